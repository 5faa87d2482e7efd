"""Attributes of the person, chosen from a list by the likelihood of their comparisons under the base (EXACT, arXiv
2602.17695: the offline stage).

With d_ja how much the attribute a moves the base towards the preferred answer of comparison j,

    d_ja = log pi(y_w | x, a) - log pi(y_w | x) - (log pi(y_l | x, a) - log pi(y_l | x)),

the set A of a person is built greedily, as long as the likelihood of their choices grows:

    L(A) = sum_j log s(beta sum_{a in A} d_ja)

The paper scores prompts with whole sets, keeps a set for each known prompt, and gives a new prompt the set of the
known ones that are most like it. Here the log-ratios of attributes add up, so that a list of M attributes costs M + 1
passes over the comparisons. All prompts of a person have the same text; with `similar` in the entry each has the
attributes of the comparisons on the prompts most like it, the paper's retrieval.

Trap: log pi(y_w | x, a) alone is largest for whatever attribute makes all answers likelier; here the rejected answer
and the base without the attribute are subtracted.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from pjrlhf.data.schema import Example
from pjrlhf.errors import UserError
from pjrlhf.feedback.writers.base import Base, Known, Writer
from pjrlhf.settings import setting


def choose(shifts: Float[np.ndarray, "J M"], most: int, beta: float) -> list[int]:
    """Indices of at most `most` attributes in the order in which the greedy search takes them.

    Args:
      shifts: d_ja, in nats.
    """
    shifts = np.asarray(shifts, np.float64)
    found: list[int] = []
    total, best = np.zeros(len(shifts)), -len(shifts) * np.log(2)
    while len(found) < min(most, shifts.shape[1]):
        likelihoods = -np.logaddexp(0, -beta * (total[:, None] + shifts)).sum(0)
        likelihoods[found] = -np.inf
        one = int(np.argmax(likelihoods))
        if likelihoods[one] <= best:
            break
        found.append(one)
        best, total = likelihoods[one], total + shifts[:, one]
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attributes(Writer):
    """Attributes by likelihood."""

    once = True
    asks = True

    attributes: tuple[str, ...] = setting((), "the list; the sentences of `preferences` where empty")
    most: int = setting(2, "attributes of a person at most", low=1, high=1000)
    beta: float = setting(1.0, "scale of the log-ratios", above=0.0, high=1e6)

    def check(self) -> None:
        if len(set(self.attributes)) < len(self.attributes) or not all(map(str.strip, self.attributes)):
            raise UserError("attributes: one is empty or comes twice; name each once")

    def write(self, known: Sequence[Known], base: Base) -> list[str]:
        attributes = self.attributes or tuple(dict.fromkeys(filter(None, base.sentences.values())))
        if not attributes:
            raise UserError("attributes: there is none, and `preferences` has no sentence; list some")
        comparisons = {id(shot.example): shot.example for one in known for shot in one.shots}
        shifts = self._shifts(base, attributes, comparisons)
        texts = []
        for one in known:
            rows = [shifts[id(shot.example)] for shot in one.shots]
            chosen = choose(np.array(rows), self.most, self.beta) if rows else []
            texts.append(" ".join(attributes[a] for a in chosen))
        return texts

    def _shifts(
        self, base: Base, attributes: Sequence[str], comparisons: Mapping[int, Example]
    ) -> dict[int, np.ndarray]:
        """d_ja of every comparison, [M]; 0 where a prompt with the attribute is too long to read."""
        asked = list(comparisons.values())
        plain, *told = (base.margins(asked, words) for words in ("", *attributes))
        return dict(zip(comparisons, np.nan_to_num(np.array(told) - plain).T, strict=True))


WRITER = Attributes
