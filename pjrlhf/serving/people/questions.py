"""Which comparison to ask a person for next: the one whose answer tells most about their row.

The row has a Gaussian posterior around its fit (Laplace's approximation), in which margins are linear in the row: the
covariance is that of the generalised Gauss-Newton matrix (MacKay 1992, "A practical Bayesian framework for
backpropagation networks"; Immer et al. 2021, arXiv 2008.08400). The information of a comparison is the mutual
information of its answer and the row (BALD; Houlsby et al. 2011, arXiv 1112.5745).
"""

import json
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from absl import logging
from jaxtyping import Float
from scipy.special import expit, xlogy
from scipy.stats import norm

from pjrlhf.data.comparisons import SIDES
from pjrlhf.data.schema import Example
from pjrlhf.errors import UserError
from pjrlhf.serving.people.files import read_comparisons
from pjrlhf.serving.people.fit import as_example, as_json
from pjrlhf.serving.people.members import Members
from pjrlhf.types import Json

MOST = 64  # pairs of a request
POOL = 1000  # pairs that a server asks about, at most
DRAWN = 32  # of them are compared at once: each is a pass forward and back
OF_A_RUN = ("comparisons/comparisons.jsonl", "population/train.jsonl")
Pair = dict[str, Json]
_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(64)
_STEP = 0.04
_MARGINS = (np.arange(-1000, 1000) + 0.5) * _STEP  # beyond them an answer is certain


def expected_information(
    margins: Float[np.ndarray, " M"],
    gradients: Float[np.ndarray, "M D"],
    seen_margins: Float[np.ndarray, " N"],
    seen_gradients: Float[np.ndarray, "N D"],
    variance: float,
) -> tuple[Float[np.ndarray, " M"], Float[np.ndarray, " M"]]:
    """(information in nats, probability that the first answer is the better one) of M comparisons.

    The answer has probability sigmoid(margin). With prior covariance `variance` I and the N comparisons seen so far,
    the posterior precision is I / variance + sum_n p_n (1 - p_n) g_n g_n^T; its inverse is taken in N dimensions
    (Woodbury), so that D may be large.

    Args:
      margins, gradients: of the comparisons, at the fitted row.
      seen_margins, seen_gradients: of those that the row was fitted to.
      variance: of the prior of every number of a row around where it started.
    """
    G = np.asarray(gradients, np.float64)
    p = expit(np.asarray(seen_margins, np.float64))
    A = np.sqrt(p * (1 - p))[:, None] * np.asarray(seen_gradients, np.float64).reshape(len(p), G.shape[1])
    spread = variance * np.square(G).sum(1)
    if len(A):
        across = A @ G.T  # [N, M]
        spread -= variance**2 * (across * np.linalg.solve(np.eye(len(A)) + variance * A @ A.T, across)).sum(0)
    mean, doubt = _expected(np.asarray(margins, np.float64), np.sqrt(np.maximum(spread, 0.0)))
    return np.maximum(_entropy(mean) - doubt, 0.0), mean


def _expected(
    margins: Float[np.ndarray, " M"], deviations: Float[np.ndarray, " M"]
) -> tuple[Float[np.ndarray, " M"], Float[np.ndarray, " M"]]:
    """Means of sigmoid(x) and of its entropy over x with normal distributions."""
    weights = _WEIGHTS / _WEIGHTS.sum()
    chances = expit(margins[:, None] + deviations[:, None] * _NODES)
    narrow = chances @ weights, _entropy(chances) @ weights
    # Of a wide one the nodes lie far apart, but it hardly changes where the sigmoid does.
    wide = np.maximum(deviations, 1.0)
    density = _STEP * norm.pdf(_MARGINS, margins[:, None], wide[:, None])
    chance = expit(_MARGINS)
    found = norm.cdf(margins / wide) + density @ (chance - (_MARGINS > 0)), density @ _entropy(chance)
    return np.where(deviations < 1, narrow[0], found[0]), np.where(deviations < 1, narrow[1], found[1])


def _entropy(p: np.ndarray) -> np.ndarray:
    return -(xlogy(p, p) + xlogy(1 - p, 1 - p))


