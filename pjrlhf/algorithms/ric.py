"""Rewards-in-Context (RiC, arXiv 2402.10207): one policy, fine-tuned on answers whose prompts state the rewards they
got.

First on answers of the base; then, in online rounds, on answers of its own to prompts that state the rewards wanted,
as far as they are good by some objective. Weights p are answered by stating `target_map(p)`.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from pjrlhf.algorithms import answering, banks, reward, sft
from pjrlhf.algorithms.answering import AnswerSettings
from pjrlhf.algorithms.modpo import raw_rewards
from pjrlhf.algorithms.targets import encode
from pjrlhf.data.batching import batches
from pjrlhf.data.messages import Conversation, Prompt, columns_of, read_options, text_of
from pjrlhf.data.packing import PackedRows
from pjrlhf.data.preferences import PreferencePrompt
from pjrlhf.data.schema import Example
from pjrlhf.data.token_table import TokenTable
from pjrlhf.errors import UserError, reason_of
from pjrlhf.models.adapters import Backbone, init_bank
from pjrlhf.objectives.multi_objective import calibrate, target_map
from pjrlhf.parallel.processes import on_process_zero
from pjrlhf.runtime.answers import EvaluatedPolicy, Point, Row, sample_base, sample_rows
from pjrlhf.runtime.devices import Devices
from pjrlhf.runtime.heldout_answers import HeldoutAnswers, heldout_requests, once, rows_of
from pjrlhf.runtime.run import Run, Trainer
from pjrlhf.runtime.streams import Streams
from pjrlhf.runtime.text import Text
from pjrlhf.settings import Settings, setting
from pjrlhf.training import completions
from pjrlhf.training.accumulation import check_accumulation, gradient_of, in_parts, parts_of
from pjrlhf.training.loop import Method
from pjrlhf.training.metrics import Metrics
from pjrlhf.training.optimizer import OptimizerSettings, check_warmup, make_optimizer, per_ingredient, steps_of
from pjrlhf.training.state import State
from pjrlhf.training.workdir import disk_errors, write_lines
from pjrlhf.types import Json, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class RicSettings(Settings):
    """Rewards-in-Context."""

    prompt_format: PreferencePrompt = setting(
        PreferencePrompt(form="tally", levels=5), "how a prompt states scores of 0 to 1; it must fit data.max_prompt"
    )
    target: str = setting("l2", "scores that preference weights ask for", choices=("identity", "l2", "max"))
    samples: int = setting(2048, "answers of the base", low=1, high=10**8)
    steps: int = setting(200, "updates on the answers of the base", low=1, high=10**9)
    epochs: float = setting(
        0.0, "passes over the answers of a round instead of steps and online_steps; 0 is steps", low=0.0, high=1e6
    )
    batch_size: int = setting(64, "answers a step", low=1, high=2**20)
    accumulation_steps: int = setting(1, "parts of a batch that are computed one after the other", low=1, high=2**20)
    rounds: int = setting(1, "online rounds after that", low=0, high=1000)
    online_samples: int = setting(1024, "answers of the policy in each round", low=1, high=10**8)
    online_steps: int = setting(80, "updates in each round", low=1, high=10**9)
    quantile: float = setting(
        0.7, "of the base's scores, which an online answer must reach by some objective", low=0.0, high=1.0
    )
    base_fraction: float = setting(
        0.25, "fraction of the base's answers that join those of an online round", low=0.0, high=1.0
    )
    optimizer: OptimizerSettings = setting(OptimizerSettings(learning_rate=3e-3, schedule="cosine"))

    def check(self) -> None:
        if not self.epochs:
            check_warmup(self.optimizer, self.steps)
        if not self.epochs and self.rounds:
            check_warmup(self.optimizer, self.online_steps, part=" of an online round")
        check_accumulation(self.accumulation_steps, self.batch_size)


# {"request", with the other columns of its record, "text", "scores": N numbers in [0, 1]}
Answer = dict[str, Any]


def prompt_format(run: Run, settings: RicSettings, request: Prompt, scores: Sequence[float]) -> str:
    """The words after `request` that state N scores, one per objective.

    Raises:
      UserError: the tokenizer does not know them, or the prompt gets longer than `data.max_prompt`.
    """
    words = settings.prompt_format(run.audience.preferences, run.audience.objectives, scores)
    length, limit = len(encode(run.records, run.text, request, words)), run.text.lengths.prompt
    if length > limit:
        raise UserError(
            f"prompt_format {words[:60]!r}: the prompt has {length} tokens with it, more than data.max_prompt={limit}; "
            "raise it, or lower prompt_format.levels"
        )
    return words


def scored(run: Run, rewarder: Params, requests: Sequence[Prompt], texts: Sequence[str], name: str) -> list[Answer]:
    """The answers that are not empty and have all rewards, these between the quantiles of the reward stage,
    `calibrate`d.

    The reward models read the plain request, whatever was stated. `name` is what messages call the answers.
    """
    examples = [
        Example(prompt=run.records.ask(request), completion=text, request=request, where=f"{name} answer {i}")
        for i, (request, text) in enumerate(zip(requests, texts, strict=True), 1)
        if text.strip()
    ]
    if not examples:
        raise UserError(f"{name}: all of {len(texts)} answers are empty; train the base longer")
    table = _tokenized(run, examples, name)
    N = len(run.audience.objectives)
    read = [(example.original, text_of(example.completion or "")) for example in table.examples]
    raw = jnp.asarray(raw_rewards(run, rewarder, list(table), read))
    scores = np.asarray(calibrate(raw[:, :N], rewarder["low"][:N], rewarder["high"][:N]))
    return [
        {"request": request, **columns_of(request), "text": text, "scores": row.tolist()}
        for (request, text), row in zip(read, scores, strict=True)
        if not np.isnan(row).any()
    ]


def stated(run: Run, settings: RicSettings, answers: Sequence[Answer], name: str) -> TokenTable:
    """The answers as completions of prompts that state the scores they really got, whatever they were asked for."""
    examples = []
    for i, answer in enumerate(answers, 1):
        words = prompt_format(run, settings, answer["request"], answer["scores"])
        prompt = run.records.ask(answer["request"], words)
        examples.append(Example(prompt=prompt, completion=answer["text"], where=f"{name} answer {i}"))
    return _tokenized(run, examples, name)


def _tokenized(run: Run, examples: Sequence[Example], name: str) -> TokenTable:
    return run.text.tokenized(examples, run.text.sampled_lengths, name, "completion")


def wanted(run: Run, settings: RicSettings, number: int) -> list[Row]:
    """What online round `number` asks for: requests in turn, each with the target of weights from Dirichlet(1)."""
    requests, N = run.records.requests[0], len(run.audience.objectives)
    rng = run.streams.numpy("ric/targets", number)
    targets = np.asarray(target_map(rng.dirichlet(np.ones(N), settings.online_samples), settings.target)).tolist()  # pyright: ignore[reportArgumentType]
    asked = [requests[i % len(requests)] for i in range(len(targets))]
    return [Row(q, prompt_format(run, settings, q, target), (1.0,)) for q, target in zip(asked, targets, strict=True)]


def good(answers: Sequence[Answer], offline: Sequence[Answer], quantile: float) -> list[Answer]:
    """Those of `answers` of which any score is at least the `quantile` of that objective's scores in `offline`."""
    limits = np.quantile([answer["scores"] for answer in offline], quantile, axis=0)
    return [answer for answer in answers if (np.array(answer["scores"]) >= limits).any()]


