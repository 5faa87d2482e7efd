"""Rewards from a server: batches of answers as JSON to a URL."""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from pjrlhf.errors import UserError
from pjrlhf.rewards.sources import SOURCES, RewardFunction
from pjrlhf.types import Json

BUSY = (408, 429, 500, 502, 503, 504)  # HTTP status codes after which another try may succeed
LONGEST_WAIT = 60.0  # seconds between two tries


@SOURCES.register("http")
def by_http(
    url: str, timeout: float = 60.0, retries: int = 5, batch_size: int = 64, concurrency: int = 4
) -> RewardFunction:
    """POSTs {"prompts": [...], "completions": [...]} and takes {"rewards": [...]}, a number or null for each.

    Args:
      timeout: seconds to wait for a reply.
      retries: further tries where the server is busy, fails or cannot be reached; the waits double from a quarter of a
        second, or are what the server asks for.
      batch_size: answers in a request.
      concurrency: requests at once.
    """
    if not url.startswith(("http://", "https://")):
        raise UserError(f"reward server {url!r}: is no address; write http://host:port/path")
    if min(batch_size, concurrency) < 1 or retries < 0 or timeout <= 0:
        raise UserError(
            f"reward server {url}: needs timeout above 0, retries of 0 or more, batch_size and concurrency of 1 or more"
        )

    def ask(prompts: Sequence[str], completions: Sequence[str]) -> list[Json]:
        body = json.dumps({"prompts": list(prompts), "completions": list(completions)}).encode()
        found = _post(url, body, timeout, retries)
        rewards = found.get("rewards") if isinstance(found, dict) else None
        if not isinstance(rewards, list) or len(rewards) != len(completions):
            raise UserError(
                f'reward server {url}: replied {str(found)[:80]!r}; it must reply {{"rewards": [...]}} with '
                f"{len(completions)} numbers or nulls"
            )
        return rewards

    def rewards(prompts: list[str], completions: list[str]) -> list[float | None]:
        parts = [slice(i, i + batch_size) for i in range(0, len(completions), batch_size)]
        with ThreadPoolExecutor(concurrency) as pool:
            found = list(pool.map(lambda part: ask(prompts[part], completions[part]), parts))
        return [reward for part in found for reward in part]

    return rewards


def _post(url: str, body: bytes, timeout: float, retries: int) -> Json:
    """The reply to a request as JSON.

    Raises:
      UserError: no reply after all tries, or one that is an error or no JSON.
    """
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    pause, reason = 0.25, ""
    for attempt in range(retries + 1):
        if attempt:
            time.sleep(min(pause, LONGEST_WAIT))
            pause *= 2
        try:
            with urllib.request.urlopen(request, timeout=timeout) as reply:
                return json.loads(reply.read())
        except urllib.error.HTTPError as error:
            reason = f"HTTP {error.code}"
            if error.code not in BUSY:
                text = " ".join(error.read(200).decode(errors="replace").split())
                raise UserError(f"reward server {url}: replied {reason} ({text}); correct that") from error
            after = error.headers.get("Retry-After", "")
            pause = float(after) if after.replace(".", "", 1).isdigit() else pause
        except (OSError, ValueError) as error:  # no connection, one that was cut, or a reply that is no JSON
            reason = " ".join(str(getattr(error, "reason", error)).split()) or type(error).__name__
    raise UserError(f"reward server {url}: no reply after {retries + 1} tries ({reason}); check the server")
