"""Rewards of sources on the host, between a rollout and its update."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor

import jax
import numpy as np
from jaxtyping import Float

from pjrlhf.algorithms.targets import PromptRows
from pjrlhf.rollout.batches import PromptBatch, Rollout, join_rows, split_rows
from pjrlhf.runtime.audience import HostRewards
from pjrlhf.types import Tree


def ask(
    data: PromptRows, batch: PromptBatch, rollout: Rollout, pool: Executor | None = None
) -> Callable[[], HostRewards]:
    """Asks the reward sources of their objectives for the responses [K n, N] to a batch [K, n, ...] of `data`; see
    `Audience.ask`. The result has rewards float32 [K n, S]; NaN for no reward.
    """
    batch, audience = join_rows(batch), data.targets.audience
    objectives, numbers = np.asarray(batch.targets.objectives), np.asarray(batch.requests)
    texts = data.text.decode(batch.prompts, rollout)
    wanted = (objectives[..., None] == np.arange(len(audience.rewards))).any(1)
    requests = [data.requests[i] for i in numbers]
    found = audience.ask(requests, texts, wanted, data.records.columns_of(requests), pool)

    def result() -> HostRewards:
        one = found()
        return dataclasses.replace(one, rewards=np.take_along_axis(one.rewards, objectives, axis=1))

    return result


def sampled_and_asked(
    data: PromptRows,
    batch: PromptBatch,
    parts: int,
    draw: Callable[..., Rollout],
    join: Callable[..., Tree],
) -> tuple[Rollout, Float[np.ndarray, "B S"], Mapping[str, float]]:
    """Samples responses to a batch [K, n, ...] and asks the sources about them: (responses [K n, N], rewards as `ask`
    gives them, seconds of waiting and of each source by the names of metrics). Of several parts one is asked about
    while the next is sampled.

    Args:
      draw: (batch, number of the part if there are several) -> responses.
      join: responses of the parts -> those of the batch.
    """
    K = len(data.targets.policies)
    if parts == 1:
        # In this thread, which functions may need, such as those that set an alarm.
        rollout = jax.block_until_ready(draw(batch))
        started = time.perf_counter()
        asked = [ask(data, batch, rollout)()]
    else:
        size = batch.targets.weights.shape[1] // parts
        each = [jax.tree.map(lambda x, i=i: x[:, i * size : (i + 1) * size], batch) for i in range(parts)]
        with ThreadPoolExecutor(1) as pool:
            drawn, waiting = [], []
            for i in range(parts + 1):
                if i < parts:
                    drawn.append(draw(each[i], np.int32(i)))
                if i > 0:  # the next part is being sampled
                    waiting.append(ask(data, each[i - 1], drawn[i - 1], pool))
            started = time.perf_counter()
            asked = [result() for result in waiting]
        rollout = join(*drawn)
    seconds = {"rewards/seconds": time.perf_counter() - started}
    for name in data.targets.audience.sources:
        seconds[f"rewards/{name}/seconds"] = sum(one.seconds.get(name, 0.0) for one in asked)
    host = [split_rows(one.rewards, K) for one in asked]
    return rollout, join_rows(np.concatenate(host, axis=1)), seconds
