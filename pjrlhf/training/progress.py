"""Progress of a pass: a bar on a terminal, plain lines at intervals elsewhere.

A pass may take minutes before its first step ends (compilation, a large batch), so a thread reports for it.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pjrlhf.parallel.processes import is_process_zero
from pjrlhf.paths import Report
from pjrlhf.terminal import line

PATIENCE = 5.0  # seconds after which a pass says what it is
_passes: list["progress"] = []  # that run now; the innermost one, the last, is shown


def _clock(seconds: float) -> str:
    """h:mm:ss, or m:ss below an hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _number(value: float) -> str:
    """Four digits; a whole number has all of its own, such as 24,240."""
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 and value == round(value) else f"{value:.4g}"


class progress:
    """Shows stage, steps, time left and the metrics named in `keys` on stderr, from process 0.

    Without a terminal it prints a line at most every `every` seconds; also where no step has ended, with the time so
    far. Of passes within passes the innermost one is shown.

    Args:
      stage: name shown first: which stage, and what it does.
      total: steps of the whole pass; 1 for one that cannot be divided.
      keys: metrics to show, where present.
      start: steps done before this run.
      every: seconds between plain lines.
      patience: seconds before anything is shown.
      note: shown until the first step has ended.
    """

    def __init__(
        self,
        stage: str,
        total: int,
        keys: Sequence[str] = (),
        *,
        start: int = 0,
        every: float = 10.0,
        patience: float = PATIENCE,
        note: str = "",
    ):
        self.stage, self.total, self.keys, self.every, self.patience = line(stage), total, keys, every, patience
        self._step, self._note = start, note
        self._told: int | None = None  # the step of the last line
        self._visible = is_process_zero()
        self._bar: Progress | None = None
        self._first: tuple[int, float] | None = None
        self._ended = threading.Event()
        self._lock = threading.Lock()

    def __enter__(self) -> "progress":
        self._started = time.monotonic()
        self._printed = self._started + self.patience - self.every
        for outer in _passes[-1:]:
            outer.hide()
        _passes.append(self)
        if self._visible:
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.hide()
        _passes.remove(self)

    def hide(self) -> None:
        """Takes the bar from the terminal."""
        with self._lock:
            if self._bar:
                self._bar.stop()
            self._bar = None

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """`step` steps are done; `metrics` are the latest values, of which those in `keys` are shown."""
        if not self._visible:
            return
        # The first step includes compilation, so speed is measured from its end.
        self._first = self._first or (step, time.monotonic())
        shown = (f"{key} {_number(metrics[key])}" for key in self.keys if key in metrics)
        self._step, self._note = step, "  ".join(shown)
        self.show(step >= self.total)

    def show(self, last: bool = False) -> None:
        """Shows the state where it is time to."""
        now = time.monotonic()
        with self._lock:
            if self._ended.is_set() or now - self._started < self.patience or _passes[-1:] != [self]:
                return
            if sys.stderr.isatty():
                self._draw()
            elif (last and self._told != self._step) or now - self._printed >= self.every:
                self._printed, self._told = now, self._step
                print(self._line(now), file=sys.stderr, flush=True)

    def _watch(self) -> None:
        """Shows the state until the pass ends, also while no step does."""
        wait = self.patience
        while not self._ended.wait(max(wait, 0.05)):
            self.show()
            wait = min(self.every, 1.0)

    def _draw(self) -> None:
        if not self._bar:
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}", markup=False),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task(self.stage, total=self.total, completed=self._step, note=self._note)
        self._bar.update(self._task, completed=self._step, total=self.total, note=self._note)

    def _line(self, now: float) -> str:
        done, seconds = (self._step - self._first[0], now - self._first[1]) if self._first else (0, 0.0)
        time_left = f"{_clock(seconds / done * (self.total - self._step))} left" if done else ""
        count = f"{self._step}/{self.total}" if self.total > 1 else ""
        parts = (self.stage, count, self._note)
        return "  ".join(filter(None, [*parts, time_left or f"{_clock(now - self._started)} so far"]))


class _Watched(Sequence):
    """Items whose number moves a bar when they are read."""

    def __init__(self, items: Any, bar: progress):
        self._items, self._bar = items, bar

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, i: Any) -> Any:
        self._bar.update(i, {})
        return self._items[i]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._items, name)


@contextlib.contextmanager
def watched(stage: str, items: Any) -> Iterator[Any]:
    """`items`, a sequence, with the progress of reading it from its first to its last item."""
    with progress(stage, len(items)) as bar:
        yield _Watched(items, bar)
        bar.update(len(items), {})


@contextlib.contextmanager
def megabytes(stage: str) -> Iterator[Report]:
    """The progress of a pass over bytes, shown in MB; gives a function of (bytes done, all bytes)."""
    with progress(f"{stage} (MB)", 1) as bar:

        def report(done: int, total: int) -> None:
            bar.total = max(1, total // 10**6)
            bar.update(done // 10**6, {})

        yield report
