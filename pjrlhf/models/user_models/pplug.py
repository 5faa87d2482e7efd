"""PPlug, persona-plug (arXiv 2409.11901, section 3): the answers that a person chose, weighed by what is asked now.

    a_j = softmax_j(Q x . h_j / sqrt(D))        h_j: frozen features of the answers chosen before
    r(x) = MLP([x; P sum_j a_j h_j])

The paper attends from the input of the moment and gives the result to a frozen language model as one soft token; here
the input is an answer with its prompt, and the token enters the reward head. The history holds what the person took
and not what they turned down, so it says less than labelled pairs. Without a history the token is 0, not the mean of
padding. What is scored is never in its own history: see `feedback.feature_pairs.TrainingPeople.batches`.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from pjrlhf.models.user_models.base import Comparisons, Slots, State, UserRewards, apply_perceptron, perceptron
from pjrlhf.settings import setting
from pjrlhf.types import Array, Params, PRNGKey


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pplug(UserRewards):
    """Attention over the answers that a person chose."""

    learning_rate: float = setting(1e-2, "of Adam, with a cosine down to 0", above=0.0, high=1e3)
    hidden: int = setting(64, "width of the token and of the reward head", low=1, high=2**16)

    slots: ClassVar[Slots] = Slots("history", "memory", "head input")

    def init(self, key: PRNGKey, width: int, people: int) -> Params:
        keys, H = jax.random.split(key, 3), self.hidden
        return {
            "query": jax.random.normal(keys[0], (width, width)) * width**-0.5,
            "projector": jax.random.normal(keys[1], (width, H)) * width**-0.5,
            "head": perceptron(keys[2], width + H, H, 1),
        }

    def person(self, params: Params, row: Int[Array, ""], context: Comparisons) -> State:
        return {"history": context.chosen, "weight": context.weight}

    def token(self, params: Params, state: State, x: Float[Array, "n D"]) -> Float[Array, "n H"]:
        """The person as each answer sees them."""
        return attended(x @ params["query"], state["history"], state["history"], state["weight"]) @ params["projector"]

    def rewards(self, params: Params, state: State, x: Float[Array, "n D"]) -> Float[Array, " n"]:
        return apply_perceptron(params["head"], jnp.concatenate([x, self.token(params, state, x)], axis=-1))[:, 0]


def attended(
    query: Float[Array, "n D"], keys: Float[Array, "c D"], values: Float[Array, "c V"], weight: Float[Array, " c"]
) -> Float[Array, "n V"]:
    """Softmax attention over rows with weight; 0 where none has."""
    scores = jnp.where(weight > 0, query @ keys.T * keys.shape[-1] ** -0.5, -1e9)
    return (jax.nn.softmax(scores) * weight) @ values


MODEL = Pplug
