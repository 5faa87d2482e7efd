"""P-DPO and P-RM: a user model learned jointly with a policy, or a reward model, from everybody's comparisons (P-RLHF,
arXiv 2402.05133).

Each entry of `preference.models` is one run of the same training on the same pairs with the same budget; the
controls, pooled DPO and permuted user ids, are two more entries. Besides the settings of its user model an entry may
have those of `PreferenceConfig`, where they differ from the section's, and of `ENTRY`.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pjrlhf.data.batching import batches
from pjrlhf.errors import UserError
from pjrlhf.feedback.pairs import SIDES, Pairs, PairSettings
from pjrlhf.models.adapters import AdapterConfig, Policies, bank_size, init_bank, is_low_rank
from pjrlhf.models.decoder import Decoder
from pjrlhf.models.storage import load_tree, save_tree
from pjrlhf.models.users import KINDS, STARTS, UserModel, fit_clusters, gather_rows
from pjrlhf.objectives import preference as losses
from pjrlhf.paths import local
from pjrlhf.rollout import scoring
from pjrlhf.runtime.run import Run, Stage
from pjrlhf.settings import Settings, parse, setting
from pjrlhf.training.lazy_adam import lazy_adam
from pjrlhf.training.loop import Method
from pjrlhf.training.metrics import Metrics
from pjrlhf.training.optimizer import OptimizerSettings, check_warmup, make_optimizer, make_schedule, per_ingredient
from pjrlhf.training.state import State

HEADS = ("policy", "reward")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreferenceConfig(Settings):
    """The objective.

    `head` "policy" scores an answer by beta log(pi / reference), as DPO does; "reward" by a scalar head on its last
    token, without a reference and with beta 1 (P-RM, arXiv 2402.05133, section 4.1). `loss` and `label_smoothing` as
    in `objectives.preference.pairwise_loss`; `alpha` is the share of the user-specific term; `mixture` "exact" puts
    every pair in twice (its user, the generic user), "dropout" once with the user dropped with probability 1 - alpha:
    the same gradient in expectation at half the cost.
    """

    head: str = setting("policy", "policy (P-DPO), or reward (P-RM)", choices=HEADS)
    loss: str = setting(
        "sigmoid", "see objectives/preference.py", choices=lambda: tuple(losses.PAIRWISE), extensible=True
    )
    beta: float = setting(0.1, "inverse temperature of the implicit reward", above=0.0, high=1e6)
    alpha: float = setting(
        0.5, "fraction of the user-specific term; the rest trains the generic user", low=0.0, high=1.0
    )
    mixture: str = setting(
        "exact", "exact: every pair twice; dropout: once, at half the cost", choices=("exact", "dropout")
    )
    label_smoothing: float = setting(0.0, "fraction of labels taken for wrong", low=0.0, below=0.5)
    sft_weight: float = setting(0.0, "weight of the log-likelihood of the chosen answers", low=0.0, high=1e6)

    def check(self) -> None:
        try:
            loss = losses.PAIRWISE.get(self.loss)
        except UserError as error:
            raise UserError(f"loss: {error}") from error
        if self.label_smoothing and "label_smoothing" not in loss.options:
            raise UserError(f"label_smoothing: loss {self.loss!r} has none; set it to 0 or choose another loss")
        if self.head == "reward" and (self.sft_weight or not loss.for_rewards):
            known = [name for name, other in losses.PAIRWISE.items() if other.for_rewards]
            raise UserError(
                f"head: 'reward' with loss {self.loss!r} and sft_weight {self.sft_weight} needs a policy; choose from "
                f"{', '.join(known)}, and sft_weight 0"
            )

    @property
    def scale(self) -> float:
        """What a score difference is multiplied by: beta for log-ratios, 1 for rewards."""
        return self.beta if self.head == "policy" else 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class EntrySettings(Settings):
    """An entry of `preference.models`: a user model, and what differs from the section where it differs."""

    kind: str = setting("individualized", "the user model", choices=tuple(KINDS))
    tokens: int = setting(10, "user tokens, of the kinds that have them", low=1, high=4096)
    clusters: int = setting(5, "of kind cluster", low=1, high=10**6)
    start: str = setting("vocabulary", "what user tokens start from", choices=STARTS)
    std: float = setting(0.02, "of user tokens that start normal", low=0.0, high=1e3)
    zero_offset: bool = setting(True, "every user starts equal to the generic one")
    permuted: bool = setting(False, "train on the same pairs under wrong names (or texts): the control")
    warm_start: float = setting(
        0.0,
        "of kind cluster: fraction of the steps that train vectors of everybody's own, then clustered",
        low=0.0,
        below=1.0,
    )
    user_text: bool = setting(False, "what people say about themselves stands before the prompt")

    def check(self) -> None:
        if self.warm_start and self.kind != "cluster":
            raise UserError(f"warm_start: kind {self.kind!r} has no clusters to start; set it to 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreferenceSettings(PairSettings, PreferenceConfig):
    """Entries of user models, trained on the same pairs with the same budget."""

    models: Mapping[str, Any] = setting(
        {
            "pooled": {"kind": "uniform"},
            "individualized": {"kind": "individualized", "tokens": 4},
            "cluster": {"kind": "cluster", "tokens": 4, "clusters": 2, "warm_start": 0.5},
            "permuted": {"kind": "individualized", "tokens": 4, "permuted": True},
        },
        "name -> entry; an entry may differ from the section in everything from head to sft_weight",
    )
    bank: str = setting("", "for entries of kind soup: policy, or bank.safetensors of a stage policy on the same base")
    steps: int = setting(160, "updates of each entry", low=1, high=10**9)
    optimizer: OptimizerSettings = setting(
        OptimizerSettings(learning_rate=3e-3, schedule="cosine", warmup_steps=5), "of the policy or reward model"
    )
    user_optimizer: OptimizerSettings = setting(
        OptimizerSettings(learning_rate=3e-2, schedule="cosine"), "of the user model"
    )

    def check(self) -> None:
        super().check()
        if not self.models:
            raise UserError("models: there is none; add an entry such as {'pooled': {'kind': 'uniform'}}")
        for name in self.models:
            users, _ = self.entry(name)
            # Two parts where the first trains vectors for the clusters.
            first = round(users.warm_start * self.steps)
            for part in filter(None, (first, self.steps - first)):
                check_warmup(self.optimizer, part)
                check_warmup(self.user_optimizer, part, "user_optimizer")

    def entry(self, name: str) -> tuple[EntrySettings, PreferenceConfig]:
        """The user model of an entry, and its objective.

        Raises:
          UserError: a setting of the entry that is not known or does not fit.
        """
        values = self.models[name]
        if not isinstance(values, Mapping):
            raise UserError(f"models.{name}: {values!r} is not an entry; give it a kind")
        objective = {field.name: getattr(self, field.name) for field in dataclasses.fields(PreferenceConfig)}
        objective |= {key: value for key, value in values.items() if key in objective}
        own = {key: value for key, value in values.items() if key not in objective}
        if "kind" not in own:
            raise UserError(f"models.{name}: has no kind; choose one of {', '.join(KINDS)}")
        return parse(EntrySettings, own, f"models.{name}"), parse(PreferenceConfig, objective, f"models.{name}")


def answer_scores(
    model: Decoder, adapter: AdapterConfig, users: UserModel, trainable: Any, base: Any, batch: Any
) -> jax.Array:
    """Float32 [2, B], of the chosen and rejected answers as each pair's user sees them: summed log-probs, nats, or,
    where `trainable` has "heads", rewards.

    Args:
      trainable: {"bank": the adapters, "users": parameters of the user model}, and "heads" of a reward model.
      batch: {"rows", "user"} of B pairs, see `stages.pairs.Pairs.collate`.
    """
    user_tokens, mix = users.apply(trainable["users"], batch["user"])
    if mix is None:
        mix = jnp.ones((1, 1))
    policies, count = Policies(model, adapter, base, trainable["bank"], mix, user_tokens), 2 * len(batch["user"])
    if "heads" in trainable:
        scores = scoring.packed_rewards(policies, trainable["heads"], jnp.ones((1, 1)), batch["rows"], count)
    else:
        scores = scoring.packed_logps(policies, batch["rows"], count)
    return scores.reshape(-1, 2).T


def _references(config: PreferenceConfig, batch: Any) -> jax.Array:
    """Float32 [2, B]: what the scores of `answer_scores` are measured against; rewards against nothing."""
    return batch["reference"].T if config.head == "policy" else jnp.zeros_like(batch["reference"].T)


def pair_rewards(config: PreferenceConfig, scores: jax.Array, batch: Any) -> tuple[jax.Array, jax.Array]:
    """(chosen, rejected) rewards float32 [B] from what `answer_scores` gives, constants to the gradient: those of the
    head, or beta log(pi / reference), per token where the loss is.
    """
    rewards = losses.implicit_rewards(scores, _references(config, batch), config.scale)
    if "lengths" in losses.PAIRWISE.get(config.loss).options:
        rewards = tuple(reward / count for reward, count in zip(rewards, batch["counts"].T, strict=True))
    return rewards


def reward_shift(config: PreferenceConfig, scores: jax.Array, batch: Any) -> jax.Array:
    """Float32 [2], sum and number of the rewards of both answers so far: those before this batch, which `batch` may
    hold as "shift", and its own. Their mean is the reward shift of BCO (arXiv 2404.04656).
    """
    rewards = jnp.stack(losses.implicit_rewards(scores, _references(config, batch), config.scale))
    return batch.get("shift", jnp.zeros(2)) + jnp.stack([rewards.sum(), jnp.asarray(float(rewards.size))])


def pair_losses(config: PreferenceConfig, scores: jax.Array, batch: Any) -> jax.Array:
    """Float32 [B], the loss of every pair from what `answer_scores` gives."""
    takes, delta = losses.PAIRWISE.get(config.loss).options, None
    if "delta" in takes:
        total, count = reward_shift(config, scores, batch)
        delta = total / count
    return losses.pairwise_loss(
        config.loss,
        scores,
        _references(config, batch),
        config.scale,
        lengths=batch["counts"].T,
        label_smoothing=config.label_smoothing,
        margin=batch["margin"] if "margin" in takes else None,
        delta=delta,
    )


def preference_loss(
    model: Decoder,
    adapter: AdapterConfig,
    users: UserModel,
    config: PreferenceConfig,
    trainable: Any,
    base: Any,
    batch: Any,
) -> tuple[jax.Array, Metrics]:
    """The personalized loss of a batch, see `stages.pairs.Pairs.collate`, with "generic" bool [B] besides: which
    copies are the generic user's (`both_copies`); None where every pair is in it once and counts once, as in plain DPO.
    """
    scores = answer_scores(model, adapter, users, trainable, base, batch)
    pairwise = pair_losses(config, scores, batch)
    if config.sft_weight:
        pairwise = pairwise + config.sft_weight * losses.sft_term(scores[0], batch["counts"][:, 0])
    ones = jnp.ones_like(pairwise)
    if batch["generic"] is None:
        pair = (pairwise.sum(), ones.sum())
    else:
        pair = losses.mixture(pairwise, batch["generic"], config.alpha)
    chosen, rejected = pair_rewards(config, scores, batch)
    counted = ones if batch["generic"] is None else 1.0 - batch["generic"]
    metrics = {
        "loss": pair,
        "rewards/accuracies": ((losses.accuracy(chosen, rejected) * counted).sum(), counted.sum()),
        "rewards/margins": (((chosen - rejected) * counted).sum(), counted.sum()),
        "rewards/chosen": ((chosen * counted).sum(), counted.sum()),
        "rewards/rejected": ((rejected * counted).sum(), counted.sum()),
        "wasted_tokens": scoring.wasted_tokens(batch["rows"]),
    }
    if "shift" in batch:
        metrics["rewards/shift"] = tuple(reward_shift(config, scores, batch))
    if config.head == "policy":
        for side, logps in zip(SIDES, scores, strict=True):
            metrics[f"logps/{side}"] = ((logps * counted).sum(), counted.sum())
    return pair[0] / pair[1], metrics


def both_copies(batch: Any) -> Any:
    """A batch with every pair twice: as its user said it, and as the generic user."""
    B = len(batch["user"])
    both = jax.tree.map(lambda x: jnp.concatenate([x, x]), batch)
    # The copies' pairs are numbered on.
    for name, step in (("owner", B), ("answer", 2 * B), ("last_answer", 2 * B)):
        numbers = batch["rows"][name]
        both["rows"][name] = jnp.concatenate([numbers, numbers + step])
    generic = jnp.arange(2 * B) >= B
    return {**both, "user": jnp.where(generic, 0, both["user"]), "generic": generic}


def soup_bank(run: Run) -> Any:
    """The trained adapters that kind soup mixes, from `preference.bank`, on the mesh.

    Raises:
      UserError: no such file, or adapters that belong to another base or were scaled in another way.
    """
    path = run.section(PreferenceSettings).bank
    if not path:
        raise UserError(
            "preference.bank: not set; name the bank.safetensors of a stage policy, whose policies soups mix, or "
            "policy for that of this run"
        )
    if path == "policy":
        path = run.workdir.path / "policy" / "bank.safetensors"
    bank, note = load_tree(local(path))
    if not is_low_rank(bank):
        raise UserError(f"{path}: holds full parameters, of which every pair would need a copy; train adapters instead")
    rank = bank["layers"]["attention"]["query"]["a"].shape[-1]
    found = {"base": note.get("base"), "rank": rank, "alpha": note.get("alpha")}
    wanted = {"base": run.workspace.base_hash, "rank": run.workspace.adapter.rank, "alpha": run.workspace.adapter.alpha}
    if found != wanted:
        raise UserError(
            f"{path}: its adapters have {found}, this run {wanted}; use the base and adapter settings of both"
        )
    return run.devices.shard(bank)


class Preference(Method):
    """The method for `training.loop.run`: one entry of `preference.models`, or a part of its training.

    Args:
      kind: the kind of user model; that of the entry by default.
      steps: of this part; all by default.
      start: {"bank", "users"} to go on from.
    """

    show = ("loss", "rewards/accuracies")

    def __init__(
        self, run: Run, name: str, pairs: Pairs, *, kind: str | None = None, steps: int = 0, start: Any = None
    ):
        self.run, self.name, self.pairs, self.start = run, name, pairs, start
        config = run.section(PreferenceSettings)
        self.settings, self.objective = config.entry(name)
        steps = steps or config.steps
        kind = kind or self.settings.kind
        # What the policies are made of beside the base but is not trained.
        self.frozen = {"bank": soup_bank(run)} if kind == "soup" else {}
        sizes = {"num_users": pairs.registry.capacity, "width": run.workspace.model_config.hidden_size}
        if self.frozen:
            sizes["adapters"] = bank_size(self.frozen["bank"])
        own = {key: getattr(self.settings, key) for key in ("tokens", "clusters", "start", "std", "zero_offset")}
        try:
            self.users = UserModel(kind=kind, **sizes, **own)
        except ValueError as error:
            raise UserError(f"preference.models.{name}: {error}") from error
        self.personal = self.users.kind != "uniform"
        self.shifted = "delta" in losses.PAIRWISE.get(self.objective.loss).options
        self.optimizer = per_ingredient(make_optimizer(config.optimizer, steps))
        self.shared = make_optimizer(config.user_optimizer, steps)
        self.lazy = lazy_adam(make_schedule(config.user_optimizer, steps))
        users = pairs.users("train")
        if self.settings.permuted:
            # The control: the same people and pairs, but nobody's pairs are their own.
            users = run.streams.numpy("preference/permutation").permutation(users)
        collate = functools.partial(self.collate, "train", users)
        self.batches = batches(pairs.tables["train"], config.batch_size, seed=run.settings.seed, collate=collate)
        self._update = run.devices.training_step(self._step)
        self.programs = (self._update,)

    def collate(self, part: str, users: np.ndarray, rows: Sequence[Any]) -> Any:
        """A batch with room for the user tokens of this entry, see `Pairs.collate`."""
        return self.pairs.collate(part, users, rows, self.users.num_tokens)

    def init(self) -> State:
        # The step donates its state; what was given as a start stays the caller's.
        return self.run.devices.create(self._initial, self.run.workspace.base, self.start)

    def _initial(self, base: Any, start: Any) -> State:
        run = self.run
        key = run.streams.key("preference/init")
        trainable = start
        if start is None:
            users = self.users.init(jax.random.fold_in(key, 1), base["embed"]["embedding"])
            trainable = {"users": users}
            if not self.frozen:
                trainable["bank"] = init_bank(base, run.workspace.adapter, 1, jax.random.fold_in(key, 0))
            if self.objective.head == "reward":
                trainable["heads"] = scoring.init_heads(
                    1, run.workspace.model_config.hidden_size, jax.random.fold_in(key, 3)
                )
        users = trainable["users"]
        opt_state = {
            "policy": self.optimizer.init(policy) if (policy := _policy(trainable)) else {},
            "shared": self.shared.init(users.get("shared", {})),
            "table": self.lazy.init(users["table"]) if self.personal else {},
        }
        extra = {"shift": jnp.zeros(2)} if self.shifted else {}
        return State(jnp.zeros((), jnp.int32), jax.random.fold_in(key, 2), trainable, opt_state, extra)

    def _step(self, state: State, base: Any, frozen: Any, batch: Any) -> tuple[State, Metrics]:
        run, trainable, opt_state = self.run, dict(state.trainable), dict(state.opt_state)
        batch = {**batch, "generic": None}
        if self.personal and self.objective.alpha < 1:
            if self.objective.mixture == "exact":
                batch = both_copies(batch)
            else:
                key = jax.random.fold_in(state.rng, state.step)
                batch["user"] = losses.user_dropout(key, batch["user"], self.objective.alpha)
        users = dict(trainable["users"])
        small, indices = users, None
        if self.personal:
            small, batch["user"], indices = gather_rows(users, batch["user"])
        batch |= state.extra

        def loss(moving: Any) -> tuple[jax.Array, Metrics]:
            policies = {**frozen, **moving}
            return preference_loss(
                run.workspace.model, run.workspace.adapter, self.users, self.objective, policies, base, batch
            )

        gradient, metrics = jax.grad(loss, has_aux=True)({**trainable, "users": small})
        if policy := _policy(trainable):
            updates, opt_state["policy"] = self.optimizer.update(_policy(gradient), opt_state["policy"], policy)
            trainable |= optax.apply_updates(policy, updates)
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
        extra = {"shift": jnp.stack(metrics["rewards/shift"])} if self.shifted else {}
        return state.replace(step=state.step + 1, trainable=trainable, opt_state=opt_state, extra=extra), metrics

    def step(self, state: State, batch: Any) -> tuple[State, Metrics]:
        return self._update(state, self.run.workspace.base, self.frozen, self.run.devices.place(batch))


def _policy(trainable: Any) -> Any:
    """What one optimizer moves: everything but the users."""
    return {name: tree for name, tree in trainable.items() if name != "users"}


def run(run: Run) -> dict[str, Any]:
    """Trains every entry of `preference.models`; writes <workdir>/preference/<name>/model.safetensors with the
    users' names.
    """
    config = run.section(PreferenceSettings)
    made = functools.cache(functools.partial(Pairs, run, config))

    def train(method: Preference, stage: str, steps: int) -> Any:
        return run.train(method, stage, steps).trainable

    for name in config.models:
        settings, _ = config.entry(name)
        texts = settings.user_text
        pairs = made(user_text=texts, permuted_text=texts and settings.permuted)
        first, start = round(settings.warm_start * config.steps), None
        if first:
            method = Preference(run, name, pairs, kind="individualized", steps=first)
            start = train(method, f"preference/{name}/individualized", first)
            people = sorted(pairs.registry.rows.values())
            vectors = method.users, start["users"], settings.clusters, run.streams.key("preference/clusters")
            start = {**start, "users": fit_clusters(*vectors, user_rows=people)}
        method = Preference(run, name, pairs, steps=config.steps - first, start=start)
        trainable = train(method, f"preference/{name}", config.steps - first)
        note = {"users": pairs.registry.to_json(), "kind": method.users.kind, "base": run.workspace.base_hash}
        save_tree(run.workdir.stage(f"preference/{name}") / "model.safetensors", {**method.frozen, **trainable}, note)
    counts = {name: len(table) for name, table in pairs.tables.items()}
    return {"pairs": counts, "users": len(pairs.registry.rows)}


def load(run: Run, name: str) -> Any:
    """{"bank", "users"} of a trained entry, on the mesh."""
    tree, _ = load_tree(run.workdir.path / "preference" / name / "model.safetensors")
    return run.devices.shard({"users": {}, **tree})


STAGE = Stage("preference", run, PreferenceSettings)
