"""Requests to an OpenAI-compatible server: cached on disk, within a budget, many at once.

Every reply is kept with its request in a JSON lines file. A request that stands in the file is not sent again, so a run
that was stopped goes on where it was, and a finished one can be replayed without the server.
"""

import dataclasses
import hashlib
import json
import math
import os
import pathlib
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait

from absl import logging

from pjrlhf.errors import UserError
from pjrlhf.judges.client import Away, Body, ChatSettings, client
from pjrlhf.paths import expand
from pjrlhf.rewards.sources import NoReply
from pjrlhf.training.progress import progress
from pjrlhf.training.workdir import end_line, read_lines
from pjrlhf.types import Json

PAUSE = 15.0  # seconds between tries to reach a server that went away


@dataclasses.dataclass
class Usage:
    """What the requests to a model took.

    Attributes:
      requests: replies in the cache, those of earlier runs included.
      input_tokens, output_tokens: of all `requests`.
      unknown: replies without token counts; these are missing from the cost.
      under_way: requests without a reply so far.
      next: when the next request may be sent, on the clock of `time.monotonic`.
      lock: of all these. Those who ask the same model at the same time share its limits.
    """

    requests: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    unknown: int = 0
    under_way: int = 0
    next: float = 0.0
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock, repr=False, compare=False)

    def add(self, reply: Json) -> None:
        counts = token_counts(reply)
        self.requests += 1
        self.unknown += counts is None
        sent, received = counts or (0, 0)
        self.input_tokens += sent
        self.output_tokens += received

    def cost(self, prices: Sequence[float]) -> float:
        """In the currency of `prices`; 0 without prices."""
        if not prices:
            return 0.0
        return (self.input_tokens * prices[0] + self.output_tokens * prices[1]) / 1e6


def token_counts(reply: Json) -> tuple[int, int] | None:
    """(input tokens, output tokens) of a reply; None where it does not say."""
    usage = reply.get("usage")
    if not isinstance(usage, Mapping):
        return None
    sent, received = (usage.get(name) for name in ("prompt_tokens", "completion_tokens"))
    if (
        type(sent) is not int
        or type(received) is not int
        or not 0 <= min(sent, received) <= max(sent, received) < 2**53
    ):
        return None
    return sent, received


def request_key(base_url: str, body: Body) -> str:
    """What a reply is kept under: a hash of the server and the whole request."""
    text = json.dumps([base_url, body], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


_caches: weakref.WeakValueDictionary[str, "Cache"] = weakref.WeakValueDictionary()


def open_cache(path: pathlib.Path) -> "Cache":
    """The cache in a file. All that use one file share it, so that none repeats a request of another."""
    name = os.path.abspath(path)
    cache = _caches.get(name)
    if cache is None:
        cache = _caches[name] = Cache(path)
    return cache


class Cache:
    """Replies by request, in memory and in a JSON lines file.

    A line that was cut short by a crash, or is none of this class, is left out.

    Raises:
      UserError: the file cannot be read or written.
    """

    def __init__(self, path: pathlib.Path):
        self.path, self.replies = path, dict[str, Json]()
        self._bodies = dict[str, Body]()
        self._usage = dict[tuple[str, str], Usage]()
        self._lock = threading.Lock()
        try:
            entries = read_lines(path)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); choose another cache") from error
        for entry in entries:
            key, body, reply = (entry.get(name) for name in ("key", "request", "reply"))
            if isinstance(key, str) and isinstance(body, dict) and isinstance(reply, dict):
                self._bodies[key], self.replies[key] = body, reply

    def usage(self, base_url: str, model: str) -> Usage:
        """What the requests to a model took, which all that ask it share."""
        with self._lock:
            if known := self._usage.get((base_url, model)):
                return known
            found = self._usage[base_url, model] = Usage()
            for key, reply in self.replies.items():
                body = self._bodies[key]
                if body.get("model") == model and request_key(base_url, body) == key:
                    found.add(reply)
            return found

    def add(self, key: str, body: Body, reply: Json) -> None:
        """Keeps a reply, on disk before it is used. Who sent the request adds it to the usage of its model."""
        line = json.dumps({"key": key, "request": body, "reply": reply}, ensure_ascii=False) + "\n"
        with self._lock:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                end_line(self.path)
                with self.path.open("ab") as file:
                    file.write(line.encode("utf-8", "surrogatepass"))
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                raise UserError(f"{self.path}: cannot be written ({error.strerror}); choose another cache") from error
            self._bodies[key], self.replies[key] = body, reply


