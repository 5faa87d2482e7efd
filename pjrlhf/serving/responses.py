"""Responses and chunks of a stream, in the format of OpenAI's API."""

import asyncio
import dataclasses
import itertools
import json
import math
from collections.abc import AsyncIterator, Sequence
from typing import Any, Literal

from typing_extensions import TypedDict

from pjrlhf import __version__
from pjrlhf.data.tokenization import Tokenizer
from pjrlhf.serving.bodies import Wish
from pjrlhf.serving.catalogue import Described, Voice
from pjrlhf.serving.engine import Finished, Piece, Ticket, Token
from pjrlhf.serving.protocol import Refused, error

UNLIKELY = -9999.0  # what OpenAI's API gives for a log-prob that is not finite
Reason = Literal["stop", "length"] | None


class TopLogprob(TypedDict):
    """A likely token of a chat."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token of a chat, with those that were likely in its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    """The log-probs of a chat."""

    content: list[TokenLogprob]


class TextLogprobs(TypedDict):
    """The log-probs of a plain completion: lists with an entry for every token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class AnswerMessage(TypedDict):
    """An answer of a chat."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(TypedDict):
    """One of the answers of a chat."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Reason


class TextChoice(TypedDict):
    """One of the answers of a plain completion."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Reason


class CachedTokens(TypedDict):
    """Tokens of prompts that the prefix cache had."""

    cached_tokens: int


class Usage(TypedDict):
    """Numbers of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class _Whole(TypedDict):
    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: Usage
    pjrlhf: Described


