"""Judges in our own decoder: `{"kind": "model", "path": FOLDER, ...}`, see `ModelJudgeSettings`; and the reward source
`judge`, the ratings of a language model.

Nothing is sampled. A verdict is read from the probabilities of its labels after the prompt.
"""

import dataclasses
import functools
import itertools
import math
import threading
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Float

from pjrlhf.data.batching import pad_left
from pjrlhf.data.messages import Message
from pjrlhf.data.schema import Prompt, shared_length
from pjrlhf.data.tokenization import Tokenizer, load_tokenizer
from pjrlhf.errors import UserError
from pjrlhf.judges.chat import Chat
from pjrlhf.judges.comparison import Baseline, ColumnBaseline, ComparisonReward, SampledBaseline
from pjrlhf.judges.judge import JUDGES, Judge, JudgeContext
from pjrlhf.judges.language_model import (
    Backend,
    ChatBackend,
    JudgeSettings,
    LanguageModelJudge,
    LanguageModelRating,
    PromptSettings,
    objective_judge,
)
from pjrlhf.judges.templates import Template, verdict_of
from pjrlhf.models.adapters import AdapterConfig, Backbone
from pjrlhf.models.attention import choose
from pjrlhf.models.decoder import Decoder
from pjrlhf.models.frozen import OtherModelSettings
from pjrlhf.models.hub import model_folder
from pjrlhf.models.huggingface import load_params, read_config
from pjrlhf.models.quantization import get_quantization
from pjrlhf.parallel.mesh import batch_sharding, leaf_sharding
from pjrlhf.rewards.sources import SOURCES, RewardFunction, SourceContext
from pjrlhf.rollout.batches import Prompts
from pjrlhf.runtime.devices import Devices
from pjrlhf.runtime.scorer import Scorer
from pjrlhf.settings import parse, setting, shown
from pjrlhf.types import Array

BASELINES = ("greedy", "sampled")  # answers of the base that others are compared with
MULTIPLE = 64  # lengths are rounded up to multiples of 64, so that few programs are compiled
# How an answer begins before its verdict, by the kind of a prompt and the format of its answer.
STARTS = {
    ("pair", "letter"): "Answer:",
    ("rating", "letter"): "Answer:",
    ("pair", "text"): "Verdict:",
    ("rating", "text"): "Verdict:",
    ("pair", "json"): '{"reason": "", "verdict": "',
    ("rating", "json"): '{"reason": "", "verdict": ',
}
Ids: TypeAlias = tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelJudgeSettings(OtherModelSettings, PromptSettings):
    """A model folder as a judge."""

    batch_size: int = setting(8, "prompts that are read at once", low=1, high=2**20)
    answer_start: str = setting(
        "", "how the answer begins before its verdict; that of the format of the prompt where empty, such as Answer:"
    )


def model_key(settings: ModelJudgeSettings) -> tuple[str | int, ...]:
    """What judges that share one model have in common."""
    s = settings
    return s.path, s.dtype, s.param_dtype, s.quantize, s.batch_size


class NextToken:
    """Log-probabilities of the next token, by a frozen model in its own tokenizer on the mesh.

    Args:
      settings: the folder and how it is read.

    Raises:
      UserError: the folder has no model or tokenizer that can be read.
    """

    def __init__(self, settings: ModelJudgeSettings, devices: Devices):
        s, self.devices = settings, devices
        folder, mesh = model_folder(s.path), devices.mesh
        config = read_config(folder)
        self.tokenizer: Tokenizer = load_tokenizer(folder, rows=config.vocab_size)
        model = Decoder(
            config,
            dtype=jnp.dtype(s.dtype),
            attention=choose("auto", mesh.devices.flat[0].platform, s.dtype, mesh.size),
            user_offset=int(bool(self.tokenizer.add_bos)),
            batch_sharding=batch_sharding(mesh) if mesh.size > 1 else None,
        )
        place = functools.partial(leaf_sharding, mesh)
        quantization = get_quantization(s.quantize)
        base = load_params(folder, dtype=jnp.dtype(s.param_dtype), place=place, quantization=quantization)
        self.backbone = Backbone(model, AdapterConfig(), base)
        self.longest = config.max_length
        self._scorer = Scorer(devices, s.batch_size)
        self._logps = jax.jit(next_logps)
        self._lock = threading.Lock()

    def __call__(self, name: str, rows: Sequence[Ids], wanted: Sequence[int]) -> Float[np.ndarray, "N M"]:
        """Float32 log-probabilities of M tokens after each of N rows, in nats.

        Args:
          name: of the progress bar.
          rows: token ids, at most `longest`.
          wanted: M token ids.
        """
        ids = jnp.asarray(wanted)

        def score(prompts: Prompts) -> jax.Array:
            return self._logps(self.backbone, prompts, ids)

        with self._lock:  # one bar, and one program after the other
            return self._scorer(name, rows, self._collate, score, [len(row) for row in rows])

    def _collate(self, rows: Sequence[Ids]) -> Prompts:
        longest = max(map(len, rows))
        length = min(longest + -longest % MULTIPLE, self.longest)
        return Prompts(*pad_left(rows, length, self.tokenizer.pad_id))  # pyright: ignore[reportArgumentType]


