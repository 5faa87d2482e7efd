"""P-DPO: a user model learned jointly with the policy from everybody's comparisons (P-RLHF, arXiv 2402.05133).

Each entry of `preference.models` is one run of the same training on the same pairs with the same budget; the
controls, pooled DPO and permuted user ids, are two more entries.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pjrlhf.data.batching import batches, collate_preference, split_by
from pjrlhf.data.schema import validate
from pjrlhf.data.sources import open_source
from pjrlhf.data.tokenization import Lengths, TokenTable, tokenize
from pjrlhf.errors import UserError
from pjrlhf.models.adapters import AdapterConfig, Policies, init_bank
from pjrlhf.models.decoder import Decoder
from pjrlhf.models.huggingface import fingerprint
from pjrlhf.models.registry import UserRegistry
from pjrlhf.models.storage import load_tree, save_tree
from pjrlhf.models.users import UserModel, clusters_of, gather_rows
from pjrlhf.objectives import preference as losses
from pjrlhf.parallel.mesh import shard_batch, shard_params
from pjrlhf.rollout import scoring
from pjrlhf.rollout.reference import reference_logps
from pjrlhf.stages.context import Run
from pjrlhf.training import loop
from pjrlhf.training.lazy_adam import lazy_adam
from pjrlhf.training.metrics import Metrics
from pjrlhf.training.optimizer import make_optimizer, make_schedule, per_ingredient
from pjrlhf.training.state import State

SIDES = ("chosen", "rejected")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreferenceConfig:
    """The objective.

    `loss` and `label_smoothing` as in `objectives.preference.pairwise_loss`; `alpha` is the share of the
    user-specific term; `mixture` "exact" puts every pair in twice (its user, the generic user), "dropout" once with
    the user dropped with probability 1 - alpha: the same gradient in expectation at half the cost.
    """

    loss: str = "sigmoid"
    beta: float = 0.1
    alpha: float = 0.5
    mixture: str = "exact"
    label_smoothing: float = 0.0
    sft_weight: float = 0.0

    def __post_init__(self):
        if self.mixture not in ("exact", "dropout"):
            raise UserError(f"preference.mixture {self.mixture!r}: unknown; choose exact or dropout")
        if not 0 <= self.alpha <= 1:
            raise UserError(f"preference.alpha {self.alpha}: not in [0, 1]; it is the share of the user-specific term")


def answer_logps(
    model: Decoder, adapter: AdapterConfig, users: UserModel, trainable: Any, base: Any, batch: Any
) -> tuple[jax.Array, jax.Array]:
    """(summed log-probs, token counts) float32 [2, B] of the chosen and rejected answers as each row's user's policy
    sees them.

    Args:
      trainable: {"bank": the adapters, "users": parameters of the user model}.
      batch: {"chosen", "rejected": {"tokens", "valid" [B, P + C]}, "user" int32 [B]}; P = `batch["prompt_slots"]`,
      static.
    """
    tokens = jnp.concatenate([batch[side]["tokens"] for side in SIDES])
    valid = jnp.concatenate([batch[side]["valid"] for side in SIDES])
    user_tokens, mix = users.apply(trainable["users"], jnp.tile(batch["user"], 2))
    if mix is None:
        mix = jnp.ones((1, 1))
    policies = Policies(model, adapter, base, trainable["bank"], mix, user_tokens)
    sums, counts = scoring.sequence_logps(policies, tokens, valid, batch["prompt_slots"])
    return sums.reshape(2, -1), counts.reshape(2, -1)


def preference_loss(
    model: Decoder,
    adapter: AdapterConfig,
    users: UserModel,
    config: PreferenceConfig,
    trainable: Any,
    base: Any,
    batch: Any,
) -> tuple[jax.Array, Metrics]:
    """The personalized loss of a batch, see `answer_logps`, with "generic" bool [B] and "reference" float32 [B, 2]
    besides.

    Where `generic` is None every row counts once, as in plain DPO.
    """
    logps, counts = answer_logps(model, adapter, users, trainable, base, batch)
    reference = batch["reference"].T
    known = losses.options(config.loss)
    pairwise = losses.pairwise_loss(
        config.loss,
        *logps,
        *reference,
        config.beta,
        label_smoothing=config.label_smoothing,
        chosen_length=counts[0],
        rejected_length=counts[1],
        margin=batch["margin"] if "margin" in known else None,
    )
    if config.sft_weight:
        pairwise = pairwise + config.sft_weight * losses.sft_term(logps[0], counts[0])
    ones = jnp.ones_like(pairwise)
    if batch["generic"] is None:
        pair = (pairwise.sum(), ones.sum())
    else:
        pair = losses.mixture(pairwise, batch["generic"], config.alpha)
    chosen, rejected = losses.implicit_rewards(*logps, *reference, config.beta)
    counted = ones if batch["generic"] is None else 1.0 - batch["generic"]
    metrics = {
        "loss": pair,
        "rewards/accuracies": ((losses.accuracy(chosen, rejected) * counted).sum(), counted.sum()),
        "rewards/margins": (((chosen - rejected) * counted).sum(), counted.sum()),
        "rewards/chosen": ((chosen * counted).sum(), counted.sum()),
        "rewards/rejected": ((rejected * counted).sum(), counted.sum()),
        "logps/chosen": ((logps[0] * counted).sum(), counted.sum()),
        "logps/rejected": ((logps[1] * counted).sum(), counted.sum()),
    }
    return pair[0] / pair[1], metrics


class Preference:
    """The method for `training.loop.run`: one entry of `preference.models`, or a part of its training.

    Args:
      kind: the kind of user model; that of the entry by default.
      steps: of this part; all by default.
      start: {"bank", "users"} to go on from.
    """

    def __init__(
        self, run: Run, name: str, pairs: Pairs, *, kind: str | None = None, steps: int = 0, start: Any = None
    ):
        self.run, self.name, self.pairs, self.start = run, name, pairs, start
        config = run.config.preference
        self.settings = config.models[name]
        steps = steps or config.steps
        self.objective = PreferenceConfig(
            **{key: config[key] for key in ("loss", "beta", "alpha", "mixture", "label_smoothing", "sft_weight")}
        )
        self.users = UserModel(
            kind=kind or self.settings.kind,
            num_users=pairs.registry.capacity,
            width=run.model_config.hidden_size,
            **{key: value for key, value in self.settings.items() if key not in ("kind", "permuted", "warm_start")},
        )
        self.personal = self.users.kind != "uniform"
        self.optimizer = per_ingredient(make_optimizer(config.optimizer.to_dict(), steps))
        self.shared = make_optimizer(config.user_optimizer.to_dict(), steps)
        self.lazy = lazy_adam(make_schedule(config.user_optimizer.to_dict(), steps))
        users = pairs.users("train")
        if self.settings.get("permuted"):
            # The control: the same people and pairs, but nobody's pairs are their own.
            users = np.random.default_rng(run.config.seed).permutation(users)
        collate = functools.partial(pairs.collate, "train", users)
        self.batches = batches(pairs.tables["train"], config.batch_size, seed=run.config.seed, collate=collate)
        self._update = jax.jit(self._step, donate_argnums=0, static_argnames="prompt_slots")

    def init(self) -> State:
        run = self.run
        key = jax.random.fold_in(run.key, 60)
        if self.start is None:
            bank = init_bank(run.base, run.adapter, 1, jax.random.fold_in(key, 0))
            users = self.users.init(jax.random.fold_in(key, 1), run.base["embed"]["embedding"])
            trainable = shard_params(run.mesh, {"bank": bank, "users": users})
        else:
            # The step donates its state; what was given stays the caller's.
            trainable = jax.tree.map(jnp.copy, self.start)
        users = trainable["users"]
        opt_state = {
            "bank": self.optimizer.init(trainable["bank"]),
            "shared": self.shared.init(users.get("shared", {})),
            "table": self.lazy.init(users["table"]) if self.personal else {},
        }
        return State(jnp.zeros((), jnp.int32), jax.random.fold_in(key, 2), trainable, opt_state, {})

    def _step(self, state: State, base: Any, batch: Any, prompt_slots: int) -> tuple[State, Metrics]:
        run, trainable, opt_state = self.run, state.trainable, state.opt_state
        batch = {**batch, "generic": None}
        if self.personal and self.objective.alpha < 1:
            if self.objective.mixture == "exact":
                # Each pair twice: as its user said it, and as the generic user.
                B = batch["user"].shape[0]
                doubled = jax.tree.map(
                    lambda x: jnp.concatenate([x, x]), {k: v for k, v in batch.items() if k != "generic"}
                )
                generic = jnp.arange(2 * B) >= B
                batch = {**doubled, "user": jnp.where(generic, 0, doubled["user"]), "generic": generic}
            else:
                key = jax.random.fold_in(state.rng, state.step)
                batch["user"] = losses.user_dropout(key, batch["user"], self.objective.alpha)
        small, indices = trainable["users"], None
        if self.personal:
            small, batch["user"], indices = gather_rows(trainable["users"], batch["user"])
        batch["prompt_slots"] = prompt_slots
        loss = functools.partial(preference_loss, run.model, run.adapter, self.users, self.objective)
        grad = jax.grad(loss, has_aux=True)
        gradient, metrics = grad({"bank": trainable["bank"], "users": small}, base, batch)
        updates, bank_state = self.optimizer.update(gradient["bank"], opt_state["bank"], trainable["bank"])
        users, new = dict(trainable["users"]), {"bank": bank_state, "shared": opt_state["shared"], "table": {}}
        if "shared" in users:
            moved, new["shared"] = self.shared.update(gradient["users"]["shared"], opt_state["shared"], users["shared"])
            users["shared"] = optax.apply_updates(users["shared"], moved)
        if self.personal:
            users["table"], new["table"] = self.lazy.update(
                indices, gradient["users"]["table"], opt_state["table"], users["table"]
            )
        trainable = {"bank": optax.apply_updates(trainable["bank"], updates), "users": users}
        norm = optax.global_norm(gradient)
        metrics = {**metrics, "grad_norm": (norm, jnp.ones_like(norm))}
        return state.replace(step=state.step + 1, trainable=trainable, opt_state=new), metrics

    def step(self, state: State, batch: Any) -> tuple[State, Metrics]:
        arrays, slots = device_part(batch)
        return self._update(state, self.run.base, shard_batch(self.run.mesh, arrays), prompt_slots=slots)


def run(run: Run) -> dict[str, Any]:
    """Trains every entry of `preference.models`; writes <workdir>/preference/<name>/model.safetensors with the
    users' names.
    """
    config = run.config.preference
    pairs = Pairs(run)

    def train(method: Preference, stage: str, steps: int) -> Any:
        state = loop.run(
            method,
            run.workdir,
            stage,
            steps=steps,
            checkpoint_every=run.config.checkpoint_every,
            log_every=run.config.log_every,
            show=("loss", "rewards/accuracies"),
        )
        return state.trainable

    for name, settings in config.models.items():
        first, start = round(settings.get("warm_start", 0.0) * config.steps), None
        if first:
            method = Preference(run, name, pairs, kind="individualized", steps=first)
            start = train(method, f"preference/{name}/individualized", first)
            key = jax.random.fold_in(run.key, 61)
            start = {**start, "users": clusters_of(method.users, start["users"], settings.clusters, key)}
        method = Preference(run, name, pairs, steps=config.steps - first, start=start)
        trainable = train(method, f"preference/{name}", config.steps - first)
        note = {"users": pairs.registry.to_json(), "kind": method.users.kind, "base": pairs.base_hash}
        save_tree(run.workdir.stage(f"preference/{name}") / "model.safetensors", trainable, note)
    counts = {name: len(table) for name, table in pairs.tables.items()}
    return {"pairs": counts, "users": pairs.registry.capacity}


def load(run: Run, name: str) -> Any:
    """{"bank", "users"} of a trained entry, on the mesh."""
    tree, _ = load_tree(run.workdir.path / "preference" / name / "model.safetensors")
    return shard_params(run.mesh, {"users": {}, **tree})
