"""Decoding from several policies at once (MOD, arXiv 2406.18853): their next-token distributions are combined and
nothing is merged. One forward pass serves all, each policy as a row of its own.
"""

import copy
from typing import Any

import jax
import jax.numpy as jnp

from pjrlhf.models.adapters import AdapterConfig, Policies, rows_of_copies
from pjrlhf.models.decoder import Cache, Decoder
from pjrlhf.objectives.multi_objective import combine_logps


class PolicyEnsemble:
    """Stands in for `Policies` in `sampler.generate`: logits are log-probs of the K policies of a bank, combined.

    Args:
      model, adapter, base, bank: as of `Policies`; a full-parameter bank is not taken, for every row is a policy.
      weights: float [B, K], of the policies in each example.
      divergence: see `combine_logps`.
    """

    def __init__(
        self,
        model: Decoder,
        adapter: AdapterConfig,
        base: Any,
        bank: Any,
        weights: jax.Array,
        divergence: str = "reverse_kl",
    ):
        self.model, self.weights, self.divergence = model, weights, divergence
        self.copies = weights.shape[1]
        self.policies = Policies(model, adapter, base, bank, jnp.tile(jnp.eye(self.copies), (len(weights), 1)))

    def reserve(self, tokens: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The same rows: there are no user tokens here."""
        return tokens, valid

    def apart(self) -> "PolicyEnsemble":
        """See `Policies.apart`."""
        found = copy.copy(self)
        found.policies = self.policies.apart()
        return found

    @property
    def separable(self) -> bool:
        """See `Policies.separable`."""
        return self.policies.separable

    def take(self, rows: jax.Array, count: int) -> "PolicyEnsemble":
        """See `Policies.take`."""
        found = copy.copy(self)
        found.weights = self.weights[rows]
        found.policies = self.policies.take(rows_of_copies(rows, self.copies), count * self.copies)
        return found

    def __call__(
        self, tokens: jax.Array, valid: jax.Array, cache: Cache | None = None, offset: jax.Array | int = 0
    ) -> tuple[jax.Array, Cache | None]:
        """Hidden states of all policies side by side, [B, T, K D], and the cache of B K rows."""
        rows = [jnp.repeat(x, self.copies, axis=0) for x in (tokens, valid)]
        hidden, cache = self.policies(*rows, cache, offset)
        B, T = tokens.shape
        return hidden.reshape(B, self.copies, T, -1).swapaxes(1, 2).reshape(B, T, -1), cache

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Log-probs [B, T, V] of the combination."""
        B, T, _ = hidden.shape
        rows = hidden.reshape(B, T, self.copies, -1).swapaxes(1, 2).reshape(B * self.copies, T, -1)
        logps = jax.nn.log_softmax(self.policies.logits(rows))
        logps = logps.reshape(B, self.copies, T, -1).swapaxes(1, 2)
        return combine_logps(logps, self.weights[:, None], self.divergence)
