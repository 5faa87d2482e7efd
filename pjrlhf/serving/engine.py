"""Answers many requests at once, each with its own soup or person: continuous batching with static shapes.

The batch has a fixed number of slots. A request waits in a queue, its prompt is read in chunks by a prefill of its own,
and each of its answers then takes a free slot until it ends. One dispatch draws several tokens in all slots; while the
devices work on it, the host reads the results of the dispatch before.

An answer does not depend on who shares the batch: rows of a batch do not see each other, a prompt is always cut into
the same chunks, and every draw has a key that the request alone determines. A prompt whose start was read before takes
the keys and values of whole chunks from the prefix cache, which hold the same numbers as a new pass over them.
"""

import collections
import dataclasses
import hashlib
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from pjrlhf.data.tokenization import Tokenizer
from pjrlhf.errors import UserError
from pjrlhf.models.adapters import Backbone, bank_size, is_low_rank
from pjrlhf.parallel.mesh import num_shards
from pjrlhf.serving import programs
from pjrlhf.serving.programs import Wanted
from pjrlhf.serving.settings import EngineSettings
from pjrlhf.serving.text import AnswerText
from pjrlhf.settings import fold_seed
from pjrlhf.types import Params

SMALLEST_CHUNK = 16  # the last tokens of a prompt are padded to a power of two from here on


class QueueFull(Exception):
    """Too many requests wait already."""


