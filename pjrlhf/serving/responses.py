"""Responses and chunks of a stream, in the format of OpenAI's API."""

import asyncio
import dataclasses
import itertools
import json
import math
from collections.abc import AsyncIterator, Sequence

from pjrlhf import __version__
from pjrlhf.data.tokenization import Tokenizer
from pjrlhf.serving.catalogue import Voice
from pjrlhf.serving.engine import Piece, Ticket, Token
from pjrlhf.serving.protocol import Refused, Wish, error
from pjrlhf.types import Json

UNLIKELY = -9999.0  # what OpenAI's API gives for a log-prob that is not finite


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

    def head(self, object: str) -> dict[str, Json]:
        """What all responses and chunks have."""
        return {
            "id": self.id,
            "object": object,
            "created": self.created,
            "model": self.voice.model,
            "system_fingerprint": f"pjrlhf-{__version__}",
        }

    def usage(self) -> dict[str, Json]:
        prompt = sum(len(ticket.request.tokens) for ticket in self.tickets)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.generated,
            "total_tokens": prompt + self.generated,
            "prompt_tokens_details": {"cached_tokens": sum(ticket.cached_tokens for ticket in self.tickets)},
        }

    async def pieces(self) -> AsyncIterator[tuple[int, Ticket, Piece]]:
        """(number of the choice, ticket, piece) until all answers have ended.

        Raises:
          Refused: the engine stopped.
        """
        left = len(self.tickets) * self.wish.n
        while left:
            number, piece = await self.queue.get()
            if piece.finish == "cancelled":
                raise Refused("the engine has stopped; try again later", status=503)
            left -= piece.finish is not None
            self.generated += len(piece.tokens)
            yield number * self.wish.n + piece.index, self.tickets[number], piece

    async def whole(self) -> dict[str, Json]:
        """The body of the response.

        Raises:
          Refused: see `pieces`.
        """
        texts, tokens, finish = {}, {}, {}
        async for index, _, piece in self.pieces():
            texts[index] = texts.get(index, "") + piece.text
            tokens.setdefault(index, []).extend(piece.tokens)
            finish[index] = piece.finish
        choices = [self._choice(i, texts[i], tokens[i], finish[i], True) for i in sorted(texts)]
        head = self.head("chat.completion" if self.chat else "text_completion")
        return {**head, "choices": choices, "usage": self.usage(), "pjrlhf": self.voice.describe()}

    async def stream(self) -> AsyncIterator[bytes]:
        """The events of the response."""
        head = self.head("chat.completion.chunk" if self.chat else "text_completion")
        extra = {"usage": None} if self.wish.usage else {}
        voice: dict[str, Json] = {"pjrlhf": self.voice.describe()}
        seen: set[int] = set()

        def chunk(choices: list[Json], **more: Json) -> bytes:
            return b"data: " + _json({**head, "choices": choices, **extra, **more}) + b"\n\n"

        try:
            async for index, _, piece in self.pieces():
                first = index not in seen
                seen.add(index)
                if first and self.chat:
                    delta = {"role": "assistant", "content": ""}
                    start = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
                    yield chunk([start], **voice)
                    voice = {}
                shown = (
                    piece.text or (piece.tokens and self.wish.alternatives is not None) or (first and self.wish.echo)
                )
                if shown:
                    yield chunk([self._choice(index, piece.text, piece.tokens, None, first)], **voice)
                    voice = {}
                if piece.finish:
                    empty = {"delta": {}} if self.chat else {"text": ""}
                    yield chunk([{"index": index, **empty, "logprobs": None, "finish_reason": piece.finish}], **voice)
                    voice = {}
            if self.wish.usage:
                yield b"data: " + _json({**head, "choices": [], "usage": self.usage()}) + b"\n\n"
            yield b"data: [DONE]\n\n"
        except Refused as refused:
            yield b"data: " + _json(error(refused.message, refused.status)) + b"\n\n"

    def _choice(
        self, index: int, text: str, tokens: Sequence[Token], finish: str | None, first: bool
    ) -> dict[str, Json]:
        """A choice, or the part of it that a chunk has; `first` says whether it is its start."""
        ends = self.tokenizer.eos_ids
        shown = [token for token in tokens if token.id not in ends]
        request = self.tickets[index // self.wish.n].request
        self.last.setdefault(index, None if self.chat else request.tokens[-1])
        if first and self.wish.echo:
            number = index // self.wish.n
            text = self.texts[number] + text
            shown = [Token(request.tokens[0], None), *self.tickets[number].prompt, *shown]
            self.last[index] = None
        logps = None
        if self.wish.alternatives is not None:
            befores = [self.last[index], *(token.id for token in shown)]
            self.last[index] = befores.pop()
            pairs = list(zip(shown, befores, strict=True))
            logps = {"content": [self._logp(*pair) for pair in pairs]} if self.chat else self._logps(pairs)
        if not self.chat:
            return {"index": index, "text": text, "logprobs": logps, "finish_reason": finish}
        if self.wish.stream:
            return {"index": index, "delta": {"content": text}, "logprobs": logps, "finish_reason": finish}
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": logps, "finish_reason": finish}

    def _text(self, token: int, before: int | None) -> str:
        """The text that a token adds after the one `before` it, with the space between words."""
        decode = self.tokenizer.decode
        if before is None:
            return decode([token], False)
        return decode([before, token], False)[len(decode([before], False)) :]

    def _logp(self, token: Token, before: int | None) -> dict[str, Json]:
        """A token in the log-probs of a chat."""

        def one(i: int, logp: float | None) -> dict[str, Json]:
            text = self._text(i, before)
            return {"token": text, "logprob": _finite(logp), "bytes": list(text.encode())}

        return {**one(token.id, token.logp), "top_logprobs": [one(*pair) for pair in token.top]}

    def _logps(self, tokens: Sequence[tuple[Token, int | None]]) -> dict[str, Json]:
        """The log-probs of a plain completion; every token with the one before it."""
        texts = [self._text(token.id, before) for token, before in tokens]
        return {
            "tokens": texts,
            "token_logprobs": [_finite(token.logp) for token, _ in tokens],
            "top_logprobs": [
                None if token.logp is None else {self._text(i, before): _finite(logp) for i, logp in token.top}
                for token, before in tokens
            ],
            "text_offset": [0, *itertools.accumulate(map(len, texts[:-1]))][: len(texts)],
        }


def _json(value: Json) -> bytes:
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


def _finite(logp: float | None) -> float | None:
    return logp if logp is None or math.isfinite(logp) else UNLIKELY
