"""Scores many answers to prompts in packed rows, as training packs them."""

import math
from collections.abc import Callable, Sequence

import jax
import numpy as np

from pjrlhf.data.packing import PackedRows, bins_of, whole_length
from pjrlhf.data.token_table import TokenRow
from pjrlhf.rollout.reference import shared_prompts, with_answers
from pjrlhf.runtime.scorer import Scorer
from pjrlhf.runtime.text import Text

TOGETHER = 8  # answers to a prompt that read it together, at most
JOINED = 4096  # positions of a row that is filled with prompts and their answers: the mask of a row takes their square


class PackedAnswers:
    """M answers in packed chunks: a prompt is read once for its answers, and rows are filled as those of training.

    Where rows are joined or packed, all chunks have one shape, and nearly every position holds a token. Elsewhere a row
    is a prompt with its answers, and rows of similar length share a chunk.

    Args:
      text: packs rows.
      answers: {"prompt", "completion"} of token ids, and perhaps "completion_mask"; at least one.
      size: answers of the greatest length that a chunk may hold; one prompt with its answers always fits.

    Attributes:
      examples: the prompts with their answers, `size` for each chunk in turn; those of no prompt fill chunks up.
      size: examples of a chunk.
    """

    def __init__(self, text: Text, answers: Sequence[TokenRow], size: int):
        self.text, d = text, text.settings
        groups, devices = shared_prompts(answers, 1 if text.packing == "none" else TOGETHER), text.devices
        A = max(map(len, groups))
        self.names = [f"answer {a}" for a in range(A)]
        lengths = [len(answers[g[0]]["prompt"]) + sum(len(answers[i]["completion"]) for i in g) for g in groups]
        bins = [[int(i)] for i in np.argsort(lengths, kind="stable")]
        rows, self.shape = devices.even(max(1, size // A)), None
        if text.packing in ("pack", "join"):
            length = d.max_prompt + A * d.max_completion
            if text.packing == "join":
                most, rows = size * (d.max_prompt + d.max_completion), devices.even(1)
                length = math.ceil(min(JOINED, most / rows, sum(lengths) / rows))
            self.shape = rows, whole_length(max(length, *lengths))
            bins = bins_of(range(len(groups)), lengths, self.shape[1])
        bins += [[]] * (-len(bins) % rows)
        slots = max(map(len, bins))
        self.size = rows * slots
        order = [i for some in bins for i in (*some, *[-1] * (slots - len(some)))]
        self.examples = [with_answers([answers[i] for i in groups[g]] if g >= 0 else [], self.names) for g in order]
        # The place of each answer among those of all examples.
        self.places = np.zeros(len(answers), np.int64)
        for e, g in enumerate(order):
            if g >= 0:
                self.places[groups[g]] = e * A + np.arange(len(groups[g]))

    def pack(self, examples: Sequence[TokenRow]) -> PackedRows:
        """A chunk of examples."""
        return self.text.pack(examples, self.names, shape=self.shape)

    def scores(self, name: str, score: Callable[[PackedRows], jax.Array]) -> np.ndarray:
        """The scores [M, ...] of all answers, in their order.

        Args:
          name: of the progress bar.
          score: rows on the devices with E prompts -> scores [E, A, ...] of their answers.
        """
        found = Scorer(self.text.devices, self.size)(name, self.examples, self.pack, score)
        return found.reshape(-1, *found.shape[2:])[self.places]
