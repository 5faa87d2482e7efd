"""Answers after phrases of feedback (Chain of Hindsight, arXiv 2302.02676, section 2), with the person's own
comparisons as the first links of the chain.

The paper trains a model by likelihood on both answers of a pair, each after the phrase that fits it, in both orders:

    x  "Good:" y_w  "Bad:" y_l        x  "Bad:" y_l  "Good:" y_w

and asks it for a good answer, x "Good:". A record here is one answer of such a chain: half of the training records ask
for the bad answer, so that their answers are exchanged, and half show the other answer of the pair before. Records
outside training ask for the good answer and show neither. With `loss` "pjrlhf.feedback.writers.hindsight:likelihood"
the loss is the paper's; pairwise losses also work.

Traps: the chain of an evaluated pair would contain its answer; and a phrase that differs between people by their label
alone would tell it.
"""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from pjrlhf.data.messages import text_of, with_text, with_words
from pjrlhf.data.schema import Example
from pjrlhf.errors import UserError
from pjrlhf.feedback.writers.base import Base, Known, Shot, Writer
from pjrlhf.objectives.preference import takes
from pjrlhf.settings import setting
from pjrlhf.types import Array


@takes("lengths")
def likelihood(w: Array, l: Array, beta: float, *, lengths: Array) -> Array:
    """-log pi(chosen) per token, up to a constant: the loss of Chain of Hindsight, where `chosen` is the answer that
    the phrase asks for; nats, [B]. `l` and `beta` do not count.
    """
    return -w / jnp.maximum(lengths[0], 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hindsight(Writer):
    """Feedback phrases."""

    good: str = setting("Good:", "phrase before a preferred answer")
    bad: str = setting("Bad:", "phrase before another answer")
    chain: bool = setting(True, "half of the training records show the other answer of the pair with its phrase")

    def check(self) -> None:
        if not self.good.strip() or self.good == self.bad:
            raise UserError(f"good, bad: {self.good!r} and {self.bad!r} do not tell answers apart; give two phrases")

    def shot(self, shot: Shot) -> str:
        """One comparison, in the drawn order."""
        told = shot.fields()
        first, second = (self.good, self.bad) if shot.chosen_first else (self.bad, self.good)
        return f"{told['prompt']} {first} {told['first']} {second} {told['second']}"

    def write(self, known: Sequence[Known], base: Base) -> list[str]:
        return ["\n".join(map(self.shot, one.shots)) for one in known]

    def ask(self, example: Example, text: str, trained: bool, rng: np.random.Generator) -> Example:
        turned, chained = rng.random(2) < 0.5
        own, other = self.good, self.bad
        if trained and turned:
            example = dataclasses.replace(example, chosen=example.rejected, rejected=example.chosen)
            own, other = other, own
        words = own
        if trained and chained and self.chain:
            words = f"{other} {text_of(example.rejected or '').strip()} {own}"
        prompt = with_words(example.prompt or "", words)
        return dataclasses.replace(example, prompt=with_text(prompt, text) if text else prompt)


WRITER = Hindsight
