"""The endpoints of people: who is known, their comparisons, and what to ask them next."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any

from anyio import CapacityLimiter, to_thread
from pydantic import Field
from starlette.convertors import StringConvertor, register_url_convertor
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from pjrlhf.data.comparisons import SIDES
from pjrlhf.errors import UserError
from pjrlhf.serving.people.exchange import LIMIT, describe, exported, imported, listed
from pjrlhf.serving.people.members import Members
from pjrlhf.serving.people.questions import Pair, ask_of, next_questions
from pjrlhf.serving.people.store import Taken, Unknown, Unreachable
from pjrlhf.serving.protocol import DIGITS, MIX, Body, Refused
from pjrlhf.serving.service import Endpoint, Service, unreachable
from pjrlhf.types import Json

ANSWERS = 128  # that one request may have scored
THREADS = 4  # requests of people at once; their fits run one after the other
PERSON = "/v1/users/{id:person}"


class _Name(StringConvertor):
    """Any text. That of Starlette's paths ends before a newline, so that one person would be taken for another."""

    regex = "(?s:.*)"


register_url_convertor("person", _Name())


def endpoints(service: Service) -> list[Endpoint]:
    """/v1/users."""
    people = PeopleApi(service)

    def endpoint(
        method: str,
        path: str,
        handler: Any,
        summary: str,
        body: type[Body] | None = None,
        query: type[Body] | None = None,
    ) -> Endpoint:
        return Endpoint(method, path, handler, summary=summary, body=body, query=query, answer=dict[str, Any])

    return [
        endpoint("GET", "/v1/users", people.list, "Lists people", query=Page),
        endpoint("POST", "/v1/users", people.add, "Adds a person", NewPerson),
        endpoint("POST", "/v1/users/import", people.take, "Adds an exported person", Exported),
        endpoint("POST", f"{PERSON}/feedback", people.learn, "Learns from comparisons of a person", Feedback),
        endpoint("POST", f"{PERSON}/next", people.ask, "Orders pairs by what they tell of a person", Questions),
        endpoint("POST", f"{PERSON}/score", people.score, "Rewards answers as a person sees them", Candidates),
        endpoint("GET", f"{PERSON}/export", people.export, "Exports a person"),
        endpoint("GET", PERSON, people.show, "Describes a person"),
        endpoint("DELETE", PERSON, people.remove, "Deletes a person"),
    ]


class Page(Body):
    """Which people of a list."""

    limit: Annotated[int, Field(ge=1, le=LIMIT), DIGITS] = LIMIT
    after: str = Field("", description="The last person of the page before.")


class NewPerson(Body):
    """A new person: a name, and comparisons or stated weights to start from."""

    forms = MIX
    id: str
    mix: dict[str, Any] | None = None
    comparisons: list[Any] | None = None


class Feedback(Body):
    """Comparisons: each a prompt (or messages), and the chosen and the rejected answer."""

    inside = dict.fromkeys(("prompt", "messages", *SIDES), "comparisons")
    comparisons: list[Any]


class Questions(Body):
    """Pairs of answers to choose from: each a prompt (or messages), and two answers."""

    optional = True
    pairs: list[Any] | None = Field(None, description="If absent, some of those that the server asks about.")


class Candidates(Body):
    """Answers to one prompt (or to messages)."""

    prompt: str | None = None
    messages: list[Any] | None = None
    answers: Annotated[list[str], Field(min_length=1, max_length=ANSWERS)]


class Exported(Body):
    """An export of a person."""

    object: str | None = None
    format: int | None = None
    id: str | None = None
    comparisons: list[Any] | None = None
    mix: dict[str, Any] | None = None
    row: dict[str, Any] | None = None
    start: dict[str, Any] | None = None
    model: str | None = None
    kind: str | None = None


@contextlib.contextmanager
def refused() -> Iterator[None]:
    """Turns what goes wrong with people into responses."""
    try:
        yield
    except Unknown as problem:
        param = "after" if str(problem).startswith("after") else "id"
        raise Refused(str(problem), param, 404, "user_not_found") from problem
    except Taken as problem:
        raise Refused(str(problem), "id", 409, "user_exists") from problem
    except Unreachable as problem:
        raise unreachable(problem) from problem
    except UserError as problem:
        param = str(problem).partition(":")[0]
        raise Refused(str(problem), param if param.isidentifier() else None) from problem