class ChatCompletion(_Whole):
    """The answers of a chat."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class TextCompletion(_Whole):
    """The answers of a plain completion."""

    object: Literal["text_completion"]
    choices: list[TextChoice]


@dataclasses.dataclass(kw_only=True)
class Call:
    """A request on its way through the server.

    Attributes:
      chat: chat completion or plain completion.
      tokenizer: of the model.
      wish, voice: what is asked for, and who answers.
      texts: of the prompts, for `echo`.
      tickets: in the engine, one for each prompt.
      queue: pieces, with the number of their prompt.
      last: by number of the choice, the token before the next one in its log-probs.
      generated: tokens drawn so far.
    """

    chat: bool
    tokenizer: Tokenizer
    wish: Wish
    voice: Voice
    texts: list[str]
    tickets: list[Ticket] = dataclasses.field(default_factory=list)
    queue: asyncio.Queue[tuple[int, Piece]] = dataclasses.field(default_factory=asyncio.Queue)
    last: dict[int, int | None] = dataclasses.field(default_factory=dict)
    generated: int = 0
    id: str = ""
    created: int = 0

    @property
    def head(self) -> dict[str, Any]:
        """What all responses and chunks have."""
        return {
            "id": self.id,
            "created": self.created,
            "model": self.voice.model,
            "system_fingerprint": f"pjrlhf-{__version__}",
        }

    def usage(self) -> Usage:
        prompt = sum(len(ticket.request.tokens) for ticket in self.tickets)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.generated,
            "total_tokens": prompt + self.generated,
            "prompt_tokens_details": {"cached_tokens": sum(ticket.cached_tokens for ticket in self.tickets)},
        }

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """(number of the drawn answer, piece) until all answers have ended.

        Raises:
          Refused: the engine stopped.
        """
        left = len(self.tickets) * self.wish.draws
        while left:
            number, piece = await self.queue.get()
            if piece.finish == "cancelled":
                raise Refused("the engine has stopped; try again later", status=503)
            left -= piece.finish is not None
            self.generated += len(piece.tokens)
            yield number * self.wish.draws + piece.index, piece

    async def whole(self) -> ChatCompletion | TextCompletion:
        """The body of the response.

        Raises:
          Refused: see `pieces`.
        """
        parts: list[list[Piece]] = [[] for _ in self.tickets]
        async for index, piece in self.pieces():
            parts[index // self.wish.draws].append(piece)
        kept = [one for own in parts for one in best(Finished.of(own, self.wish.draws), self.wish.n)]
        rest = {**self.head, "usage": self.usage(), "pjrlhf": self.voice.describe()}
        if self.chat:
            return {**rest, "object": "chat.completion", "choices": [self._chat(i, x) for i, x in enumerate(kept)]}  # pyright: ignore[reportReturnType]
        return {**rest, "object": "text_completion", "choices": [self._text(i, x) for i, x in enumerate(kept)]}  # pyright: ignore[reportReturnType]

    def _chat(self, index: int, answer: Finished) -> ChatChoice:
        text, logprobs = self._part(index, answer.text, answer.tokens, True)
        message: AnswerMessage = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": answer.finish}  # pyright: ignore[reportReturnType]

    def _text(self, index: int, answer: Finished) -> TextChoice:
        text, logprobs = self._part(index, answer.text, answer.tokens, True)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": answer.finish}  # pyright: ignore[reportReturnType]

    async def stream(self) -> AsyncIterator[bytes]:
        """The events of the response."""
        head = {**self.head, "object": "chat.completion.chunk" if self.chat else "text_completion"}
        extra = {"usage": None} if self.wish.usage else {}
        voice: dict[str, Any] = {"pjrlhf": self.voice.describe()}
        seen: set[int] = set()

        def chunk(index: int, said: dict[str, Any], logprobs: Any = None, finish: str | None = None) -> bytes:
            choice = {"index": index, **said, "logprobs": logprobs, "finish_reason": finish}
            event = {**head, "choices": [choice], **extra, **voice}
            voice.clear()  # the first chunk alone has it
            return _event(event)

        try:
            async for index, piece in self.pieces():
                first = index not in seen
                seen.add(index)
                if first and self.chat:
                    yield chunk(index, {"delta": {"role": "assistant", "content": ""}})
                if piece.text or (piece.tokens and self.wish.alternatives is not None) or (first and self.wish.echo):
                    text, logprobs = self._part(index, piece.text, piece.tokens, first)
                    yield chunk(index, {"delta": {"content": text}} if self.chat else {"text": text}, logprobs)
                if piece.finish:
                    yield chunk(index, {"delta": {}} if self.chat else {"text": ""}, finish=piece.finish)
            if self.wish.usage:
                yield _event({**head, "choices": [], "usage": self.usage()})
            yield b"data: [DONE]\n\n"
        except Refused as refused:
            yield _event(error(refused.message, refused.status))

    def _part(self, index: int, text: str, tokens: Sequence[Token], first: bool) -> tuple[str, Any]:
        """(text, log-probs or None) of a part of a choice; `first` says whether it is its start.

        Plain completions list the token that ends an answer, too: harnesses ask for one token and drop the last entry.
        """
        ends = self.tokenizer.eos_ids if self.chat else ()
        shown = [token for token in tokens if token.id not in ends]
        number = index // self.wish.n
        request = self.tickets[number].request
        self.last.setdefault(index, None if self.chat else request.tokens[-1])
        if first and self.wish.echo:
            text = self.texts[number] + text
            scored = self.tickets[number].prompt
            # Nothing stands before the first token, except user tokens where there is no BOS.
            start = [Token(request.tokens[0], None)] if len(scored) < len(request.tokens) else []
            shown = [*start, *scored, *shown]
            self.last[index] = None
        if self.wish.alternatives is None:
            return text, None
        befores = [self.last[index], *(token.id for token in shown)]
        self.last[index] = befores.pop()
        pairs = list(zip(shown, befores, strict=True))
        return text, {"content": [self._chat_logprob(*pair) for pair in pairs]} if self.chat else self._logprobs(pairs)

    def _added(self, token: int, before: int | None) -> str:
        """The text that a token adds after the one `before` it, with the space between words."""
        decode = self.tokenizer.decode
        if before is None:
            return decode([token], False)
        return decode([before, token], False)[len(decode([before], False)) :]

    def _chat_logprob(self, token: Token, before: int | None) -> TokenLogprob:
        def one(i: int, logp: float | None) -> TopLogprob:
            text = self._added(i, before)
            return {"token": text, "logprob": _finite(logp or 0.0), "bytes": list(text.encode())}

        return {**one(token.id, token.logp), "top_logprobs": [one(*pair) for pair in token.top]}

    def _logprobs(self, tokens: Sequence[tuple[Token, int | None]]) -> TextLogprobs:
        texts = [self._added(token.id, before) for token, before in tokens]
        return {
            "tokens": texts,
            "token_logprobs": [None if token.logp is None else _finite(token.logp) for token, _ in tokens],
            "top_logprobs": [
                None if token.logp is None else {self._added(i, before): _finite(logp) for i, logp in token.top}
                for token, before in tokens
            ],
            "text_offset": [0, *itertools.accumulate(map(len, texts[:-1]))][: len(texts)],
        }


def best(answers: Sequence[Finished], n: int) -> list[Finished]:
    """The `n` answers with the highest log-prob per token, best first; as they are where there are no more."""
    if len(answers) <= n:
        return list(answers)

    def quality(answer: Finished) -> float:
        return sum(token.logp or 0.0 for token in answer.tokens) / max(len(answer.tokens), 1)

    return sorted(answers, key=quality, reverse=True)[:n]


def _event(value: Any) -> bytes:
    return b"data: " + json.dumps(value, separators=(",", ":"), allow_nan=False).encode() + b"\n\n"


def _finite(logp: float) -> float:
    return logp if math.isfinite(logp) else UNLIKELY
