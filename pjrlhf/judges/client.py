"""A model behind an OpenAI-compatible URL: its settings, and the client that sends it requests."""

import dataclasses
import json
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from absl import logging

from pjrlhf.errors import UserError
from pjrlhf.rewards.server import is_address, is_busy, key_in, refuse_login
from pjrlhf.rewards.sources import NoReply
from pjrlhf.settings import Settings, setting
from pjrlhf.terminal import masked
from pjrlhf.types import Json

if TYPE_CHECKING:
    import openai

Body = Mapping[str, Json]  # of a request to /v1/chat/completions
GATEWAY = (502, 503, 504)  # statuses of those in front of a server that is away


class Away(NoReply):
    """A server that takes no requests at all after all tries; it may be starting again."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatSettings(Settings):
    """A model behind an OpenAI-compatible URL."""

    model: str = setting("", "its name there")
    base_url: str = setting("", "URL of the server, such as http://localhost:8000/v1; that of OpenAI where empty")
    key_variable: str = setting("OPENAI_API_KEY", "environment variable that holds the key")
    timeout: float = setting(120.0, "seconds to wait for a reply", above=0.0, high=86400.0)
    retries: int = setting(6, "further tries after a lost connection, and where the server is busy or fails", low=0)
    patience: float = setting(
        600.0, "seconds, after the last of these, to wait for a server that has answered before", low=0.0, high=86400.0
    )
    concurrency: int = setting(8, "requests at once", low=1, high=1024)
    requests_per_minute: int = setting(0, "requests sent in a minute at most; 0 for no limit", low=0, high=10**6)
    cache: str = setting("", "JSON lines file of requests and replies; judge.jsonl in the run directory where empty")
    replay: bool = setting(False, "send nothing: a request without a cached reply is an error")
    max_requests: int = setting(0, "requests to this model in the cache at most; 0 for no limit", low=0)
    max_cost: float = setting(0.0, "cost of its requests in the cache at most; 0 for no limit", low=0.0)
    prices: tuple[float, ...] = setting((), "of a million input tokens and of a million output tokens", low=0.0)

    def check(self) -> None:
        super().check()
        if self.base_url and not is_address(self.base_url):
            raise UserError(f"base_url: {masked(self.base_url)!r} is no address; write http://host:port/v1")
        refuse_login(self.base_url, f"base_url {masked(self.base_url)}")
        if self.prices and len(self.prices) != 2:
            raise UserError(f"prices: {self.prices} are not two; give that of input and that of output tokens")
        if self.max_cost and not self.prices:
            raise UserError("max_cost: needs prices; give those of a million input and output tokens")


def text_in(content: Json) -> str:
    """The text of a message's content: a text, or parts, of which those of type text count; empty for anything else."""
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, Mapping) and part.get("type") == "text"]
        content = "".join(text for text in texts if isinstance(text, str))
    return content.strip() if isinstance(content, str) else ""


def client(settings: ChatSettings) -> Callable[[Body], Json]:
    """A function that sends a request through the `openai` client, which waits and tries again where that can help."""
    try:
        import openai
    except ImportError as error:
        raise UserError("chat: needs the openai client; pip install 'pjrlhf[judge]'") from error
    key = key_in(settings.key_variable)
    if not key and not settings.base_url:
        raise UserError(
            f"model {settings.model!r}: ${settings.key_variable} is not set; set it to the key of the server"
        )

    class Telling(openai.OpenAI):
        """A client that says when it waits for a server."""

        def _calculate_retry_timeout(self, remaining_retries: int, *args: Any, **kwargs: Any) -> float:
            # No public method: a version of the client that has another one waits in silence.
            seconds = super()._calculate_retry_timeout(remaining_retries, *args, **kwargs)
            waits.tell(sys.exc_info()[1], seconds, settings.retries - remaining_retries + 1)
            return seconds

    connection = Telling(
        api_key=key or "none",  # local servers need none
        base_url=settings.base_url or None,
        timeout=settings.timeout,
        max_retries=settings.retries,
    )
    where = f"model {settings.model!r} at {connection.base_url}"
    waits = Waits(where, settings.retries)

    accepted = Accepted(where)

    def send(body: Body) -> Json:
        problem: Exception = ValueError("a reply without choices")
        for _ in range(settings.retries + 1):
            try:
                found = accepted.create(connection.chat.completions.create, body)
                waits.answered()
                if getattr(found, "choices", None):
                    return found.model_dump(mode="json", exclude_none=True, warnings=False)
            except (openai.APIResponseValidationError, ValueError, RecursionError) as error:
                problem = error  # a reply that is no JSON, or another JSON
            except openai.AuthenticationError as error:
                raise UserError(f"{where}: refuses the key; check ${settings.key_variable}") from error
            except openai.NotFoundError as error:
                raise UserError(f"{where}: has no such model or address; check model and base_url") from error
            except openai.APIConnectionError as error:
                kind = NoReply if isinstance(error, openai.APITimeoutError) else Away
                raise kind(f"{where}: cannot be reached ({error.__cause__ or error}); check base_url") from error
            except openai.APIStatusError as error:
                reason = " ".join(_said(error).split())[:200]
                busy = Away if error.status_code in GATEWAY else NoReply
                kind = busy if is_busy(error.status_code) else UserError
                raise kind(f"{where}: answers {error.status_code} ({reason}); correct that, or try later") from error
        raise NoReply(f"{where}: its replies cannot be read ({problem}); check base_url") from problem

    return send