def _stored_answer(line: Json) -> Answer:
    request, text, scores = line["request"], str(line["text"]), [float(score) for score in line["scores"]]
    if not isinstance(request, str):
        request = Conversation(request, read_options(line))
    return {**line, "request": request, "text": text, "scores": scores}


def stored(path: pathlib.Path, make: Callable[[], list[Answer]]) -> list[Answer]:
    """The answers in the JSON lines of `path`; where there is no such file, those of `make`, which go there."""
    if path.is_file():
        try:
            return [_stored_answer(json.loads(line)) for line in path.read_bytes().splitlines()]
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise UserError(
                f"{path}: is damaged ({reason_of(error)}); delete it, and the same command samples these answers again"
            ) from error
    answers = make()
    with disk_errors(path):
        on_process_zero(write_lines)(path, answers)
    return answers


@dataclasses.dataclass(frozen=True)
class Round:
    """One round of fine-tuning.

    Attributes:
      table: prompts and completions, see `stated`.
      steps: how many updates.
      start: the adapter to go on from, a bank of one; None for a new one.
      accumulation_steps: parts of a batch.
    """

    table: TokenTable
    steps: int
    start: Params | None = None
    accumulation_steps: int = 1


class Ric(Method):
    """The method for `training.loop.run`: one round, through one adapter."""

    def __init__(
        self,
        settings: RicSettings,
        data: Round,
        devices: Devices,
        backbone: Backbone,
        text: Text,
        streams: Streams,
        answers: Callable[[], HeldoutAnswers] | None = None,
    ):
        self.answers = once(answers)
        self.data, self.devices, self.backbone, self.streams = data, devices, backbone, streams
        self.rates = settings.optimizer.rates()
        self.optimizer = per_ingredient(make_optimizer(settings.optimizer, data.steps))
        make = in_parts(functools.partial(sft.collate, text), data.accumulation_steps)
        self.batches = batches(data.table, settings.batch_size, seed=streams.seed, collate=make, key="ric.batch_size")
        self._update = devices.training_step(self._step)
        self.programs = (self._update,)

    def init(self) -> State:
        # The step donates its state; what was given as a start stays the caller's.
        return self.devices.create(self._initial, self.backbone, self.data.start)

    def _initial(self, backbone: Backbone, start: Params | None) -> State:
        bank = start
        if start is None:
            bank = init_bank(backbone.base, backbone.adapter, 1, self.streams.key("ric/adapter"))
        return State.create(self.streams.key("ric/state"), bank, self.optimizer)

    def _step(self, state: State, backbone: Backbone, *parts: PackedRows) -> tuple[State, Metrics]:
        gradient, metrics = gradient_of(functools.partial(sft.sft_loss, backbone), state.trainable, parts, state.key)
        return state.apply_gradients(gradient, self.optimizer), metrics

    def step(self, state: State, batch: PackedRows | tuple[PackedRows, ...]) -> tuple[State, Metrics]:
        return self._update(state, self.backbone, *map(self.devices.place, parts_of(batch)))

    def rows(self, state: State) -> Sequence[completions.Row]:
        return rows_of(self.answers, state.trainable)


