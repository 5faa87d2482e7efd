"""Answers of a run's models to requests."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from pjrlhf.data.schema import Prompt
from pjrlhf.models.adapters import is_low_rank
from pjrlhf.runtime.run import Run
from pjrlhf.runtime.sampler import PoliciesOf, mixed

Keys = Callable[[int], jax.Array]  # number of a chunk -> its PRNG key
Point = tuple[float, ...]  # preference weights, one per objective


def sample_base(run: Run, prompts: Sequence[Prompt], keys: Keys, stage: str) -> list[str]:
    """One answer of the base to each prompt."""
    return run.sampler()(stage, prompts, keys)


@dataclasses.dataclass(frozen=True)
class Row:
    """One answer to sample: what is asked, what the prompt says about preferences, and the weights of the adapters."""

    request: str
    words: str
    mix: tuple[float, ...]


def sample_rows(run: Run, bank: Any, rows: Sequence[Row], keys: Keys, policies: PoliciesOf = mixed) -> list[str]:
    """One answer per row; rows of a chunk may all have different weights, low-rank banks are never merged.

    Args:
      bank: the adapters; None for the base.
    """
    prompts = [run.records.ask(row.request, row.words) for row in rows]
    mix = np.array([row.mix for row in rows], np.float32)
    apart = None if bank is None or is_low_rank(bank) else [row.mix for row in rows]
    return run.sampler(policies)("evaluate", prompts, keys, bank, mix, apart)


def silent(_: Point) -> str:
    """States nothing about preferences."""
    return ""


@dataclasses.dataclass(frozen=True)
class EvaluatedPolicy:
    """A trained method ready to be asked.

    Attributes:
      bank: its adapters; None for the base.
      mix: preference weights -> weights of the adapters.
      words: preference weights -> what the prompt says about them.
      points: the only preference weights that it can be asked for; None for any.
      policies: how the adapters answer together.
    """

    bank: Any
    mix: Callable[[Point], Sequence[float]]
    words: Callable[[Point], str] = silent
    points: Sequence[Point] | None = None
    policies: PoliciesOf = mixed
