"""The bodies of /v1/chat/completions and /v1/completions, and what they ask for."""

import dataclasses
import secrets
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pydantic
from pydantic import ConfigDict, Field

from pjrlhf.serving.catalogue import WEIGHT_LIMIT
from pjrlhf.serving.penalties import BIASES
from pjrlhf.serving.programs import TOP
from pjrlhf.serving.protocol import MIX, UNSUPPORTED, WHOLE, Body, Ignored, Refused

MAX_CHOICES = 128  # answers to one request
MAX_STOPS = 16  # harnesses give more than the four of OpenAI's API
COMPLETION_TOKENS = 16  # of /v1/completions where the request sets no limit, as OpenAI has it
LARGEST = 2**31 - 1

FORMS = {**MIX, "messages": 'give messages, such as [{"role": "user", "content": "what is rain ?"}]'}
Weight = Annotated[float, Field(ge=-WEIGHT_LIMIT, le=WEIGHT_LIMIT)]
TokenId = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,8})$")]
Bias = Annotated[float, Field(ge=-100, le=100)]
Stop = Annotated[str, Field(min_length=1, max_length=1000)]
Id = Annotated[int, WHOLE]
Ids = Annotated[list[Id], Field(min_length=1)]


# Fields that are not supported, with the values that ask for nothing.
Zero = Annotated[Annotated[float, Field(ge=0, le=0)] | None, UNSUPPORTED]
One = Annotated[Annotated[float, Field(ge=1, le=1)] | None, UNSUPPORTED]
Off = Annotated[Literal[False] | None, UNSUPPORTED]
On = Annotated[Literal[True] | None, UNSUPPORTED]
Nothing = Annotated[Annotated[list[Any], Field(max_length=0)] | None, UNSUPPORTED]
NoTool = Annotated[Literal["none", "auto"] | None, UNSUPPORTED]


class StreamOptions(pydantic.BaseModel):
    """Options of a stream."""

    model_config = ConfigDict(strict=True, extra="forbid")
    include_usage: bool | None = Field(None, description="The last chunk has the usage.")
    include_obfuscation: Ignored = None


class TextFormat(pydantic.BaseModel):
    """Plain text."""

    model_config = ConfigDict(strict=True, extra="forbid")
    type: Literal["text"]


class _Common(Body):
    forms = MIX
    # Who answers
    model: str | None = Field(None, description="One of /v1/models, or `soup:NAME=WEIGHT,NAME=WEIGHT`.")
    mix: dict[str, Weight] | None = Field(None, description="Weights by name of ingredient, beside the base.")
    user: str | None = Field(None, description="The person who asks.")
    safety_identifier: str | None = Field(None, description="The person who asks, where `user` is not given.")
    # How it is drawn
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES), WHOLE] | None = Field(None, description="Answers to each prompt.")
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(None, description="0 is greedy; default 1.")
    top_p: Annotated[float, Field(gt=0, le=1)] | None = Field(None, description="Nucleus sampling where below 1.")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="Tokens less likely than this fraction of the most likely one are not drawn."
    )
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = Field(
        None, description="Taken from the logit of a token, times the number of times that the answer has it."
    )
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = Field(
        None, description="Taken from the logit of a token that the answer has."
    )
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = Field(
        None, description="Divides positive logits, and multiplies others, of tokens of the prompt and the answer."
    )
    logit_bias: (
        Annotated[dict[TokenId, Bias], Field(max_length=BIASES, json_schema_extra={"additionalProperties": False})]
        | None
    ) = Field(None, description="Added to the logits of tokens, by id.")
    top_k: Annotated[int, Field(ge=-1, le=LARGEST), WHOLE] | None = Field(
        None, description="Draws from so many tokens; 0 and -1 turn it off."
    )
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1), WHOLE] | None = Field(
        None, description="The same seed draws the same answer."
    )
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = Field(
        None, description="Texts that end an answer and are no part of it."
    )
    stream: bool | None = Field(None, description="Server-sent events.")
    stream_options: StreamOptions | None = Field(None, description="Need `stream`.")
    # What changes nothing
    metadata: Ignored = None
    store: Ignored = None
    service_tier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_retention: Ignored = None
    parallel_tool_calls: Ignored = None
    prediction: Ignored = None
    verbosity: Ignored = None
    chat_id: Ignored = None
    session_id: Ignored = None
    request_id: Ignored = None
    id: Ignored = None
    background_tasks: Ignored = None
    cache_prompt: Ignored = None
    keep_alive: Ignored = None
    priority: Ignored = None
    # What is not supported
    response_format: Annotated[TextFormat | None, UNSUPPORTED] = None
    tools: Nothing = None
    tool_choice: NoTool = None
    functions: Nothing = None
    function_call: NoTool = None
    modalities: Annotated[list[Literal["text"]] | None, UNSUPPORTED] = None
    reasoning_effort: Annotated[Literal["none"] | None, UNSUPPORTED] = None
    min_tokens: Zero = None
    length_penalty: One = None
    ignore_eos: Off = None
    use_beam_search: Off = None
    include_stop_str_in_output: Off = None
    return_token_ids: Off = None
    return_tokens_as_token_ids: Off = None
    skip_special_tokens: On = None
    spaces_between_special_tokens: On = None

    def limit(self, default: int | None) -> tuple[str, int | None]:
        """(name of the field, tokens of an answer)."""
        both = {name: getattr(self, name) for name in ("max_tokens", "max_completion_tokens")}
        given = {name: value for name, value in both.items() if value is not None}
        if len({*given.values()}) > 1:
            raise Refused(
                "max_completion_tokens: differs from max_tokens; give one of the two", "max_completion_tokens"
            )
        return next(iter(given.items()), ("max_tokens", default))

    def common(self, header_user: str | None) -> dict[str, Any]:
        """What both kinds of requests ask for, as attributes of a `Wish`."""
        if self.stream_options is not None and self.stream_options.model_fields_set and not self.stream:
            raise Refused("stream_options: need stream=true; set it, or leave them out", "stream_options")
        return {
            "model": self.model,
            "mix": self.mix,
            "user": self.user or self.safety_identifier or header_user,
            "n": self.n or 1,
            "draws": self.n or 1,
            "sampling": {
                "temperature": 1.0 if self.temperature is None else self.temperature,
                "top_p": self.top_p or 1.0,
                "top_k": max(self.top_k or 0, 0),
                "min_p": self.min_p or 0.0,
                "frequency_penalty": self.frequency_penalty or 0.0,
                "presence_penalty": self.presence_penalty or 0.0,
                "repetition_penalty": self.repetition_penalty or 1.0,
                "logit_bias": {int(i): value for i, value in (self.logit_bias or {}).items()},
                "seed": secrets.randbits(63) if self.seed is None else self.seed,
                "stop": tuple([self.stop] if isinstance(self.stop, str) else self.stop or ()),
            },
            "stream": bool(self.stream),
            "usage": bool(self.stream_options and self.stream_options.include_usage),
        }


