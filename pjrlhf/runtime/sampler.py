"""Samples answers to many prompts in chunks of equal size."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from pjrlhf.data.schema import Prompt
from pjrlhf.models.adapters import Backbone, Policies, is_low_rank
from pjrlhf.rollout.batches import Prompts, Rollout
from pjrlhf.rollout.decoding import PolicyEnsemble
from pjrlhf.rollout.sampler import Sampling, generate
from pjrlhf.runtime.text import Text
from pjrlhf.training.progress import progress
from pjrlhf.types import Array, Params, PRNGKey

# (backbone, parameters, data of every row [B, ...] or None) -> the policies of the B rows of a chunk.
PoliciesOf = Callable[[Backbone, Any, Any], Policies | PolicyEnsemble]


def mixed(backbone: Backbone, bank: Params | None, mix: Float[Array, "B K"] | None) -> Policies:
    """The soups of a bank with the weights in rows of `mix`; the base where `bank` is None.

    A bank of full parameters is merged once per chunk, so all rows of the chunk must be equal.
    """
    if bank is not None and mix is not None and not is_low_rank(bank):
        mix = mix[:1]
    return backbone.policies(bank, mix)


class Sampler:
    """Samples answers in chunks of rows.

    The last chunk repeats its first row, so that all chunks of a shape share one program.

    Args:
      text: encodes prompts and decodes answers.
      policies: makes the policies of a chunk.
      sampling: length, temperature and special tokens; those of the run where None.
      size: rows of a chunk, rounded up to a multiple that splits evenly over the devices; `text.sample_rows` where 0.
    """

    def __init__(
        self,
        text: Text,
        backbone: Backbone,
        policies: PoliciesOf = mixed,
        sampling: Sampling | None = None,
        size: int = 0,
    ):
        self.text, self.backbone, self.policies = text, backbone, policies
        self.size = text.devices.even(size) if size else text.sample_rows
        self.sampling = sampling or text.sampling()
        self._draw = jax.jit(self.draw)

    def draw(
        self, backbone: Backbone, parameters: Params | None, rows: Array | None, prompts: Prompts, key: PRNGKey
    ) -> Rollout:
        """The rollout of a chunk; pure, for `jax.jit`."""
        return generate(self.policies(backbone, parameters, rows), self.sampling, prompts, key)

    def __call__(
        self,
        name: str,
        prompts: Sequence[Prompt],
        keys: Callable[[int], PRNGKey],
        parameters: Params | None = None,
        rows: np.ndarray | None = None,
        groups: Sequence[Any] | None = None,
    ) -> list[str]:
        """One answer to every prompt.

        Args:
          name: of the progress bar.
          prompts: M of them.
          keys: number of a chunk -> its PRNG key.
          parameters: of the policies, the same for all rows.
          rows: data of every prompt, [M, ...], such as its row of `mix` or its user.
          groups: group of every prompt, M sortable values; a chunk has prompts of one group.

        Raises:
          UserError: a prompt is too long, see `Text.encode`.
        """
        size, texts = self.size, [""] * len(prompts)
        chunks = _chunks(len(prompts), size, groups)
        with progress(name, len(chunks)) as bar:
            for number, chunk in enumerate(chunks):
                padded = chunk + [chunk[0]] * (size - len(chunk))
                batch = self.text.encode([prompts[i] for i in padded])
                placed, own = self.text.devices.place(batch), None if rows is None else rows[np.array(padded)]
                rollout = self._draw(self.backbone, parameters, own, placed, keys(number))
                for i, text in zip(chunk, self.text.decode(batch, rollout), strict=False):
                    texts[i] = text
                bar.update(number + 1, {})
        return texts


def _chunks(count: int, size: int, groups: Sequence[Any] | None) -> list[list[int]]:
    """Indices below `count` in chunks of at most `size`, each of one group."""
    members = [list(range(count))]
    if groups is not None:
        order = sorted(range(count), key=lambda i: groups[i])
        members = [list(group) for _, group in itertools.groupby(order, key=lambda i: groups[i])]
    return [group[i : i + size] for group in members for i in range(0, len(group), size)]