# ---- the stage


def method_of(run: Run, settings: RicSettings, data: Round) -> Ric:
    """The method for one round of a run."""
    answers = functools.partial(heldout_answers, run, settings)
    return Ric(settings, data, run.devices, run.workspace.backbone, run.text, run.streams, answers)


def heldout_answers(run: Run, settings: RicSettings) -> HeldoutAnswers:
    """Answers that are asked for all of one objective, or for equal parts of all, in turn."""
    names, requests = run.audience.objectives, heldout_requests(run)
    points = np.concatenate([np.eye(len(names)), np.full((1, len(names)), 1 / len(names))])
    points = points[np.arange(len(requests)) % len(points)]
    stated = np.asarray(target_map(points, settings.target)).tolist()  # pyright: ignore[reportArgumentType]
    prompts = [
        run.records.ask(request, prompt_format(run, settings, request, scores))
        for request, scores in zip(requests, stated, strict=True)
    ]
    weights = [[f"{name} {w:.3g}" for name, w in zip(names, p, strict=True) if w] for p in points.tolist()]
    about = [{"weights": ", ".join(each)} for each in weights]
    keys = functools.partial(run.streams.key, "ric/completions")
    return HeldoutAnswers(run, keys, prompts, about, data=np.ones((len(prompts), 1), np.float32))


