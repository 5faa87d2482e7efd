"""The endpoints that answer: chat completions and plain completions."""

import asyncio
import contextlib
import re
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from absl import logging
from anyio import to_thread
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from pjrlhf.data.messages import ROLES, SAID, Conversation, Message, read_messages, read_options, text_of
from pjrlhf.data.records import RecordError
from pjrlhf.errors import UserError
from pjrlhf.serving import engine as engines
from pjrlhf.serving.bodies import MAX_CHOICES, ChatBody, CompletionBody, Wish
from pjrlhf.serving.catalogue import Voice
from pjrlhf.serving.engine import Closing, Piece, QueueFull, Ticket
from pjrlhf.serving.protocol import Refused
from pjrlhf.serving.responses import Call, ChatCompletion, TextCompletion
from pjrlhf.serving.service import Endpoint, Service
from pjrlhf.settings import shown
from pjrlhf.terminal import visible

USER_HEADER = "x-openwebui-user-id"
RETRY_SECONDS = 1


def endpoints(service: Service) -> list[Endpoint]:
    """/v1/chat/completions and /v1/completions."""
    answers = Answers(service)
    return [
        Endpoint(
            "POST",
            "/v1/chat/completions",
            answers.chat,
            summary="Answers a conversation",
            body=ChatBody,
            answer=ChatCompletion,
            streams=True,
        ),
        Endpoint(
            "POST",
            "/v1/completions",
            answers.complete,
            summary="Goes on with prompts",
            body=CompletionBody,
            answer=TextCompletion,
            streams=True,
        ),
    ]


