"""Pooled Bradley-Terry: one reward for everybody, the control of every user model.

    r(x) = w . x                      hidden = 0
    r(x) = MLP(x)                     hidden = width of its one hidden layer

Source: Bradley and Terry 1952; as a reward model Ouyang et al. 2022, equation 1. "Pooled" as in P-GenRM (arXiv
2602.12116), where it beats most personal models on the votes of real people.
"""

import dataclasses
from typing import ClassVar

from jaxtyping import Float, Int

from pjrlhf.models.user_models.base import Comparisons, Slots, State, UserRewards, apply_perceptron, perceptron
from pjrlhf.settings import setting
from pjrlhf.types import Array, Params, PRNGKey


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pooled(UserRewards):
    """One reward for everybody."""

    hidden: int = setting(0, "width of a hidden layer; 0 has none", low=0, high=2**16)

    slots: ClassVar[Slots] = Slots("nobody", "nothing", "nowhere")

    def init(self, key: PRNGKey, width: int, people: int) -> Params:
        return {"head": perceptron(key, width, *((self.hidden,) if self.hidden else ()), 1)}

    def person(self, params: Params, row: Int[Array, ""], context: Comparisons) -> State:
        return {}

    def rewards(self, params: Params, state: State, x: Float[Array, "n D"]) -> Float[Array, " n"]:
        return apply_perceptron(params["head"], x)[:, 0]


MODEL = Pooled
