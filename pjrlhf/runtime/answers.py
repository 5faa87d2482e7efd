"""Sampled answers of the policies of a run."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from pjrlhf.data.schema import Prompt
from pjrlhf.models.adapters import is_low_rank
from pjrlhf.runtime.run import Run
from pjrlhf.runtime.sampler import PoliciesOf, mixed
from pjrlhf.types import Params, PRNGKey

Keys = Callable[[int], PRNGKey]  # number of a chunk -> its PRNG key
Point = tuple[float, ...]  # preference weights, one per objective


def sample_base(run: Run, prompts: Sequence[Prompt], keys: Keys, stage: str) -> list[str]:
    """One answer of the base to every prompt.

    Args:
      keys: number of a chunk -> its PRNG key.
      stage: name of the progress bar.
    """
    return run.sampler()(stage, prompts, keys)


@dataclasses.dataclass(frozen=True)
class Row:
    """One answer to sample.

    Attributes:
      request: what the user asks.
      words: what the prompt says about preferences; may be empty.
      mix: weights of the adapters, [K].
    """

    request: Prompt
    words: str
    mix: tuple[float, ...]


def sample_rows(
    run: Run,
    bank: Params | None,
    rows: Sequence[Row],
    keys: Keys,
    policies: PoliciesOf = mixed,
    name: str = "answers",
) -> list[str]:
    """One answer per row.

    Rows of a chunk may have different weights where the bank is low-rank, because it is not merged.

    Args:
      bank: the adapters, with leading axis K; None for the base.
      keys: number of a chunk -> its PRNG key.
      policies: combines the adapters.
      name: of the progress bar.
    """
    prompts = [run.records.ask(row.request, row.words) for row in rows]
    mix = np.array([row.mix for row in rows], np.float32)
    groups = None if bank is None or is_low_rank(bank) else [row.mix for row in rows]
    return run.sampler(policies)(name, prompts, keys, bank, mix, groups)


def silent(_: Point) -> str:
    """States nothing about preferences."""
    return ""


@dataclasses.dataclass(frozen=True)
class EvaluatedPolicy:
    """A trained method, ready to answer for any preference weights.

    Attributes:
      bank: its adapters, with leading axis K; None for the base.
      mix: preference weights -> weights of the adapters, [K].
      words: preference weights -> what the prompt says about them.
      points: the preference weights that it was trained for; None if it answers for all.
      policies: combines the adapters.
      best_of: answers to a prompt, of which the one with the highest rewards by the weights counts.
    """

    bank: Params | None
    mix: Callable[[Point], Sequence[float]]
    words: Callable[[Point], str] = silent
    points: Sequence[Point] | None = None
    policies: PoliciesOf = mixed
    best_of: int = 1
