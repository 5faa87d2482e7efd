"""A linear reward head per person: P-RM's individualized user model (P-RLHF, arXiv 2402.05133, section 4.2) where
features are frozen, so that a person enters at the head and not at the input.

    r_i(x) = (w_0 + o_i) . x
    loss = alpha L(w_0 + o_i) + (1 - alpha) L(w_0) + prior

w_0 is the generic person. P-RM's cluster user model at a linear head, w_i = sum_k softmax(a_i)_k V_k, is LoRe: see
`lore`.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Float, Int

from pjrlhf.models.user_models.base import Comparisons, Person, Slots, State, Table
from pjrlhf.settings import setting
from pjrlhf.types import Array, Params, PRNGKey


@dataclasses.dataclass(frozen=True, kw_only=True)
class Individual(Table):
    """A linear reward head per person."""

    precision: float = setting(3.0, "of the prior of a person's numbers around the generic ones", low=0.0, high=1e9)
    alpha: float = setting(0.5, "weight of the person's own loss beside that of the generic person", low=0.0, high=1.0)

    slots: ClassVar[Slots] = Slots("id", "head", "reward head")

    def init(self, key: PRNGKey, width: int, people: int) -> Params:
        return {"shared": {"head": jnp.zeros(width)}, "table": {"offset": jnp.zeros((people + 1, width))}}

    def rewards(self, params: Params, state: State, x: Float[Array, "n D"]) -> Float[Array, " n"]:
        return x @ (params["shared"]["head"] + state["offset"])

    def loss(
        self, params: Params, one: Person, key: PRNGKey, step: Int[Array, ""]
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        own, metrics = super().loss(params, one, key, step)
        generic = self.bradley_terry(params, {"offset": jnp.zeros_like(params["shared"]["head"])}, one.query)
        return self.alpha * own + (1 - self.alpha) * generic, metrics

    def finish(self, params: Params, pairs: Comparisons) -> Params:
        return params  # the generic person was trained


MODEL = Individual
