"""What the endpoints of the server share: the models, their engine, limits, metrics, and the bodies of requests."""

import asyncio
import dataclasses
import hmac
import time
from collections.abc import Awaitable, Callable
from typing import Any

from absl import logging
from starlette.requests import Request
from starlette.responses import Response

from pjrlhf.data.messages import Prompt
from pjrlhf.errors import UserError
from pjrlhf.serving.catalogue import Catalogue, UnknownIngredient, UnknownModel, Voice
from pjrlhf.serving.engine import Engine
from pjrlhf.serving.metrics import Metrics
from pjrlhf.serving.people.members import Members, open_members
from pjrlhf.serving.people.questions import pool_of
from pjrlhf.serving.people.store import Unreachable
from pjrlhf.serving.protocol import Body, Refused
from pjrlhf.serving.settings import ServerSettings


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """One method of one path.

    Attributes:
      method: of HTTP.
      path: with parameters as Starlette writes them.
      handler: answers a request. It may raise `Refused`.
      open: needs no API key, and is neither counted nor logged: probes, and files of a page.
      summary: for the OpenAPI schema, which leaves endpoints without one out.
      body: the model of the request's JSON, or None.
      query: the model of the parameters after the path, or None.
      answer: the type of the response's JSON, or None for text.
      streams: the response may be server-sent events.
    """

    method: str
    path: str
    handler: Callable[[Request], Awaitable[Response]]
    open: bool = False
    summary: str = ""
    body: type[Body] | None = None
    query: type[Body] | None = None
    answer: Any = None
    streams: bool = False


class Service:
    """What endpoints share. A group of endpoints is a function from a `Service` to its endpoints.

    Args:
      catalogue: what is served.
      engine: of its model and bank; running.
      settings: limits.
      api_key: that requests must bring; "" for none.

    Attributes:
      metrics: of this server.
      started: time of its start, in whole seconds since the epoch.
      questions: pairs of answers that people are asked about.
      encoding: held while a text is encoded: one at a time, so that others do not hold up answers.
    """

    def __init__(self, catalogue: Catalogue, engine: Engine, settings: ServerSettings, api_key: str = ""):
        self.catalogue = open_members(catalogue, settings.people, settings.comparisons)
        self.engine, self.settings = engine, settings
        people, notes = self.catalogue.people, catalogue.notes
        fits = isinstance(people, Members) and people.fitter is not None
        if settings.questions and not fits:
            raise UserError(
                "questions: no row of a person is fitted here, so that no question tells more than another; leave it "
                "out, or serve another entry"
            )
        self.questions = pool_of(catalogue.run, settings.questions, bool(notes.examples)) if fits else ()
        self.api_key = api_key.encode("utf-8", "surrogateescape")
        self.metrics = Metrics(engine)
        self.started = int(time.time())
        self.encoding = asyncio.Lock()

    @property
    def compiling(self) -> bool:
        """Whether what votes need is still compiled, so that a vote may wait for it."""
        people = self.catalogue.people
        return isinstance(people, Members) and people.table.warming

    def admits(self, request: Request) -> bool:
        """Whether a request brings the key, where there is one."""
        given = request.headers.get("authorization", "").encode("latin-1")  # headers are bytes
        return not self.api_key or hmac.compare_digest(given, b"Bearer " + self.api_key)

    async def body(self, request: Request, *, optional: bool = False) -> bytes:
        """The JSON text of a request.

        Args:
          optional: there may be none, which no header then speaks of.

        Raises:
          Refused: it is too large, or said to be something else.
        """
        limit = self.settings.max_body
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        wrong = Refused("content-type: is not application/json; send JSON, and say so in this header", status=415)
        if kind != "application/json" and not optional:
            raise wrong
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
        if kind != "application/json" and size:
            raise wrong
        return b"".join(parts)

    def voice(self, model: str | None, mix: Any = None, user: str | None = None) -> Voice:
        """Who answers, see `Catalogue.voice`.

        Raises:
          Refused: nothing of that name is served, or the soup is malformed.
        """
        try:
            return self.catalogue.voice(model, mix, user)
        except UnknownModel as problem:
            raise Refused(str(problem), "model", 404, "model_not_found") from problem
        except Unreachable as problem:
            raise unreachable(problem) from problem
        except UserError as problem:
            code = "unknown_ingredient" if isinstance(problem, UnknownIngredient) else None
            raise Refused(str(problem), "model" if mix is None else "mix", code=code) from problem

    def told(self, voice: Voice, prompt: Prompt) -> Prompt:
        """See `Catalogue.told`.

        Raises:
          Refused: the people cannot be read, or nobody writes what they compared.
        """
        try:
            return self.catalogue.told(voice, prompt)
        except Unreachable as problem:
            raise unreachable(problem) from problem
        except UserError as problem:
            raise Refused(str(problem), "prompt") from problem


def unreachable(problem: Unreachable) -> Refused:
    """What clients are told; the log has the reason, which is for whoever runs the server."""
    logging.error("%s", problem)
    message = "people: their database does not answer, see the log of the server; try again later"
    return Refused(message, status=503, headers={"retry-after": "1"})
