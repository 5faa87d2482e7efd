"""P-DPO: a user model learned jointly with the policy from everybody's comparisons (P-RLHF, arXiv 2402.05133).

Each entry of `preference.models` is one run of the same training on the same pairs with the same budget; the
controls, pooled DPO and permuted user ids, are two more entries.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pjrlhf.data.batching import batches
from pjrlhf.errors import UserError
from pjrlhf.models.adapters import AdapterConfig, Policies, bank_size, init_bank, is_low_rank
from pjrlhf.models.decoder import Decoder
from pjrlhf.models.storage import load_tree, save_tree
from pjrlhf.models.users import UserModel, clusters_of, gather_rows
from pjrlhf.objectives import preference as losses
from pjrlhf.parallel.mesh import shard_batch, shard_params
from pjrlhf.rollout import scoring
from pjrlhf.stages.context import Run
from pjrlhf.stages.pairs import SIDES, Pairs, device_part
from pjrlhf.training import loop
from pjrlhf.training.lazy_adam import lazy_adam
from pjrlhf.training.metrics import Metrics
from pjrlhf.training.optimizer import make_optimizer, make_schedule, per_ingredient
from pjrlhf.training.state import State


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
        try:
            known = losses.options(self.loss)
        except ValueError as error:
            raise UserError(f"preference.loss: {error}") from error
        if self.label_smoothing and "label_smoothing" not in known:
            raise UserError(
                f"preference.label_smoothing: loss {self.loss!r} has none; set it to 0 or choose another loss"
            )
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


def soup_bank(run: Run, base_hash: str) -> Any:
    """The trained adapters that kind soup mixes, from `preference.bank`, on the mesh.

    Raises:
      UserError: no such file, or adapters that belong to another base or were scaled in another way.
    """
    path = run.config.preference.bank
    if not path:
        raise UserError(
            "preference.bank: not set; name the bank.safetensors of a stage policy, whose policies soups mix"
        )
    bank, note = load_tree(path)
    if not is_low_rank(bank):
        raise UserError(f"{path}: holds full parameters, of which every pair would need a copy; train adapters instead")
    rank = bank["layers"]["attention"]["query"]["a"].shape[-1]
    found = {"base": note.get("base"), "rank": rank, "alpha": note.get("alpha")}
    wanted = {"base": base_hash, "rank": run.adapter.rank, "alpha": run.adapter.alpha}
    if found != wanted:
        raise UserError(
            f"{path}: its adapters have {found}, this run {wanted}; use the base and adapter settings of both"
        )
    return shard_params(run.mesh, bank)


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
        kind = kind or self.settings.kind
        # What the policies are made of beside the base but is not trained.
        self.frozen = {"bank": soup_bank(run, pairs.base_hash)} if kind == "soup" else {}
        sizes = {"num_users": pairs.registry.capacity, "width": run.model_config.hidden_size}
        if self.frozen:
            sizes["adapters"] = bank_size(self.frozen["bank"])
        own = {key: value for key, value in self.settings.items() if key not in ("kind", "permuted", "warm_start")}
        try:
            self.users = UserModel(kind=kind, **sizes, **own)
        except (TypeError, ValueError) as error:
            raise UserError(f"preference.models.{name}: {error}") from error
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
            users = self.users.init(jax.random.fold_in(key, 1), run.base["embed"]["embedding"])
            trainable = {"users": users}
            if not self.frozen:
                trainable["bank"] = init_bank(run.base, run.adapter, 1, jax.random.fold_in(key, 0))
        else:
            # The step donates its state; what was given stays the caller's.
            trainable = jax.tree.map(jnp.copy, self.start)
        users = trainable["users"]
        opt_state = {
            "bank": self.optimizer.init(trainable["bank"]) if "bank" in trainable else {},
            "shared": self.shared.init(users.get("shared", {})),
            "table": self.lazy.init(users["table"]) if self.personal else {},
        }
        state = State(jnp.zeros((), jnp.int32), jax.random.fold_in(key, 2), trainable, opt_state, {})
        return shard_params(run.mesh, state)

    def _step(self, state: State, base: Any, frozen: Any, batch: Any, prompt_slots: int) -> tuple[State, Metrics]:
        run, trainable, opt_state = self.run, dict(state.trainable), dict(state.opt_state)
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
        users = dict(trainable["users"])
        small, indices = users, None
        if self.personal:
            small, batch["user"], indices = gather_rows(users, batch["user"])
        batch["prompt_slots"] = prompt_slots

        def loss(moving: Any) -> tuple[jax.Array, Metrics]:
            policies = {**frozen, **moving}
            return preference_loss(run.model, run.adapter, self.users, self.objective, policies, base, batch)

        gradient, metrics = jax.grad(loss, has_aux=True)({**trainable, "users": small})
        if "bank" in trainable:
            updates, opt_state["bank"] = self.optimizer.update(gradient["bank"], opt_state["bank"], trainable["bank"])
            trainable["bank"] = optax.apply_updates(trainable["bank"], updates)
        if "shared" in users:
            updates, opt_state["shared"] = self.shared.update(
                gradient["users"]["shared"], opt_state["shared"], users["shared"]
            )
            users["shared"] = optax.apply_updates(users["shared"], updates)
        if self.personal:
            users["table"], opt_state["table"] = self.lazy.update(
                indices, gradient["users"]["table"], opt_state["table"], users["table"]
            )
        norm = optax.global_norm(gradient)
        metrics = {**metrics, "grad_norm": (norm, jnp.ones_like(norm))}
        trainable["users"] = users
        return state.replace(step=state.step + 1, trainable=trainable, opt_state=opt_state), metrics

    def step(self, state: State, batch: Any) -> tuple[State, Metrics]:
        arrays, slots = device_part(batch)
        arrays = shard_batch(self.run.mesh, arrays)
        return self._update(state, self.run.base, self.frozen, arrays, prompt_slots=slots)


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
        save_tree(run.workdir.stage(f"preference/{name}") / "model.safetensors", {**method.frozen, **trainable}, note)
    counts = {name: len(table) for name, table in pairs.tables.items()}
    return {"pairs": counts, "users": pairs.registry.capacity}


def load(run: Run, name: str) -> Any:
    """{"bank", "users"} of a trained entry, on the mesh."""
    tree, _ = load_tree(run.workdir.path / "preference" / name / "model.safetensors")
    return shard_params(run.mesh, {"users": {}, **tree})
