"""What requests and errors have in common: bodies as models, whose limits the OpenAPI schema shows, and refusals.

A field that would change the answer and is not supported is refused rather than ignored.
"""

import difflib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Self

import pydantic
from pydantic import BeforeValidator, ConfigDict, Field
from typing_extensions import TypedDict

from pjrlhf.data.records import RecordError, from_json, plain
from pjrlhf.types import Json


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


class ErrorDetails(TypedDict):
    """What is wrong, and with what."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(TypedDict):
    """Why a request is not answered."""

    error: ErrorDetails


def error(message: str, status: int, param: str | None = None, code: str | None = None) -> ErrorBody:
    """The body of an error."""
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


# Marks in the annotations of fields.
UNSUPPORTED = "unsupported"  # only values that ask for nothing are taken
IGNORED = "ignored"  # any value is taken, because the field changes no answer


# The way out of a soup that is no object, see `Body.forms`.
MIX: Mapping[str, str] = MappingProxyType({"mix": 'give weights by name, such as {"P1A": 0.7, "P3A": 0.3}'})


def _whole(value: Any) -> Any:
    return int(value) if type(value) is float and value.is_integer() else value


# Last in the annotation of a whole number, after its limits, which the schema shows: JSON has one kind of number, and
# 3.0 is a whole one.
WHOLE = BeforeValidator(_whole)
# The same for a whole number of a query, which is text.
DIGITS = BeforeValidator(lambda text: int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else text)
Ignored = Annotated[Any, Field(description="Changes nothing here."), IGNORED]


class Body(pydantic.BaseModel):
    """The JSON object of a request. Null is the same as no field.

    Attributes:
      optional: a request without a body is one without fields.
      inside: names that belong into the items of a list -> that list.
      forms: name -> how to give a field of another type, or one that is missing.
    """

    optional: ClassVar[bool] = False
    inside: ClassVar[Mapping[str, str]] = {}
    forms: ClassVar[Mapping[str, str]] = {}
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    @classmethod
    def read(cls, text: bytes) -> Self:
        """
        Raises:
          Refused: no JSON object; or a field that is missing, unknown, not supported, malformed or out of range. The
            message and `param` name it.
        """
        if cls.optional and not text:
            return cls.of({})
        try:
            value = plain(from_json(text, strict=True))
        except RecordError as problem:
            raise Refused(f"body: {problem}; send a JSON object") from problem
        if not isinstance(value, dict):
            raise Refused("body: is no JSON object; send one")
        return cls.of(value)

    @classmethod
    def of(cls, fields: Mapping[str, Json]) -> Self:
        """Of the fields of a body, or the texts of a query.

        Raises:
          Refused: see `read`.
        """
        given = {name: one for name, one in fields.items() if one is not None}
        for name in given:
            if name not in cls.model_fields:
                close = difflib.get_close_matches(name, cls.model_fields, 1)
                hint = f"did you mean {close[0]}?" if close else "leave it out"
                if name in cls.inside:
                    hint = f"put it into an item of the list {cls.inside[name]}"
                raise Refused(f"{name[:100]}: unknown field; {hint}", name[:100], code="unknown_parameter")
        try:
            return cls.model_validate(given)
        except pydantic.ValidationError as problem:
            raise cls._refused(problem, given) from problem

    @classmethod
    def _refused(cls, problem: pydantic.ValidationError, given: Json) -> Refused:
        """The first field that is wrong."""
        errors = problem.errors(include_url=False, include_context=False, include_input=False)
        name = str(errors[0]["loc"][0])
        own = [one for one in errors if one["loc"][0] == name]
        if UNSUPPORTED in cls.model_fields[name].metadata:
            return Refused(f"{name}: is not supported; leave it out", name, code="unsupported_parameter")
        # Of a value that may have several types, errors of the types that it does not have say nothing.
        own = [one for one in own if not one["type"].endswith("_type")] or own
        reasons = dict.fromkeys(_reason(one["msg"]) for one in own)
        way = cls.forms.get(name, "correct it") if all(one["loc"] == (name,) for one in own) else "correct it"
        return Refused(f"{_place(own[0]['loc'], given)}: {' or '.join(reasons)}; {way}", name)


def _reason(text: str) -> str:
    text = text.removeprefix("Input ").replace(" after validation", "").replace("Field required", "is missing")
    text = text.replace("a valid dictionary", "an object").replace("a valid list", "a list")
    return text[:1].lower() + text[1:]


def _place(parts: tuple[int | str, ...], value: Any) -> str:
    """A place in a body, such as `stop[1]`; parts that are names of types are left out."""
    found = ""
    for part in parts:
        if isinstance(value, list) and isinstance(part, int) and part < len(value):
            found, value = f"{found}[{part}]", value[part]
        elif isinstance(value, dict) and part in value:
            found, value = f"{found}.{part}"[:200], value[part]
        elif not found:
            found = str(part)  # a field that is missing
    return found.removeprefix(".")
