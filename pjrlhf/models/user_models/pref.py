"""PReF, personalization via reward factorization (arXiv 2503.06358): real weights per person over d linear features.

    r_i(x) = u_i . phi(x)            phi linear, [D] -> [d]; u_i [d]

Start (section 3.2 there): the matrix of people x pairs of labels, 1 or 0 and 1/2 where nobody answered, is completed by
ten rounds of truncated SVD; people start at U sqrt(S), and phi at the least-squares map of feature differences to
V sqrt(S). Then both are trained together. A new person's u is a logistic regression with a Gaussian prior, u alone.

Questions (section 3.3): with p the probability of an answer and v the difference of phi, ask what maximises

    (p (1 - p))^2  v' Sigma^-1 v,    Sigma = precision I + sum over the asked of p (1 - p) v v'.

The authors' code chooses the threshold of its accuracy on test labels. Here a comparison counts where its margin is
positive, and no label of a test is seen in training.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from pjrlhf.models.user_models.base import Comparisons, Slots, State, Table
from pjrlhf.settings import setting
from pjrlhf.types import Array, Params, PRNGKey

ROUNDS = 10  # of the completion


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pref(Table):
    """Real weights per person over shared linear features."""

    learning_rate: float = setting(1e-2, "of Adam, with a cosine down to 0", above=0.0, high=1e3)
    factors: int = setting(5, "features that people weigh", low=1, high=4096)
    svd: bool = setting(True, "start from the completed matrix of people and pairs; otherwise from random numbers")
    active: bool = setting(False, "ask a new person the most informative question next")

    slots: ClassVar[Slots] = Slots("id", "weights", "reward head")

    def init(self, key: PRNGKey, width: int, people: int) -> Params:
        features, weights = jax.random.split(key)
        return {
            "shared": {"features": jax.random.normal(features, (width, self.factors)) * width**-0.5},
            "table": {"weights": jax.random.normal(weights, (people + 1, self.factors)).at[0].set(0.0)},
        }

    def rewards(self, params: Params, state: State, x: Float[Array, "n D"]) -> Float[Array, " n"]:
        return x @ (params["shared"]["features"] @ state["weights"])

    def start(self, params: Params, rows: Int[Array, " N"], pairs: Comparisons) -> Params:
        if not self.svd:
            return params
        people, factors = params["table"]["weights"].shape
        difference = np.asarray(pairs.chosen, np.float64) - np.asarray(pairs.rejected, np.float64)
        questions, column, sign = distinct(difference)
        labels = np.full((people - 1, len(questions)), np.nan)
        labels[np.asarray(rows) - 1, column] = (sign > 0).astype(np.float64)
        own, of_pairs = completed(labels, factors)
        features, *_ = np.linalg.lstsq(questions, of_pairs, rcond=1e-3)
        table = np.zeros((people, factors))
        table[1:, : own.shape[1]] = own
        shared = np.zeros(params["shared"]["features"].shape)
        shared[:, : features.shape[1]] = features
        return {
            "shared": {"features": jnp.asarray(shared, jnp.float32)},
            "table": {"weights": jnp.asarray(table, jnp.float32)},
        }

    def informativeness(
        self, params: Params, state: State, asked: Comparisons, pool: Comparisons
    ) -> Float[Array, " n"] | None:
        if not self.active:
            return None

        def curvature(pairs):
            v = (pairs.chosen - pairs.rejected) @ params["shared"]["features"]
            p = jax.nn.sigmoid(v @ state["weights"])
            return v, p * (1 - p)

        seen, weight = curvature(asked)
        sigma = jnp.einsum("nd,ne,n->de", seen, seen, weight * asked.weight)
        sigma += max(self.precision, 1e-3) * jnp.eye(self.factors)
        v, slope = curvature(pool)
        return slope**2 * jnp.einsum("nd,dn->n", v, jnp.linalg.solve(sigma, v.T))


def distinct(
    difference: Float[np.ndarray, "N D"],
) -> tuple[Float[np.ndarray, "q D"], Int[np.ndarray, " N"], Float[np.ndarray, " N"]]:
    """(the q questions that the rows ask in either direction, the question of each row, its direction +1 or -1)."""
    first = np.argmax(difference != 0, axis=1)
    sign = np.sign(difference[np.arange(len(difference)), first])
    sign[sign == 0] = 1.0
    questions, column = np.unique(difference * sign[:, None], axis=0, return_inverse=True)
    return questions, column.reshape(-1), sign


def completed(
    labels: Float[np.ndarray, "U q"], rank: int, rounds: int = ROUNDS
) -> tuple[Float[np.ndarray, "U r"], Float[np.ndarray, "q r"]]:
    """(U sqrt(S), V sqrt(S)) of labels in [0, 1] less 1/2, nan where missing: iterative imputation by truncated SVD."""
    missing, filled = np.isnan(labels), np.where(np.isnan(labels), 0.5, labels) - 0.5
    known = filled.copy()
    own = of_pairs = np.zeros((0, 0))
    for _ in range(rounds):
        left, values, right = np.linalg.svd(filled, full_matrices=False)
        root = np.sqrt(values[:rank])
        own, of_pairs = left[:, :rank] * root, right[:rank].T * root
        filled = np.where(missing, own @ of_pairs.T, known)
    return own, of_pairs


MODEL = Pref
