"""LoRe, low-rank reward modelling (arXiv 2504.14439, equations 3 to 5): a point of the simplex per person over B linear
rewards that all share.

    r_i(x) = x V softmax(w_i)        V [D, B], w_i [B]

Training minimises the mean over people of their mean losses. A new person has w alone, with V frozen. V starts from
N(0, 1 / D), so that a reward has variance 1 on features of variance 1; the authors start from N(0, 1) and divide the
reward by 100. With B = 1 it is pooled Bradley-Terry; with a linear head the cluster user model of P-RM (arXiv
2402.05133) is the same function.

The authors' preparation of PRISM formats the rejected side as a list, whose punctuation separates the classes. Here
both sides come from the same tokenized table.
"""

import dataclasses
from typing import ClassVar

import jax
from jaxtyping import Float

from pjrlhf.models.user_models.base import Slots, State, Table
from pjrlhf.settings import setting
from pjrlhf.types import Array, Params, PRNGKey


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lore(Table):
    """Simplex weights per person over a basis of rewards."""

    learning_rate: float = setting(5e-2, "of Adam, with a cosine down to 0", above=0.0, high=1e3)
    bases: int = setting(5, "rewards of the basis", low=1, high=4096)

    slots: ClassVar[Slots] = Slots("id", "weights", "reward head")

    def init(self, key: PRNGKey, width: int, people: int) -> Params:
        basis, weights = jax.random.split(key)
        drawn = jax.random.normal(weights, (people + 1, self.bases)).at[0].set(0.0)
        return {
            "shared": {"basis": jax.random.normal(basis, (width, self.bases)) * width**-0.5},
            "table": {"weights": drawn},
        }

    def rewards(self, params: Params, state: State, x: Float[Array, "n D"]) -> Float[Array, " n"]:
        return x @ (params["shared"]["basis"] @ jax.nn.softmax(state["weights"]))


MODEL = Lore