class Waits:
    """Says that a server does not answer, in one line for each wait, however many threads wait at the same time. After
    the last try of a request it says no more, until the server answers again.

    Args:
      where: the model and its server, for messages.
      retries: further tries of a request.
    """

    def __init__(self, where: str, retries: int):
        self.where, self.retries = where, retries
        self._lock, self._until, self._away = threading.Lock(), 0.0, False

    def tell(self, error: BaseException | None, seconds: float, attempt: int) -> None:
        """To be called by who waits before a further try.

        Args:
          error: why; that of a server that did answer, with a status, is not told.
          seconds: of the wait.
          attempt: number of the further try, from 1.
        """
        if error is None or hasattr(error, "response"):
            return
        with self._lock:
            now = time.monotonic()
            if self._away or now < self._until:
                return
            self._until, self._away = now + seconds, attempt >= self.retries
        reason = str(error) or type(error).__name__
        what = "%s: does not answer (%s); trying again in %.2g s (%d of %d)"
        logging.warning(what, self.where, reason, seconds, attempt, self.retries)

    def answered(self) -> None:
        """To be called by who got an answer."""
        with self._lock:
            again, self._away = self._away, False
        if again:
            logging.info("%s: answers again", self.where)


# Parameters that some servers refuse, and the name under which these take them; None: what they can do without.
OTHER_NAMES: Mapping[str, str | None] = {
    "max_tokens": "max_completion_tokens",
    "max_completion_tokens": "max_tokens",
    "logprobs": None,
    "seed": None,
}
# A refusal of a parameter, and not of its value.
UNKNOWN = re.compile(
    r"unsupported|not (yet |be )?(support|permitted|allowed|available|enabled|accept|implemented)|n't support|unknown"
    r"|unrecogni[sz]ed|unexpected|extra |forbidden|deprecated|instead",
    re.IGNORECASE,
)


class Accepted:
    """The parameters that a server takes, learned from its refusals. Those who ask at the same time may share it.

    Args:
      where: the model and its server, for messages.
    """

    def __init__(self, where: str):
        self.where = where
        self.names: Mapping[str, str | None] = {}  # of what it refused

    def create(self, create: Callable[..., Any], body: Body) -> Any:
        """What `create` returns for a request, under the names that the server takes. Where it refuses a parameter, the
        request is sent again under its other name, or without it; what the server then takes is remembered.

        Raises:
          openai.OpenAIError: that of `create`; the first one where the server refuses both names.
        """
        import openai

        names, refused = dict(self.names), dict[str, openai.APIStatusError]()
        while True:
            renamed = ((names.get(name, name), value) for name, value in body.items())
            sent = {name: value for name, value in renamed if name is not None}
            if "logprobs" not in sent:
                sent.pop("top_logprobs", None)
            # What servers of open models take beside the parameters of OpenAI.
            further = {name: value for name, value in sent.items() if name == "chat_template_kwargs"}
            known = {name: value for name, value in sent.items() if name not in further}
            try:
                found = create(**known, extra_body=further)
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                name = _refused(_said(error), known)
                if name is None:
                    raise
                refused[name] = error
                own = next(own for own in body if names.get(own, own) == name)
                names[own] = OTHER_NAMES[name]
                if names[own] in refused:
                    raise next(iter(refused.values())) from error
                continue
            if names != self.names:
                self._tell(names)
                self.names = names
            return found

    def _tell(self, names: Mapping[str, str | None]) -> None:
        for name, other in names.items():
            if self.names.get(name, name) != other:
                what = f"takes {other} in place of {name}" if other else f"does not take {name}, which is left out"
                logging.info("%s: %s", self.where, what)


def _said(error: "openai.APIStatusError") -> str:
    """What a server says with an error: its message, or all that it sent. Of the text of the exception some versions of
    the client make the whole body, and others leave out one without a message.
    """
    body = error.body
    if isinstance(body, Mapping) and isinstance(body.get("message"), str):
        body = body["message"]
    return (body if isinstance(body, str) else json.dumps(body) if body else "") or str(error)


def _refused(message: str, sent: Body) -> str | None:
    """The parameter of a request that the message of an error refuses; None where it speaks of something else."""
    if not UNKNOWN.search(message):
        return None
    return next((name for name in OTHER_NAMES if name in sent and re.search(rf"\b{name}\b", message)), None)
