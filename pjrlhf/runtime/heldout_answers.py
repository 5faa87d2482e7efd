"""Answers to held-out prompts while a stage trains, as rows of a table."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pjrlhf.data.schema import Prompt
from pjrlhf.models.adapters import Backbone
from pjrlhf.runtime.answers import Keys
from pjrlhf.runtime.run import Run
from pjrlhf.runtime.sampler import PoliciesOf, Sampler, mixed
from pjrlhf.training.completions import Row


class HeldoutAnswers:
    """Answers of a model in training to the same M prompts each time, drawn with the same keys.

    Args:
      keys: number of a chunk -> its key.
      prompts: as the model is asked.
      about: M beginnings of rows, such as the policy or the user that answers.
      backbone: of the policies; that of the run where None.
      policies: makes the policies of the rows from the parameters in training.
      data: of every row, [M, ...], such as its row of `mix` or its user.
      groups: of every row, where a chunk must have rows of one; see `Sampler`.
    """

    def __init__(
        self,
        run: Run,
        keys: Keys,
        prompts: Sequence[Prompt],
        about: Sequence[Row],
        backbone: Backbone | None = None,
        policies: PoliciesOf = mixed,
        data: np.ndarray | None = None,
        groups: Sequence[Any] | None = None,
    ):
        self.keys, self.prompts, self.data, self.groups = keys, prompts, data, groups
        size = len(prompts) // len(set(groups)) if groups else len(prompts)
        self._sample = Sampler(run.text, backbone or run.workspace.backbone, policies, size=size)
        decode = run.text.workspace.tokenizer.backend.decode
        self._about = [
            {**one, "prompt": decode(run.text.prompt_ids(prompt))} for one, prompt in zip(about, prompts, strict=True)
        ]

    def __call__(self, parameters: Any) -> list[Row]:
        """The rows, with columns `prompt`, as the model reads it, and `completion`. All processes must call it."""
        name = "answers to held-out prompts"
        texts = self._sample(name, self.prompts, self.keys, parameters, self.data, self.groups)
        return [{**one, "completion": text} for one, text in zip(self._about, texts, strict=True)]


def once(make: Callable[[], HeldoutAnswers] | None) -> Callable[[], HeldoutAnswers] | None:
    """`make`, which is called for the first table."""
    return None if make is None else functools.cache(make)


def rows_of(answers: Callable[[], HeldoutAnswers] | None, parameters: Any) -> Sequence[Row]:
    """The rows of `answers`; none where a method shows none."""
    return () if answers is None else answers()(parameters)


def heldout_requests(run: Run) -> list[Prompt]:
    """The first held-out requests of a run, as many as a table shows."""
    return list(run.records.requests[1][: run.settings.completion_prompts])
