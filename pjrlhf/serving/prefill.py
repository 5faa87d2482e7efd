"""Reads prompts: short ones together, longer ones in chunks that are kept for later prompts.

A prompt of at most one chunk is read whole, in a program without earlier keys and values. Several prompts that are
padded to the same length are read at once, as many as fill a chunk. Every prompt gets the numbers it gets alone: see
`models.decoder.Linear` for the products, and nothing else crosses rows.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from pjrlhf.errors import UserError
from pjrlhf.models.decoder import Cache
from pjrlhf.serving import programs
from pjrlhf.serving.prefix import PrefixCache
from pjrlhf.serving.served import ServedModel
from pjrlhf.serving.settings import EngineSettings
from pjrlhf.serving.tickets import Request, Ticket, Token

SMALLEST_CHUNK = 16  # the last tokens of a prompt are padded to a power of two from here on


@dataclasses.dataclass(eq=False)
class Prompt:
    """A prompt that is read, or that waits for slots.

    Attributes:
      tokens: with places for user tokens.
      keys: of its whole chunks in the prefix cache.
      row: of `cache`, or of the cache of the prefill where that is None.
      cache: keys and values of the short prompts that were read with it.
      read: tokens read so far.
      last: rows of hidden states, with that of the last token; None before.
      started: answers that have got a slot.
    """

    ticket: Ticket
    tokens: np.ndarray
    keys: list[bytes]
    row: int
    cache: Cache | None = None
    read: int = 0
    last: jax.Array | None = None
    started: int = 0


class Prefill:
    """The prompts that are read or wait for slots.

    Args:
      served: the model.
      settings: sizes.
      results: gets functions that wait for what was dispatched and hand it on.

    Attributes:
      cache: keys and values of longer prompts, one row for each device over which rows are split.
      prompts: that `choose` found together.
      prefixes: chunks of earlier prompts.

    Raises:
      UserError: the prefix cache is smaller than a chunk.
    """

    def __init__(self, served: ServedModel, settings: EngineSettings, results: collections.deque[Callable[[], None]]):
        self._served, self._results = served, results
        self.chunk = min(settings.chunk, served.context)
        self._tokens = settings.chunk  # read at once
        self.cache = programs.make_cache(served.model, served.shards, served.context)
        self.prompts: list[Prompt] = []
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

    def group(self, size: int) -> int:
        """Short prompts of this padded length that are read at once, at most."""
        return self._served.shards * max(1, self._tokens // size)

    def padded(self, tokens: int) -> int:
        """The length to which the next chunk is padded where so many tokens are left.

        It depends on the length of the prompt alone.
        """
        return min(self.chunk, max(SMALLEST_CHUNK, 1 << (tokens - 1).bit_length()))

    def choose(self, queue: Iterable[Ticket]) -> list[Ticket]:
        """The requests of the queue to read next: the first one, and those that can be read with it."""

        def kind(request: Request) -> tuple[int, bool]:
            length = len(request.tokens) + self._served.places(request)
            return (0, False) if length > self.chunk else (self.padded(length), request.prompt_logps)

        found: list[Ticket] = []
        alone, most, wanted = self._served.shards, 0, None
        for ticket in queue:
            if wanted is None:
                wanted = size, scored = kind(ticket.request)
                most = alone if scored or not size else self.group(size)
            if kind(ticket.request) == wanted:
                found.append(ticket)
            if len(found) == most:
                break
        # A program for many rows that are mostly empty takes longer than one for few.
        return found if 2 * len(found) > most else found[:alone]

    def take(self, tickets: Sequence[Ticket]) -> None:
        """Takes requests that `choose` found together; the prefix cache may have the starts of long ones."""
        for row, ticket in enumerate(tickets):
            request, served = ticket.request, self._served
            own, offset = served.places(request), min(served.model.user_offset, len(request.tokens))
            # The decoder puts user tokens there.
            places = [served.tokenizer.pad_id] * own
            tokens = np.array([*request.tokens[:offset], *places, *request.tokens[offset:]], np.int32)
            prompt = Prompt(ticket, tokens, self.prefixes.keys(request, tokens), row)
            if not request.prompt_logps:  # hidden states are not kept
                for found in self.prefixes.find(prompt.keys):
                    self.cache = programs.write_chunk(served.model, self.cache, found, row, prompt.read)
                    prompt.read += self.chunk
            ticket.cached_tokens = max(0, prompt.read - own)
            self.prompts.append(prompt)

    def read(self) -> int:
        """Reads short prompts, or the next chunk of longer ones.

        Returns:
          The number of tokens read, padding included; 0 where all prompts are read.
        """
        unread = [prompt for prompt in self.prompts if prompt.last is None]
        if not unread:
            return 0
        size = self.padded(len(unread[0].tokens) - unread[0].read)
        if len(unread[0].tokens) <= self.chunk:
            rows = self._served.shards if len(unread) <= self._served.shards else self.group(size)
            for row, prompt in enumerate(unread):
                prompt.row = row
            cache = programs.make_cache(self._served.model, rows, size)
            cache = self._read(cache, unread, rows, size)
            for prompt in unread:
                prompt.cache = cache
            return rows * size
        rows = self._served.shards
        alike = [prompt for prompt in unread if self.padded(len(prompt.tokens) - prompt.read) == size]
        self.cache = self._read(self.cache, alike, rows, size)
        for prompt in alike:
            index = (prompt.read - 1) // self.chunk
            if prompt.read % self.chunk == 0 and index < len(prompt.keys) and prompt.keys[index] not in self.prefixes:
                kept = programs.read_chunk(self.cache, prompt.row, prompt.read - self.chunk, self.chunk)
                self.prefixes.keep(prompt.keys[index], kept)
        return rows * size

    def _read(self, cache: Cache, prompts: Sequence[Prompt], rows: int, size: int) -> Cache:
        """Reads the next `size` tokens of prompts in a cache of this number of rows, and returns the cache."""
        served, length = self._served, jax.tree.leaves(cache)[0].shape[-2]
        tokens = np.full((rows, size), served.tokenizer.pad_id, np.int32)
        offset, count = np.full(rows, length, np.int32), np.zeros(rows, np.int32)
        following = np.zeros_like(tokens)
        requests: list[Request | None] = [None] * rows
        for prompt in prompts:
            row, start = prompt.row, prompt.read
            part, after = prompt.tokens[start : start + size], prompt.tokens[start + 1 : start + 1 + size]
            tokens[row, : len(part)], offset[row], count[row] = part, start, len(part)
            following[row, : len(after)] = after
            requests[row] = prompt.ticket.request
        cache, hidden, last = programs.prefill(
            served.backbone, served.bank, cache, tokens, offset, count, *served.speakers(requests)
        )
        if scored := [prompt for prompt in prompts if prompt.ticket.request.prompt_logps]:
            scores = programs.score(served.backbone, hidden, following)
            starts = {prompt.row: (prompt, prompt.read) for prompt in scored}
            self._results.append(lambda: self._hand_on_scores(scores, starts, size))
        for prompt in prompts:
            prompt.read += int(count[prompt.row])
            if prompt.read == len(prompt.tokens):
                prompt.last = last
        return cache

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
