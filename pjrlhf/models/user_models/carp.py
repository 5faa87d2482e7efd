"""A contrastive critique reward, CARP (arXiv 2210.07792, section 3), whose critique is what a person chose.

    a(x) = A x / |A x|                       encoder of answers
    c = u / |u|,  u = u_0 + mean_j C (x_chosen - x_rejected)           encoder of critiques; u_0 alone for nobody
    r(x) = e^t a(x) . c                      e^t clipped to [1/100, 100]

    loss = 1/2 mean_q -log softmax over {x_q chosen, all rejected of the query} at x_q chosen
         + 1/2 mean_q -log softmax over {c, c'} at c, for x_q chosen

This is InfoNCE in both directions, from a critique to answers and from an answer to critiques. In the paper critiques
are texts of reviewers, and all others of the batch are the wrong ones; here the wrong answers are those that the person
turned down, and the wrong critique c' is that of somebody who chose the opposite. The paper then clusters critiques
and tunes a prompt for each cluster, which is not done here. With one comparison in the query the first part is
Bradley-Terry.

Traps of the authors' code: the absolute value of the cosine, by which a critique and its opposite are the same; and a
limit of the temperature whose result is thrown away. (Both in `BaseModel` of magiCARP.)
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from pjrlhf.models.user_models.base import Comparisons, Person, Slots, State, UserRewards, masked_mean
from pjrlhf.settings import setting
from pjrlhf.types import Array, Params, PRNGKey

SCALES = (1e-2, 1e2)  # e^t


@dataclasses.dataclass(frozen=True, kw_only=True)
class Carp(UserRewards):
    """Likeness of an answer to the critique that a person's choices are."""

    learning_rate: float = setting(1e-2, "of Adam, with a cosine down to 0", above=0.0, high=1e3)
    weight_decay: float = setting(0.1, "decoupled", low=0.0, high=1e3)
    hidden: int = setting(16, "dimensions in which answers and critiques are compared", low=1, high=2**16)
    scale: float = setting(4.0, "initial e^t", low=SCALES[0], high=SCALES[1])

    slots: ClassVar[Slots] = Slots("pairs", "latent", "reward head", "contrastive")

    def init(self, key: PRNGKey, width: int, people: int) -> Params:
        keys = jax.random.split(key, 3)
        return {
            "answers": jax.random.normal(keys[0], (width, self.hidden)) * width**-0.5,
            "critiques": jax.random.normal(keys[1], (width, self.hidden)) * width**-0.5,
            "nobody": jax.random.normal(keys[2], (self.hidden,)) * self.hidden**-0.5,
            "log_scale": jnp.log(jnp.float32(self.scale)),
        }

    def person(self, params: Params, row: Int[Array, ""], context: Comparisons) -> State:
        said = masked_mean((context.chosen - context.rejected) @ params["critiques"], context.weight)
        return {"critique": _unit(params["nobody"] + said)}

    def rewards(self, params: Params, state: State, x: Float[Array, "n D"]) -> Float[Array, " n"]:
        scale = jnp.clip(jnp.exp(params["log_scale"]), *SCALES)
        return scale * _unit(x @ params["answers"]) @ state["critique"]

    def loss(
        self, params: Params, one: Person, key: PRNGKey, step: Int[Array, ""]
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        own, opposite = (self.person(params, one.row, x) for x in (one.context, one.context.reversed()))
        query, weight = one.query, one.query.weight
        chosen, rejected = (self.rewards(params, own, x) for x in (query.chosen, query.rejected))
        wrong = jax.nn.logsumexp(jnp.where(weight > 0, rejected, -1e9))
        to_answers = masked_mean(jax.nn.softplus(wrong - chosen), weight)
        to_critiques = masked_mean(jax.nn.softplus(self.rewards(params, opposite, query.chosen) - chosen), weight)
        known = one.context.weight.sum() > 0  # nothing is the opposite of nothing
        return jnp.where(known, (to_answers + to_critiques) / 2, to_answers), {"critiques": to_critiques}


def _unit(x: Float[Array, "*n H"]) -> Float[Array, "*n H"]:
    return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-12)


MODEL = Carp
