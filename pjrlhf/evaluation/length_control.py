"""Win rates at equal lengths (AlpacaEval 2, arXiv 2404.04475): what a regression leaves of them without the effect of
length.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike
from scipy import optimize, special

# Words that make a criterion one about length.
ABOUT_LENGTH = re.compile(
    r"\b(length(y|s)?|long(er|est)?|short(er|est)?|brief(ly|er)?|brevity|concise(ly|ness)?|succinct(ly)?|terse(ly)?"
    r"|verbos\w*|wordy|detail(s|ed)?|informative(ness)?|completeness|complete|thorough(ly|ness)?|in depth)\b",
    re.IGNORECASE,
)
LARGEST = 30.0  # of a coefficient: where one side always wins, there is no finite one
CHUNK = 2_000_000  # observations times resamples that are fitted at once
PENALTY = {"minimal": (0.0, 1.0), "instructions": (0.0, 1.0, 1.0)}  # form -> of the coefficients


def about_length(text: str) -> bool:
    """Whether the text of a criterion speaks of length, which a rate at equal lengths takes away."""
    return bool(ABOUT_LENGTH.search(text))


@dataclasses.dataclass(frozen=True)
class Comparisons:
    """N comparisons of a model with the baseline.

    Attributes:
      verdicts: [N] in [-1, 1], 1 where the model wins; NaN is none.
      lengths, baseline: [N], of both answers in characters.
      instructions: [N] whole numbers, which instruction was answered.
    """

    verdicts: ArrayLike
    lengths: ArrayLike
    baseline: ArrayLike
    instructions: ArrayLike

    @property
    def judged(self) -> "Comparisons":
        """Those with a verdict, float64."""
        known = ~np.isnan(np.asarray(self.verdicts, np.float64))
        fields = (getattr(self, field.name) for field in dataclasses.fields(self))
        return Comparisons(*(np.asarray(values)[known] for values in fields))

    @property
    def wins(self) -> Float[np.ndarray, " N"]:
        return (1 + np.asarray(self.verdicts, np.float64)) / 2

    @property
    def length_term(self) -> Float[np.ndarray, " N"]:
        """tanh(d / s) of the differences of lengths d, where s is their standard deviation."""
        difference = np.asarray(self.lengths, np.float64) - np.asarray(self.baseline, np.float64)
        return np.tanh(difference / (difference.std() or 1.0)) if len(difference) else difference


@dataclasses.dataclass(frozen=True, kw_only=True)
class ControlledRate:
    """The win rate of a model against the baseline at equal lengths, in [0, 1]; NaN without verdicts.

    Attributes:
      low, high: its bootstrap interval over instructions, given their difficulties.
      length_effect: the coefficient of the length term; above 0 where longer answers win.
      form: "instructions", with their difficulties; or "minimal", where each instruction has one comparison.
    """

    controlled: float
    low: float
    high: float
    length_effect: float
    form: str


def length_controlled(
    models: Mapping[str, Comparisons], *, resamples: int = 2000, seed: int = 0, level: float = 0.95
) -> dict[str, ControlledRate]:
    """The win rates of models against one baseline at equal lengths.

    A logistic regression for each model m of its wins (1 + verdict) / 2 on instructions x:

        logit p = theta_m + phi_m tanh(d / s) + psi_m gamma_x,

    where d is the difference of the lengths and s its standard deviation for this model. gamma_x is the difficulty of
    an instruction, from a joint fit of all models with psi = 1. The rate is the mean of sigma(theta_m + psi_m gamma_x)
    over the comparisons. Where each instruction has one comparison, its difficulty cannot be told from the outcome, and
    gamma is 0, the minimal form. Ridge penalties of 1/2 hold phi and gamma near 0 and psi near 1.

    It says nothing about criteria that are themselves about length.

    Args:
      models: name -> its comparisons.
      resamples, seed, level: of the bootstrap.
    """
    judged = {name: one.judged for name, one in models.items()}
    every = [np.asarray(one.instructions, np.int64) for one in judged.values()]
    if not every:
        return {}
    _, numbers = np.unique(np.concatenate(every), return_inverse=True)
    rows = dict(zip(judged, np.split(numbers, np.cumsum([len(one) for one in every])[:-1]), strict=True))
    several = len(numbers) > (numbers.max() + 1 if len(numbers) else 0)
    difficulty = _difficulties(list(judged.values()), list(rows.values())) if several else None
    options = (resamples, seed, level)
    return {name: _rate(one, rows[name], difficulty, *options) for name, one in judged.items()}


def _difficulties(models: Sequence[Comparisons], rows: Sequence[np.ndarray]) -> Float[np.ndarray, " X"]:
    """gamma of X instructions, from the joint fit of all models; `rows` are their numbers, [N] of each model."""
    M, numbers = len(models), np.concatenate(rows)
    X = int(numbers.max()) + 1
    owner = np.repeat(np.arange(M), [len(own) for own in rows])
    wins = np.concatenate([one.wins for one in models])
    length = np.concatenate([one.length_term for one in models])

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        theta, phi, gamma = np.split(weights, (M, 2 * M))
        logits = theta[owner] + phi[owner] * length + gamma[numbers]
        error = special.expit(logits) - wins
        slopes = [np.bincount(owner, error, M), np.bincount(owner, error * length, M) + phi]
        slopes.append(np.bincount(numbers, error, X) + gamma)
        value = (np.logaddexp(0, logits) - wins * logits).sum() + (phi @ phi + gamma @ gamma) / 2
        return float(value), np.concatenate(slopes)

    bounds = [(-LARGEST, LARGEST)] * (2 * M + X)
    found = optimize.minimize(loss, np.zeros(2 * M + X), jac=True, method="L-BFGS-B", bounds=bounds).x[2 * M :]
    return found - found.mean()


def _rate(
    model: Comparisons,
    numbers: np.ndarray,
    difficulty: np.ndarray | None,
    resamples: int,
    seed: int,
    level: float,
) -> ControlledRate:
    form = "minimal" if difficulty is None else "instructions"
    if not len(numbers):
        return ControlledRate(controlled=math.nan, low=math.nan, high=math.nan, length_effect=math.nan, form=form)
    columns = [np.ones(len(numbers)), model.length_term]
    if difficulty is not None:
        columns.append(difficulty[numbers])
    features = np.stack(columns, axis=1)
    # Whole instructions are drawn, so that comparisons of one stay together.
    own, places = np.unique(numbers, return_inverse=True)
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(len(own), np.full(len(own), 1 / len(own)), resamples)
    equal = features * np.array([1.0, 0.0, 1.0])[: features.shape[1]]  # no difference of lengths

    def rates(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        weights = fit(features, model.wins, counts, PENALTY[form], (0.0, 0.0, 1.0)[: features.shape[1]])
        return (special.expit(weights @ equal.T) * counts).sum(1) / counts.sum(1), weights

    (rate,), ((_, effect, *_),) = rates(np.ones((1, len(numbers))))
    chunks = np.array_split(drawn, -(-drawn.shape[0] * len(numbers) // CHUNK))
    low, high = np.quantile(
        np.concatenate([rates(chunk[:, places])[0] for chunk in chunks]), ((1 - level) / 2, (1 + level) / 2)
    )
    return ControlledRate(
        controlled=float(rate), low=float(low), high=float(high), length_effect=float(effect), form=form
    )


def fit(
    features: Float[np.ndarray, "N P"],
    wins: Float[np.ndarray, " N"],
    counts: Float[np.ndarray, "R N"],
    penalty: Sequence[float],
    prior: Sequence[float],
) -> Float[np.ndarray, "R P"]:
    """Coefficients of R logistic regressions, row r with `counts` [r] of each observation: the minimum of the
    cross-entropy plus penalty / 2 (coefficient - prior)^2, at most `LARGEST`, by Newton's method.
    """
    P = features.shape[1]
    products = (features[:, :, None] * features[:, None]).reshape(-1, P * P)
    ridge, center = np.asarray(penalty), np.asarray(prior)
    weights = np.tile(center, (len(counts), 1))
    for _ in range(100):
        p = special.expit(weights @ features.T)
        slope = (counts * (wins - p)) @ features - ridge * (weights - center)
        curvature = ((counts * p * (1 - p)) @ products).reshape(-1, P, P) + np.diag(ridge + 1e-9)
        step = np.linalg.solve(curvature, slope[..., None])[..., 0]
        step *= np.minimum(1.0, 4.0 / np.maximum(np.abs(step).max(1, keepdims=True), 1e-12))
        new = np.clip(weights + step, -LARGEST, LARGEST)
        moved, weights = np.abs(new - weights).max(), new
        if moved < 1e-9:
            break
    return weights
