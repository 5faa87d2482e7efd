"""Answers of a run's models to prompts, sampled in chunks of one shape."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from pjrlhf.models.adapters import is_low_rank
from pjrlhf.rollout.experience import sample
from pjrlhf.runtime.run import Run
from pjrlhf.training.progress import progress


def sample_base(run: Run, prompts: list[Any], key: jax.Array, stage: str) -> list[str]:
    """One answer of the base to each prompt, `run.text.sample_rows` rows at a time."""
    rows = run.text.sample_rows
    draw = jax.jit(sample, static_argnums=(0, 1, 2))
    texts: list[str] = []
    chunks = [prompts[i : i + rows] for i in range(0, len(prompts), rows)]
    with progress(stage, len(chunks), ()) as bar:
        for i, chunk in enumerate(chunks):
            # The last chunk is filled up so that one program serves all.
            arrays = run.text.encode(chunk + [chunk[0]] * (rows - len(chunk)))
            placed, one = run.devices.place(arrays), jax.random.fold_in(key, i)
            out = draw(
                run.workspace.model,
                run.workspace.adapter,
                run.text.sampling(),
                run.workspace.base,
                None,
                None,
                placed,
                one,
            )
            texts += run.text.decode(arrays, out)[: len(chunk)]
            bar.update(i + 1, {})
    return texts


@dataclasses.dataclass(frozen=True)
class Row:
    """One answer to sample: what is asked, what the prompt says about preferences, and the weights of the policies."""

    request: str
    words: str
    mix: tuple[float, ...]


class Sampler:
    """Answers of soups to requests; rows of one batch may all have different weights, LoRA banks are never merged."""

    def __init__(self, run: Run, bank: Any, draw: Callable[..., Any] | None = None):
        self.run, self.bank = run, bank
        self._draw = draw or jax.jit(sample, static_argnums=(0, 1, 2))

    def __call__(self, rows: Sequence[Row], key: jax.Array) -> list[str]:
        """One answer per row."""
        low_rank = self.bank is None or is_low_rank(self.bank)
        # Full parameters are merged once per distinct weight vector, so there rows of one vector go together.
        order = sorted(range(len(rows)), key=lambda i: (0.0,) if low_rank else rows[i].mix)
        groups = [order] if low_rank else [list(g) for _, g in itertools.groupby(order, key=lambda i: rows[i].mix)]
        size = self.run.text.sample_rows
        chunks = [group[i : i + size] for group in groups for i in range(0, len(group), size)]
        texts = [""] * len(rows)
        with progress("evaluate", len(chunks), ()) as bar:
            for number, chunk in enumerate(chunks):
                padded = chunk + [chunk[0]] * (size - len(chunk))
                arrays = self.run.text.encode([self.run.records.ask(rows[i].request, rows[i].words) for i in padded])
                placed = self.run.devices.place(arrays)
                part = jax.random.fold_in(key, number)
                mix = np.array([rows[i].mix for i in (padded if low_rank else padded[:1])], np.float32)
                sampling = self.run.text.sampling()
                out = self._draw(
                    self.run.workspace.model,
                    self.run.workspace.adapter,
                    sampling,
                    self.run.workspace.base,
                    self.bank,
                    mix,
                    placed,
                    part,
                )
                for i, text in zip(chunk, self.run.text.decode(arrays, out), strict=False):
                    texts[i] = text
                bar.update(number + 1, {})
        return texts