class Answers:
    """Turns bodies into requests of the engine, and follows these until they end."""

    def __init__(self, service: Service):
        self._service = service

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        return await self._answer(request, chat=True)

    async def complete(self, request: Request) -> Response:
        """POST /v1/completions."""
        return await self._answer(request, chat=False)

    async def _answer(self, request: Request, chat: bool) -> Response:
        text = await self._service.body(request)
        if self._service.settings.log_prompts:
            logging.info("%s %s", request.url.path, visible(text.decode("utf-8", "replace")))
        async with self._service.encoding:
            call, requests = await to_thread.run_sync(self._prepare, text, request.headers.get(USER_HEADER), chat)
        self._submit(call, requests)
        if call.wish.stream:
            return StreamingResponse(
                self._stream(call), media_type="text/event-stream", headers={"cache-control": "no-cache"}
            )
        try:
            return JSONResponse(await _unless_gone(request, call.whole()))
        finally:
            self._leave(call)

    def _prepare(self, text: bytes, header_user: str | None, chat: bool) -> tuple[Call, list[engines.Request]]:
        """The requests for the engine, one for each prompt."""
        body = (ChatBody if chat else CompletionBody).read(text)
        wish = body.wish(header_user)
        prompts = body.prompts if isinstance(body, CompletionBody) else [body]
        voice = self._service.voice(wish.model, wish.mix, wish.user)
        if len(prompts) * wish.draws > MAX_CHOICES:
            name = "n" if wish.draws == wish.n else "best_of"
            message = f"{name}: {len(prompts)} prompts with {wish.draws} answers each are more than {MAX_CHOICES}"
            raise Refused(f"{message}; ask for fewer", name)
        requests, texts = [], []
        for prompt in prompts:
            tokens, text_of_prompt = self._encode(prompt, wish, voice)
            texts.append(text_of_prompt)
            requests.append(self._request(tokens, wish, voice, chat))
        call = Call(
            chat=chat,
            tokenizer=self._service.catalogue.model.tokenizer,
            wish=wish,
            voice=voice,
            texts=texts,
            created=int(time.time()),
        )
        call.id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        return call, requests

    def _encode(self, prompt: str | list[int] | ChatBody, wish: Wish, voice: Voice) -> tuple[list[int], str]:
        """(token ids, text for `echo`) of a prompt."""
        tokenizer = self._service.catalogue.model.tokenizer
        if isinstance(prompt, list) and voice.reads:
            raise Refused(
                "prompt: is token ids, and this entry reads comparisons of the person before it; send text", "prompt"
            )
        if isinstance(prompt, list):
            known = tokenizer.rows
            if not all(0 <= i < known for i in prompt):
                raise Refused(f"prompt: has a token that is not from 0 to {known - 1}; correct it", "prompt")
            return prompt, tokenizer.decode(prompt) if wish.echo else ""
        name = "prompt" if isinstance(prompt, str) else "messages"
        try:
            if isinstance(prompt, str):
                told = text_of(self._service.told(voice, prompt))
                return tokenizer.encode_prompt(told), told
            _check_contents(prompt.messages)
            messages = read_messages(prompt.messages, "messages")
            _check_roles(messages, str(tokenizer.backend.chat_template))
            _check_tools(messages)
            options = read_options({"chat_template_kwargs": prompt.chat_template_kwargs})
            return tokenizer.encode_prompt(self._service.told(voice, Conversation(messages, options))), ""
        except RecordError as problem:
            name = "chat_template_kwargs" if "chat_template_kwargs" in str(problem) else name
            raise Refused(f"{name}: {_fault(name, problem)}; correct it", name) from problem
        except UserError as problem:
            raise Refused(str(problem), name) from problem

    def _request(self, tokens: list[int], wish: Wish, voice: Voice, chat: bool) -> engines.Request:
        engine = self._service.engine
        room = engine.context - (0 if voice.user_tokens is None else len(voice.user_tokens)) - len(tokens)
        name, too_long = "messages" if chat else "prompt", "context_length_exceeded"
        limit = room if wish.limit is None else wish.limit
        if room < (1 if wish.limit is None else min(limit, 1)):
            message = f"{name}: {len(tokens)} tokens leave no room in the context of {engine.context}; shorten it"
            raise Refused(message, name, code=too_long)
        if limit > room:
            raise Refused(
                f"{wish.limit_name}: {limit} with a prompt of {len(tokens)} tokens exceeds the context of "
                f"{engine.context}; ask for {room} at most",
                wish.limit_name,
                code=too_long,
            )
        known = self._service.catalogue.model.tokenizer.rows
        if unknown := [i for i in wish.sampling["logit_bias"] if i >= known]:
            message = f"logit_bias: {unknown[0]} is no token from 0 to {known - 1}; correct it"
            raise Refused(message, "logit_bias")
        return engines.Request(
            tokens=tokens,
            max_new_tokens=limit,
            plain=not chat,
            n=wish.draws,
            mix=voice.mix,
            user_tokens=voice.user_tokens,
            alternatives=wish.alternatives or 0,
            **wish.sampling,
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
                call.tickets.append(self._service.engine.submit(request, listener(number)))
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
                self._service.engine.cancel(ticket)
        self._service.metrics.count(call.voice, call.tickets, call.generated)
        logging.info("%s: %s answered with %d tokens", call.id, visible(call.voice.model), call.generated)

    async def _stream(self, call: Call) -> AsyncIterator[bytes]:
        try:
            async for event in call.stream():
                yield event
        finally:
            self._leave(call)


def _check_contents(messages: Sequence[Mapping[str, Any]]) -> None:
    """Raises Refused for a message that says nothing."""
    for i, message in enumerate(messages):
        if message.get("role") is not None and all(message.get(key) is None for key in ("content", *SAID)):
            raise Refused(
                f"messages[{i}]: has no content; give it one: text, or a list of parts of type text", "messages"
            )


def _check_roles(messages: Sequence[Message], template: str) -> None:
    """Raises Refused for a role that is neither of the protocol nor one that the chat template names."""
    for i, message in enumerate(messages):
        role = message["role"]
        if role not in ROLES and not any(f"{quote}{role}{quote}" in template for quote in "'\""):
            raise Refused(
                f"messages[{i}]: {shown(role)} is no role of a message; choose from {', '.join(ROLES)}", "messages"
            )


def _check_tools(messages: Sequence[Message]) -> None:
    """Raises Refused for a result of a tool that follows no call of tools."""
    called = False
    for i, message in enumerate(messages):
        if message["role"] == "tool" and not called:
            raise Refused(
                f"messages[{i}]: has the role tool, and no message of the assistant with tool_calls stands before it; "
                "add that message, or leave this one out",
                "messages",
            )
        called = bool(message.get("tool_calls")) or (called and message["role"] == "tool")


def _fault(name: str, problem: RecordError) -> str:
    """What is wrong with the field `name`, for a message that begins with the name."""
    if problem.reason == f"bad {name}":
        return problem.detail
    return re.sub(rf"^{name} | (in )?{name}(?= \(|$)", "", str(problem))


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
