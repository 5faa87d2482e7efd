"""Who answers the prompts of comparisons: the base of the run, or a model that is stronger than it.

A sampler is a function (requests, words, name of the progress bar) -> one answer for each, the same on all processes.
"""

import collections
import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from pjrlhf.data.messages import Message, Prompt, columns_of
from pjrlhf.errors import UserError, described
from pjrlhf.judges.chat import Body, Chat, ChatSettings
from pjrlhf.judges.client import text_in
from pjrlhf.judges.judge import judge_name
from pjrlhf.models.frozen import OtherModelSettings
from pjrlhf.parallel.processes import json_from_zero
from pjrlhf.registry import Registry, callable_as
from pjrlhf.rewards.calls import awaited, listed
from pjrlhf.runtime.answers import sample_base
from pjrlhf.runtime.run import Run, SharedSettings
from pjrlhf.runtime.workspace import ModelSettings
from pjrlhf.settings import arguments, made_by, parse, setting, shown
from pjrlhf.types import Json

BASE = "base"
CACHE = "sampler.jsonl"  # in the run directory: requests to a chat sampler, and replies
STREAM = "comparisons/answers"


class Sampler(Protocol):
    """Answers requests."""

    def __call__(self, requests: Sequence[Prompt], words: Sequence[str], name: str) -> list[str]:
        """One answer to each request, followed in its prompt by `words` about preferences, which may be empty."""
        ...


# Each makes a sampler from a run and the settings in its specification.
SAMPLERS: Registry[Callable[..., Sampler]] = Registry(
    "sampler", callable_as("a function that makes a sampler from a run")
)


@SAMPLERS.register(BASE)
def by_base(run: Run) -> Sampler:
    """The base of the run."""
    return functools.partial(_sampled, run)


