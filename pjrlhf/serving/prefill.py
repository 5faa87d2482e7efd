"""Reads prompts in chunks, one prompt for each device at a time, and keeps whole chunks for later prompts."""

import collections
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from pjrlhf.errors import UserError
from pjrlhf.serving import programs
from pjrlhf.serving.prefix import PrefixCache
from pjrlhf.serving.served import ServedModel
from pjrlhf.serving.settings import EngineSettings
from pjrlhf.serving.tickets import Ticket, Token

SMALLEST_CHUNK = 16  # the last tokens of a prompt are padded to a power of two from here on


@dataclasses.dataclass(eq=False)
class Prompt:
    """A prompt in a row of the prefill.

    Attributes:
      tokens: with places for user tokens.
      keys: of its whole chunks in the prefix cache.
      read: tokens read so far.
      last: rows of hidden states, with that of the last token; None before.
      started: answers that have got a slot.
    """

    ticket: Ticket
    tokens: np.ndarray
    keys: list[bytes]
    read: int = 0
    last: jax.Array | None = None
    started: int = 0


class Prefill:
    """The prompts that are read, one row for each device over which rows are split.

    Args:
      served: the model.
      settings: sizes.
      results: gets functions that wait for what was dispatched and hand it on.

    Attributes:
      cache: keys and values of the prompts in the rows.
      prompts: by row.
      prefixes: chunks of earlier prompts.

    Raises:
      UserError: the prefix cache is smaller than a chunk.
    """

    def __init__(self, served: ServedModel, settings: EngineSettings, results: collections.deque[Callable[[], None]]):
        self._served, self._results = served, results
        self.chunk = min(settings.chunk, served.context)
        self.cache = programs.make_cache(served.model, served.shards, served.context)
        self.prompts: list[Prompt | None] = [None] * served.shards
        self.prefixes = PrefixCache(round(settings.prefix_mb * 1e6), self.chunk)
        whole = sum(leaf.nbytes for leaf in jax.tree.leaves(self.cache)) / (served.shards * served.context) * self.chunk
        if 0 < self.prefixes.limit < whole:
            raise UserError(
                f"prefix_mb: {settings.prefix_mb:g} MB hold no chunk of {self.chunk} tokens, which takes "
                f"{whole / 1e6:.3g} MB; raise it, lower chunk, or give 0, which turns the prefix cache off"
            )

    @property
    def sizes(self) -> list[int]:
        """Lengths that a chunk may have."""
        found = [min(self.chunk, SMALLEST_CHUNK)]
        while found[-1] < self.chunk:
            found.append(min(self.chunk, 2 * found[-1]))
        return found

    def take(self, ticket: Ticket, row: int) -> None:
        """Puts the prompt of a request into a row, with what the prefix cache has of it."""
        request, served = ticket.request, self._served
        own, offset = served.places(request), min(served.model.user_offset, len(request.tokens))
        # The decoder puts user tokens there.
        places = [served.tokenizer.pad_id] * own
        tokens = np.array([*request.tokens[:offset], *places, *request.tokens[offset:]], np.int32)
        prompt = Prompt(ticket, tokens, self.prefixes.keys(request, tokens))
        if not request.prompt_logps:  # hidden states are not kept
            for found in self.prefixes.find(prompt.keys):
                self.cache = programs.write_chunk(served.model, self.cache, found, row, prompt.read)
                prompt.read += self.chunk
        ticket.cached_tokens = max(0, prompt.read - own)
        self.prompts[row] = prompt

    def read(self) -> int:
        """Reads the next chunk of the first unread prompt and of those that are cut alike.

        Returns:
          The length of the chunk, 0 where all prompts are read.
        """
        unread = [prompt for prompt in self.prompts if prompt is not None and prompt.last is None]
        if not unread:
            return 0
        size = self._chunk_size(unread[0])
        self._read_chunk(size)
        return size

    def _chunk_size(self, prompt: Prompt) -> int:
        """The length to which the next chunk is padded; it depends on the length of the prompt alone."""
        left = len(prompt.tokens) - prompt.read
        return min(self.chunk, max(SMALLEST_CHUNK, 1 << (left - 1).bit_length()))

    def _read_chunk(self, size: int) -> None:
        """Reads the next chunk of all prompts whose chunk has this size."""
        chunk = {
            row: prompt
            for row, prompt in enumerate(self.prompts)
            if prompt is not None and prompt.last is None and self._chunk_size(prompt) == size
        }
        rows, served = len(self.prompts), self._served
        tokens = np.full((rows, size), served.tokenizer.pad_id, np.int32)
        offset, count = np.full(rows, served.context, np.int32), np.zeros(rows, np.int32)
        following = np.zeros_like(tokens)
        for row, prompt in chunk.items():
            part = prompt.tokens[prompt.read : prompt.read + size]
            tokens[row, : len(part)], offset[row], count[row] = part, prompt.read, len(part)
            after = prompt.tokens[prompt.read + 1 : prompt.read + 1 + size]
            following[row, : len(after)] = after
        speakers = served.speakers([None if prompt is None else prompt.ticket.request for prompt in self.prompts])
        self.cache, hidden, last = programs.prefill(
            served.backbone,
            served.bank,
            self.cache,
            tokens,
            offset,
            count,
            *speakers,
        )
        scored = {row: prompt for row, prompt in chunk.items() if prompt.ticket.request.prompt_logps}
        if scored:
            scores = programs.score(served.backbone, hidden, following)
            starts = {row: (prompt, prompt.read) for row, prompt in scored.items()}
            self._results.append(lambda: self._hand_on_scores(scores, starts, size))
        for row, prompt in chunk.items():
            index, prompt.read = prompt.read // self.chunk, prompt.read + int(count[row])
            if prompt.read % self.chunk == 0 and index < len(prompt.keys) and prompt.keys[index] not in self.prefixes:
                kept = programs.read_chunk(self.cache, row, prompt.read - self.chunk, self.chunk)
                self.prefixes.keep(prompt.keys[index], kept)
            if prompt.read == len(prompt.tokens):
                prompt.last = last

    def _hand_on_scores(self, scores: Any, starts: dict[int, tuple[Prompt, int]], size: int) -> None:
        logps, top_ids, top_logps = jax.device_get(scores)
        for row, (prompt, start) in starts.items():
            ticket = prompt.ticket
            tokens, own = ticket.request.tokens, self._served.places(ticket.request)
            first = min(self._served.model.user_offset, len(tokens))
            for position in range(start, min(start + size, len(prompt.tokens) - 1)):
                # The token after a position; user tokens themselves are never scored.
                following = position + 1 if position + 1 < first else position + 1 - own
                if first <= position + 1 < first + own:
                    continue
                i, top = position - start, ticket.request.alternatives
                pairs = zip(top_ids[row, i, :top].tolist(), top_logps[row, i, :top].tolist(), strict=True)
                ticket.prompt.append(Token(int(tokens[following]), float(logps[row, i]), tuple(pairs)))
