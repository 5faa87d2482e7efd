"""What the engine is asked, and what it answers with: requests, and tickets with their pieces."""

import dataclasses
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np


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
      user_tokens: float [E, D], for an engine with user tokens; None for an answer without any.
      temperature: 0 is greedy.
      top_k, top_p: truncation of the distribution; 0 and 1 turn it off.
      frequency_penalty, presence_penalty, repetition_penalty, min_p: see `Penalties`.
      logit_bias: id of a token -> what is added to its logit; 300 at most.
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
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    min_p: float = 0.0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
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
