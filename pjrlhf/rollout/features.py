"""States of the frozen base for answers: the features of reward models that train no layer of it."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import xxhash
from jaxtyping import Float

from pjrlhf.data.batching import Completions
from pjrlhf.data.token_table import TokenRow
from pjrlhf.models.adapters import Backbone
from pjrlhf.rollout.batches import Prompts
from pjrlhf.types import Array

STATES = ("last", "mean")  # the order of the axis of `answer_states`
KEY_BYTES = 16


def answer_states(backbone: Backbone, batch: Completions) -> Float[Array, "B 2 D"]:
    """The base's hidden state at the last token of each answer, and the mean of those at all its tokens; float32."""
    hidden, _ = backbone.policies()(batch.tokens, batch.valid)
    hidden = hidden.astype(jnp.float32)
    last = batch.valid.shape[1] - 1 - jnp.argmax(batch.valid[:, ::-1], axis=1)
    at_last = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    answered = jnp.asarray(batch.valid[:, batch.prompt_length :], jnp.float32)
    total = jnp.einsum("bnd,bn->bd", hidden[:, batch.prompt_length :], answered)
    return jnp.stack([at_last, total / jnp.maximum(answered.sum(1), 1.0)[:, None]], axis=1)


def prompt_states(backbone: Backbone, batch: Prompts) -> Float[Array, "B D"]:
    """The mean of the base's hidden states at the tokens of each prompt; float32."""
    hidden, _ = backbone.policies()(batch.tokens, batch.valid)
    weight = jnp.asarray(batch.valid, jnp.float32)
    return jnp.einsum("bnd,bn->bd", hidden.astype(jnp.float32), weight) / weight.sum(1, keepdims=True)


def answer_key(row: TokenRow) -> bytes:
    """The content of a prompt with its answer: 16 bytes that depend on their token ids alone."""
    prompt, answer = (np.asarray(row[name], "<i4").tobytes() for name in ("prompt", "completion"))
    return xxhash.xxh3_128_digest(len(prompt).to_bytes(8, "little") + prompt + answer)


@dataclasses.dataclass(frozen=True, eq=False)
class Reduction:
    """Standardises features, rotates them to their first principal components, and scales them.

    Attributes:
      mean, spread: of each of D features.
      axes: of the d components.
      scale: that makes the mean square 1 on what it was fitted to.
    """

    mean: Float[np.ndarray, " D"]
    spread: Float[np.ndarray, " D"]
    axes: Float[np.ndarray, "D d"]
    scale: float

    @classmethod
    def fitted(cls, states: Float[np.ndarray, "N D"], components: int) -> "Reduction":
        """That of some answers; with 0 components features are standardised and scaled alone."""
        used = states.astype(np.float64)
        mean, spread = used.mean(0), used.std(0)
        spread[spread < 1e-6] = 1.0
        used = (used - mean) / spread
        axes = np.eye(used.shape[1])
        if count := min(components, used.shape[1]):
            _, axes = np.linalg.eigh(used.T @ used)
            axes = axes[:, ::-1][:, :count]
        scale = np.sqrt(np.mean((used @ axes) ** 2))
        return cls(mean, spread, axes, max(float(scale), 1e-6))

    def __call__(self, states: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N d"]:
        """Reduced features, float32."""
        return (((states - self.mean) / self.spread) @ self.axes / self.scale).astype(np.float32)
