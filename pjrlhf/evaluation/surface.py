"""A baseline without a language model: preferences explained by the surface of the answers.

A Bradley-Terry model whose score is linear in six features of an answer, with shared weights and deviations from them
per person. A reward model that is not clearly better has learned no more than length and layout.
"""

import math
import re

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, special

from pjrlhf.errors import UserError

NAMES = ("characters", "words per sentence", "lines", "non-letters", "marks", "overlap")

_WORD = re.compile(r"\w+")
# A full stop inside a number or a name ends no sentence. The look behind keeps a long run of stops linear in time.
_SENTENCE = re.compile(r"(?<![.!?])[.!?]++(?=\s|$)|[\u3002\uff01\uff1f\n]+")
# List items, headings, quotes, table rows and fences at the start of a line; bold and code anywhere.
_MARK = re.compile(r"^[ \t]*(?:[-*+•][ \t]|\d+[.)][ \t]|#{1,6}[ \t]|>|\||```)|\*\*|`+", re.MULTILINE)


def features(prompt: str, answer: str) -> np.ndarray:
    """Surface features of an answer, float64 [6] in the order of `NAMES`.

    Logarithms of one plus the number of characters, of words per sentence, of lines that are not blank and of Markdown
    marks; the fraction of visible characters that are not letters; the fraction of the answer's distinct words that the
    prompt uses too. White space around the answer does not count, and a blank answer is all zeros.
    """
    answer = answer.strip()
    words = _WORD.findall(answer.lower())
    sentences = sum(bool(_WORD.search(part)) for part in _SENTENCE.split(answer))
    visible = sum(not c.isspace() for c in answer)
    letters = sum(c.isalpha() for c in answer)
    distinct = set(words)
    shared = distinct & set(_WORD.findall(prompt.lower()))
    return np.array(
        [
            math.log1p(len(answer)),
            math.log1p(len(words) / max(sentences, 1)),
            math.log1p(sum(bool(line.strip()) for line in answer.splitlines())),
            1 - letters / visible if visible else 0.0,
            math.log1p(len(_MARK.findall(answer))),
            len(shared) / max(len(distinct), 1),
        ]
    )


def fit(differences: ArrayLike, users: ArrayLike, num_users: int, l2: float = 1.0, user_l2: float = 10.0) -> np.ndarray:
    """Logistic regression through the origin with shared weights and deviations per person: the mode of

        sum_i -log sigmoid((w + v[users_i]) . x_i)  +  l2/2 |w|^2  +  user_l2/2 sum_u |v_u|^2

    where x is `differences` with every column divided by its root mean square, so the penalties mean the same for any
    unit. Without an intercept, swapping the answers flips the sign of a margin.

    Args:
      differences: float [n, D], features of the chosen answer less those of the rejected one.
      users: int [n] in 0..num_users, whose pair it is; pairs of user 0, the generic user, move only w.
      num_users: people without user 0.
      l2, user_l2: precisions of the Gaussian priors, positive; `user_l2=math.inf` gives everyone the pooled weights.

    Returns:
      float64 [num_users + 1, D] for unscaled differences. Row 0 is w, also for people the data do not know; row u is
      w + v_u, which is w where u has no pair.

    Raises:
      UserError: no pairs, values that are not finite, users outside the table, or penalties that are not positive.
    """
    differences, users = _pairs(differences, users, num_users + 1)
    if not len(differences):
        raise UserError("differences: there are no pairs; a fit needs at least one")
    if not (0 < l2 < math.inf and user_l2 > 0):
        raise UserError(f"l2 {l2}, user_l2 {user_l2}: not positive; without a penalty some pairs have no best fit")
    scale = np.sqrt(np.mean(differences**2, axis=0))
    scale[scale == 0] = 1.0
    pooled = math.isinf(user_l2)
    rows = 1 if pooled else num_users + 1
    found = optimize.minimize(
        _objective,
        np.zeros(rows * differences.shape[1]),
        (differences / scale, users * (not pooled), np.array([l2] + [user_l2] * (rows - 1))[:, None]),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": 5000, "maxfun": 10000, "ftol": 1e-14, "gtol": 1e-8},
    )
    weights = found.x.reshape(rows, -1)
    weights[1:] += weights[0]
    return np.broadcast_to(weights, (num_users + 1, differences.shape[1])) / scale


def margins(weights: ArrayLike, differences: ArrayLike, users: ArrayLike) -> np.ndarray:
    """Score of the chosen answer less that of the rejected one, float64 [n]; its sigmoid is P(chosen is preferred).

    Args:
      weights: [U, D] from `fit`.
      differences: [n, D] as for `fit`.
      users: int [n] in 0..U-1; 0 for people who were not in the fit.

    Raises:
      UserError: shapes that do not fit, values that are not finite, or users outside the table.
    """
    weights = np.asarray(weights, np.float64)
    differences, users = _pairs(differences, users, len(weights))
    if weights.shape[1:] != differences.shape[1:]:
        raise UserError(f"weights: shape {weights.shape} for differences of shape {differences.shape}; fit them alike")
    return np.einsum("nd,nd->n", weights[users], differences)


def _objective(flat: np.ndarray, x: np.ndarray, users: np.ndarray, precision: np.ndarray) -> tuple[float, np.ndarray]:
    """Mean of the function in `fit` over the pairs, and its gradient; row 0 of `flat` is w, row u is v_u."""
    rows = flat.reshape(len(precision), -1)
    effective = rows + rows[0]
    effective[0] = rows[0]
    margin = np.einsum("nd,nd->n", effective[users], x)
    pull = -special.expit(-margin)[:, None] * x
    gradient = precision * rows
    np.add.at(gradient, users, pull)
    # The pairs of user 0 are counted above already.
    gradient[0] += pull[users > 0].sum(0)
    value = np.logaddexp(0, -margin).sum() + (precision * rows**2).sum() / 2
    return value / len(x), gradient.ravel() / len(x)


def _pairs(differences: ArrayLike, users: ArrayLike, rows: int) -> tuple[np.ndarray, np.ndarray]:
    differences, users = np.asarray(differences, np.float64), np.asarray(users)
    if differences.ndim != 2 or users.shape != differences.shape[:1]:
        raise UserError(f"differences, users: shapes {differences.shape} and {users.shape}; give [n, D] and [n]")
    if bad := int((~np.isfinite(differences)).any(1).sum()):
        raise UserError(f"differences: {bad} of {len(differences)} pairs are not finite; leave them out")
    if len(users) and not (np.issubdtype(users.dtype, np.integer) and 0 <= users.min() <= users.max() < rows):
        raise UserError(f"users: not all are whole numbers in 0..{rows - 1}; number the people from 1, strangers are 0")
    return differences, users.astype(np.intp)