def next_logps(backbone: Backbone, prompts: Prompts, wanted: Array) -> Float[Array, "B M"]:
    """Log-probabilities of the tokens `wanted` [M] after left-padded prompts, float32."""
    policies = backbone.policies(None, None)
    hidden, _ = policies(prompts.tokens, prompts.valid)
    logits = policies.logits(hidden[:, -1:])[:, 0].astype(jnp.float32)
    return jax.nn.log_softmax(logits)[:, wanted]


@dataclasses.dataclass(frozen=True)
class Continuations:
    """How a tokenizer writes labels after a prompt.

    A label may have several forms, such as with and without a space before it, and each may be several tokens. Its
    first token may also hold the end of the prompt, so the last tokens of prompts are left to the forms.

    Attributes:
      cut: tokens at the end of every prompt that the forms begin with.
      forms: label -> the ids of its forms.
    """

    cut: int
    forms: Mapping[str, tuple[Ids, ...]]

    @classmethod
    def find(cls, tokenizer: Tokenizer, prompt: Prompt, start: str, labels: Sequence[str]) -> "Continuations":
        """Those of any prompt that ends as `prompt` does.

        Raises:
          UserError: the tokenizer writes two labels alike, because it does not know them.
        """
        plain = tokenizer.encode_prompt(prompt, start)
        written = {
            label: [tokenizer.encode_prompt(prompt, start + space + label) for space in ("", " ")] for label in labels
        }
        kept = min(shared_length(plain, ids) for forms in written.values() for ids in forms)
        forms = {label: tuple(dict.fromkeys(tuple(ids[kept:]) for ids in found)) for label, found in written.items()}
        owner: dict[Ids, str] = {}
        for label, form in ((label, form) for label, found in forms.items() for form in found):
            if owner.setdefault(form, label) != label:
                raise UserError(
                    f"judge: its tokenizer writes the verdicts {owner[form]!r} and {label!r} alike; choose another "
                    "model, or a prompt with other verdicts"
                )
        return cls(len(plain) - kept, forms)

    @functools.cached_property
    def starts(self) -> tuple[Ids, ...]:
        """What forms begin with, the empty beginning first: after each of these a next token is looked up."""
        every = itertools.chain.from_iterable(self.forms.values())
        return tuple(sorted({form[:i] for form in every for i in range(len(form))}, key=lambda ids: (len(ids), ids)))

    @functools.cached_property
    def wanted(self) -> tuple[int, ...]:
        """The tokens that are looked up."""
        return tuple(sorted({token for forms in self.forms.values() for form in forms for token in form}))

    def probabilities(self, logps: Float[np.ndarray, "S M"]) -> dict[str, float]:
        """The probability of each label: that one of its forms is written, and no longer one that begins with it, as 10
        begins with 1.

        Args:
          logps: of the tokens `wanted` after each of `starts`.
        """
        place, column = ({x: i for i, x in enumerate(xs)} for xs in (self.starts, self.wanted))
        forms = dict.fromkeys(itertools.chain.from_iterable(self.forms.values()))
        written = {
            form: math.exp(sum(float(logps[place[form[:i]], column[token]]) for i, token in enumerate(form)))
            for form in forms
        }
        alone = dict(written)
        for form in forms:
            shorter = [other for other in forms if len(other) < len(form) and form[: len(other)] == other]
            if shorter:  # the longest of these holds it, and is itself held by those that are shorter
                alone[max(shorter, key=len)] -= written[form]
        return {label: sum(max(alone[form], 0.0) for form in found) for label, found in self.forms.items()}


