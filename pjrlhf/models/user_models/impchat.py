"""A retrieval score in the manner of IMPChat (arXiv 2108.07935, section 3): how well an answer matches those that the
person chose before.

    style(x) = mean_j S x . S h_j / sqrt(H)                       h_j: features of the answers chosen before
    preference(x) = sum_j a_j V x . V h_j / sqrt(H),              a_j = softmax_j(Q x . Q h_j / sqrt(H))
    r(x) = w . x + style(x) + preference(x)

`style` takes the whole history alike; `preference` weighs it by its likeness to what is asked now. The paper matches
words in several layers of attention and has the post apart from the answer; the frozen features hold both, and one
layer is left. The loss, a softmax over the candidates, is Bradley-Terry with two of them. Without a history the score
is w . x.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from pjrlhf.models.user_models.base import Comparisons, Slots, State, UserRewards, masked_mean
from pjrlhf.models.user_models.pplug import attended
from pjrlhf.settings import setting
from pjrlhf.types import Array, Params, PRNGKey


@dataclasses.dataclass(frozen=True, kw_only=True)
class Impchat(UserRewards):
    """Likeness to the answers that a person chose."""

    learning_rate: float = setting(3e-3, "of Adam, with a cosine down to 0", above=0.0, high=1e3)
    weight_decay: float = setting(0.1, "decoupled", low=0.0, high=1e3)
    hidden: int = setting(16, "dimensions in which answers are compared", low=1, high=2**16)

    slots: ClassVar[Slots] = Slots("history", "memory", "attention")

    def init(self, key: PRNGKey, width: int, people: int) -> Params:
        maps = dict(zip(("style", "query", "value"), jax.random.split(key, 3), strict=True))
        drawn = {name: jax.random.normal(one, (width, self.hidden)) * width**-0.5 for name, one in maps.items()}
        return {"head": jnp.zeros(width), **drawn}

    def person(self, params: Params, row: Int[Array, ""], context: Comparisons) -> State:
        return {"history": context.chosen, "weight": context.weight}

    def rewards(self, params: Params, state: State, x: Float[Array, "n D"]) -> Float[Array, " n"]:
        history, weight, root = state["history"], state["weight"], self.hidden**-0.5
        style = (x @ params["style"]) @ masked_mean(history @ params["style"], weight) * root
        values = attended(x @ params["query"], history @ params["query"], history @ params["value"], weight)
        preference = jnp.einsum("nh,nh->n", x @ params["value"], values) * root
        return x @ params["head"] + style + preference


MODEL = Impchat
