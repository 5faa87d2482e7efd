"""A progress bar on a terminal, plain lines at intervals elsewhere."""

import sys
import time
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pjrlhf.parallel.processes import is_process_zero


def _clock(seconds: float) -> str:
    """h:mm:ss, or m:ss below an hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class progress:
    """Shows stage, steps, time left and the metrics named in `keys` on stderr, from process 0.

    Args:
      stage: name shown first.
      total: steps of the whole stage.
      keys: metrics to show, where present.
      start: steps done before this run.
      every: seconds between plain lines.
      patience: seconds before anything is shown.
    """

    def __init__(
        self,
        stage: str,
        total: int,
        keys: Sequence[str] = ("loss",),
        *,
        start: int = 0,
        every: float = 10.0,
        patience: float = 0.0,
    ):
        self.stage, self.total, self.keys, self.every = stage, total, keys, every
        self._step = start
        self._visible = is_process_zero()
        self._bar: Progress | None = None
        self._first: tuple[int, float] | None = None
        self._printed = -every
        self._silent_until = time.monotonic() + patience

    def __enter__(self) -> "progress":
        if time.monotonic() >= self._silent_until:
            self._open()
        return self

    def _open(self) -> None:
        """Shows the bar, where there is a terminal."""
        if self._visible and sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task(self.stage, total=self.total, completed=self._step, note="")

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """`step` steps are done; `metrics` are the latest values, of which those in `keys` are shown."""
        if not self._visible:
            return
        now = time.monotonic()
        # The first step includes compilation, so speed is measured from its end.
        self._first = self._first or (step, now)
        if now < self._silent_until:
            return
        if not self._bar:
            self._open()
        note = "  ".join(f"{key} {metrics[key]:.4g}" for key in self.keys if key in metrics)
        if self._bar:
            self._bar.update(self._task, completed=step, note=note)
            return
        done, seconds = step - self._first[0], now - self._first[1]
        if now - self._printed >= self.every or step >= self.total:
            self._printed = now
            left = f"{_clock(seconds / done * (self.total - step))} left" if done else ""
            parts = (self.stage, f"{step}/{self.total}", note, left)
            print("  ".join(part for part in parts if part), file=sys.stderr, flush=True)
