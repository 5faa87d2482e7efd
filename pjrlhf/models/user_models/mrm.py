"""MRM, meta reward modelling (arXiv 2601.18731): LoRe's reward, whose weights a person reaches by steps of Adam from a
start that is learned (MAML, arXiv 1703.03400).

    r(x; w) = x V softmax(w)
    w' = w_0 after `inner_steps` of Adam, rate `inner_rate`, on the mean loss of the context
    loss of a person = mean loss of the query at w'

The gradient goes through the inner steps (`jax.grad` in `jax.grad`). People count by s((L - tau) / gamma), with tau the
median of the step and no gradient through the weight, divided by their sum: the robust outer objective.

The first step of Adam moves every weight by the inner rate in the direction of the sign of its gradient, whatever its
size and the number of comparisons. A root needs `eps_root`, since its slope at a gradient of 0 (no context) is
infinite. The authors choose the epoch by the test accuracy; here the steps are fixed beforehand.
"""

import dataclasses
from typing import ClassVar, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float, Int

from pjrlhf.models.user_models.base import Comparisons, Slots, State, UserRewards
from pjrlhf.settings import setting
from pjrlhf.types import Array, Params, PRNGKey

EPS_ROOT = 1e-16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mrm(UserRewards):
    """Weights over a basis of rewards, by steps from a learned start."""

    bases: int = setting(8, "rewards of the basis", low=1, high=4096)
    inner_steps: int = setting(1, "of Adam on a person's comparisons", low=1, high=1000)
    inner_rate: float = setting(1.0, "of these steps", above=0.0, high=1e3)
    gamma: float = setting(0.5, "softness of the robust weights of people; 0 weighs all alike", low=0.0, high=1e6)

    slots: ClassVar[Slots] = Slots("pairs", "weights", "reward head", "inner step")

    def init(self, key: PRNGKey, width: int, people: int) -> Params:
        return {
            "basis": jax.random.normal(key, (width, self.bases)) * width**-0.5,
            "weights": jnp.zeros(self.bases),
        }

    def person(self, params: Params, row: Int[Array, ""], context: Comparisons) -> State:
        optimizer = optax.adam(self.inner_rate, eps_root=EPS_ROOT)
        state: Params = {"weights": params["weights"]}
        moments = optimizer.init(state)
        for _ in range(self.inner_steps):
            gradient = jax.grad(lambda own: self.bradley_terry(params, own, context))(state)
            updates, moments = optimizer.update(gradient, moments)
            state = cast(Params, optax.apply_updates(state, updates))
        return state

    def rewards(self, params: Params, state: State, x: Float[Array, "n D"]) -> Float[Array, " n"]:
        return x @ (params["basis"] @ jax.nn.softmax(state["weights"]))

    def over_people(self, losses: Float[Array, " m"]) -> Float[Array, ""]:
        if not self.gamma:
            return losses.mean()
        weight = jax.lax.stop_gradient(jax.nn.sigmoid((losses - jnp.median(losses)) / self.gamma))
        return (weight * losses).sum() / weight.sum()


MODEL = Mrm
