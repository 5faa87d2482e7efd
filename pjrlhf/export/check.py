"""Compares the log-probs of a live server with ours, for the same soup or person.

The server is any with OpenAI's `/v1/completions`. Where it can echo a prompt, the log-probs of prompts are compared;
where it cannot, those of the tokens that it draws greedily.
"""

import dataclasses
import http.client
import json
import math
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pjrlhf.data.batching import pad_right
from pjrlhf.errors import UserError
from pjrlhf.export.soup import Source
from pjrlhf.export.vocabulary import people_of
from pjrlhf.rewards.server import is_address, key_in
from pjrlhf.types import Json

PROMPTS = (
    "what is rain ?",
    "How do I boil an egg?",
    "Write two sentences about the sea, and one about the mountains.",
)
TOLERANCE = 0.05  # nats; servers compute in 16 bits
GREEDY = 8  # tokens
KEYS = "PJRLHF_API_KEY", "OPENAI_API_KEY"
MULTIPLE = 32  # lengths are rounded up, so that few programs are compiled


class _NotSupported(Exception):
    """The server refuses a request, for the reason in the message."""


@dataclasses.dataclass(frozen=True)
class Server:
    """A server with OpenAI's API.

    Attributes:
      url: up to /v1.
      timeout: seconds for a reply.
    """

    url: str
    timeout: float = 120.0

    @classmethod
    def at(cls, url: str) -> "Server":
        """
        Raises:
          UserError: no address of a server.
        """
        if not (is_address(url) and url.isascii()):
            raise UserError(f"--check {url}: is no address of a server; write one such as http://127.0.0.1:8000/v1")
        parts = urllib.parse.urlsplit(url)
        path = parts.path.rstrip("/") or "/v1"
        return cls(f"{parts.scheme}://{parts.netloc}{path}")

    def ask(self, path: str, body: Mapping[str, Json] | None = None) -> Any:
        """The JSON reply to a request.

        Raises:
          _NotSupported: status 400, 404, 405, 422 or 501.
          UserError: no server there, a key that cannot be sent, or another failure.
        """
        key = next((value for name in KEYS if (value := key_in(name))), None)
        headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}{path}", data, headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                return json.loads(reply.read())
        except urllib.error.HTTPError as error:
            reason = " ".join(error.read().decode("utf-8", "replace").split())[:300]
            if error.code in (400, 404, 405, 422, 501):
                raise _NotSupported(reason) from error
            if error.code == 401:
                raise UserError(f"{self.url}: wants an API key; set {' or '.join(KEYS)}") from error
            raise UserError(f"{self.url}: status {error.code} ({reason}); try again, or look at its log") from error
        except (OSError, ValueError, http.client.HTTPException, RecursionError) as error:
            # No connection, one that was cut, or a reply that is no HTTP or no JSON.
            reason = " ".join(str(getattr(error, "reason", error)).split())[:300] or type(error).__name__
            raise UserError(
                f"{self.url}: gives no answer ({reason}); start the server, or correct the address"
            ) from error


def check_tolerance(tolerance: float) -> None:
    """Raises UserError for a tolerance that decides nothing."""
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise UserError(f"--tolerance {tolerance:g}: is no number of nats that is finite and at least 0; correct it")


def check(
    server: Server,
    source: Source,
    mix: Mapping[str, float] | None,
    user: str | None,
    served_as: str | None = None,
    tolerance: float = TOLERANCE,
) -> tuple[list[str], bool]:
    """(lines to print, whether all log-probs agree within the tolerance).

    Args:
      mix, user: who answers here, and on a server of this program also there.
      served_as: the name of the model there; its only one where None.
      tolerance: nats.

    Raises:
      UserError: no server, no model of that name, or no log-probs in its replies.
    """
    voice = source.voice(mix, user)
    try:
        reply = server.ask("/models")
    except _NotSupported as error:
        raise UserError(f"{server.url}/models: {error}; name the address up to /v1") from error
    data = reply.get("data") if isinstance(reply, dict) else None
    listed = [one for one in data if isinstance(one, dict)] if isinstance(data, list) else []
    same = any(one.get("owned_by") == "pjrlhf" for one in listed)
    body: dict[str, Json] = {
        "model": _name(server, [str(one.get("id")) for one in listed], served_as, voice.model if same else None)
    }
    if same:
        body |= {"mix": dict(mix)} if mix is not None and served_as is None else {}  # a name says who answers
        body |= {"user": user} if user is not None else {}
    ours = _Ours(source, voice)
    added = None if same or voice.user_tokens is None else people_of(source)[0]
    lines, worst = [], 0.0
    for prompt in PROMPTS:
        ids = source.catalogue.model.tokenizer.encode_prompt(prompt)
        sent, own = list(ids), np.ones(len(ids), bool)
        if added is not None:
            tokenizer = source.catalogue.model.tokenizer
            sent = added.inserted(ids, user, tokenizer, added.extend(tokenizer))
            own = np.ones(len(sent), bool)
            start = min(ours.offset, len(ids))
            own[start : start + added.count] = False
        gap, what = _difference(server, body, ours, ids, sent, own)
        worst = max(worst, gap)
        lines.append(f"{prompt!r}: largest difference {gap:.2g} nats, {what}")
    good = worst <= tolerance
    verdict = "within" if good else "beyond"
    who = [str(body["model"])]
    if isinstance(asked := body.get("mix"), dict):
        who.append("with the mix " + ",".join(f"{name}={weight:g}" for name, weight in asked.items()))
    who += [f"for {user}"] if "user" in body else []
    lines.append(f"{' '.join(who)}: largest difference {worst:.3g} nats, {verdict} the tolerance of {tolerance:g}")
    return lines, good


