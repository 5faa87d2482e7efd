"""Notices training that diverges while its numbers are still finite."""

import collections
from collections.abc import Mapping

from absl import logging

WINDOW = 5  # steps whose mean is compared, so that a single hard batch is no alarm
LOSS_FACTOR, LOSS_MARGIN = 1.5, 0.5  # the loss may rise to factor * first mean + margin, in nats
KL_LIMIT = 50.0  # nats per answer; policies that still write text of the reference's kind stay far below


class Divergence:
    """Warns once for each metric that explodes: the loss, or the KL to the reference.

    Args:
      stage: name in messages.
      rates: setting -> learning rate, the ones to lower.
    """

    def __init__(self, stage: str, rates: Mapping[str, float]):
        self.stage, self.rates = stage, rates
        self._first: dict[str, list[float]] = {}
        self._last: dict[str, collections.deque[float]] = {}
        self._warned: set[str] = set()

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Takes the metrics of a step, pooled over the policies."""
        for name in ("loss", "objective/kl"):
            if name in values and name not in self._warned:
                self._watch(name, step, values[name])

    def _watch(self, name: str, step: int, value: float) -> None:
        first = self._first.setdefault(name, [])
        last = self._last.setdefault(name, collections.deque(maxlen=WINDOW))
        last.append(value)
        if len(first) < WINDOW:
            first.append(value)
        start, now = sum(first) / len(first), sum(last) / len(last)
        limit = KL_LIMIT if name == "objective/kl" else LOSS_FACTOR * abs(start) + LOSS_MARGIN
        if len(last) == WINDOW and now > limit:
            self._warned.add(name)
            rates = " and ".join(f"{key}={rate:g}" for key, rate in self.rates.items()) or "the learning rate"
            logging.warning(
                "%s: %s rose from %.3g to %.3g (means of %d steps) by step %d: training diverges; lower %s",
                *(self.stage, name, start, now, WINDOW, step, rates),
            )