class Chat:
    """Sends requests and returns replies.

    Args:
      settings: the model and its limits.
      cache: file of the replies.
      send: (body) -> reply as JSON; that of the `openai` client where None.

    Attributes:
      sent: requests that this object sent.
      failures: what was asked in vain, because no reply could be read; counted by those who read them.

    Raises:
      UserError: no model is named, the client is not installed, or there is no key.
    """

    def __init__(self, settings: ChatSettings, cache: pathlib.Path, send: Callable[[Body], Json] | None = None):
        if not settings.model:
            raise UserError("judge: names no model; set model to its name on the server")
        self.settings = settings
        self.cache = open_cache(pathlib.Path(expand(settings.cache)) if settings.cache else cache)
        self.usage = self.cache.usage(settings.base_url, settings.model)
        self.sent, self.failures = 0, 0
        self._told = -math.inf  # until when a wait for the server was announced
        self._send = send
        if send is None and not settings.replay:
            self._send = client(settings)

    @property
    def cost(self) -> float:
        """Of all replies of this model in the cache."""
        return self.usage.cost(self.settings.prices)

    def __call__(self, name: str, bodies: Sequence[Body]) -> list[Json]:
        """The replies to N requests, in their order. Equal requests are sent once.

        Args:
          name: of the progress bar.

        Raises:
          UserError: the server fails after all retries, refuses a request, or the budget is used up; replies that came
            before are kept. In a replay: a request without a kept reply.
        """
        keys = [request_key(self.settings.base_url, body) for body in bodies]
        missing = {key: body for key, body in zip(keys, bodies, strict=True) if key not in self.cache.replies}
        if missing and self.settings.replay:
            raise UserError(
                f"{self.cache.path}: has no reply to {len(missing)} of {len(bodies)} requests of {name}; set replay to "
                "False to send them"
            )
        if missing:
            self._fetch(name, missing)
        return [self.cache.replies[key] for key in keys]

    def allows(self, most: int) -> tuple[bool, str]:
        """(whether the budget allows `most` further requests, what it says to them). They cost as much as those in the
        cache did on average.
        """
        limits, usage, enough, told = self.settings, self.usage, True, []
        if limits.max_requests:
            left = max(limits.max_requests - usage.requests, 0)
            enough = left >= most
            told.append(f"max_requests={limits.max_requests} allows {left:,}")
        known = usage.requests - usage.unknown
        cost = self.cost / known * most if known and limits.prices else None
        if cost is not None:
            told.append(f"they cost about {cost:,.2f}")
        if limits.max_cost and cost is None:
            told.append(f"max_cost={limits.max_cost:g} is compared with their cost after the first reply")
        elif limits.max_cost and cost is not None:
            left_cost = max(limits.max_cost - self.cost, 0.0)
            enough = enough and left_cost >= cost
            told.append(f"max_cost={limits.max_cost:g} allows {left_cost:,.2f}")
        if not (limits.max_requests or limits.max_cost):
            told.append("neither max_requests nor max_cost limits them")
        return enough, ", ".join(told)

    def _fetch(self, name: str, missing: Mapping[str, Body]) -> None:
        try:
            self._send_all(name, missing)
        except NoReply as error:
            kept = f"; {self.usage.requests} replies are kept in {self.cache.path}" if self.usage.requests else ""
            raise NoReply(f"{error}{kept}; the same command goes on") from error

    def _send_all(self, name: str, missing: Mapping[str, Body]) -> None:
        total, ended, waiting = len(missing), threading.Event(), list(missing.items())
        with (
            progress(name, total, ("requests", *(["cost"] if self.settings.prices else []), "unreadable")) as bar,
            ThreadPoolExecutor(self.settings.concurrency) as pool,
        ):
            if self.settings.max_cost and not self.usage.requests:
                # Alone, because what a request costs is not known before.
                self._one(*waiting.pop(0), ended)
            jobs = [pool.submit(self._one, key, body, ended) for key, body in waiting]
            try:
                pending: set[Future[None]] = set(jobs)
                while pending:
                    done, pending = wait(pending, timeout=0.5, return_when=FIRST_EXCEPTION)
                    for job in done:
                        job.result()
                    counts = {"requests": float(self.usage.requests), "unreadable": float(self.failures)}
                    bar.update(total - len(pending), {**counts, "cost": self.cost})
            except BaseException:
                ended.set()  # what was sent is still received and kept
                raise

    def _one(self, key: str, body: Body, ended: threading.Event) -> None:
        self._wait(ended)
        if ended.is_set():
            return
        with self.usage.lock:
            self._check_budget()
            self.usage.under_way += 1
        try:
            reply = self._reply(body, ended)
            self.cache.add(key, body, reply)
        except BaseException:
            with self.usage.lock:
                self.usage.under_way -= 1
            raise
        with self.usage.lock:  # in one go, so that no request counts twice against the budget
            self.usage.under_way -= 1
            self.usage.add(reply)
            self.sent += 1
        if self.settings.max_cost and token_counts(reply) is None:
            raise UserError(
                f"model {self.settings.model!r}: its server reports no token counts, which max_cost needs; set "
                "max_requests instead"
            )

    def _reply(self, body: Body, ended: threading.Event) -> Json:
        """The reply of the server. One that has answered before is waited for: it may be starting again."""
        assert self._send is not None  # only a replay has none
        end = math.inf
        while True:
            try:
                return self._send(body)
            except Away as error:
                now = time.monotonic()
                end = min(end, now + self.settings.patience)
                if not self.sent or now >= end:
                    raise
                self._tell(error, now, end)
                if ended.wait(min(PAUSE, end - now)):
                    raise

    def _tell(self, error: Away, now: float, end: float) -> None:
        """Says that the server is waited for, in one line for all that wait."""
        with self.usage.lock:
            if now < self._told:
                return
            self._told = end
        logging.warning("%s; it has answered before, so it is waited for, %.0f s at most", error, end - now)

    def _wait(self, ended: threading.Event) -> None:
        """Waits until `requests_per_minute` allows another request, or until the end."""
        if self.settings.requests_per_minute:
            with self.usage.lock:
                now = time.monotonic()
                start = max(self.usage.next, now)
                self.usage.next = start + 60 / self.settings.requests_per_minute
            ended.wait(start - now)

    def _check_budget(self) -> None:
        """Raises UserError where one more request may exceed the budget: those under way cost what others did."""
        limits, used = self.settings, ""
        expected = self.cost * (1 + self.usage.under_way / max(self.usage.requests, 1))
        if limits.max_requests and self.usage.requests + self.usage.under_way >= limits.max_requests:
            used = f"max_requests={limits.max_requests} is reached"
        elif limits.max_cost and expected >= limits.max_cost:
            used = f"max_cost={limits.max_cost:g} is reached"
        if used:
            raise UserError(
                f"model {limits.model!r}: {used}; raise the limit, and the same command goes on from {self.cache.path}"
            )
