"""P-TTT, personal test-time training ("Using context is not enough", 2026): fast weights in closed form from k pairs.

The paper writes to a down-projection W of the language model; on frozen features W belongs to a reward model of one
hidden layer.

    k(x) = gelu(A x + a) / sqrt(H),   r(x) = v_r . W k(x)
    W_person = W + eta sum_j v (k(x_chosen) - k(x_rejected))',   v = V v_r

Nothing is fitted for a person: one forward pass over the pairs. With f = sum_j k(x_chosen) - k(x_rejected), the reward
is v_r . W k(x) + eta (v_r . V v_r) (f . k(x)), so the state of a person is f, H numbers, and not a matrix. V starts at
the identity, so that the fast weights of an untrained model already point to what the person chose.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from pjrlhf.models.user_models.base import Comparisons, Slots, State, UserRewards, dense, linear
from pjrlhf.settings import setting
from pjrlhf.types import Array, Params, PRNGKey


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pttt(UserRewards):
    """Fast weights in closed form from labelled pairs."""

    learning_rate: float = setting(3e-3, "of Adam, with a cosine down to 0", above=0.0, high=1e3)
    weight_decay: float = setting(0.1, "decoupled", low=0.0, high=1e3)
    hidden: int = setting(64, "width of the hidden layer", low=1, high=2**16)
    eta: float = setting(0.5, "size of the fast weights", low=0.0, high=1e6)

    slots: ClassVar[Slots] = Slots("pairs", "fast weights", "reward head")

    def init(self, key: PRNGKey, width: int, people: int) -> Params:
        keys, H = jax.random.split(key, 3), self.hidden
        return {
            "keys": dense(keys[0], width, H),
            "slow": jax.random.normal(keys[1], (H, H)) * H**-0.5,
            "value": jnp.eye(H),
            "head": jax.random.normal(keys[2], (H,)) * H**-0.5,
        }

    def keys(self, params: Params, x: Float[Array, "n D"]) -> Float[Array, "n H"]:
        """k(x)."""
        return jax.nn.gelu(linear(params["keys"], x)) * self.hidden**-0.5

    def person(self, params: Params, row: Int[Array, ""], context: Comparisons) -> State:
        difference = self.keys(params, context.chosen) - self.keys(params, context.rejected)
        return {"fast": jnp.einsum("nh,n->h", difference, context.weight)}

    def rewards(self, params: Params, state: State, x: Float[Array, "n D"]) -> Float[Array, " n"]:
        keys, head = self.keys(params, x), params["head"]
        strength = self.eta * (head @ params["value"] @ head)
        return keys @ (head @ params["slow"]) + strength * (keys @ state["fast"])


MODEL = Pttt