def fine_tune(
    run: Run, settings: RicSettings, stage: str, number: int, answers: Sequence[Answer], start: Params | None = None
) -> Params:
    """The bank of one adapter after round `number`, of which the first is 0, on `answers`."""
    name = f"{stage}/round{number}"
    if not answers:
        raise UserError(
            f"{name}: none of the answers is both not empty and rewarded by every source; let the sources of all "
            "objectives say something about the same answers, or leave one out of the objectives"
        )
    table = stated(run, settings, answers, name)
    steps = settings.online_steps if number else settings.steps
    steps = steps_of(steps, settings.epochs, len(table), settings.batch_size, "ric", settings.optimizer)
    data = Round(table, steps, start, settings.accumulation_steps)
    return run.train(method_of(run, settings, data), name, steps).trainable


def _check(run: Run, settings: RicSettings) -> None:
    # Every label by itself, before anything is sampled.
    for scores in np.eye(len(run.audience.objectives)):
        prompt_format(run, settings, run.records.requests[0][0], scores.tolist())


def train(run: Run, settings: RicSettings, stage: str) -> dict[str, Any]:
    """Trains the policy; writes <workdir>/<stage>/bank.safetensors, the adapter as a folder, and the answers of every
    round.
    """
    _check(run, settings)
    run.audience.announce(stage, settings.samples + settings.rounds * settings.online_samples)
    folder, rewarder = run.workdir.stage(stage), reward.load(run)

    def offline_answers() -> list[Answer]:
        requests = [run.records.requests[0][i % len(run.records.requests[0])] for i in range(settings.samples)]
        prompts = [run.records.ask(request) for request in requests]
        texts = sample_base(
            run, prompts, functools.partial(run.streams.key, "ric/base_answers"), f"{stage}: answers of the base"
        )
        return scored(run, rewarder, requests, texts, f"{stage}/round0")

    def online_answers(bank: Params, number: int) -> list[Answer]:
        rows = wanted(run, settings, number)
        keys = functools.partial(run.streams.key, "ric/answers", number)
        texts = sample_rows(run, bank, rows, keys, name=f"{stage}: answers of round {number}")
        return scored(run, rewarder, [row.request for row in rows], texts, f"{stage}/round{number}")

    offline = stored(folder / "answers0.jsonl", offline_answers)
    bank = fine_tune(run, settings, stage, 0, offline)
    usable, kept = len(offline), []
    for number in range(1, settings.rounds + 1):
        found = stored(folder / f"answers{number}.jsonl", functools.partial(online_answers, bank, number))
        best = good(found, offline, settings.quantile)
        rng = run.streams.numpy("ric/kept", number)
        again = rng.choice(len(offline), round(settings.base_fraction * len(offline)), replace=False)
        bank = fine_tune(run, settings, stage, number, [*best, *(offline[i] for i in again)], bank)
        usable, kept = usable + len(found), [*kept, len(best)]
    base_hash = banks.save(run, stage, ["policy"], bank)
    samples = settings.samples + settings.rounds * settings.online_samples
    return {
        "ingredients": ["policy"],
        "samples": samples,
        "base": base_hash,
        "empty_answers": samples - usable,
        "kept": kept,
    }


def answers(run: Run, settings: RicSettings, stage: str, how: AnswerSettings) -> EvaluatedPolicy:
    """The one policy, which is told the target of the preference weights."""
    words = answering.stating(run, settings.prompt_format)

    def target(p: Point) -> str:
        return words(np.asarray(target_map(np.array(p), settings.target)).tolist())  # pyright: ignore[reportArgumentType]

    return dataclasses.replace(answering.by_one_adapter(run, settings, stage, how), words=target)


TRAINER = Trainer(lambda run: run.section(RicSettings), train, answers)