class ModelBackend:
    """A model in our own decoder, which answers in log-probabilities. What does not fit its context has no answer."""

    on_all_processes = True

    def __init__(self, settings: ModelJudgeSettings, context: SourceContext):
        self.settings, self.context = settings, context
        self.calls = 0

    def __call__(self, name: str, template: Template, items: Sequence[Mapping[str, str]]) -> list[float]:
        model = self._model()
        start = self.settings.answer_start or STARTS[template.kind, template.answer]
        prompts = [self._prompt(model.tokenizer, template.messages(item)) for item in items]
        labels = Continuations.find(model.tokenizer, prompts[0], start, template.labels)
        ids = [tuple(model.tokenizer.encode_prompt(prompt, start)) for prompt in prompts]
        ids = [row[: len(row) - labels.cut] for row in ids]
        room = model.longest - max(map(len, labels.starts))
        known = [i for i, row in enumerate(ids) if len(row) <= room]
        if len(known) < len(ids):
            logging.warning(
                "%s: %d of %d prompts do not fit the %d tokens of %s and have no verdict",
                *(name, len(ids) - len(known), len(ids), model.longest, self.settings.path),
            )
        found = [math.nan] * len(ids)
        if not known:
            return found
        rows = [ids[i] + begun for i in known for begun in labels.starts]
        logps = model(name, rows, labels.wanted).reshape(len(known), len(labels.starts), -1)
        for i, one in zip(known, logps, strict=True):
            found[i] = verdict_of(template, labels.probabilities(one))
        self.calls += len(rows)
        return found

    def _prompt(self, tokenizer: Tokenizer, messages: list[dict[str, str]]) -> Prompt:
        """Messages in the chat template of the model; as text where it has none."""
        if tokenizer.has_chat_template:
            turns: list[Message] = list(messages)
            return turns
        return "\n\n".join([*(message["content"] for message in messages), ""])

    def _model(self) -> NextToken:
        """The model, which all that judge by the same folder share."""
        key, shared = ("judge", *model_key(self.settings)), self.context.shared
        if key not in shared:
            assert self.context.devices is not None, "a judge of a check is never asked"
            shared[key] = NextToken(self.settings, self.context.devices())
        return shared[key]

    def report(self) -> dict[str, Any]:
        """The folder, and how many prompts it read."""
        return {"model": self.settings.path, "requests": self.calls, "cost": 0.0}


@JUDGES.register("model")
def by_model(context: JudgeContext, **settings: Any) -> Judge:
    """A model folder in our own decoder; for settings see `ModelJudgeSettings`."""
    own = parse(ModelJudgeSettings, settings, "judge")
    if not own.path:
        raise UserError("judge: names no model; set path to its folder")
    return LanguageModelJudge(own, context.criteria, ModelBackend(own, context.sources), context.columns)


@SOURCES.register("judge")
def by_judge(
    objective: str,
    criterion: str,
    context: SourceContext,
    path: str = "",
    cache: str = "",
    baseline: str = "",
    baseline_column: str = "",
    score: str = "",
    **settings: Any,
) -> RewardFunction:
    """Ratings of a language model, or its comparisons with a baseline: in our own decoder where `path` names its
    folder, see `ModelJudgeSettings`; else behind an OpenAI-compatible URL, see `JudgeSettings`.

    Args:
      criterion: what is judged, in words.
      cache: JSON lines file of requests to a URL and replies; ratings.jsonl in the run directory where empty.
      baseline: "greedy" or "sampled", the answer of the base with which answers are compared; where empty they are
        rated.
      baseline_column: the column of the records with the answer to compare with.
      score: of a comparison, see `ComparisonReward`; "probability" where empty.
    """
    name = f"rewards.{objective}"
    if path and cache:
        raise UserError(f"{name}: has a path and a cache; leave out the cache, because a folder needs none")
    if path:
        own: ModelJudgeSettings | JudgeSettings = parse(ModelJudgeSettings, {**settings, "path": path}, name)
        backend: Backend = ModelBackend(own, context)
    else:
        own = parse(JudgeSettings, {**settings, "cache": cache}, name)
        if not own.model:
            raise UserError(f"{name}: names no model; set path to its folder, or model to its name on a server")
        backend = ChatBackend(own, Chat(own, context.folder / "ratings.jsonl"))
    against = _baseline(name, baseline, baseline_column, context)
    if against is None:
        if score:
            raise UserError(f"{name}.score: is of comparisons; set baseline or baseline_column, or leave it out")
        return LanguageModelRating(own, objective, criterion, backend)
    return ComparisonReward(
        objective_judge(own, objective, criterion, backend), objective, against, score or "probability"
    )


def _baseline(name: str, how: str, column: str, context: SourceContext) -> Baseline | None:
    """The baseline that a reward compares with; None for none."""
    if how and column:
        raise UserError(f"{name}: has a baseline and a baseline_column; leave one of them out")
    if column:
        return ColumnBaseline(f"{name}.baseline_column", column)
    if how not in ("", *BASELINES):
        raise UserError(
            f"{name}.baseline: {shown(how)} is unknown; choose one of {', '.join(BASELINES)}, or set baseline_column "
            "to a column of the records"
        )
    return SampledBaseline(functools.partial(_base_answers, context, how)) if how else None


def _base_answers(context: SourceContext, how: str, prompts: Sequence[Prompt]) -> list[str]:
    if context.base_answers is None:
        raise UserError("baseline: the base of a run answers; use it as a reward in a config")
    return context.base_answers(prompts, how)
