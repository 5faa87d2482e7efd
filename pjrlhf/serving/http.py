"""The HTTP server: OpenAI's API over the engine, with a soup or a person per request."""

import asyncio
import contextlib
import dataclasses
import hmac
import itertools
import json
import logging as python_logging
import math
import os
import signal
import socket
import sys
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import prometheus_client
import uvicorn
from absl import logging
from anyio import to_thread
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from pjrlhf import __version__
from pjrlhf.data.messages import Conversation, read_messages, read_options
from pjrlhf.data.records import RecordError
from pjrlhf.errors import UserError
from pjrlhf.serving import engine as engines
from pjrlhf.serving.catalogue import Catalogue, UnknownIngredient, UnknownModel, Voice
from pjrlhf.serving.engine import Closing, Engine, Piece, QueueFull, Ticket, Token
from pjrlhf.serving.protocol import CHAT, COMPLETION, MAX_CHOICES, Body, Refused, Wish, error, read_prompts, read_wish
from pjrlhf.serving.settings import EngineSettings, ServerSettings
from pjrlhf.terminal import visible
from pjrlhf.types import Json

KEY_VARIABLE = "PJRLHF_API_KEY"
USER_HEADER = "x-openwebui-user-id"
RETRY_SECONDS = 1
UNLIKELY = -9999.0  # what OpenAI's API gives for a log-prob that is not finite
LOOPBACK = ("127.0.0.1", "::1", "localhost")


