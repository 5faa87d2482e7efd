"""Supervised fine-tuning of the base on prompt-completion records; the part of Tulu where the synthetic environment is
used.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float

from pjrlhf.algorithms import banks
from pjrlhf.data.batching import batches
from pjrlhf.data.packing import PackedRows
from pjrlhf.data.token_table import TokenRow, TokenTable
from pjrlhf.errors import UserError
from pjrlhf.merging.lora import merge_dense
from pjrlhf.models.adapters import AdapterConfig, Backbone, Policies, init_bank
from pjrlhf.parallel.processes import on_process_zero, to_host
from pjrlhf.rollout import scoring
from pjrlhf.runtime.devices import Devices
from pjrlhf.runtime.heldout_answers import HeldoutAnswers, heldout_requests, once, rows_of
from pjrlhf.runtime.records import CorpusSettings
from pjrlhf.runtime.run import Run, Stage
from pjrlhf.runtime.streams import Streams
from pjrlhf.runtime.text import Text
from pjrlhf.runtime.workspace import Workspace
from pjrlhf.settings import setting
from pjrlhf.training.accumulation import check_accumulation, gradient_of, in_parts, parts_of
from pjrlhf.training.completions import Row
from pjrlhf.training.loop import Method
from pjrlhf.training.metrics import Metrics, masked
from pjrlhf.training.optimizer import OptimizerSettings, check_warmup, make_optimizer, per_ingredient, steps_of
from pjrlhf.training.state import State
from pjrlhf.training.workdir import disk_errors
from pjrlhf.types import Array, Params, PRNGKey


@dataclasses.dataclass(frozen=True, kw_only=True)
class SftSettings(CorpusSettings):
    """Supervised fine-tuning of the base."""

    steps: int = setting(400, "updates", low=1, high=10**9)
    epochs: float = setting(0.0, "passes over the records instead of steps; 0 is steps", low=0.0, high=1e6)
    batch_size: int = setting(64, "records a step", low=1, high=2**20)
    accumulation_steps: int = setting(1, "parts of a batch that are computed one after the other", low=1, high=2**20)
    adapter: AdapterConfig = setting(AdapterConfig(rank=0), "rank 0 trains full parameters")
    optimizer: OptimizerSettings = setting(
        OptimizerSettings(learning_rate=4e-3, schedule="cosine", warmup_steps=20, b2=0.98, weight_decay=0.01)
    )

    def check(self) -> None:
        if not self.epochs:
            check_warmup(self.optimizer, self.steps)
        check_accumulation(self.accumulation_steps, self.batch_size)
        if self.adapter.freeze_a:
            raise UserError(
                "adapter.freeze_a: this adapter is merged into the base, which leaves nothing to share; leave it out"
            )


def sft_loss(
    backbone: Backbone, bank: Params | None, rows: PackedRows, dropout_key: PRNGKey | None = None
) -> tuple[Float[Array, ""], Metrics]:
    """Mean negative log-likelihood of the completion tokens, nats.

    Args:
      bank: a LoRA bank of one adapter; None for the base itself.
      rows: prompts with one answer each.
      dropout_key: see `Policies`.
    """
    policies = backbone.policies(bank, None if bank is None else jnp.ones((1, 1)), dropout_key=dropout_key)
    logps, mask = scoring.packed_token_logps(policies, rows)
    pair = masked(-logps, mask)
    metrics = {"loss": pair, "num_tokens": (pair[1], jnp.ones(())), "wasted_tokens": scoring.wasted_tokens(rows)}
    return pair[0] / jnp.maximum(pair[1], 1), metrics


def collate(text: Text, rows: Sequence[TokenRow]) -> PackedRows:
    """Rows of prompts and one answer each."""
    return text.pack(rows, ("completion",))


class Sft(Method):
    """The method for `training.loop.run`: full parameters, or LoRA where `settings.adapter.rank` > 0.

    Args:
      table: prompts and completions.
      answers: shown while training, by the policies of `policies_of`.
    """

    def __init__(
        self,
        settings: SftSettings,
        devices: Devices,
        workspace: Workspace,
        text: Text,
        streams: Streams,
        table: TokenTable,
        answers: Callable[[], HeldoutAnswers] | None = None,
    ):
        self.answers = once(answers)
        self.devices, self.workspace, self.streams, self.records = devices, workspace, streams, len(table)
        s = settings
        steps = steps_of(s.steps, s.epochs, len(table), s.batch_size, "sft", s.optimizer)
        self.settings = settings = settings.replace(steps=steps)
        self.adapter = settings.adapter
        self.rates = settings.optimizer.rates()
        optimizer = make_optimizer(settings.optimizer, settings.steps)
        self.optimizer = per_ingredient(optimizer) if self.adapter.rank else optimizer
        make = in_parts(functools.partial(collate, text), settings.accumulation_steps)
        self.batches = batches(table, settings.batch_size, seed=streams.seed, collate=make, key="sft.batch_size")
        self.backbone = Backbone(workspace.model, self.adapter, {})
        self._update = devices.training_step(self._step)
        self.programs = (self._update,)

    def init(self) -> State:
        params = self.workspace.start_params(self.streams.key("base/init"))
        if self.adapter.rank:
            self.backbone = self.backbone.replace(base=params)
        # Full parameters become those of the state; beside an adapter they stay.
        return self.devices.create(self._initial, params, donate=() if self.adapter.rank else (0,))

    def _initial(self, params: Params) -> State:
        if self.adapter.rank:
            params = init_bank(params, self.adapter, 1, self.streams.key("sft/adapter"))
        return State.create(self.streams.key("sft/state"), params, self.optimizer)

    def _step(self, state: State, backbone: Backbone, *parts: PackedRows) -> tuple[State, Metrics]:
        def loss(trainable: Params, batch: PackedRows, key: PRNGKey) -> tuple[Array, Metrics]:
            if self.adapter.rank:
                return sft_loss(backbone, trainable, batch, key)
            return sft_loss(backbone.replace(base=trainable), None, batch)

        gradient, metrics = gradient_of(loss, state.trainable, parts, state.key)
        norm = optax.global_norm(gradient)
        metrics = {**metrics, "grad_norm": (norm, jnp.ones_like(norm))}
        return state.apply_gradients(gradient, self.optimizer), metrics

    def step(self, state: State, batch: PackedRows | tuple[PackedRows, ...]) -> tuple[State, Metrics]:
        return self._update(state, self.backbone, *map(self.devices.place, parts_of(batch)))

    def rows(self, state: State) -> Sequence[Row]:
        if self.adapter.rank:
            return rows_of(self.answers, {"base": self.backbone.base, "bank": state.trainable})
        return rows_of(self.answers, {"base": state.trainable, "bank": None})

    def result(self, state: State) -> Params:
        """The fine-tuned parameters."""
        if not self.adapter.rank:
            return state.trainable
        one = jax.tree.map(lambda x: x[0], state.trainable)
        return merge_dense(self.backbone.base, [one], [self.adapter.scale], [1.0])


def policies_of(backbone: Backbone, parameters: Params, _: None) -> Policies:
    """The model in training, of parameters {"base", "bank"}; no bank where all of them are trained."""
    bank = parameters["bank"]
    return backbone.replace(base=parameters["base"]).policies(bank, None if bank is None else jnp.ones((1, 1)))


# ---- the stage


def heldout_answers(run: Run, settings: SftSettings) -> HeldoutAnswers:
    """What the model in training answers to held-out requests."""
    prompts = [run.records.ask(request) for request in heldout_requests(run)]
    backbone = Backbone(run.workspace.model, settings.adapter, {})
    keys = functools.partial(run.streams.key, "sft/completions")
    return HeldoutAnswers(run, keys, prompts, [{}] * len(prompts), backbone, policies_of)


def method_of(run: Run) -> Sft:
    """The method for the base of a run."""
    settings = run.section(SftSettings)
    table = run.text.tokenized(run.records.completions, run.text.lengths, "sft.data", "completion")
    answers = functools.partial(heldout_answers, run, settings)
    return Sft(settings, run.devices, run.workspace, run.text, run.streams, table, answers)


def run(run: Run) -> dict[str, Any]:
    """Trains the base and writes it to <workdir>/sft/model as a Hugging Face folder."""
    method = method_of(run)
    state = run.train(method, "sft", method.settings.steps)
    workspace, params = run.workspace, to_host(method.result(state))
    folder, note = workspace.base_folder, {"eos_tokens": workspace.tokenizer.eos_tokens}
    with disk_errors(folder):
        on_process_zero(banks.export_model)(workspace, folder, params, workspace.start_folder, note, "sft")
    return {"steps": method.settings.steps, "records": method.records}


STAGE = Stage("sft", run, SftSettings)
