"""Answers many requests at once, each with its own soup or person: continuous batching with static shapes.

The batch has a fixed number of slots. A request waits in a queue, its prompt is read by the prefill, short prompts
together and longer ones in chunks, and each of its answers then takes a free slot until it ends. One dispatch draws
several tokens in all slots; while the devices work on it, the host reads the results of the dispatch before.

An answer does not depend on who shares the batch: rows of a batch do not see each other, a prompt is always cut into
the same chunks, and every draw has a key that the request alone determines. A prompt whose start was read before takes
the keys and values of whole chunks from the prefix cache, which hold the same numbers as a new pass over them.
"""

import collections
import threading
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from pjrlhf.data.tokenization import Tokenizer
from pjrlhf.models.adapters import Backbone
from pjrlhf.serving import programs
from pjrlhf.serving.prefill import Prefill
from pjrlhf.serving.served import ServedModel
from pjrlhf.serving.settings import EngineSettings
from pjrlhf.serving.slots import Answer
from pjrlhf.serving.text import AnswerText
from pjrlhf.serving.tickets import Closing, Finished, Piece, QueueFull, Request, Ticket, Token
from pjrlhf.types import Params


class Engine:
    """Answers requests with one base and one bank.

    Args:
      backbone: the base with the shape of its adapters; on several devices, sharded, its model with `batch_sharding`.
      tokenizer: of the base.
      bank: low-rank adapters, or None for the base alone.
      user_tokens: E, the number of user tokens of a request that brings any.
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
        self.settings, self.tokenizer = settings, tokenizer
        self.served = served = ServedModel.make(backbone, bank, tokenizer, user_tokens, settings.context)
        self.context, self.num_user_tokens = served.context, user_tokens
        # What was dispatched and not read: functions that wait for it and hand it on.
        self._results: collections.deque[Callable[[], None]] = collections.deque()
        self.prefill = Prefill(served, settings, self._results)
        count = settings.slots + -settings.slots % served.shards
        self._slots = programs.make_slots(served.model, count, served.context, served.wanted([None] * count))
        self._answers: list[Answer | None] = [None] * count
        self._stopped = np.zeros(count, bool)
        self._ends = jnp.asarray(tokenizer.eos_ids, jnp.int32)
        self._queue: collections.deque[Ticket] = collections.deque()
        self._open: set[Ticket] = set()
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
        self.served.check(request)
        ticket = Ticket(request, listener)
        with self._changed:
            if self.state != "ok":
                raise Closing
            if len(self._queue) >= self.settings.queue:
                raise QueueFull
            self._queue.append(ticket)
            self._open.add(ticket)
            self._changed.notify_all()
        return ticket

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

    def warm_up(self) -> None:
        """Compiles what requests may need: otherwise all answers would wait for the first prompt of another length."""
        mix = np.zeros(self.served.adapters, np.float32) if self.served.adapters else None
        prefill, longest = self.prefill, self.context
        together: list[list[Request]] = []

        def add(length: int, count: int = 1, scored: bool = False) -> None:
            limit = min(1, longest - length)
            one = Request(tokens=[0] * length, max_new_tokens=limit, mix=mix, temperature=1.0, prompt_logps=scored)
            together.append([one] * count)

        for size in prefill.sizes:
            # One token less is padded to the same length, and leaves room for an answer.
            length = next(n for n in (min(size, longest - 1), size) if n and prefill.padded(n) == size)
            add(length, scored=True)
            if prefill.group(size) > self.served.shards:
                add(length, prefill.group(size))
            more = min(size, longest - prefill.chunk)
            if more and prefill.padded(more) == size:
                add(prefill.chunk + more)
        if longest > prefill.chunk:
            add(prefill.chunk + 1)  # its start comes from the prefix cache
        for requests in together:
            self.answer(requests)
        self.prefill.prefixes.clear()

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
    def state(self) -> str:
        """ "ok" where it takes requests, "draining" after `drain`, "stopped" after a failure."""
        return "stopped" if self.failure is not None else "draining" if self._closing else "ok"

    @property
    def busy(self) -> bool:
        """Whether there is something to do."""
        return bool(self._queue or self._results or self.running or self.prefill.prompts)

    # ---- the loop

    def start(self) -> None:
        """Works in a thread of its own from now on."""
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    def drain(self) -> None:
        """Takes no more requests from now on; those it has are answered."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    def close(self, timeout: float | None = None) -> bool:
        """Drains, and waits until all requests are answered; False where that takes too long."""
        self.drain()
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
        for prompt in [prompt for prompt in self.prefill.prompts if prompt.ticket.cancelled]:
            self.prefill.prompts.remove(prompt)
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
        with self._changed:
            self._open.discard(ticket)
        ticket.done.set()

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self.failure = error
            tickets = list(self._open)
            self._queue.clear()
        for ticket in tickets:
            ticket.error = error
            ticket.cancelled = True
            self._end(ticket)

    # ---- prompts

    def _read_prompts(self) -> None:
        """Reads prompts up to the budget of a step, and starts answers in free slots."""
        budget = self.settings.prefill_tokens
        while True:
            self._start_answers()
            if not self.prefill.prompts:
                self.prefill.take(self._next())
            size = self.prefill.read() if budget > 0 else 0
            if not size:
                return
            budget -= size

    def _next(self) -> list[Ticket]:
        """The requests to read next, out of the queue."""
        with self._changed:
            found = self.prefill.choose(self._queue)
            for ticket in found:
                self._queue.remove(ticket)
        return found

    # ---- answers

    def _start_answers(self) -> None:
        """Gives free slots to the answers of prompts that are read, oldest first."""
        ready = [prompt for prompt in self.prefill.prompts if prompt.last is not None]
        for prompt in sorted(ready, key=lambda one: one.ticket.submitted):
            request = prompt.ticket.request
            if not request.max_new_tokens:
                self.prefill.prompts.remove(prompt)
                self._results.append(lambda ticket=prompt.ticket: self._end_unanswered(ticket))
                continue
            while prompt.started < request.n and None in self._answers:
                slot = self._answers.index(None)
                self._slots = programs.insert(
                    self.served.model,
                    self._slots,
                    self.prefill.cache if prompt.cache is None else prompt.cache,
                    prompt.last,
                    prompt.row,
                    slot,
                    len(prompt.tokens),
                    self.served.wanted([request], prompt.started),
                )
                text = AnswerText(self.tokenizer, request.tokens if request.plain else None, request.stop)
                self._answers[slot] = Answer(prompt.ticket, prompt.started, text)
                self._stopped[slot] = False
                prompt.started += 1
            if prompt.started == request.n:
                self.prefill.prompts.remove(prompt)

    def _end_unanswered(self, ticket: Ticket) -> None:
        """Ends a request that asks for no tokens, once what is known of its prompt is handed on."""
        ticket.first = time.monotonic()
        for index in range(ticket.request.n):
            ticket.listener(ticket, Piece(index, "", (), "length"))
        ticket.open = 0
        self._end(ticket)

    def _steps(self) -> int:
        """Tokens to draw in the next dispatch.

        An answer that has just begun gets its first token at once. Where others wait, a dispatch ends with the first
        answer that reaches its limit, so that its slot is never empty.
        """
        running = [answer for answer in self._answers if answer is not None]
        if any(not answer.sent for answer in running):
            return 1
        if not (self._queue or self.prefill.prompts):
            return self.settings.steps
        left = min(answer.ticket.request.max_new_tokens - answer.sent for answer in running)
        return min(self.settings.steps, left)

    def _dispatch(self) -> None:
        """Draws the next tokens in all slots."""
        steps = self._steps()
        self._slots, drawn = programs.decode(
            self.settings.steps,
            self.served.backbone,
            self.served.bank,
            self._slots,
            self._stopped.copy(),
            self._ends,
            steps,
        )
        self._stopped[:] = False
        answers = tuple(self._answers)
        if not any(answer is not None and answer.ticket.request.alternatives for answer in answers):
            drawn = drawn.replace(top_ids=None, top_logps=None)
        for slot, answer in enumerate(answers):
            if answer is not None:
                answer.sent += steps
                if answer.sent >= answer.ticket.request.max_new_tokens:
                    self._answers[slot] = None  # it ends in this dispatch, so the next answer may follow it
        for leaf in jax.tree.leaves(drawn):
            leaf.copy_to_host_async()
        self._results.append(lambda: self._hand_on(drawn, answers))

    def _hand_on(self, drawn: programs.Drawn, answers: Sequence[Answer | None]) -> None:
        """Hands the tokens of a dispatch on to the listeners of its answers."""
        drawn = jax.device_get(drawn)
        now = time.monotonic()
        for slot, answer in enumerate(answers):
            if answer is None or answer.finish is not None:
                continue
            tokens, finish = answer.add(drawn, slot, self.tokenizer.eos_ids)
            answer.ticket.first = answer.ticket.first or now
            if finish:
                self._finish(slot, answer, finish, tokens)
            elif tokens:
                answer.ticket.listener(answer.ticket, Piece(answer.index, answer.text.take(), tuple(tokens), None))

    def _finish(self, slot: int, answer: Answer, reason: str, tokens: Sequence[Token]) -> None:
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