def next_questions(members: Members, name: str, pairs: object) -> list[dict[str, Json]]:
    """Pairs of answers, that which tells most about a person first.

    Args:
      pairs: each {"prompt" or "messages", "answers": [text, text]}.

    Raises:
      Unknown: no such person.
      UserError: a pair that the model cannot read.
    """
    if not isinstance(pairs, list) or not 1 <= len(pairs) <= MOST:
        raise UserError(f"pairs: is no list of 1 to {MOST} pairs; give each a prompt and two answers")
    asked = []
    for i, pair in enumerate(pairs, 1):
        answers = pair.get("answers") if isinstance(pair, Mapping) else None
        if not isinstance(answers, list) or len(answers) != 2:
            raise UserError(f"pairs: number {i} has no answers, a list of two; give it prompt and answers")
        asked.append(_first_chosen(pair, answers))
    new, seen = members.linearized(name, asked, "pairs")
    information, chance = expected_information(*new, *seen, members.table.variance)
    order = np.argsort(-information, kind="stable")
    return [
        {
            "index": int(i),
            "information": float(information[i]),
            "probability": float(chance[i]),
            "pair": pairs[i],
        }
        for i in order
    ]


def read_pool(path: str) -> tuple[Pair, ...]:
    """The pairs of a file of comparisons, each once, in random order, as are the two answers: which of them was chosen
    does not show.

    Raises:
      UserError: no such file, a line that is no comparison, or none at all.
    """
    found = {}
    for example in read_comparisons(path):
        comparison = as_json(example)
        found[_key(comparison)] = comparison
    if not found:
        raise UserError(f"{path}: holds no comparisons; give it one on each line")
    rng, pairs = np.random.default_rng(0), list(found.values())
    pool = [pairs[i] for i in rng.permutation(len(pairs))[:POOL]]
    return tuple(
        {name: value for name, value in one.items() if name not in SIDES}
        | {"answers": [one[side] for side in (SIDES if rng.integers(2) else SIDES[::-1])]}
        for one in pool
    )


def pool_of(run: pathlib.Path | None, path: str, own: bool) -> tuple[Pair, ...]:
    """What a server asks people about.

    Args:
      run: that is served, or None.
      path: of a file of comparisons, or "".
      own: without a file, use the answers that the run itself has drawn. Records that a run was given are not shown.

    Raises:
      UserError: see `read_pool`.
    """
    if path:
        try:
            return read_pool(path)
        except UserError as error:
            raise UserError(f"questions: {error}") from error
    for file in [run / name for name in OF_A_RUN] if own and run is not None else ():
        if file.is_file():
            try:
                return read_pool(str(file))
            except UserError as error:
                logging.warning("no questions for people: %s", error)
    return ()


def ask_of(members: Members, name: str, pool: Sequence[Pair]) -> list[dict[str, Json]]:
    """Pairs of a pool that a person has not compared, some at random, that which tells most first; none where all are
    compared.

    Raises:
      Unknown: no such person.
    """
    seen = {_key(one) for one in members.comparisons(name)}
    left = [i for i, pair in enumerate(pool) if _key(pair) not in seen]
    some = np.random.default_rng().permutation(left)[:DRAWN].tolist() if left else []
    found = next_questions(members, name, [pool[i] for i in some]) if some else []
    return [{**one, "index": some[one["index"]]} for one in found]


def likely_votes(pool: Sequence[Pair]) -> list[Example]:
    """Some of what people may compare, as many as `ask_of` draws; either answer stands as the better one."""
    return [as_example(_first_chosen(pair, pair["answers"])) for pair in pool[:DRAWN]]


def _first_chosen(pair: Mapping[str, Json], answers: Sequence[Json]) -> dict[str, Json]:
    rest = {key: value for key, value in pair.items() if key != "answers"}
    return {**rest, **dict(zip(SIDES, answers, strict=True))}


def _key(pair: Mapping[str, Json]) -> str:
    """The same for both orders of the answers."""
    answers = pair.get("answers") or [pair[side] for side in SIDES]
    rest = {name: value for name, value in pair.items() if name not in ("answers", *SIDES)}
    return json.dumps([rest, sorted(map(json.dumps, answers))], sort_keys=True)