class Closing(Exception):
    """The engine takes no more requests."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """A prompt and how to answer it.

    Attributes:
      tokens: ids of the prompt, without user tokens.
      max_new_tokens: of an answer; 0 reads the prompt only.
      plain: the prompt is plain text, see `AnswerText`.
      n: number of answers; they share the pass over the prompt.
      mix: float [K], weights of the adapters; None without a bank.
      user_tokens: float [E, D], for an engine with user tokens.
      temperature: 0 is greedy.
      top_k, top_p: truncation of the distribution; 0 and 1 turn it off.
      seed: any integer.
      stop: strings that end an answer.
      alternatives: number of most likely tokens whose log-probs come with every token, 0 to 20.
      prompt_logps: the prompt's tokens come with log-probs, too.
    """

    tokens: Sequence[int]
    max_new_tokens: int
    plain: bool = False
    n: int = 1
    mix: np.ndarray | None = None
    user_tokens: np.ndarray | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: Sequence[str] = ()
    alternatives: int = 0
    prompt_logps: bool = False


@dataclasses.dataclass(frozen=True)
class Token:
    """A token with its log-prob under the model, in nats.

    Attributes:
      logp: None for the first token of a prompt.
      top: ids and log-probs of the most likely tokens, most likely first.
    """

    id: int
    logp: float | None
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Piece:
    """The next part of an answer.

    Attributes:
      index: of the answer among the n.
      text: to append.
      tokens: drawn since the piece before; their text may come with a later piece.
      finish: "stop" or "length" in the last piece of the answer, "cancelled" after a cancellation, None before.
    """

    index: int
    text: str
    tokens: tuple[Token, ...]
    finish: str | None


class Ticket:
    """A request in the engine.

    Attributes:
      request: as submitted.
      prompt: tokens of the prompt with their log-probs, where asked for; complete before the first piece.
      cached_tokens: of the prompt, taken from the prefix cache.
      submitted, first: times in seconds (`time.monotonic`), of submission and of the first token.
      error: what stopped the engine, or None.
      done: set after the last piece.
    """

    def __init__(self, request: Request, listener: Callable[["Ticket", Piece], None]):
        self.request = request
        self.prompt: list[Token] = []
        self.cached_tokens = 0
        self.submitted = time.monotonic()
        self.first: float | None = None
        self.error: BaseException | None = None
        self.done = threading.Event()
        self.cancelled = False
        self.listener = listener
        self.open = request.n  # answers that are not finished


@dataclasses.dataclass(eq=False)
class _Answer:
    """One of the n answers of a request, from its slot on."""

    ticket: Ticket
    index: int
    text: AnswerText
    count: int = 0
    finish: str | None = None


@dataclasses.dataclass(eq=False)
class _Prompt:
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


@dataclasses.dataclass(frozen=True)
class Finished:
    """A whole answer.

    Attributes:
      text: of the answer.
      tokens: all that were drawn, with one that ended the answer.
      finish: see `Piece`.
    """

    text: str
    tokens: tuple[Token, ...]
    finish: str | None

    @classmethod
    def of(cls, pieces: Sequence[Piece], n: int) -> "list[Finished]":
        """The n answers that pieces make."""
        own = [[piece for piece in pieces if piece.index == index] for index in range(n)]
        return [
            cls("".join(p.text for p in one), tuple(t for p in one for t in p.tokens), one[-1].finish if one else None)
            for one in own
        ]


class Engine:
    """Answers requests with one base and one bank.

    Args:
      backbone: the base with the shape of its adapters; on several devices, sharded, its model with `batch_sharding`.
      tokenizer: of the base.
      bank: low-rank adapters, or None for the base alone.
      user_tokens: E, the number of user tokens that every request brings.
      settings: sizes.

    Raises:
      UserError: sizes that do not fit the model, or a bank of full parameters.
    """

    def __init__(
        self,
        backbone: Backbone,
        tokenizer: Tokenizer,
        bank: Params | None = None,
        user_tokens: int = 0,
        settings: EngineSettings = EngineSettings(),  # noqa: B008 - frozen
    ):
        if bank is not None and not is_low_rank(bank):
            raise UserError(
                "bank: holds full parameters, and every soup of them would be a model of its own; merge a soup with "
                "pjrlhf merge, and serve its folder"
            )
        config = backbone.model.config
        self.context = settings.context or min(config.max_length, 4096)
        if self.context > config.max_length:
            raise UserError(
                f"context: {self.context} is more than the {config.max_length} tokens of the model; lower it"
            )
        if user_tokens >= self.context:
            raise UserError(f"context: {self.context} has no room after {user_tokens} user tokens; raise it")
        self.settings, self.tokenizer, self.num_user_tokens = settings, tokenizer, user_tokens
        self.chunk = min(settings.chunk, self.context)
        self._rows = 1 if backbone.model.batch_sharding is None else num_shards(backbone.model.batch_sharding)
        self._slots_count = settings.slots + -settings.slots % self._rows
        self._adapters = 0 if bank is None else bank_size(bank)
        self._ends = jnp.asarray(tokenizer.eos_ids, jnp.int32)
        self._backbone, self._bank = _unrolled(backbone, bank)
        model = self._backbone.model
        blank = self._wanted([None] * self._slots_count)
        self._slots = programs.make_slots(model, self._slots_count, self.context, blank)
        self._cache = programs.make_cache(model, self._rows, self.context)
        self._answers: list[_Answer | None] = [None] * self._slots_count
        self._prompts: list[_Prompt | None] = [None] * self._rows
        self._stopped = np.zeros(self._slots_count, bool)
        self._prefixes: collections.OrderedDict[bytes, Any] = collections.OrderedDict()
        # What was dispatched and not read: functions that wait for it and hand it on.
        self._results: collections.deque[Callable[[], None]] = collections.deque()
        self._queue: collections.deque[Ticket] = collections.deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closing = False
        self.failure: BaseException | None = None

    # ---- requests

    def submit(self, request: Request, listener: Callable[[Ticket, Piece], None]) -> Ticket:
        """Puts a request into the queue. The engine calls `listener` from its thread with every piece of an answer.

        Raises:
          UserError: the request does not fit the model or the bank; the message starts with the name of a field.
          QueueFull: too many requests wait.
          Closing: the engine takes no more.
        """
        self.check(request)
        ticket = Ticket(request, listener)
        with self._changed:
            if not self.healthy:
                raise Closing
            if len(self._queue) >= self.settings.queue:
                raise QueueFull
            self._queue.append(ticket)
            self._changed.notify_all()
        return ticket

    def check(self, request: Request) -> None:
        """Raises UserError for a request that does not fit the model or the bank."""
        length = len(request.tokens) + self.num_user_tokens
        if not len(request.tokens):
            raise UserError("tokens: the prompt is empty; give at least one token")
        if length + request.max_new_tokens > self.context:
            own = f" and {self.num_user_tokens} user tokens" if self.num_user_tokens else ""
            raise UserError(
                f"max_new_tokens: a prompt of {len(request.tokens)} tokens{own} and {request.max_new_tokens} new ones "
                f"exceed the context of {self.context} tokens; shorten the prompt or ask for fewer tokens"
            )
        rows = self._backbone.model.config.vocab_size
        if not all(0 <= i < rows for i in request.tokens):
            raise UserError(f"tokens: the prompt has an id that is not among the {rows} of the model; correct it")
        for name, value, width in (
            ("mix", request.mix, (self._adapters,)),
            ("user_tokens", request.user_tokens, (self.num_user_tokens, self._backbone.model.config.hidden_size)),
        ):
            wanted = width if width[0] else None
            if (None if value is None else np.shape(value)) != wanted:
                raise UserError(f"{name}: has shape {None if value is None else np.shape(value)}; give {wanted}")
            if value is not None and not np.isfinite(value).all():
                raise UserError(f"{name}: holds numbers that are not finite; correct them")

    def cancel(self, ticket: Ticket) -> None:
        """Ends a request soon; its slots become free for others."""
        with self._changed:
            ticket.cancelled = True
            self._changed.notify_all()

    def answer(self, requests: Sequence[Request]) -> list[list[Finished]]:
        """All answers to all requests, in their order; for use without a thread."""
        pieces: dict[Ticket, list[Piece]] = {}
        waiting, tickets = collections.deque(requests), []
        while waiting or any(not ticket.done.is_set() for ticket in tickets):
            while waiting and len(self._queue) < self.settings.queue:
                ticket = self.submit(waiting.popleft(), lambda ticket, piece: pieces[ticket].append(piece))
                tickets.append(ticket)
                pieces[ticket] = []
            self.step()
        return [Finished.of(pieces[ticket], ticket.request.n) for ticket in tickets]

    # ---- state for health and metrics

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """Answers in slots."""
        return sum(answer is not None for answer in self._answers)

    @property
    def healthy(self) -> bool:
        """Whether it takes requests."""
        return not self._closing and self.failure is None

    @property
    def busy(self) -> bool:
        """Whether there is something to do."""
        return bool(self._queue or self._results or self.running or any(self._prompts))

    # ---- the loop

    def start(self) -> None:
        """Works in a thread of its own from now on."""
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    def close(self, timeout: float | None = None) -> bool:
        """Takes no more requests, and waits until those it has are answered; False where that takes too long."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(timeout)
            return not self._thread.is_alive()
        return True

    def _loop(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self.busy or self._closing)
                if not self.busy:
                    return
            try:
                self.step()
            except Exception as error:  # whatever the devices report: nobody may wait for ever
                logging.exception("the engine stopped")
                self._fail(error)
                return

    def step(self) -> None:
        """Starts what can be started, and hands on results of the dispatch before."""
        self._drop_cancelled()
        self._read_prompts()
        dispatched = any(self._answers)
        if dispatched:
            self._dispatch()
        # One dispatch stays in flight while the host reads the one before.
        while len(self._results) > dispatched:
            self._results.popleft()()

    def _drop_cancelled(self) -> None:
        with self._changed:
            gone = [ticket for ticket in self._queue if ticket.cancelled]
            for ticket in gone:
                self._queue.remove(ticket)
        for ticket in gone:
            self._end(ticket)
        for row, prompt in enumerate(self._prompts):
            if prompt is not None and prompt.ticket.cancelled:
                self._prompts[row] = None
                prompt.ticket.open -= prompt.ticket.request.n - prompt.started
                if not prompt.ticket.open:
                    self._end(prompt.ticket)
        for slot, answer in enumerate(self._answers):
            if answer is not None and answer.ticket.cancelled:
                self._finish(slot, answer, "cancelled", ())

    def _end(self, ticket: Ticket) -> None:
        """After the last answer, or none."""
        if ticket.cancelled:
            ticket.listener(ticket, Piece(0, "", (), "cancelled"))
        ticket.done.set()

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self.failure = error
            tickets = {*self._queue, *(x.ticket for x in (*self._prompts, *self._answers) if x is not None)}
            self._queue.clear()
        for ticket in tickets:
            ticket.error = error
            ticket.cancelled = True
            self._end(ticket)

    # ---- prompts

    def _read_prompts(self) -> None:
        """Reads chunks of prompts up to the budget of a step, and starts answers in free slots."""
        budget = self.settings.prefill_tokens
        while True:
            self._start_answers()
            for row, prompt in enumerate(self._prompts):
                if prompt is None and (new := self._next_prompt(row)):
                    self._prompts[row] = new
            unread = [prompt for prompt in self._prompts if prompt is not None and prompt.last is None]
            if not unread or budget <= 0:
                return
            size = self._chunk_size(unread[0])
            self._read_chunk(size)
            budget -= size

    def _next_prompt(self, row: int) -> _Prompt | None:
        """The next request of the queue, with what the prefix cache has of its prompt in a row of the prefill."""
        with self._changed:
            if not self._queue:
                return None
            ticket = self._queue.popleft()
        request, offset = ticket.request, min(self._backbone.model.user_offset, len(ticket.request.tokens))
        places = [self.tokenizer.pad_id] * self.num_user_tokens  # the decoder puts user tokens there
        tokens = np.array([*request.tokens[:offset], *places, *request.tokens[offset:]], np.int32)
        prompt = _Prompt(ticket, tokens, self._keys(request, tokens))
        if not request.prompt_logps:  # hidden states are not kept
            for key in prompt.keys:
                if (found := self._prefixes.get(key)) is None:
                    break
                self._prefixes.move_to_end(key)
                self._cache = programs.write_chunk(self._backbone.model, self._cache, found, row, prompt.read)
                prompt.read += self.chunk
        ticket.cached_tokens = max(0, prompt.read - self.num_user_tokens)
        return prompt

    def _keys(self, request: Request, tokens: np.ndarray) -> list[bytes]:
        """Of every whole chunk before the last token: a digest of all that decides on its keys and values."""
        if not self.settings.prefix_chunks:
            return []
        digest = hashlib.blake2b(digest_size=16)
        for part in (request.mix, request.user_tokens):
            digest.update(b"" if part is None else np.asarray(part, np.float32).tobytes())
        keys = []
        for end in range(self.chunk, len(tokens), self.chunk):
            digest.update(tokens[end - self.chunk : end].tobytes())
            keys.append(digest.digest())
        return keys

    def _chunk_size(self, prompt: _Prompt) -> int:
        """The length to which the next chunk is padded; it depends on the length of the prompt alone."""
        left = len(prompt.tokens) - prompt.read
        return min(self.chunk, max(SMALLEST_CHUNK, 1 << (left - 1).bit_length()))

    def _read_chunk(self, size: int) -> None:
        """Reads the next chunk of all prompts whose chunk has this size."""
        chunk = {
            row: prompt
            for row, prompt in enumerate(self._prompts)
            if prompt is not None and prompt.last is None and self._chunk_size(prompt) == size
        }
        tokens = np.full((self._rows, size), self.tokenizer.pad_id, np.int32)
        offset, count = np.full(self._rows, self.context, np.int32), np.zeros(self._rows, np.int32)
        following = np.zeros_like(tokens)
        for row, prompt in chunk.items():
            part = prompt.tokens[prompt.read : prompt.read + size]
            tokens[row, : len(part)], offset[row], count[row] = part, prompt.read, len(part)
            after = prompt.tokens[prompt.read + 1 : prompt.read + 1 + size]
            following[row, : len(after)] = after
        requests = [None if prompt is None else prompt.ticket.request for prompt in self._prompts]
        wanted = self._wanted(requests)
        self._cache, hidden, last = programs.prefill(
            self._backbone, self._bank, self._cache, tokens, offset, count, wanted.mix, wanted.user_tokens
        )
        scored = {row: prompt for row, prompt in chunk.items() if prompt.ticket.request.prompt_logps}
        if scored:
            scores = programs.score(self._backbone, hidden, following)
            starts = {row: (prompt, prompt.read) for row, prompt in scored.items()}
            self._results.append(lambda: self._hand_on_scores(scores, starts, size))
        for row, prompt in chunk.items():
            index, prompt.read = prompt.read // self.chunk, prompt.read + int(count[row])
            if prompt.read % self.chunk == 0 and index < len(prompt.keys):
                self._keep(prompt.keys[index], row, prompt.read - self.chunk)
            if prompt.read == len(prompt.tokens):
                prompt.last = last
                if not prompt.ticket.request.max_new_tokens:
                    self._prompts[row] = None
                    self._results.append(lambda ticket=prompt.ticket: self._end_unanswered(ticket))

    def _keep(self, key: bytes, row: int, start: int) -> None:
        """Puts a chunk into the prefix cache."""
        if key not in self._prefixes:
            self._prefixes[key] = programs.read_chunk(self._cache, row, start, self.chunk)
            while len(self._prefixes) > self.settings.prefix_chunks:
                self._prefixes.popitem(last=False)

    def _hand_on_scores(self, scores: Any, starts: dict[int, tuple[_Prompt, int]], size: int) -> None:
        logps, top_ids, top_logps = jax.device_get(scores)
        for row, (prompt, start) in starts.items():
            ticket = prompt.ticket
            tokens, own = ticket.request.tokens, self.num_user_tokens
            first = min(self._backbone.model.user_offset, len(tokens))
            for position in range(start, min(start + size, len(prompt.tokens) - 1)):
                # The token after a position; user tokens themselves are never scored.
                following = position + 1 if position + 1 < first else position + 1 - own
                if first <= position + 1 < first + own:
                    continue
                i, top = position - start, ticket.request.alternatives
                pairs = zip(top_ids[row, i, :top].tolist(), top_logps[row, i, :top].tolist(), strict=True)
                ticket.prompt.append(Token(int(tokens[following]), float(logps[row, i]), tuple(pairs)))

    def _end_unanswered(self, ticket: Ticket) -> None:
        ticket.first = time.monotonic()
        for index in range(ticket.request.n):
            ticket.listener(ticket, Piece(index, "", (), "length"))
        ticket.open = 0
        ticket.done.set()

    # ---- answers

    def _start_answers(self) -> None:
        """Gives free slots to the answers of prompts that are read, oldest first."""
        ready = [(row, p) for row, p in enumerate(self._prompts) if p is not None and p.last is not None]
        for row, prompt in sorted(ready, key=lambda one: one[1].ticket.submitted):
            request = prompt.ticket.request
            while prompt.started < request.n and None in self._answers:
                slot = self._answers.index(None)
                self._slots = programs.insert(
                    self._backbone.model,
                    self._slots,
                    self._cache,
                    prompt.last,
                    row,
                    slot,
                    len(prompt.tokens),
                    self._wanted([request], prompt.started),
                )
                text = AnswerText(self.tokenizer, request.tokens if request.plain else None, request.stop)
                self._answers[slot] = _Answer(prompt.ticket, prompt.started, text)
                self._stopped[slot] = False
                prompt.started += 1
            if prompt.started == request.n:
                self._prompts[row] = None

    def _dispatch(self) -> None:
        """Draws the next tokens in all slots."""
        self._slots, drawn = programs.decode(
            self.settings.steps, self._backbone, self._bank, self._slots, self._stopped.copy(), self._ends
        )
        self._stopped[:] = False
        answers = tuple(self._answers)
        if not any(answer is not None and answer.ticket.request.alternatives for answer in answers):
            drawn = drawn.replace(top_ids=None, top_logps=None)
        for leaf in jax.tree.leaves(drawn):
            leaf.copy_to_host_async()
        self._results.append(lambda: self._hand_on(drawn, answers))

    def _hand_on(self, drawn: programs.Drawn, answers: Sequence[_Answer | None]) -> None:
        """Hands the tokens of a dispatch on to the listeners of its answers."""
        drawn = jax.device_get(drawn)
        now = time.monotonic()
        for slot, answer in enumerate(answers):
            if answer is None or answer.finish is not None:
                continue
            steps = np.flatnonzero(drawn.emitted[:, slot])
            tokens, finish = [], None
            for i in steps.tolist():
                tokens.append(_token(drawn, i, slot, answer.ticket.request.alternatives))
                finish = self._add(answer, tokens[-1].id)
                if finish:
                    break
            answer.ticket.first = answer.ticket.first or now
            if finish:
                self._finish(slot, answer, finish, tokens)
            elif tokens:
                answer.ticket.listener(answer.ticket, Piece(answer.index, answer.text.take(), tuple(tokens), None))

    def _add(self, answer: _Answer, token: int) -> str | None:
        """Adds a token to an answer; returns why the answer ends with it."""
        answer.count += 1
        if token in self.tokenizer.eos_ids:
            return "stop"
        answer.text.add([token])
        if answer.text.stopped:
            return "stop"
        return "length" if answer.count == answer.ticket.request.max_new_tokens else None

    def _finish(self, slot: int, answer: _Answer, reason: str, tokens: Sequence[Token]) -> None:
        """Ends an answer and frees its slot. The devices may not know that it is over."""
        answer.finish = reason
        if self._answers[slot] is answer:
            self._answers[slot] = None
            self._stopped[slot] = True
        ticket = answer.ticket
        ticket.open -= 1
        if reason != "cancelled":
            ticket.listener(ticket, Piece(answer.index, answer.text.take(end=True), tuple(tokens), reason))
        if not ticket.open:
            self._end(ticket)

    # ---- arrays

    def _wanted(self, requests: Sequence[Request | None], sample: int = 0) -> Wanted:
        """The arrays of requests, one row each; of None, rows of no meaning."""
        width = self._backbone.model.config.hidden_size

        def rows(name: str, dtype: type, none: float = 0) -> Any:
            return np.array([none if one is None else getattr(one, name) for one in requests], dtype)

        seeds: Any = np.array([0 if one is None else fold_seed(one.seed) for one in requests], np.uint32)
        samples: Any = np.full(len(requests), sample, np.int32)

        def arrays(name: str, *shape: int) -> Any:
            if not shape[0]:
                return None
            none = np.zeros(shape, np.float32)
            return np.stack([none if one is None else np.asarray(getattr(one, name), np.float32) for one in requests])

        return Wanted(
            limit=rows("max_new_tokens", np.int32),
            temperature=rows("temperature", np.float32),
            top_k=rows("top_k", np.int32),
            top_p=rows("top_p", np.float32, 1.0),
            seed=seeds,
            sample=samples,
            alternatives=rows("alternatives", np.int32) > 0,
            mix=arrays("mix", self._adapters),
            user_tokens=arrays("user_tokens", self.num_user_tokens, width),
        )


def _unrolled(backbone: Backbone, bank: Params | None) -> tuple[Backbone, Params | None]:
    """The same policies in the layout in which the model decodes fastest, made once for all requests."""
    model = backbone.model
    if model.decode == "scan":
        return backbone, bank
    mix = None if bank is None else jnp.zeros((1, bank_size(bank)))
    variables = jax.jit(lambda backbone, bank: backbone.policies(bank, mix).unroll().variables)(backbone, bank)
    unrolled = model.clone(scan_layers=False, transposed=model.decode == "transposed")
    return Backbone(unrolled, backbone.adapter, variables["params"]), variables.get("adapters")


def _token(drawn: programs.Drawn, step: int, slot: int, alternatives: int) -> Token:
    top = ()
    if alternatives:
        ids, logps = (x[step, slot, :alternatives].tolist() for x in (drawn.top_ids, drawn.top_logps))
        top = tuple(zip(ids, logps, strict=True))
    return Token(int(drawn.tokens[step, slot]), float(drawn.logps[step, slot]), top)
