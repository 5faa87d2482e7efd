"""Bodies of requests in the format of OpenAI's API: what they may hold, and the errors that tell what is wrong.

A field that would change the answer and is not supported is refused rather than ignored.
"""

import dataclasses
import difflib
import math
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from pjrlhf.data.records import RecordError, from_json, plain
from pjrlhf.serving.programs import TOP
from pjrlhf.types import Json

MAX_CHOICES = 128  # answers to one request
MAX_STOPS = 4
COMPLETION_TOKENS = 16  # of /v1/completions where the request sets no limit, as OpenAI has it
SEEDS = (-(2**63), 2**63 - 1)
COMMON = (
    *("model", "mix", "user", "safety_identifier", "n", "temperature", "top_p", "top_k", "seed", "stop", "stream"),
    *("stream_options", "max_tokens", "logprobs"),
)
CHAT = (*COMMON, "messages", "max_completion_tokens", "top_logprobs", "chat_template_kwargs")
COMPLETION = (*COMMON, "prompt", "echo", "best_of", "suffix")
# Fields that change nothing here, whatever their value.
IGNORED = (
    *("metadata", "store", "service_tier", "prompt_cache_key", "prompt_cache_retention", "parallel_tool_calls"),
    *("verbosity", "chat_id", "session_id", "id", "background_tasks"),
)
# Fields that are not supported -> the values that ask for nothing.
NEUTRAL: dict[str, tuple[Json, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "min_p": (0,),
    "min_tokens": (0,),
    "ignore_eos": (False,),
    "use_beam_search": (False,),
    "skip_special_tokens": (True,),
    "suffix": ("",),
}


class Refused(Exception):
    """A request that is not answered.

    Attributes:
      status: of HTTP.
      message, param, code: of the body, see `error`.
      headers: further ones of the response.
    """

    def __init__(
        self,
        message: str,
        param: str | None = None,
        status: int = 400,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.message, self.param, self.status, self.code, self.headers = (
            message,
            param,
            status,
            code,
            dict(headers or {}),
        )


def error(message: str, status: int, param: str | None = None, code: str | None = None) -> dict[str, Json]:
    """The body of an error."""
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Body:
    """A JSON object, read field by field; null is the same as no field."""

    def __init__(self, text: bytes, known: Sequence[str]):
        """
        Raises:
          Refused: no JSON object, or a field that is unknown or not supported.
        """
        try:
            value = plain(from_json(text))
        except RecordError as problem:
            raise Refused(f"body: {problem}; send a JSON object") from problem
        if not isinstance(value, dict):
            raise Refused("body: is no JSON object; send one")
        self.fields = {name: one for name, one in value.items() if one is not None}
        for name, one in self.fields.items():
            if name in NEUTRAL and name not in known:
                if not any(
                    (type(one) is type(x) and one == x) or _number(one) == _number(x) is not None for x in NEUTRAL[name]
                ):
                    raise Refused(f"{name}: is not supported; leave it out", name, code="unsupported_parameter")
            elif name not in known and name not in IGNORED:
                close = difflib.get_close_matches(str(name), known, 1)
                hint = f"did you mean {close[0]}?" if close else "leave it out"
                raise Refused(f"{str(name)[:100]}: unknown field; {hint}", str(name)[:100], code="unknown_parameter")

    def get(self, name: str, kind: type, default: Any = None) -> Any:
        """A field of a type."""
        value = self.fields.get(name, default)
        if value is not default and not (isinstance(value, kind) and (kind is bool or not isinstance(value, bool))):
            names = {str: "text", dict: "an object", list: "a list", bool: "true or false"}
            raise Refused(f"{name}: is not {names[kind]}; correct it", name)
        return value

    def number(self, name: str, default: Any, low: float, high: float, whole: bool = False, above: bool = False) -> Any:
        """A number from `low` (or above it) to `high`."""
        if name not in self.fields:
            return default
        value = _number(self.fields[name])
        if value is not None and whole and value != int(value):
            value = None
        if value is None or not low <= value <= high or (above and value == low):
            kind = "whole number" if whole else "number"
            raise Refused(
                f"{name}: is no {kind} {'above' if above else 'from'} {low:,} up to {high:,}; correct it", name
            )
        return int(value) if whole else float(value)


def _number(value: Json) -> float | int | None:
    """A finite number, or None."""
    return value if type(value) in (int, float) and math.isfinite(value) else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wish:
    """What a request asks for, besides its prompt.

    Attributes:
      model, mix, user: who answers, see `Catalogue.voice`.
      n, temperature, top_p, top_k, seed, stop: of `engine.Request`.
      limit: tokens of an answer, or None.
      limit_name: the field that gave it.
      alternatives: most likely tokens to return; None returns no log-probs at all.
      stream, usage: whether to stream, and with the usage at the end.
      echo: the prompt is part of the answer.
    """

    model: str | None
    mix: Mapping[str, float] | None
    user: str | None
    n: int
    temperature: float
    top_p: float
    top_k: int
    seed: int
    stop: tuple[str, ...]
    limit: int | None
    limit_name: str
    alternatives: int | None
    stream: bool
    usage: bool
    echo: bool = False


def read_wish(body: Body, header_user: str | None, chat: bool) -> Wish:
    """The settings of a request.

    Args:
      header_user: name of the person by a header, where the body has none.

    Raises:
      Refused: a field is malformed, out of range or contradicts another.
    """
    mix = body.get("mix", dict)
    if mix is not None:
        for name, weight in mix.items():
            if _number(weight) is None:
                raise Refused(f"mix: the weight of {name!r} is no number; correct it", "mix")
    stop = body.fields.get("stop", [])
    stop = [stop] if isinstance(stop, str) else stop
    if (
        not isinstance(stop, list)
        or len(stop) > MAX_STOPS
        or not all(isinstance(x, str) and 0 < len(x) <= 1000 for x in stop)
    ):
        raise Refused(f"stop: is neither text nor a list of up to {MAX_STOPS} texts; correct it", "stop")
    stream = body.get("stream", bool, False)
    options = body.get("stream_options", dict, {})
    if options and not stream:
        raise Refused("stream_options: need stream=true; set it, or leave them out", "stream_options")
    usage = options.get("include_usage", False)
    if not isinstance(usage, bool | None):
        raise Refused("stream_options: include_usage is neither true nor false; correct it", "stream_options")
    limit_name, limit = _limit(body, chat)
    echo = False if chat else body.get("echo", bool, False)
    if not chat and body.get("suffix", str, ""):
        raise Refused("suffix: is not supported; leave it out", "suffix", code="unsupported_parameter")
    n = body.number("n", 1, 1, MAX_CHOICES, whole=True)
    if not chat and body.number("best_of", n, 1, MAX_CHOICES, whole=True) != n:
        raise Refused("best_of: must equal n; leave it out", "best_of", code="unsupported_parameter")
    top_k = body.number("top_k", 0, -1, 2**31 - 1, whole=True)
    return Wish(
        model=body.get("model", str),
        mix=mix,
        user=body.get("user", str) or body.get("safety_identifier", str) or header_user,
        n=n,
        temperature=body.number("temperature", 1.0, 0.0, 2.0),
        top_p=body.number("top_p", 1.0, 0.0, 1.0, above=True),
        top_k=max(top_k, 0),
        seed=body.number("seed", secrets.randbits(63), *SEEDS, whole=True),
        stop=tuple(stop),
        limit=limit,
        limit_name=limit_name,
        alternatives=_alternatives(body, chat),
        stream=stream,
        usage=bool(usage),
        echo=echo,
    )


def _limit(body: Body, chat: bool) -> tuple[str, int | None]:
    low = 1 if chat else 0
    found = {
        name: body.number(name, None, low, 2**31 - 1, whole=True)
        for name in ("max_tokens", "max_completion_tokens")
        if name in body.fields
    }
    if len({*found.values()}) > 1:
        raise Refused("max_completion_tokens: differs from max_tokens; give one of the two", "max_completion_tokens")
    for name, value in found.items():
        return name, value
    return "max_tokens", None if chat else COMPLETION_TOKENS


def _alternatives(body: Body, chat: bool) -> int | None:
    if not chat:
        return body.number("logprobs", None, 0, TOP, whole=True)
    wanted = body.get("logprobs", bool, False)
    if "top_logprobs" in body.fields and not wanted:
        raise Refused("top_logprobs: needs logprobs=true; set it, or leave this out", "top_logprobs")
    count = body.number("top_logprobs", 0, 0, TOP, whole=True)
    return count if wanted else None


def read_prompts(body: Body) -> list[str | list[int]]:
    """The prompts of /v1/completions: texts or lists of token ids.

    Raises:
      Refused: another form.
    """
    value: Any = body.fields.get("prompt")

    def ids(x: Json) -> bool:
        return isinstance(x, list) and len(x) > 0 and all(type(i) is int for i in x)

    if isinstance(value, str) or ids(value):
        return [value]
    if isinstance(value, list) and value and (all(isinstance(x, str) for x in value) or all(ids(x) for x in value)):
        if len(value) > MAX_CHOICES:
            raise Refused(f"prompt: has more than {MAX_CHOICES} prompts; send fewer", "prompt")
        return value
    raise Refused("prompt: is neither text nor token ids, nor a list of either; give one", "prompt")
