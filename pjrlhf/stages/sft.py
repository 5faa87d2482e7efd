"""Supervised fine-tuning of the base on prompt-completion records; the part of Tulu where the built-in world is
used.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from pjrlhf.data.batching import batches, collate_completion
from pjrlhf.data.tokenization import tokenize
from pjrlhf.merging.lora import merge_dense
from pjrlhf.models.adapters import AdapterConfig, Policies, init_bank
from pjrlhf.models.decoder import Decoder
from pjrlhf.models.huggingface import save_params
from pjrlhf.parallel.processes import by_first, to_host
from pjrlhf.rollout import scoring
from pjrlhf.stages.context import Run
from pjrlhf.training.metrics import Metrics, masked
from pjrlhf.training.optimizer import make_optimizer, per_ingredient
from pjrlhf.training.state import State
from pjrlhf.training.workdir import disk_errors


def sft_loss(
    model: Decoder, adapter: AdapterConfig, prompt_slots: int, trainable: Any, base: Any, batch: Any
) -> tuple[jax.Array, Metrics]:
    """Mean negative log-likelihood of the completion tokens, nats.

    Args:
      prompt_slots: P, where completions start.
      trainable: the parameters, or with `base` given a LoRA bank of one adapter.
      batch: {"tokens", "valid", "loss_mask"} [B, P + C], see `data.batching.collate_completion`.
    """
    if base is None:
        policies = Policies(model, adapter, trainable, None, None)
    else:
        policies = Policies(model, adapter, base, trainable, jnp.ones((1, 1)))
    states = scoring.response_states(policies, batch["tokens"], batch["valid"], prompt_slots)
    logps, _ = scoring.token_logps(policies, states, batch["tokens"][:, prompt_slots:])
    pair = masked(-logps, batch["loss_mask"][:, prompt_slots:])
    return pair[0] / jnp.maximum(pair[1], 1), {"loss": pair, "num_tokens": (pair[1], jnp.ones(()))}


class Sft:
    """The method for `training.loop.run`: full parameters, or LoRA where `sft.adapter.rank` > 0."""

    def __init__(self, run: Run):
        self.run, config = run, run.config.sft
        self.adapter = AdapterConfig(rank=config.adapter.rank, alpha=float(config.adapter.alpha))
        optimizer = make_optimizer(config.optimizer.to_dict(), config.steps)
        self.optimizer = per_ingredient(optimizer) if self.adapter.rank else optimizer
        self.prompt_slots = run.lengths.prompt
        collate = functools.partial(
            collate_completion,
            prompt_length=run.lengths.prompt,
            completion_length=run.lengths.completion,
            pad_id=run.tokenizer.pad_id,
        )
        self.batches = batches(self._table(), config.batch_size, seed=run.config.seed, collate=collate)
        self.base = None
        self._update = run.training_step(self._step)

    def _table(self) -> Any:
        return tokenize(
            self.run.completions,
            "completion",
            self.run.tokenizer,
            self.run.lengths,
            source_name="sft.data",
            max_bad_share=self.run.config.data.max_bad_share,
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
        loss = functools.partial(sft_loss, self.run.model, self.adapter, self.prompt_slots)
        (_, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(state.trainable, base, batch)
        norm = optax.global_norm(gradient)
        metrics = {**metrics, "grad_norm": (norm, jnp.ones_like(norm))}
        return state.updated(gradient, self.optimizer), metrics

    def step(self, state: State, batch: Any) -> tuple[State, Metrics]:
        arrays = {name: batch[name] for name in ("tokens", "valid", "loss_mask")}
        return self._update(state, self.base, self.run.place(arrays))

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
        by_first(save_params)(
            run.base_folder,
            run.model_config,
            to_host(method.result(state)),
            model_type=run.model_type,
            tokenizer_folder=run.start_folder,
            token_ids=run.token_ids,
        )
    return {"steps": config.steps}