class ChatBody(_Common):
    """A conversation to answer."""

    forms = FORMS
    messages: list[dict[str, Any]] = Field(
        description="Each has a `role` and a `content`: text, or a list of parts of type text."
    )
    max_tokens: Annotated[int, Field(ge=1, le=LARGEST), WHOLE] | None = Field(None, description="Of an answer.")
    max_completion_tokens: Annotated[int, Field(ge=1, le=LARGEST), WHOLE] | None = Field(
        None, description="The same as `max_tokens`."
    )
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Variables of the chat template.")
    logprobs: bool | None = Field(None, description="Log-probs of the tokens of the answer.")
    top_logprobs: Annotated[int, Field(ge=0, le=TOP), WHOLE] | None = Field(
        None, description="So many most likely tokens at each place; needs `logprobs`."
    )
    add_generation_prompt: On = None
    continue_final_message: Off = None
    echo: Off = None

    def wish(self, header_user: str | None) -> "Wish":
        """
        Raises:
          Refused: fields contradict each other.
        """
        name, limit = self.limit(None)
        if self.top_logprobs is not None and not self.logprobs:
            raise Refused("top_logprobs: needs logprobs=true; set it, or leave this out", "top_logprobs")
        alternatives = (self.top_logprobs or 0) if self.logprobs else None
        return Wish(**self.common(header_user), limit=limit, limit_name=name, alternatives=alternatives)


class CompletionBody(_Common):
    """Prompts to go on with."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES)]
        | Ids
        | Annotated[list[Ids], Field(min_length=1, max_length=MAX_CHOICES)]
    ) = Field(description="Text, token ids, or a list of either.")
    max_tokens: Annotated[int, Field(ge=0, le=LARGEST), WHOLE] | None = Field(None, description="Of an answer.")
    max_completion_tokens: Annotated[int, Field(ge=0, le=LARGEST), WHOLE] | None = Field(
        None, description="The same as `max_tokens`."
    )
    echo: bool | None = Field(None, description="The prompt is part of the answer.")
    logprobs: Annotated[int, Field(ge=0, le=TOP), WHOLE] | None = Field(
        None, description="Log-probs of the tokens, and so many most likely ones at each place."
    )
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES), WHOLE] | None = Field(
        None, description="Draws so many answers, and returns the `n` with the highest log-prob per token."
    )
    suffix: Annotated[Literal[""] | None, UNSUPPORTED] = None

    def wish(self, header_user: str | None) -> "Wish":
        """
        Raises:
          Refused: fields contradict each other.
        """
        name, limit = self.limit(COMPLETION_TOKENS)
        common = self.common(header_user)
        n = common["n"]
        if self.best_of is not None and self.best_of < n:
            raise Refused(f"best_of: {self.best_of} is less than n, {n}; raise it", "best_of")
        if (self.best_of or n) > n and common["stream"]:
            raise Refused("best_of: the best are known at the end alone; set stream=false, or leave it out", "best_of")
        common["draws"] = self.best_of or n
        return Wish(**common, limit=limit, limit_name=name, alternatives=self.logprobs, echo=bool(self.echo))

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, one after the other."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [self.prompt] if isinstance(self.prompt[0], int) else self.prompt  # pyright: ignore[reportReturnType]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wish:
    """What a request asks for, besides its prompt.

    Attributes:
      model, mix, user: who answers, see `Catalogue.voice`.
      sampling: attributes of `engine.Request`.
      n: answers to each prompt.
      draws: answers to draw to each prompt; the n with the highest log-prob per token are returned.
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
    draws: int
    sampling: Mapping[str, Any]
    limit: int | None
    limit_name: str
    alternatives: int | None
    stream: bool
    usage: bool
    echo: bool = False
