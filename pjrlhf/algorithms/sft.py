"""Supervised fine-tuning of the base on prompt-completion records; the part of Tulu where the synthetic environment is
used.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from pjrlhf.data.batching import batches
from pjrlhf.merging.lora import merge_dense
from pjrlhf.models.adapters import AdapterConfig, Policies, init_bank
from pjrlhf.models.decoder import Decoder
from pjrlhf.models.huggingface import save_params
from pjrlhf.parallel.processes import on_process_zero, to_host
from pjrlhf.rollout import scoring
from pjrlhf.runtime.records import CorpusSettings
from pjrlhf.runtime.run import Run, Stage
from pjrlhf.settings import setting
from pjrlhf.training.loop import Method
from pjrlhf.training.metrics import Metrics, masked
from pjrlhf.training.optimizer import OptimizerSettings, check_warmup, make_optimizer, per_ingredient
from pjrlhf.training.state import State
from pjrlhf.training.workdir import disk_errors


@dataclasses.dataclass(frozen=True, kw_only=True)
class SftSettings(CorpusSettings):
    """Supervised fine-tuning of the base."""

    steps: int = setting(400, "updates", low=1, high=10**9)
    batch_size: int = setting(64, "records a step", low=1, high=2**20)
    adapter: AdapterConfig = setting(AdapterConfig(rank=0), "rank 0 trains full parameters")
    optimizer: OptimizerSettings = setting(
        OptimizerSettings(learning_rate=4e-3, schedule="cosine", warmup_steps=20, b2=0.98, weight_decay=0.01)
    )

    def check(self) -> None:
        check_warmup(self.optimizer, self.steps)


def sft_loss(model: Decoder, adapter: AdapterConfig, trainable: Any, base: Any, rows: Any) -> tuple[jax.Array, Metrics]:
    """Mean negative log-likelihood of the completion tokens, nats.

    Args:
      trainable: the parameters, or with `base` given a LoRA bank of one adapter.
      rows: of prompts and one answer each, see `data.packing.pack`.
    """
    if base is None:
        policies = Policies(model, adapter, trainable, None, None)
    else:
        policies = Policies(model, adapter, base, trainable, jnp.ones((1, 1)))
    logps, mask = scoring.packed_token_logps(policies, rows)
    pair = masked(-logps, mask)
    metrics = {"loss": pair, "num_tokens": (pair[1], jnp.ones(())), "wasted_tokens": scoring.wasted_tokens(rows)}
    return pair[0] / jnp.maximum(pair[1], 1), metrics


def collate(run: Run, rows: Sequence[Any]) -> Any:
    """Rows of prompts and one answer each, see `data.packing.pack`."""
    return run.text.pack([row["prompt"] for row in rows], [[row["completion"]] for row in rows])


class Sft(Method):
    """The method for `training.loop.run`: full parameters, or LoRA where `sft.adapter.rank` > 0."""

    def __init__(self, run: Run):
        self.run, config = run, run.section(SftSettings)
        self.adapter = config.adapter
        optimizer = make_optimizer(config.optimizer, config.steps)
        self.optimizer = per_ingredient(optimizer) if self.adapter.rank else optimizer
        make = functools.partial(collate, run)
        self.batches = batches(self._table(), config.batch_size, seed=run.settings.seed, collate=make)
        self.base = None
        self._update = run.devices.training_step(self._step)
        self.programs = (self._update,)

    def _table(self) -> Any:
        text = self.run.text
        return text.tokenized(self.run.records.completions, text.lengths, "sft.data", "completion")

    def init(self) -> State:
        params = self.run.workspace.start_params(self.run.streams.key("base/init"))
        if self.adapter.rank:
            self.base = params
        # Full parameters become those of the state; beside an adapter they stay.
        return self.run.devices.create(self._initial, params, donate=() if self.adapter.rank else (0,))

    def _initial(self, params: Any) -> State:
        if self.adapter.rank:
            params = init_bank(params, self.adapter, 1, self.run.streams.key("sft/adapter"))
        return State.create(self.run.streams.key("sft/state"), params, self.optimizer)

    def _step(self, state: State, base: Any, batch: Any) -> tuple[State, Metrics]:
        loss = functools.partial(sft_loss, self.run.workspace.model, self.adapter)
        (_, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(state.trainable, base, batch)
        norm = optax.global_norm(gradient)
        metrics = {**metrics, "grad_norm": (norm, jnp.ones_like(norm))}
        return state.apply_gradients(gradient, self.optimizer), metrics

    def step(self, state: State, batch: Any) -> tuple[State, Metrics]:
        return self._update(state, self.base, self.run.devices.place(batch))

    def result(self, state: State) -> Any:
        """The fine-tuned parameters."""
        if not self.adapter.rank:
            return state.trainable
        one = jax.tree.map(lambda x: x[0], state.trainable)
        return merge_dense(self.base, [one], [self.adapter.scale], [1.0])


def run(run: Run) -> dict[str, Any]:
    """Trains the base and writes it to <workdir>/sft/model as a Hugging Face folder."""
    config = run.section(SftSettings)
    method = Sft(run)
    state = run.train(method, "sft", config.steps)
    with disk_errors(run.workspace.base_folder):
        on_process_zero(save_params)(
            run.workspace.base_folder,
            run.workspace.model_config,
            to_host(method.result(state)),
            model_type=run.workspace.model_type,
            tokenizer_folder=run.workspace.start_folder,
            token_ids=run.workspace.token_ids,
        )
    return {"steps": config.steps}


STAGE = Stage("sft", run, SftSettings)