def _name(server: Server, listed: Sequence[str], wanted: str | None, default: str | None) -> str:
    name = wanted or default or (listed[0] if len(listed) == 1 else None)
    if name is None or (listed and name not in listed and not name.startswith("soup:")):
        reason = "serves several models" if name is None else f"serves no {name!r}"
        raise UserError(f"{server.url}: {reason}; name one with --served-as: {', '.join(listed)}")
    return name


def _difference(
    server: Server, body: Mapping[str, Json], ours: "_Ours", ids: Sequence[int], sent: Sequence[int], own: np.ndarray
) -> tuple[float, str]:
    """(largest difference for a prompt, what was compared)."""
    wish = {**body, "prompt": [*sent], "temperature": 0, "logprobs": 1}
    for limit in (0, 1):  # some servers want at least one token
        try:
            reply = server.ask("/completions", {**wish, "echo": True, "max_tokens": limit})
        except _NotSupported:
            continue
        found = _logprobs(reply)
        if len(found) >= len(sent):
            theirs = [value for value, mine in zip(found, own, strict=False) if mine]
            mine = ours.prompt(ids)
            pairs = [(a, b) for a, b in zip(theirs, mine, strict=True) if a is not None and b is not None]
            if pairs:
                return _largest([abs(a - b) for a, b in pairs]), f"{len(pairs)} tokens of the prompt"
    try:
        reply = server.ask("/completions", {**wish, "max_tokens": GREEDY})
    except _NotSupported as error:
        raise UserError(
            f"{server.url}: refuses prompts for log-probs ({error}); use a server that gives them"
        ) from error
    theirs = [value for value in _logprobs(reply) if value is not None][:GREEDY]
    if not theirs:
        raise UserError(f"{server.url}: gives no log-probs; use a server with logprobs in /v1/completions")
    texts, gaps = _texts(reply), []
    for (text, value), found, their_text in zip(
        ours.greedy(ids, len(theirs)), theirs, [*texts, *[None] * GREEDY], strict=False
    ):
        gaps.append(abs(value - found))
        if their_text is not None and their_text.strip() != text.strip():
            break  # another token, as where two are about as likely; what follows differs
    return _largest(gaps), f"{len(gaps)} greedy tokens"


def _largest(gaps: Sequence[float]) -> float:
    """The largest of some differences; infinite where one is no number."""
    return max(gaps) if all(math.isfinite(gap) for gap in gaps) else math.inf


def _texts(reply: Any) -> list[str]:
    """The tokens of a completion."""
    try:
        found = reply["choices"][0].get("logprobs") or {}
        return [str(one) for one in found.get("tokens") or [one["token"] for one in found.get("content") or []]]
    except (KeyError, IndexError, TypeError, AttributeError):
        return []


def _logprobs(reply: Any) -> list[float | None]:
    """Log-probs of a completion, in the form of OpenAI's completions or of its chats."""
    try:
        found = reply["choices"][0].get("logprobs") or {}
        if "token_logprobs" in found:
            return [None if one is None else float(one) for one in found["token_logprobs"]]
        return [float(one["logprob"]) for one in found.get("content") or []]
    except (KeyError, IndexError, TypeError, AttributeError, ValueError):
        return []


class _Ours:
    """Log-probs of a voice of the catalogue."""

    def __init__(self, source: Source, voice: Any):
        self._model, self._bank = source.catalogue.model, source.catalogue.bank
        self._mix = None if voice.mix is None else jnp.asarray(voice.mix)[None]
        self._user = None if voice.user_tokens is None else jnp.asarray(voice.user_tokens)[None]
        self.offset = self._model.backbone.model.user_offset

    def _table(self, ids: Sequence[int]) -> np.ndarray:
        """Log-probs [T + E, V] of what follows every token of a prompt and its user tokens."""
        length = len(ids) + -len(ids) % MULTIPLE
        tokens, valid = pad_right([[*ids]], length, self._model.tokenizer.pad_id)
        return np.asarray(_logps(self._model.backbone, self._bank, self._mix, self._user, tokens, valid))

    def prompt(self, ids: Sequence[int]) -> list[float | None]:
        """Of the tokens of a prompt; None for one that nothing stands before."""
        table, more = self._table(ids), 0 if self._user is None else self._user.shape[1]
        places = [i + (more if i >= self.offset else 0) for i in range(len(ids))]
        return [float(table[p - 1, token]) if p else None for p, token in zip(places, ids, strict=True)]

    def greedy(self, ids: Sequence[int], count: int) -> list[tuple[str, float]]:
        """(text, log-prob) of the most likely tokens after a prompt, up to one that ends the answer."""
        found, ids = [], list(ids)
        more = 0 if self._user is None else self._user.shape[1]
        for _ in range(count):
            last = self._table(ids)[len(ids) + more - 1]
            ids.append(int(last.argmax()))
            found.append((self._model.tokenizer.decode(ids[-1:], False), float(last.max())))
            if ids[-1] in self._model.tokenizer.eos_ids:
                break
        return found


@jax.jit
def _logps(backbone: Any, bank: Any, mix: Any, user_tokens: Any, tokens: Any, valid: Any) -> jax.Array:
    policies = backbone.policies(bank, mix, user_tokens)
    hidden, _ = policies(*policies.reserve(tokens, valid))
    return jax.nn.log_softmax(policies.logits(hidden)[0], -1)
