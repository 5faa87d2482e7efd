"""PAL, pluralistic alignment (arXiv 2406.08469, model A): every person has an ideal point, a mixture of K prototypes.

    a_i = sum_k softmax(w_i)_k p_k
    r_i(x) = -|f(x) - a_i|^2         f linear, [D] -> [d]

A new person has w alone.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Float

from pjrlhf.models.user_models.base import Slots, State, Table
from pjrlhf.settings import setting
from pjrlhf.types import Array, Params, PRNGKey


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pal(Table):
    """An ideal point per person, within the hull of shared prototypes."""

    learning_rate: float = setting(5e-2, "of Adam, with a cosine down to 0", above=0.0, high=1e3)
    prototypes: int = setting(5, "ideal points that people mix", low=1, high=4096)
    dimensions: int = setting(8, "of the space of ideal points", low=1, high=4096)
    precision: float = setting(0.1, "of the prior of a person's numbers around the generic ones", low=0.0, high=1e9)

    slots: ClassVar[Slots] = Slots("id", "point", "reward head")

    def init(self, key: PRNGKey, width: int, people: int) -> Params:
        keys = jax.random.split(key, 3)
        drawn = jax.random.normal(keys[2], (people + 1, self.prototypes)).at[0].set(0.0)
        return {
            "shared": {
                "projection": jax.random.normal(keys[0], (width, self.dimensions)) * width**-0.5,
                "prototypes": jax.random.normal(keys[1], (self.prototypes, self.dimensions)),
            },
            "table": {"weights": drawn},
        }

    def rewards(self, params: Params, state: State, x: Float[Array, "n D"]) -> Float[Array, " n"]:
        ideal = jax.nn.softmax(state["weights"]) @ params["shared"]["prototypes"]
        return -jnp.square(x @ params["shared"]["projection"] - ideal).sum(-1)


MODEL = Pal