def _sampled(run: Run, requests: Sequence[Prompt], words: Sequence[str], name: str) -> list[str]:
    prompts = [run.records.ask(request, said) for request, said in zip(requests, words, strict=True)]
    return sample_base(run, prompts, functools.partial(run.streams.key, STREAM), name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSamplerSettings(OtherModelSettings):
    """Another model, as a sampler."""

    temperature: float | None = setting(None, "of its answers; that of the run where not set", low=0.0, high=100.0)
    max_prompt: int = setting(0, "longest prompt in its tokens; 0 for data.max_prompt", low=0, high=2**20)
    max_completion: int = setting(0, "longest answer in its tokens; 0 for data.max_completion", low=0, high=2**20)


@SAMPLERS.register("model")
def by_model(run: Run, **settings: Any) -> Sampler:
    """A model folder; for settings see `ModelSamplerSettings`. It is asked in its own chat template, if it has one."""
    own = parse(ModelSamplerSettings, settings, "sampler")
    if not own.path:
        raise UserError("sampler: names no model; set path to its folder")

    def sample(requests: Sequence[Prompt], words: Sequence[str], name: str) -> list[str]:
        return _sampled(_other(run, own), requests, words, name)

    return sample


def other_base(shared: SharedSettings, own: ModelSamplerSettings) -> SharedSettings:
    """The settings of a run with another base."""
    model = ModelSettings(
        path=own.path,
        dtype=own.dtype,
        param_dtype=own.param_dtype,
        quantize=own.quantize,
        attention=shared.model.attention,
    )
    data = shared.data.replace(
        chat=None,
        max_prompt=own.max_prompt or shared.data.max_prompt,
        max_completion=own.max_completion or shared.data.max_completion,
    )
    temperature = shared.temperature if own.temperature is None else own.temperature
    stages = tuple(stage for stage in shared.stages if stage != "sft")
    return shared.replace(model=model, data=data, temperature=temperature, stages=stages)


def _other(run: Run, own: ModelSamplerSettings) -> Run:
    """The run with another base."""
    other = Run(other_base(run.settings, own), {}, run.workdir)
    vars(other)["devices"] = run.devices  # one mesh
    return other


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatSamplerSettings(ChatSettings):
    """A model behind an OpenAI-compatible URL, as a sampler."""

    system: str = setting("", "system message; none where empty")
    temperature: float = setting(1.0, "of its answers", low=0.0, high=100.0)
    max_tokens: int = setting(0, "longest answer in its tokens; 0 for data.max_completion", low=0, high=2**20)


@SAMPLERS.register("chat")
def by_chat(run: Run, **settings: Any) -> Sampler:
    """A model behind an OpenAI-compatible URL; for settings see `ChatSamplerSettings`."""
    own = parse(ChatSamplerSettings, settings, "sampler")
    if not own.model:
        raise UserError("sampler: names no model; set model to its name on the server")
    return functools.partial(_asked, run, own)


def _asked(
    run: Run, own: ChatSamplerSettings, requests: Sequence[Prompt], words: Sequence[str], name: str
) -> list[str]:
    """Answers of a chat model. Process 0 asks."""
    times: collections.Counter[str] = collections.Counter()
    bodies: list[Body] = []
    for request, said in zip(requests, words, strict=True):
        prompt = run.records.ask(request, said)
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [_sent(turn) for turn in prompt]
        system = [{"role": "system", "content": own.system}]
        system = system if own.system and turns[0]["role"] != "system" else []
        body: dict[str, Json] = {"model": own.model, "messages": [*system, *turns], **columns_of(prompt)}
        body |= {"temperature": own.temperature, "max_tokens": own.max_tokens or run.settings.data.max_completion}
        # The same request twice is two answers, and two entries of the cache.
        text = repr(turns)
        body["seed"] = (1_000_003 * run.settings.seed + times[text]) % 2**31
        times[text] += 1
        bodies.append(body)

    def ask() -> list[str]:
        chat = Chat(own, run.workdir.path / CACHE)
        return [answer_of(reply) for reply in chat(name, bodies)]

    return json_from_zero(ask)


def _sent(turn: Message) -> Message:
    """A message as servers take it: arguments of tool calls are JSON text, which our records hold as objects."""
    if "tool_calls" not in turn:
        return turn
    calls = []
    for call in turn["tool_calls"]:
        inner = call.get("function", call)
        text = json.dumps(inner.get("arguments") or {}, ensure_ascii=False)
        outer = call if "function" in call else {}
        calls.append({"type": "function", **outer, "function": {"name": inner["name"], "arguments": text}})
    return {"content": None, **turn, "tool_calls": calls}


def answer_of(reply: Json) -> str:
    """The text of a reply, empty where it has none; a question mark for half of a surrogate pair."""
    try:
        text = text_in(reply["choices"][0]["message"].get("content"))
        return text.encode("utf-8", "replace").decode()
    except (AttributeError, IndexError, KeyError, TypeError):
        return ""


def as_spec(spec: str | Mapping[str, Any]) -> dict[str, Any]:
    """A specification of a sampler with its kind: "base", the folder of a model, or a mapping."""
    if isinstance(spec, str):
        own = spec == BASE or ":" in spec.replace("://", "")
        return {"kind": spec} if own else {"kind": "model", "path": spec}
    return dict(spec)


def sampler(run: Run | None, spec: str | Mapping[str, Any]) -> Sampler:
    """The sampler that a config names; without a run it is only checked.

    Raises:
      UserError: no such sampler, or settings that it does not take.
    """
    settings = as_spec(spec)
    kind = settings.pop("kind", None)
    if not isinstance(kind, str) or (kind not in SAMPLERS and ":" not in kind):
        raise UserError(f"sampler: kind {kind!r} is unknown; choose one of {', '.join(SAMPLERS)}, or name a folder")
    make = SAMPLERS.get(kind)
    settings = arguments(make, settings, "sampler")
    found = made_by(make, f"sampler {kind!r}:", "a sampler", run, **settings)
    return functools.partial(_checked, kind, found) if ":" in kind else found


def _checked(kind: str, sampler: Sampler, requests: Sequence[Prompt], words: Sequence[str], name: str) -> list[str]:
    """What a sampler from outside this package answers; UserError where it raises, or for anything but texts."""
    try:
        found = awaited(sampler(list(requests), list(words), name))
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        reason = described(error)
        raise UserError(f"sampler {kind!r}: raised {reason}; correct it") from error
    texts = listed(found, len(requests))
    if texts is None or len(texts) != len(requests) or not all(isinstance(text, str) for text in texts):
        raise UserError(
            f"sampler {kind!r}: returned {shown(found)} for {len(requests)} requests; return a list with one text each"
        )
    return texts


def sampler_name(spec: str | Mapping[str, Any]) -> str:
    """The kind of a sampler, with its model if it has one, as records show it."""
    return judge_name(as_spec(spec))
