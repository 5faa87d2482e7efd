"""Multi-objective decoding (MOD, arXiv 2406.18853): combines the next-token distributions of K policies.

Parameters are not merged. One forward pass runs all K policies, each as a batch row of its own.
"""

import copy

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from pjrlhf.models.adapters import AdapterConfig, Policies, copy_indices
from pjrlhf.models.decoder import Cache, Decoder
from pjrlhf.objectives.multi_objective import combine_logps
from pjrlhf.types import Array, Params


class PolicyEnsemble:
    """Replaces `Policies` in `sampler.generate`; its logits are the combined log-probs of the K policies of a bank.

    Args:
      model, adapter, base, bank: as for `Policies`; the bank must be low-rank, since every batch row is a policy.
      weights: of the policies, for each example.
      divergence: see `combine_logps`.
    """

    def __init__(
        self,
        model: Decoder,
        adapter: AdapterConfig,
        base: Params,
        bank: Params,
        weights: Float[Array, "B K"],
        divergence: str | float = "reverse_kl",
    ):
        self.model, self.weights, self.divergence = model, weights, divergence
        self.copies = weights.shape[1]
        self.policies = Policies(model, adapter, base, bank, jnp.tile(jnp.eye(self.copies), (len(weights), 1)))

    def reserve(
        self, tokens: Int[Array, "B T"], valid: Bool[Array, "B T"]
    ) -> tuple[Int[Array, "B T"], Bool[Array, "B T"]]:
        """Returns the rows unchanged: an ensemble has no user tokens."""
        return tokens, valid

    def unroll(self) -> "PolicyEnsemble":
        """See `Policies.unroll`."""
        ensemble = copy.copy(self)
        ensemble.policies = self.policies.unroll()
        return ensemble

    @property
    def selectable(self) -> bool:
        """See `Policies.selectable`."""
        return self.policies.selectable

    def select(self, rows: Int[Array, " C"], count: int) -> "PolicyEnsemble":
        """See `Policies.select`."""
        ensemble = copy.copy(self)
        ensemble.weights = self.weights[rows]
        ensemble.policies = self.policies.select(copy_indices(rows, self.copies), count * self.copies)
        return ensemble

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        valid: Bool[Array, "B M"],
        cache: Cache | None = None,
        offset: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "B T KD"], Cache | None]:
        """Hidden states of all policies, concatenated to [B, T, K D], and the cache of B K rows."""
        repeated, repeated_valid = (jnp.repeat(x, self.copies, axis=0) for x in (tokens, valid))
        hidden, cache = self.policies(repeated, repeated_valid, cache, offset)
        B, T = tokens.shape
        return hidden.reshape(B, self.copies, T, -1).swapaxes(1, 2).reshape(B, T, -1), cache

    def logits(self, hidden: Float[Array, "B T KD"]) -> Float[Array, "B T V"]:
        """Log-probs of the combined distribution, from hidden states [B, T, K D]."""
        B, T, _ = hidden.shape
        rows = hidden.reshape(B, T, self.copies, -1).swapaxes(1, 2).reshape(B * self.copies, T, -1)
        logps = jax.nn.log_softmax(self.policies.logits(rows))
        logps = logps.reshape(B, self.copies, T, -1).swapaxes(1, 2)
        return combine_logps(logps, self.weights[:, None], self.divergence)