class PeopleApi:
    """Reads the requests, and hands them to `Members` in threads: fits and databases take their time."""

    def __init__(self, service: Service):
        self._service = service
        self._limiter = CapacityLimiter(THREADS)

    @property
    def _members(self) -> Members:
        people = self._service.catalogue.people
        if not isinstance(people, Members):
            raise Refused(
                "users: nobody can be known here; serve a run with --run, or two or more --ingredients", status=404
            )
        return people

    async def _answer(self, function: Callable[..., Json], *arguments: Any, **options: Any) -> Response:
        work = functools.partial(function, self._members, *arguments, **options)
        started = time.monotonic()
        with refused():
            found = await to_thread.run_sync(work, limiter=self._limiter)
        if function is _learn:
            found = {**found, "seconds": time.monotonic() - started}
        return JSONResponse(found)

    async def list(self, request: Request) -> Response:
        """Everybody who is known."""
        page = Page.of(request.query_params)
        if not isinstance(self._service.catalogue.people, Members):
            return JSONResponse({"object": "list", "data": [], "has_more": False})
        return await self._answer(listed, page.limit, page.after or None)

    async def add(self, request: Request) -> Response:
        """A new person."""
        body = NewPerson.read(await self._service.body(request))
        return await self._answer(_add, body.id, body.comparisons, body.mix)

    async def show(self, request: Request) -> Response:
        """One person."""
        return await self._answer(describe, request.path_params["id"])

    async def remove(self, request: Request) -> Response:
        """Deletes a person."""
        return await self._answer(_remove, request.path_params["id"])

    async def learn(self, request: Request) -> Response:
        """Comparisons of a person."""
        body = Feedback.read(await self._service.body(request))
        return await self._answer(_learn, request.path_params["id"], body.comparisons)

    async def ask(self, request: Request) -> Response:
        """What to ask a person next."""
        body = Questions.read(await self._service.body(request, optional=Questions.optional))
        pool = self._service.questions
        if body.pairs is None and not pool:
            message = "pairs: is missing, and this server has no questions; give pairs, or start it with --questions"
            raise Refused(message, "pairs")
        return await self._answer(_next, request.path_params["id"], body.pairs, pool)

    async def score(self, request: Request) -> Response:
        """What answers are worth to a person."""
        body = Candidates.read(await self._service.body(request))
        if (body.prompt is None) == (body.messages is None):
            raise Refused("prompt: give either it or messages", "prompt")
        prompt = body.messages if body.prompt is None else body.prompt
        return await self._answer(_score, request.path_params["id"], prompt, body.answers)

    async def export(self, request: Request) -> Response:
        """All that is kept of a person."""
        raw = request.scope.get("raw_path", b"/export")
        if not raw.endswith(b"/export"):  # the slash is a part of the name
            return await self._answer(describe, request.scope["path"].removeprefix("/v1/users/"))
        return await self._answer(exported, request.path_params["id"])

    async def take(self, request: Request) -> Response:
        """A person from an export."""
        body = Exported.read(await self._service.body(request))
        return await self._answer(_import, body.model_dump())


def _add(members: Members, name: Json, comparisons: Json, mix: Json) -> Json:
    return describe(members, members.add(name, comparisons, mix))


def _learn(members: Members, name: str, comparisons: Json) -> Json:
    members.learn(name, comparisons)
    return describe(members, name)


def _remove(members: Members, name: str) -> Json:
    members.remove(name)
    found: dict[str, Json] = {"object": "user.deleted", "id": name, "deleted": True}
    try:
        found["rewritten"] = [str(path) for path in members.forget(name)]
    except UserError as problem:  # they are deleted all the same: nobody uses this row again
        return {**found, "rewritten": [], "warning": f"{problem}; then run pjrlhf users remove"}
    left = members.left_in(name)
    return {**found, "warning": left} if left else found


def _next(members: Members, name: str, pairs: Json, pool: Sequence[Pair]) -> Json:
    found = ask_of(members, name, pool) if pairs is None else next_questions(members, name, pairs)
    return {"object": "list", "data": found}


def _score(members: Members, name: str, prompt: Json, answers: list[str]) -> Json:
    rewards = members.rewards(name, prompt, answers)
    data = [{"index": i, "reward": reward} for i, reward in enumerate(rewards)]
    return {"object": "list", "data": data, "best": rewards.index(max(rewards))}


def _import(members: Members, fields: Json) -> Json:
    return describe(members, imported(members, fields))