class Metrics:
    """What /metrics shows, in the format of Prometheus."""

    def __init__(self, engine: Engine):
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> prometheus_client.Counter:
            return prometheus_client.Counter(f"pjrlhf_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str) -> prometheus_client.Histogram:
            seconds = [0.01 * 2**i for i in range(14)]
            return prometheus_client.Histogram(f"pjrlhf_{name}_seconds", text, buckets=seconds, registry=self.registry)

        def gauge(name: str, text: str, value: Callable[[], float]) -> None:
            prometheus_client.Gauge(f"pjrlhf_{name}", text, registry=self.registry).set_function(value)

        self.requests = counter("requests", "Requests by path and status.", "path", "status")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts.")
        self.cached_tokens = counter("cached_prompt_tokens", "Tokens of prompts that the prefix cache had.")
        self.generated_tokens = counter("generated_tokens", "Tokens of answers.")
        self.ingredient_requests = counter("ingredient_requests", "Requests with a weight for it.", "ingredient")
        self.ingredient_tokens = counter("ingredient_tokens", "Tokens of answers with a weight for it.", "ingredient")
        self.first_token = histogram("time_to_first_token", "From the request to its first token.")
        self.duration = histogram("request", "From the request to its last token.")
        gauge("requests_waiting", "Requests in the queue.", lambda: engine.waiting)
        gauge("answers_running", "Answers in slots.", lambda: engine.running)

    def count(self, voice: Voice, tickets: Sequence[Ticket], generated: int) -> None:
        """Counts a request after its end."""
        self.prompt_tokens.inc(sum(len(ticket.request.tokens) for ticket in tickets))
        self.cached_tokens.inc(sum(ticket.cached_tokens for ticket in tickets))
        self.generated_tokens.inc(generated)
        for name in voice.weights:
            self.ingredient_requests.labels(name).inc()
            self.ingredient_tokens.labels(name).inc(generated)
        for ticket in tickets:
            if ticket.first is not None:
                self.first_token.observe(ticket.first - ticket.submitted)
                self.duration.observe(time.monotonic() - ticket.submitted)


@dataclasses.dataclass(kw_only=True)
class Call:
    """A request on its way through the server.

    Attributes:
      chat: chat completion or plain completion.
      wish, voice: what is asked for, and who answers.
      texts: of the prompts, for `echo`.
      tickets: in the engine, one for each prompt.
      queue: pieces, with the number of their prompt.
      last: by number of the choice, the token before the next one in its log-probs.
      generated: tokens drawn so far.
    """

    chat: bool
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


class Server:
    """The application.

    Args:
      catalogue: what is served.
      engine: of its model and bank; running.
      settings: limits.
      api_key: that requests must bring; "" for none.
    """

    def __init__(self, catalogue: Catalogue, engine: Engine, settings: ServerSettings, api_key: str = ""):
        self.catalogue, self.engine, self.settings = catalogue, engine, settings
        self.metrics = Metrics(engine)
        self._key = api_key.encode()
        self._started = int(time.time())
        self._encoding = asyncio.Lock()  # one text at a time; others wait without holding up answers
        routes = [
            self._route("/v1/models", self.models, "GET"),
            self._route("/v1/models/{name:path}", self.model, "GET"),
            self._route("/v1/chat/completions", self.chat, "POST"),
            self._route("/v1/completions", self.complete, "POST"),
            Route("/health", self.health),
            Route("/metrics", self.show_metrics),
        ]
        self.app = Starlette(routes=routes, exception_handlers={HTTPException: self._no_route, Exception: self._failed})

    # ---- requests as a whole

    def _route(self, path: str, handler: Callable[[Request], Awaitable[Response]], method: str) -> Route:
        async def answer(request: Request) -> Response:
            try:
                self._authenticate(request)
                response = await handler(request)
            except Refused as refused:
                body = error(refused.message, refused.status, refused.param, refused.code)
                response = JSONResponse(body, refused.status, refused.headers)
            except ClientDisconnect:
                response = Response(status_code=499)
            response.headers["x-request-id"] = uuid.uuid4().hex
            self.metrics.requests.labels(path, str(response.status_code)).inc()
            logging.info("%s %s: %d", method, path, response.status_code)
            return response

        return Route(path, answer, methods=[method])

    def _authenticate(self, request: Request) -> None:
        given = request.headers.get("authorization", "").encode("utf-8", "surrogateescape")
        if self._key and not hmac.compare_digest(given, b"Bearer " + self._key):
            raise Refused(
                "the API key is missing or wrong; send it as a bearer token", status=401, code="invalid_api_key"
            )

    async def _no_route(self, request: Request, problem: Exception) -> Response:
        assert isinstance(problem, HTTPException)
        message = f"{request.method} {request.url.path[:200]}: {problem.detail}"
        return JSONResponse(error(message, problem.status_code), problem.status_code, problem.headers)

    async def _failed(self, request: Request, problem: Exception) -> Response:
        logging.error("%s %s: %s", request.method, request.url.path, type(problem).__name__)
        return JSONResponse(error("the server failed at this request", 500), 500)

    async def _body(self, request: Request) -> bytes:
        limit = self.settings.max_body
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise Refused("content-type: is not application/json; send JSON", status=415)
        too_large = Refused(f"body: is larger than {limit} bytes; send less", status=413)
        length = request.headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > limit:
            raise too_large
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size > limit:
                raise too_large
            parts.append(part)
        return b"".join(parts)

    # ---- what is served

    def _model_of(self, name: str, parent: str | None) -> dict[str, Json]:
        return {
            "id": name,
            "object": "model",
            "created": self._started,
            "owned_by": "pjrlhf",
            "parent": parent,
            "max_model_len": self.engine.context,
        }

    async def models(self, request: Request) -> Response:
        """The base, its adapters, and the soups of people."""
        found = [self._model_of(name, parent) for name, parent in self.catalogue.models.items()]
        return JSONResponse({"object": "list", "data": found})

    async def model(self, request: Request) -> Response:
        """One of them; also a soup."""
        name = request.path_params["name"]
        self._voice(name, None, None)
        parent = self.catalogue.models.get(name, next(iter(self.catalogue.models)))
        return JSONResponse(self._model_of(name, parent))

    async def health(self, request: Request) -> Response:
        """Whether requests are answered."""
        well = self.engine.healthy
        state = {"status": "ok" if well else "stopped", "waiting": self.engine.waiting, "running": self.engine.running}
        return JSONResponse(state, 200 if well else 503)

    async def show_metrics(self, request: Request) -> Response:
        """For Prometheus."""
        kind = prometheus_client.CONTENT_TYPE_LATEST
        return Response(prometheus_client.generate_latest(self.metrics.registry), headers={"content-type": kind})

    # ---- answers

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        return await self._answer(request, chat=True)

    async def complete(self, request: Request) -> Response:
        """POST /v1/completions."""
        return await self._answer(request, chat=False)

    async def _answer(self, request: Request, chat: bool) -> Response:
        text = await self._body(request)
        if self.settings.log_prompts:
            logging.info("%s %s", request.url.path, visible(text.decode("utf-8", "replace")))
        async with self._encoding:
            call, requests = await to_thread.run_sync(self._prepare, text, request.headers.get(USER_HEADER), chat)
        self._submit(call, requests)
        if call.wish.stream:
            return StreamingResponse(
                self._stream(call), media_type="text/event-stream", headers={"cache-control": "no-cache"}
            )
        try:
            return JSONResponse(await _unless_gone(request, self._whole(call)))
        finally:
            self._leave(call)

    def _prepare(self, text: bytes, header_user: str | None, chat: bool) -> tuple[Call, list[engines.Request]]:
        """The requests for the engine, one for each prompt."""
        body = Body(text, CHAT if chat else COMPLETION)
        wish = read_wish(body, header_user, chat)
        prompts = [None] if chat else read_prompts(body)
        voice = self._voice(wish.model, wish.mix, wish.user)
        if len(prompts) * wish.n > MAX_CHOICES:
            raise Refused(f"n: {len(prompts)} prompts with {wish.n} answers each are more than {MAX_CHOICES}", "n")
        requests, texts = [], []
        for prompt in prompts:
            tokens, text_of_prompt = self._encode(body, prompt, wish)
            texts.append(text_of_prompt)
            requests.append(self._request(tokens, wish, voice, chat))
        call = Call(chat=chat, wish=wish, voice=voice, texts=texts, created=int(time.time()))
        call.id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        return call, requests

    def _voice(self, model: str | None, mix: Any, user: str | None) -> Voice:
        try:
            return self.catalogue.voice(model, mix, user)
        except UnknownModel as problem:
            raise Refused(str(problem), "model", 404, "model_not_found") from problem
        except UserError as problem:
            code = "unknown_ingredient" if isinstance(problem, UnknownIngredient) else None
            raise Refused(str(problem), "model" if mix is None else "mix", code=code) from problem

    def _encode(self, body: Body, prompt: str | list[int] | None, wish: Wish) -> tuple[list[int], str]:
        """(token ids, text for `echo`) of a prompt; None for the messages of a chat."""
        tokenizer = self.catalogue.model.tokenizer
        if isinstance(prompt, list):
            known = tokenizer.rows
            if not all(0 <= i < known for i in prompt):
                raise Refused(f"prompt: has a token that is not from 0 to {known - 1}; correct it", "prompt")
            return prompt, tokenizer.decode(prompt) if wish.echo else ""
        name = "messages" if prompt is None else "prompt"
        try:
            if prompt is not None:
                return tokenizer.encode_prompt(prompt), prompt
            messages = read_messages(body.fields.get("messages", []), "messages")
            options = read_options({"chat_template_kwargs": body.fields.get("chat_template_kwargs")})
            return tokenizer.encode_prompt(Conversation(messages, options)), ""
        except RecordError as problem:
            name = "chat_template_kwargs" if "chat_template_kwargs" in str(problem) else name
            raise Refused(f"{name}: {problem}", name) from problem
        except UserError as problem:
            raise Refused(str(problem), name) from problem

    def _request(self, tokens: list[int], wish: Wish, voice: Voice, chat: bool) -> engines.Request:
        room = self.engine.context - self.engine.num_user_tokens - len(tokens)
        name, too_long = "messages" if chat else "prompt", "context_length_exceeded"
        limit = room if wish.limit is None else wish.limit
        if room < (1 if wish.limit is None else min(limit, 1)):
            message = f"{name}: {len(tokens)} tokens leave no room in the context of {self.engine.context}; shorten it"
            raise Refused(message, name, code=too_long)
        if limit > room:
            raise Refused(
                f"{wish.limit_name}: {limit} with a prompt of {len(tokens)} tokens exceeds the context of "
                f"{self.engine.context}; ask for {room} at most",
                wish.limit_name,
                code=too_long,
            )
        return engines.Request(
            tokens=tokens,
            max_new_tokens=limit,
            plain=not chat,
            n=wish.n,
            mix=voice.mix,
            user_tokens=voice.user_tokens,
            temperature=wish.temperature,
            top_k=wish.top_k,
            top_p=wish.top_p,
            seed=wish.seed,
            stop=wish.stop,
            alternatives=wish.alternatives or 0,
            prompt_logps=wish.echo and wish.alternatives is not None,
        )

    def _submit(self, call: Call, requests: Sequence[engines.Request]) -> None:
        loop = asyncio.get_running_loop()

        def listener(number: int) -> Callable[[Ticket, Piece], None]:
            def tell(_: Ticket, piece: Piece) -> None:
                with contextlib.suppress(RuntimeError):  # the server has ended
                    loop.call_soon_threadsafe(call.queue.put_nowait, (number, piece))

            return tell

        retry = {"retry-after": str(RETRY_SECONDS)}
        try:
            for number, request in enumerate(requests):
                call.tickets.append(self.engine.submit(request, listener(number)))
        except QueueFull as problem:
            self._leave(call)
            raise Refused(
                "too many requests wait already; try again", status=429, code="queue_full", headers=retry
            ) from problem
        except Closing as problem:
            self._leave(call)
            raise Refused("the server takes no more requests; try again later", status=503, headers=retry) from problem

    def _leave(self, call: Call) -> None:
        """After the last piece, or after the client has gone."""
        for ticket in call.tickets:
            if not ticket.done.is_set():
                self.engine.cancel(ticket)
        self.metrics.count(call.voice, call.tickets, call.generated)
        logging.info("%s: %s answered with %d tokens", call.id, visible(call.voice.model), call.generated)

    async def _whole(self, call: Call) -> dict[str, Json]:
        texts, tokens, finish = {}, {}, {}
        async for index, _, piece in call.pieces():
            texts[index] = texts.get(index, "") + piece.text
            tokens.setdefault(index, []).extend(piece.tokens)
            finish[index] = piece.finish
        choices = [self._choice(call, i, texts[i], tokens[i], finish[i], True) for i in sorted(texts)]
        head = call.head("chat.completion" if call.chat else "text_completion")
        return {**head, "choices": choices, "usage": call.usage(), "pjrlhf": call.voice.describe()}

    async def _stream(self, call: Call) -> AsyncIterator[bytes]:
        head = call.head("chat.completion.chunk" if call.chat else "text_completion")
        extra = {"usage": None} if call.wish.usage else {}
        voice: dict[str, Json] = {"pjrlhf": call.voice.describe()}
        seen: set[int] = set()

        def chunk(choices: list[Json], **more: Json) -> bytes:
            return b"data: " + _json({**head, "choices": choices, **extra, **more}) + b"\n\n"

        try:
            async for index, _, piece in call.pieces():
                first = index not in seen
                seen.add(index)
                if first and call.chat:
                    delta = {"role": "assistant", "content": ""}
                    start = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
                    yield chunk([start], **voice)
                    voice = {}
                shown = (
                    piece.text or (piece.tokens and call.wish.alternatives is not None) or (first and call.wish.echo)
                )
                if shown:
                    yield chunk([self._choice(call, index, piece.text, piece.tokens, None, first)], **voice)
                    voice = {}
                if piece.finish:
                    empty = {"delta": {}} if call.chat else {"text": ""}
                    yield chunk([{"index": index, **empty, "logprobs": None, "finish_reason": piece.finish}], **voice)
                    voice = {}
            if call.wish.usage:
                yield b"data: " + _json({**head, "choices": [], "usage": call.usage()}) + b"\n\n"
            yield b"data: [DONE]\n\n"
        except Refused as refused:
            yield b"data: " + _json(error(refused.message, refused.status)) + b"\n\n"
        finally:
            self._leave(call)

    def _choice(
        self, call: Call, index: int, text: str, tokens: Sequence[Token], finish: str | None, first: bool
    ) -> dict[str, Json]:
        """A choice, or the part of it that a chunk has; `first` says whether it is its start."""
        ends = self.catalogue.model.tokenizer.eos_ids
        shown = [token for token in tokens if token.id not in ends]
        request = call.tickets[index // call.wish.n].request
        call.last.setdefault(index, None if call.chat else request.tokens[-1])
        if first and call.wish.echo:
            number = index // call.wish.n
            text = call.texts[number] + text
            shown = [Token(request.tokens[0], None), *call.tickets[number].prompt, *shown]
            call.last[index] = None
        logps = None
        if call.wish.alternatives is not None:
            befores = [call.last[index], *(token.id for token in shown)]
            call.last[index] = befores.pop()
            pairs = list(zip(shown, befores, strict=True))
            logps = {"content": [self._logp(*pair) for pair in pairs]} if call.chat else self._logps(pairs)
        if not call.chat:
            return {"index": index, "text": text, "logprobs": logps, "finish_reason": finish}
        if call.wish.stream:
            return {"index": index, "delta": {"content": text}, "logprobs": logps, "finish_reason": finish}
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": logps, "finish_reason": finish}

    def _text(self, token: int, before: int | None) -> str:
        """The text that a token adds after the one `before` it, with the space between words."""
        decode = self.catalogue.model.tokenizer.decode
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


async def _unless_gone(request: Request, work: Any) -> Any:
    """The result of `work`, which is stopped when the client leaves.

    Raises:
      ClientDisconnect: it has left.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientDisconnect
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()


def serve(catalogue: Catalogue, settings: ServerSettings, sizes: EngineSettings) -> None:
    """Serves until SIGTERM or Ctrl-C; answers that have begun are finished first.

    Raises:
      UserError: the address is taken or not of this machine.
    """
    engine = Engine(catalogue.model.backbone, catalogue.model.tokenizer, catalogue.bank, catalogue.user_tokens, sizes)
    key = os.environ.get(KEY_VARIABLE, "")
    listener = _listen(settings)
    voice = catalogue.voice()
    one = engines.Request(tokens=[0], max_new_tokens=1, mix=voice.mix, user_tokens=voice.user_tokens, temperature=1.0)
    engine.answer([one])  # compiles before anybody waits
    engine.start()
    server = Server(catalogue, engine, settings, key)
    config = uvicorn.Config(
        server.app,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=settings.drain_seconds,
    )
    logging.use_absl_handler()
    logging.set_verbosity(logging.INFO)
    python_logging.getLogger("uvicorn").setLevel(python_logging.WARNING)
    host, port = listener.getsockname()[:2]
    print(f"serving {', '.join(catalogue.models)} at http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
    if not key and settings.host not in LOOPBACK:
        print(f"anybody who reaches {host} can use it; set {KEY_VARIABLE} to ask for a key", file=sys.stderr)
    # uvicorn drains, and then sends itself the signal again.
    signal.signal(signal.SIGTERM, lambda *_: None)
    uvicorn.Server(config).run(sockets=[listener])
    engine.close(settings.drain_seconds)


def _listen(settings: ServerSettings) -> socket.socket:
    try:
        family, *_, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1024)
    except OSError as problem:
        place = f"{settings.host}:{settings.port}"
        raise UserError(f"{place}: {problem.strerror or problem}; choose another --host or --port") from problem
    return listener
