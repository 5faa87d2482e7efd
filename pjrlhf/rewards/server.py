"""Rewards from a server: batches of answers as JSON to a URL."""

import contextlib
import datetime
import email.utils
import http.client
import json
import math
import os
import socket
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pjrlhf import strict_json
from pjrlhf.data.messages import Prompt
from pjrlhf.data.records import as_json
from pjrlhf.errors import UserError
from pjrlhf.rewards.sources import SOURCES, NoReply, RewardFunction, Unanswered
from pjrlhf.terminal import masked
from pjrlhf.types import Json

LONGEST_WAIT = 60.0  # seconds between two tries


@SOURCES.register("http")
def by_http(
    url: str,
    timeout: float = 60.0,
    retries: int = 5,
    batch_size: int = 64,
    concurrency: int = 4,
    key_variable: str = "",
) -> RewardFunction:
    """POSTs {"prompts": [...], "completions": [...]} and takes {"rewards": [...]}, a number or null for each. A prompt
    is a text, or a list of messages where its record has messages. Where the records have other columns, "columns" has
    {name: [...]}, as `as_json` writes their values.

    Args:
      timeout: seconds to wait for a reply.
      retries: further tries where the server is busy, fails or cannot be reached; the waits double from a quarter of a
        second, or are what the server asks for.
      batch_size: answers in a request.
      concurrency: requests at once.
      key_variable: environment variable that holds a key, which is sent as a bearer token.
    """
    if not is_address(url):
        raise UserError(f"reward server {url!r}: is no address; write http://host:port/path")
    refuse_login(url, f"reward server {masked(url)}")
    if min(batch_size, concurrency) < 1 or retries < 0 or timeout <= 0:
        raise UserError(
            f"reward server {url}: needs timeout above 0, retries of 0 or more, batch_size and concurrency of 1 or more"
        )

    key = key_in(key_variable) if key_variable else ""
    if key_variable and not key:
        raise UserError(f"reward server {url}: ${key_variable} is not set; set it to the key of the server")

    def ask(content: Mapping[str, Json]) -> list[Json]:
        completions = content["completions"]
        found = _post(url, json.dumps(content).encode(), timeout, retries, key, key_variable)
        rewards = found.get("rewards") if isinstance(found, dict) else None
        if not isinstance(rewards, list) or len(rewards) != len(completions):
            raise UserError(
                f'reward server {url}: replied {str(found)[:80]!r}; it must reply {{"rewards": [...]}} with '
                f"{len(completions)} numbers or nulls"
            )
        return rewards

    def rewards(prompts: list[Prompt], completions: list[str], **columns: Sequence[Any]) -> list[float | None]:
        parts = [slice(i, i + batch_size) for i in range(0, len(completions), batch_size)]
        found: list[float | None] = [None] * len(completions)
        failed: list[int] = []
        reason = ""
        with ThreadPoolExecutor(concurrency) as pool:
            asked = []
            for part in parts:
                content: dict[str, Json] = {"prompts": prompts[part], "completions": completions[part]}
                if columns:
                    content["columns"] = {name: as_json(list(values[part])) for name, values in columns.items()}
                asked.append(pool.submit(ask, content))
            for part, one in zip(parts, asked, strict=True):
                try:
                    found[part] = one.result()
                except NoReply as error:
                    failed += range(len(completions))[part]
                    reason = reason or str(error)
                except UserError:
                    pool.shutdown(cancel_futures=True)
                    raise
        if failed:
            raise Unanswered(reason, found, failed)
        return found

    rewards.waits = True  # type: ignore[attr-defined]  # see RewardSource.waits
    return rewards


def key_in(variable: str) -> str:
    """The key that an environment variable holds; empty where it is not set.

    Raises:
      UserError: characters that cannot be sent.
    """
    key = os.environ.get(variable, "")
    if not (key.isascii() and key.isprintable()) or key != key.strip():
        raise UserError(
            f"${variable}: holds a line break, a space at its ends or a letter that is not ASCII, which no key has; "
            "set it to the key alone"
        )
    return key


def is_address(url: str) -> bool:
    """Whether a text is the address of an HTTP server."""
    try:
        parts = urllib.parse.urlsplit(url)
        known = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:  # a port out of range, or an open bracket
        return False
    return bool(known) and url.isprintable() and " " not in url


def listens(url: str, timeout: float = 2.0) -> bool:
    """Whether something takes connections at an address; not tried, and True, where a proxy stands between.

    Args:
      timeout: seconds to wait for a connection.
    """
    parts = urllib.parse.urlsplit(url)
    if urllib.request.getproxies().get(parts.scheme) and not urllib.request.proxy_bypass(parts.hostname or ""):
        return True
    with contextlib.suppress(OSError):
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
        socket.create_connection((parts.hostname, port), timeout).close()
        return True
    return False


def refuse_login(url: str, name: str) -> None:
    """Raises UserError for the address of the server `name` that has a user or password, which messages would show."""
    if "@" in urllib.parse.urlsplit(url).netloc:
        raise UserError(
            f"{name}: has a login in its address, which is not sent; put the key into an environment variable and name "
            "that in key_variable"
        )


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirected POST would become a GET without the answers."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


def _post(url: str, body: bytes, timeout: float, retries: int, key: str, key_variable: str) -> Json:
    """The reply to a request as JSON.

    Raises:
      NoReply: after all tries.
      UserError: a reply that is an error.
    """
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(url, body, headers)
    pause, reason = 0.25, ""
    for attempt in range(retries + 1):
        if attempt:
            time.sleep(min(pause, LONGEST_WAIT))
            pause *= 2
        try:
            with _OPENER.open(request, timeout=timeout) as reply:
                return strict_json.loads(reply.read())
        except urllib.error.HTTPError as error:
            reason = f"HTTP {error.code}"
            if error.code in (401, 403):
                way = f"check ${key_variable}" if key_variable else "set key_variable to the variable that holds a key"
                raise UserError(f"reward server {url}: replied {reason}, it refuses the key; {way}") from error
            if place := error.headers.get("Location", "") if 300 <= error.code < 400 else "":
                new = urllib.parse.urljoin(url, place)
                raise UserError(f"reward server {url}: replied {reason}, it is now {new}; set url to that") from error
            if not is_busy(error.code):
                text = " ".join(error.read(200).decode(errors="replace").split())
                raise UserError(f"reward server {url}: replied {reason} ({text}); correct that") from error
            pause = retry_after(error.headers.get("Retry-After", ""), pause)
        except (OSError, ValueError, http.client.HTTPException, RecursionError) as error:
            # No connection, one that was cut, or a reply that is no HTTP or no JSON.
            reason = " ".join(str(getattr(error, "reason", error)).split()) or type(error).__name__
    raise NoReply(f"reward server {url}: no reply after {retries + 1} tries ({reason}); check the server")


def is_busy(status: int) -> bool:
    """Whether another try may succeed after an HTTP status code: a busy or failing server, or one that cannot be
    reached by what stands before it (520 to 530).
    """
    return status in (408, 409, 429) or (500 <= status < 600 and status not in (501, 505))


def retry_after(text: str, otherwise: float) -> float:
    """The seconds of a header Retry-After, a number or a date (RFC 9110, 10.2.3); `otherwise` where it says nothing."""
    try:
        seconds = float(text)
    except ValueError:
        try:
            then = email.utils.parsedate_to_datetime(text)
        except ValueError:
            return otherwise
        then = then if then.tzinfo else then.replace(tzinfo=datetime.UTC)
        seconds = (then - datetime.datetime.now(datetime.UTC)).total_seconds()
    return seconds if 0 < seconds < math.inf else otherwise
