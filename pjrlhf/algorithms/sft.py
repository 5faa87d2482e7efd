"""Supervised fine-tuning of the base on prompt-completion records; the part of Tulu where the synthetic environment is
used.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from pjrlhf.data.batching import batches
from pjrlhf.data.tokenization import tokenize
from pjrlhf.merging.lora import merge_dense
from pjrlhf.models.adapters import AdapterConfig, Policies, init_bank
from pjrlhf.models.decoder import Decoder
from pjrlhf.models.huggingface import save_params
from pjrlhf.parallel.processes import on_process_zero, to_host
from pjrlhf.rollout import scoring
from pjrlhf.runtime.context import Run
from pjrlhf.training.metrics import Metrics, masked
from pjrlhf.training.optimizer import make_optimizer, per_ingredient
from pjrlhf.training.state import State
from pjrlhf.training.workdir import disk_errors


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
    return run.pack([row["prompt"] for row in rows], [[row["completion"]] for row in rows])


class Sft:
    """The method for `training.loop.run`: full parameters, or LoRA where `sft.adapter.rank` > 0."""

    def __init__(self, run: Run):
        self.run, config = run, run.config.sft
        self.adapter = AdapterConfig.of(config.adapter)
        optimizer = make_optimizer(config.optimizer.to_dict(), config.steps)
        self.optimizer = per_ingredient(optimizer) if self.adapter.rank else optimizer
        make = functools.partial(collate, run)
        self.batches = batches(self._table(), config.batch_size, seed=run.config.seed, collate=make)
        self.base = None
        self._update = run.training_step(self._step)

    def _table(self) -> Any:
        return tokenize(
            self.run.completions,
            "completion",
            self.run.tokenizer,
            self.run.lengths,
            source_name="sft.data",
            max_bad_fraction=self.run.config.data.max_bad_fraction,
        )

    def init(self) -> State:
        params = self.run.start_params()
        if self.adapter.rank:
            self.base = params
        # Full parameters become those of the state; beside an adapter they stay.
        return self.run.create(self._initial, params, donate=() if self.adapter.rank else (0,))

    def _initial(self, params: Any) -> State:
        if self.adapter.rank:
            params = init_bank(params, self.adapter, 1, jax.random.fold_in(self.run.key, 1))
        return State.create(jax.random.fold_in(self.run.key, 2), params, self.optimizer)

    def _step(self, state: State, base: Any, batch: Any) -> tuple[State, Metrics]:
        loss = functools.partial(sft_loss, self.run.model, self.adapter)
        (_, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(state.trainable, base, batch)
        norm = optax.global_norm(gradient)
        metrics = {**metrics, "grad_norm": (norm, jnp.ones_like(norm))}
        return state.apply_gradients(gradient, self.optimizer), metrics

    def step(self, state: State, batch: Any) -> tuple[State, Metrics]:
        return self._update(state, self.base, self.run.place(batch))

    def result(self, state: State) -> Any:
        """The fine-tuned parameters."""
        if not self.adapter.rank:
            return state.trainable
        one = jax.tree.map(lambda x: x[0], state.trainable)
        return merge_dense(self.base, [one], [self.adapter.scale], [1.0])


def run(run: Run) -> dict[str, Any]:
    """Trains the base and writes it to <workdir>/sft/model as a Hugging Face folder."""
    config = run.config.sft
    method = Sft(run)
    state = run.train(method, "sft", config.steps)
    with disk_errors(run.base_folder):
        on_process_zero(save_params)(
            run.base_folder,
            run.model_config,
            to_host(method.result(state)),
            model_type=run.model_type,
            tokenizer_folder=run.start_folder,
            token_ids=run.token_ids,
        )
    return {"steps": config.steps}
