"""What requests change in the logits of a row before a token is drawn: biases, penalties of repetition, and min-p.

With neutral values a row keeps its logits bit for bit, whatever the other rows ask for.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Bool, Float, Int

from pjrlhf.serving.tickets import Request
from pjrlhf.types import Array

BIASES = 300  # tokens with a bias of their own, at most


class Penalties(struct.PyTreeNode):
    """Of every row of a batch.

    Attributes:
      frequency, presence: as OpenAI's API defines them, see `penalized`; 0 is neutral.
      repetition: of CTRL (Keskar et al. 2019, section 4.1); 1 is neutral.
      min_p: tokens less likely than this fraction of the most likely one are not drawn; 0 is neutral.
      prompt: whether a token occurs in the prompt; unspecified where `repetition` is neutral.
      bias_ids, bias: added to the logits of tokens; ids of unused entries are V.
    """

    frequency: Float[Array, " B"]
    presence: Float[Array, " B"]
    repetition: Float[Array, " B"]
    min_p: Float[Array, " B"]
    prompt: Bool[Array, "B V"]
    bias_ids: Int[Array, "B _"]
    bias: Float[Array, "B _"]

    @property
    def any(self) -> Bool[Array, " B"]:
        """Which rows change their logits before the temperature."""
        return (self.frequency != 0) | (self.presence != 0) | (self.repetition != 1) | (self.bias != 0).any(axis=1)


def penalties_of(requests: Sequence[Request | None], vocab: int) -> Penalties:
    """One row for each request; of None, a neutral one."""

    def rows(name: str, none: float) -> Any:
        return np.array([none if one is None else getattr(one, name) for one in requests], np.float32)

    prompt: Any = np.zeros((len(requests), vocab), bool)
    ids: Any = np.full((len(requests), BIASES), vocab, np.int32)
    bias: Any = np.zeros((len(requests), BIASES), np.float32)
    for row, one in enumerate(requests):
        if one is not None:
            if one.repetition_penalty != 1:
                prompt[row, list(one.tokens)] = True
            for place, (i, value) in enumerate(one.logit_bias.items()):
                ids[row, place], bias[row, place] = i, value
    return Penalties(
        frequency=rows("frequency_penalty", 0),
        presence=rows("presence_penalty", 0),
        repetition=rows("repetition_penalty", 1),
        min_p=rows("min_p", 0),
        prompt=prompt,
        bias_ids=ids,
        bias=bias,
    )


def penalized(
    logits: Float[Array, "B V"], penalties: Penalties, counts: Int[Array, "B V"], active: Bool[Array, " B"]
) -> Float[Array, "B V"]:
    """The logits to draw from.

    First the bias is added. The repetition penalty r then divides the positive logits, and multiplies the others, of
    all tokens of the prompt and the answer. At last `frequency` times the number of times that the answer has a token
    is subtracted, and `presence` where it has it.

    Args:
      counts: how often the answer has each token.
      active: rows that count; others need not be right.
    """

    def change() -> Float[Array, "B V"]:
        rows = jnp.arange(len(logits))[:, None]
        found = logits.at[rows, penalties.bias_ids].add(penalties.bias.astype(logits.dtype), mode="drop")
        drawn = counts > 0
        by = penalties.repetition[:, None]
        found = jnp.where(drawn | penalties.prompt, jnp.where(found > 0, found / by, found * by), found)
        found = found - penalties.frequency[:, None] * counts - penalties.presence[:, None] * drawn
        return jnp.where(penalties.any[:, None], found, logits).astype(logits.dtype)

    return jax.lax.cond((active & penalties.any).any(), change, lambda: logits)


def above_min_p(logits: Float[Array, "B V"], min_p: Float[Array, " B"]) -> Float[Array, "B V"]:
    """-inf in place of the logits of tokens whose probability is below `min_p` times that of the most likely one
    (Nguyen et al. 2024, "Turning Up the Heat", section 3).
    """
    threshold = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(min_p)[:, None]
    return jnp.where(logits < threshold, -jnp.inf, logits)
