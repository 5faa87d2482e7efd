"""The arrays of online RL, from prompts to what a policy is trained on.

Arrays of a training step are [K, n, ...]: K policies with n rows each, from the prompts to the update. Only a forward
pass, and the transfer to the devices, which share the rows of all policies, join these two axes (`join_rows`).
Elsewhere, such as in evaluations, the rows are [B, ...]. `*rows` stands for either.

Shapes: P prompt positions and Q of the reward model's prompt (both left-padded), N response positions (right-padded),
S objectives that a response is rewarded for, H heads of the combination rule, A adapters.
"""

from typing import TypeVar

import jax
import numpy as np
from flax import struct

from pjrlhf.types import Array

T = TypeVar("T")


@struct.dataclass
class Prompts:
    """Left-padded prompts.

    Attributes:
      tokens: int32 [*rows, P].
      valid: bool [*rows, P], False on padding.
    """

    tokens: Array
    valid: Array


@struct.dataclass
class Rollout:
    """Sampled responses.

    Attributes:
      tokens: int32 [*rows, N], padding after EOS.
      valid: bool [*rows, N], True up to and including EOS.
      logps: float32 [*rows, N], nats, log-probability of each token under softmax(logits / temperature) before
        truncation, 0 outside `valid`.
    """

    tokens: Array
    valid: Array
    logps: Array


@struct.dataclass
class TargetBatch:
    """What responses are rewarded for.

    Attributes:
      objectives: int32 [*rows, S], numbers of the reward models.
      weights: float32 [*rows, S], preference weights of these objectives.
      group: int32 [*rows], which preference it is, where preferences come from a fixed set.
    """

    objectives: Array
    weights: Array
    group: Array


@struct.dataclass
class PromptBatch:
    """The prompts of one step.

    Attributes:
      prompts: what the policies read, [*rows, P].
      reward_prompts: the plain requests, which reward models read, [*rows, Q].
      targets: what the responses are rewarded for.
      requests: int32 [*rows], numbers of the requests; None where no reward source reads them.
    """

    prompts: Prompts
    reward_prompts: Prompts
    targets: TargetBatch
    requests: Array | None = None


@struct.dataclass
class ScoredRollout:
    """Responses with their rewards.

    Attributes:
      prompts: [K, n, P].
      rollout: [K, n, N].
      scores: float32 [K, n, S], normalised rewards.
      targets: [K, n, S].
    """

    prompts: Prompts
    rollout: Rollout
    scores: Array
    targets: TargetBatch


@struct.dataclass
class Experience:
    """What PPO trains on.

    Attributes:
      tokens, valid: int32 and bool [K, n, P + N], prompts and responses.
      logps: float32 [K, n, N], nats, log-probabilities of the responses when they were sampled.
      advantages: float32 [K, n, N].
      values, returns: float32 [K, n, N, H].
      mix: float32 [K, n, A], weights of the adapters that gave each response; None where policy k is adapter k.
      temperature: of the distribution that the responses were sampled from; static.
    """

    tokens: Array
    valid: Array
    logps: Array
    advantages: Array
    values: Array
    returns: Array
    mix: Array | None = None
    temperature: float = struct.field(pytree_node=False, default=1.0)

    @property
    def prompt_length(self) -> int:
        """P."""
        return self.tokens.shape[2] - self.logps.shape[2]

    @property
    def response(self) -> Array:
        """int32 [K, n, N]."""
        return self.tokens[:, :, self.prompt_length :]

    @property
    def mask(self) -> Array:
        """float32 [K, n, N], 1 on the tokens of the response."""
        return self.valid[:, :, self.prompt_length :].astype(np.float32)


def join_rows(tree: T) -> T:
    """Arrays [K, n, ...] as [K n, ...]."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)


def split_rows(tree: T, K: int) -> T:
    """Arrays [K n, ...] as [K, n, ...]."""
    return jax.tree.map(lambda x: x.reshape(K, -1, *x.shape[1:]), tree)
