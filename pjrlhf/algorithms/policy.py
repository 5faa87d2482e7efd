"""K policies by PPO, or a critic-free relative, against rewards of one or several objectives, in one program
(Personalized Soups, arXiv 2310.11564; checklist of Huang et al. 2023).

Soups, MORL, Prompted-MORL, MOC and CLP are settings of it: what the policies are trained for (see `goals`), how their
objectives become one advantage (see `objectives.scalarization`), and what estimates it.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pjrlhf.algorithms import reward
from pjrlhf.algorithms.targets import Rows, Targets, TargetSettings
from pjrlhf.data.batching import batches
from pjrlhf.data.preferences import PreferencePrompt
from pjrlhf.errors import UserError
from pjrlhf.models.adapters import AdapterConfig, Policies, init_bank
from pjrlhf.models.decoder import Decoder
from pjrlhf.models.huggingface import save_params
from pjrlhf.models.peft import MANIFEST, save_peft
from pjrlhf.models.storage import load_tree, save_tree
from pjrlhf.objectives import policy_gradient as pg
from pjrlhf.objectives.scalarization import CombinationRule, make_rule, section
from pjrlhf.parallel.processes import on_process_zero, to_host
from pjrlhf.rollout import scoring
from pjrlhf.rollout.experience import (
    ExperienceConfig,
    experience,
    init_value_heads,
    reward_scores,
    sample,
    values_of,
)
from pjrlhf.runtime.run import Run, Sections, Stage, Trainer
from pjrlhf.settings import Settings, setting
from pjrlhf.training.loop import Method
from pjrlhf.training.metrics import Metrics
from pjrlhf.training.optimizer import OptimizerSettings, check_warmup, make_optimizer, per_ingredient
from pjrlhf.training.state import State
from pjrlhf.training.workdir import disk_errors, write_json

BANK = "bank.safetensors"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPOConfig(Settings):
    """Settings of the PPO update."""

    epochs: int = setting(2, "passes over a batch", low=1, high=1000)
    minibatches: int = setting(2, "parts of every pass", low=1, high=2**20)
    policies_at_once: int = setting(
        0, "policies whose gradients are taken together, 0: all; fewer take less memory and change no number", low=0
    )
    clip: float = setting(0.2, "range of the ratio around 1", above=0.0, high=1e6)
    value_clip: float = setting(0.2, "range of the values around the old ones", above=0.0, high=1e6)
    vf_coef: float = setting(0.1, "weight of the value loss", low=0.0, high=1e6)
    entropy_coef: float = setting(0.0, "weight of the entropy bonus", low=0.0, high=1e6)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KLSettings(Settings):
    """The coefficient of the KL penalty, fixed or adapted (Ziegler et al. 2019)."""

    coefficient: float = setting(0.1, "at the start", low=0.0, high=1e6)
    target: float = setting(0.0, "KL in nats per answer that the coefficient is adapted to; 0 keeps it fixed", low=0.0)
    horizon: int = setting(10000, "answers over which it adapts", low=1, high=10**9)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicySettings(Settings):
    """K policies trained by PPO or a critic-free relative."""

    preferences: TargetSettings = setting(TargetSettings())
    mix: str = setting(
        "own",
        "own: an adapter per policy; weights: an adapter per objective, mixed by the preference weights",
        choices=("own", "weights"),
    )
    prompt_format: PreferencePrompt = setting(PreferencePrompt())
    prompt_preference: str = setting(
        "",
        "as the setting of that name of the run, which holds where this is empty",
        choices=("", "never", "always", "half"),
    )
    scale: str = setting("std", "of rewards: std, or quantiles (0 to 1)", choices=("std", "quantiles"))
    combine: Mapping[str, Any] = setting(
        section(), "how objectives become one advantage: the kind of rule and the settings of all rules"
    )
    steps: int = setting(60, "rollouts, each followed by an update", low=1, high=10**9)
    rollouts: int = setting(16, "answers per policy and step", low=1, high=2**20)
    top_k: int = setting(0, "0: off; a policy cannot be trained on truncated samples", low=0)
    top_p: float = setting(1.0, "1: off; a policy cannot be trained on truncated samples", above=0.0, high=1.0)
    kl: KLSettings = setting(KLSettings())
    ppo: PPOConfig = setting(PPOConfig())
    experience: ExperienceConfig = setting(ExperienceConfig())
    optimizer: OptimizerSettings = setting(OptimizerSettings(learning_rate=3e-3, schedule="linear", b2=0.99, eps=1e-5))

    @property
    def rule(self) -> CombinationRule:
        """The combination rule that `combine` describes."""
        return make_rule({**section(), **self.combine})

    def check(self) -> None:
        try:
            _ = self.rule
        except ValueError as error:
            raise UserError(f"combine.{error}") from error
        check_warmup(self.optimizer, self.steps * self.ppo.epochs * self.ppo.minibatches)
        if self.rollouts % self.experience.samples_per_prompt:
            raise UserError(
                f"rollouts: {self.rollouts} is not a multiple of experience.samples_per_prompt="
                f"{self.experience.samples_per_prompt}; make it one"
            )
        if self.rollouts % self.ppo.minibatches:
            raise UserError(
                f"rollouts: {self.rollouts} cannot be split into ppo.minibatches={self.ppo.minibatches} equal parts"
            )
        if self.top_k or self.top_p < 1:
            raise UserError(
                f"{'top_k' if self.top_k else 'top_p'}: truncated sampling would train on other probabilities than it "
                "samples from; set top_k to 0 and top_p to 1"
            )


def ppo_loss(
    model: Decoder, adapter: AdapterConfig, config: PPOConfig, temperature: float, trainable: Any, base: Any, rows: Any
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Sum over the K policies of their PPO losses; `rows` as made by `rollout.experience`, leaves [K, n, ...].

    Each policy's loss is a mean over its own tokens, and no parameter belongs to two policies, so the gradient is
    that of K separate runs. Of several value heads the mean of the losses counts. Metrics are [K].
    """
    K, n, total = rows["tokens"].shape
    N = rows["mask"].shape[2]
    mix = rows["mix"].reshape(K * n, -1) if "mix" in rows else jnp.eye(K)
    policies = Policies(model, adapter, base, trainable["bank"], mix)
    tokens, valid = rows["tokens"].reshape(K * n, total), rows["valid"].reshape(K * n, total)
    states = scoring.response_states(policies, tokens, valid, total - N)
    logps, entropy = scoring.token_logps(policies, states, rows["response"].reshape(K * n, N), temperature)
    values = values_of(trainable["heads"], states)

    def per_policy(logps, entropy, values, rows):
        policy_loss, metrics = pg.ppo_policy_loss(logps, rows["logps"], rows["advantages"], rows["mask"], config.clip)
        per_head = jax.vmap(pg.value_loss, (-1, -1, -1, None, None))
        value_loss, value_clipped = per_head(values, rows["values"], rows["returns"], rows["mask"], config.value_clip)
        entropy = pg.masked_mean(entropy, rows["mask"])
        loss = policy_loss + config.vf_coef * value_loss.mean() - config.entropy_coef * entropy
        metrics |= {
            "loss/policy_avg": policy_loss,
            "loss/value_avg": value_loss.mean(),
            "val/clipfrac_avg": value_clipped.mean(),
            "policy/entropy_avg": entropy,
        }
        return loss, metrics

    shape = (K, n, N)
    losses, metrics = jax.vmap(per_policy)(logps.reshape(shape), entropy.reshape(shape), values, rows)
    return losses.sum(), metrics


def ppo_gradient(
    model: Decoder, adapter: AdapterConfig, config: PPOConfig, temperature: float, trainable: Any, base: Any, rows: Any
) -> tuple[Any, dict[str, jax.Array]]:
    """Gradient of `ppo_loss` and its metrics [K]; of `config.policies_at_once` policies at once, one group of policies
    after the other. Adapters mixed per row ("mix" in `rows`) belong to all policies, so these cannot be split.
    """

    def gradient(trainable, rows):
        return jax.grad(ppo_loss, argnums=4, has_aux=True)(model, adapter, config, temperature, trainable, base, rows)

    K = rows["tokens"].shape[0]
    together = config.policies_at_once or K
    if together == K:
        return gradient(trainable, rows)
    if K % together or "mix" in rows:
        raise ValueError(f"gradients of {K} policies cannot be taken of {together} at once")
    groups = jax.tree.map(lambda x: x.reshape(K // together, together, *x.shape[1:]), (trainable, rows))
    return jax.tree.map(lambda x: x.reshape(K, *x.shape[2:]), jax.lax.map(lambda x: gradient(*x), groups))


def ppo_update(
    model: Decoder,
    adapter: AdapterConfig,
    config: PPOConfig,
    tx: optax.GradientTransformation,
    temperature: float,
    trainable: Any,
    opt_state: Any,
    base: Any,
    rows: Any,
    key: jax.Array,
) -> tuple[Any, Any, dict[str, jax.Array]]:
    """`epochs` x `minibatches` PPO steps on one batch of experience; old log-probs and advantages stay fixed.

    Returns:
      trainable, opt_state, and metrics [K] averaged over the steps; `policy/first_approxkl` is that of the first
      step, 0 up to rounding because nothing has moved yet.
    """
    n = rows["tokens"].shape[1]
    if n % config.minibatches:
        raise ValueError(f"{n} rollouts per policy cannot be split into {config.minibatches} equal minibatches")

    def step(carry, index):
        trainable, opt_state = carry
        part = jax.tree.map(lambda x: x[:, index], rows)
        gradient, metrics = ppo_gradient(model, adapter, config, temperature, trainable, base, part)
        updates, opt_state = tx.update(gradient, opt_state, trainable)
        return (optax.apply_updates(trainable, updates), opt_state), metrics

    keys = jax.random.split(key, config.epochs)
    order = jax.vmap(lambda k: jax.random.permutation(k, n))(keys)
    order = order.reshape(config.epochs * config.minibatches, n // config.minibatches)
    (trainable, opt_state), metrics = jax.lax.scan(step, (trainable, opt_state), order)
    first = metrics["policy/approxkl_avg"][0]
    metrics = jax.tree.map(lambda x: x.mean(0), metrics)
    return trainable, opt_state, metrics | {"policy/first_approxkl": first}


class Policy(Method):
    """The method for `training.loop.run`: rollouts, scores and PPO updates of all K policies in one jitted step.

    Args:
      settings: a section like `config.policy`, which it is by default.
      rewarder: reward models as `reward.load` gives them, which it is by default.
    """

    show = ("objective/scores", "objective/kl")
    watch = ("loss/policy_avg", "loss/value_avg", "objective/kl")

    def __init__(self, run: Run, settings: PolicySettings | None = None, rewarder: Any = None):
        settings = settings or settings_of(run)
        self.run, self.settings = run, settings
        self.goals = Targets(run, settings)
        self.ppo, self.experience, self.combination = settings.ppo, settings.experience, settings.rule
        if self.experience.estimator != "gae":
            self.ppo = dataclasses.replace(self.ppo, vf_coef=0.0)
        self._check()
        self.sampling = run.text.sampling()
        if self.sampling.temperature <= 0:
            raise UserError("temperature: a policy cannot learn from greedy samples; set it above 0, for example to 1")
        updates = settings.steps * self.ppo.epochs * self.ppo.minibatches
        optimizer = make_optimizer(settings.optimizer, updates)
        # Adapters that one policy mixes are trained together.
        self.optimizer = optimizer if self.goals.mix == "weights" else per_ingredient(optimizer)
        prompts = settings.rollouts // self.experience.samples_per_prompt
        source = Rows(run, self.goals, settings.steps * prompts)
        self.batches = batches(source, prompts, seed=run.settings.seed, collate=self.collate)
        self.rewarder = rewarder or reward.load(run)
        self._update = run.devices.training_step(self._step)
        self.programs = (self._update,)
        self.ingredients = () if self.goals.sampled else self.goals.policies  # a policy alone needs no name

    def _check(self) -> None:
        """Raises UserError for settings that do not go together."""
        settings, combine = self.settings, self.combination
        together, policies = self.ppo.policies_at_once, len(self.goals.policies)
        if together and (policies % together or self.goals.mix == "weights"):
            raise UserError(
                f"policy.ppo.policies_at_once={together}: must divide the {policies} policies, which must not share "
                "adapters (policy.mix=own); set it to 1, or to 0 for all"
            )
        if combine.needs_calibrated_rewards and settings.scale != "quantiles":
            raise UserError(
                "policy.combine: the rule compares rewards with preference weights, so they must be on one scale; set "
                "policy.scale to quantiles"
            )
        if combine.needs_preference_groups and self.goals.kind not in ("grid", "fixed"):
            raise UserError("policy.combine: the rule needs a fixed set of preferences; set preferences.kind to grid")

    def collate(self, rows: Sequence[Any]) -> Any:
        """m rows of `Rows`, each for s samples, n = m s -> {"prompt", "valid" [n, K, P], "reward_prompt",
        "reward_valid" [n, K, Q], "weights" [n, K, S], "objectives" [n, K, S], "group" [n, K]}.
        """
        run, K = self.run, len(self.goals.policies)
        rows = [row for row in rows for _ in range(self.experience.samples_per_prompt)]
        prompts = [ids for row in rows for ids in row["prompts"]]
        plain = [row["reward_prompt"] for row in rows for _ in range(K)]
        longest = max(map(len, prompts + plain))
        if longest > run.text.lengths.prompt:
            raise UserError(f"prompts: one has {longest} tokens, more than data.max_prompt; raise it")
        prompt, valid = run.text.pad_prompts(prompts)
        reward_prompt, reward_valid = run.text.pad_prompts(plain)
        arrays = {"prompt": prompt, "valid": valid, "reward_prompt": reward_prompt, "reward_valid": reward_valid}
        goals = [goal for row in rows for goal in row["goals"]]
        arrays["weights"] = np.array([goal.weights for goal in goals], np.float32)
        arrays["objectives"] = np.array([goal.objectives for goal in goals], np.int32)
        arrays["group"] = np.array([goal.group for goal in goals], np.int32)
        return {name: x.reshape(len(rows), K, *x.shape[1:]) for name, x in arrays.items()}

    def init(self) -> State:
        return self.run.devices.create(self._initial, self.run.workspace.base)

    def _initial(self, base: Any) -> State:
        run, goals = self.run, self.goals
        heads = len(self.combination.names(goals.scored))
        trainable = {
            "bank": init_bank(base, run.workspace.adapter, len(goals.adapters), run.streams.key("policy/adapter")),
            "heads": init_value_heads(len(goals.policies), heads, run.workspace.model_config.hidden_size),
        }
        beta = jnp.full((len(goals.policies),), self.settings.kl.coefficient)
        return State.create(run.streams.key("policy/state"), trainable, self.optimizer, beta=beta)

    def _step(self, state: State, base: Any, rewarder: Any, batch: Any) -> tuple[State, Metrics]:
        kl, model, adapter = self.settings.kl, self.run.workspace.model, self.run.workspace.adapter
        sampling, goals = self.sampling, self.goals
        mix = batch["weights"] if goals.mix == "weights" else jnp.eye(len(goals.policies))
        draw, shuffle = jax.random.split(jax.random.fold_in(state.rng, state.step))
        prompt = {"prompt": batch["prompt"], "valid": batch["valid"]}
        plain = {"prompt": batch["reward_prompt"], "valid": batch["reward_valid"]}
        response = sample(model, adapter, sampling, base, state.trainable["bank"], mix, prompt, draw)
        objectives = batch["objectives"] if goals.objectives is None else jnp.asarray(goals.objectives)
        scores = reward_scores(model, adapter, base, rewarder, objectives, plain, response, self.settings.scale)
        beta = state.extra["beta"]
        rows, statistics = experience(
            model,
            adapter,
            self.experience,
            sampling,
            base,
            state.trainable,
            prompt,
            response,
            scores,
            beta,
            {"weights": batch["weights"], "group": batch["group"], "mix": mix},
            self.combination,
        )
        rows, statistics = jax.lax.stop_gradient((rows, statistics))
        trainable, opt_state, metrics = ppo_update(
            model,
            adapter,
            self.ppo,
            self.optimizer,
            sampling.temperature,
            state.trainable,
            state.opt_state,
            base,
            rows,
            shuffle,
        )
        if kl.target:
            count = rows["mask"].shape[1]
            beta = pg.adapt_kl_coefficient(beta, statistics["objective/kl"], kl.target, count, kl.horizon)
        heads = statistics.pop("heads")
        if heads.shape[1] > 1:
            names = self.combination.names(goals.scored)
            statistics |= {f"objective/weights/{name}": heads[:, h] for h, name in enumerate(names)}
        else:
            del statistics["objective/gradient_cosine"]
        metrics = {name: (x, jnp.ones_like(x)) for name, x in {**statistics, **metrics}.items()}
        metrics |= self._by_objective(scores, batch["objectives"])
        # The x axis that methods share: answers sampled so far, of all policies.
        metrics["samples"] = ((state.step + 1.0) * rows["mask"].shape[0] * rows["mask"].shape[1], jnp.ones(()))
        state = state.replace(step=state.step + 1, trainable=trainable, opt_state=opt_state, extra={"beta": beta})
        return state, metrics

    def _by_objective(self, scores: jax.Array, objectives: jax.Array) -> Metrics:
        """Mean and standard deviation of every reward, and how the rewards of an answer go together, [K] each, of
        `scores` and `objectives` [K n, S]; nothing where there is one objective per policy.
        """
        K, S = len(self.goals.policies), scores.shape[1]
        if S == 1:
            return {}
        scores, objectives = scores.reshape(K, -1), objectives.reshape(K, -1)
        metrics = {}
        for i, name in enumerate(self.run.audience.rewards):
            own = (objectives == i).astype(jnp.float32)
            count = own.sum(1)
            mean = (scores * own).sum(1) / jnp.maximum(count, 1)
            spread = jnp.sqrt((jnp.square(scores - mean[:, None]) * own).sum(1) / jnp.maximum(count, 1))
            seen = (count > 0).astype(jnp.float32)
            metrics |= {f"rewards/{name}/mean": (mean * seen, seen), f"rewards/{name}/std": (spread * seen, seen)}
        if self.goals.objectives is not None:
            centred = scores.reshape(K, -1, S)
            centred = centred - centred.mean(1, keepdims=True)
            unit = centred / jnp.maximum(jnp.linalg.norm(centred, axis=1, keepdims=True), 1e-6)
            correlation = jnp.einsum("kns,knt->kst", unit, unit)
            apart = (correlation.sum((1, 2)) - jnp.trace(correlation, axis1=1, axis2=2)) / (S * (S - 1))
            metrics["rewards/correlation"] = (apart, jnp.ones(K))
        return metrics

    def step(self, state: State, batch: Any) -> tuple[State, Metrics]:
        # Rows of one policy stand one after another: [n, K, P] -> [K n, P].
        rows = {name: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]) for name, x in batch.items()}
        return self._update(state, self.run.workspace.base, self.rewarder, self.run.devices.place(rows))


def settings_of(run: Sections) -> PolicySettings:
    """The section of the stage; its prompts state preferences as the run says, where it does not say so itself."""
    settings = run.section(PolicySettings)
    return dataclasses.replace(settings, prompt_preference=settings.prompt_preference or run.settings.prompt_preference)


def run(run: Run) -> dict[str, Any]:
    """Trains the policies; writes <workdir>/policy/bank.safetensors and one folder per adapter (PEFT, or a full
    model).
    """
    return train(run, settings_of(run), "policy")


def train(run: Run, settings: Any, stage: str) -> dict[str, Any]:
    """The same by the section `settings`, into <workdir>/<stage>."""
    method = Policy(run, settings)
    state = run.train(method, stage, settings.steps)
    with disk_errors(run.workdir.path / stage):
        base_hash = save(run, stage, method.goals.adapters, state.trainable["bank"])
    return {
        "ingredients": list(method.goals.adapters),
        "rollouts_per_policy": settings.steps * settings.rollouts,
        "samples": settings.steps * settings.rollouts * len(method.goals.policies),
        "base": base_hash,
    }


def save(run: Run, stage: str, names: Sequence[str], bank: Any) -> str:
    """Writes the bank, and each adapter as a folder of its own; returns the fingerprint of the base."""
    folder = run.workdir.stage(stage)
    bank = to_host(bank)
    save_tree(
        folder / BANK,
        bank,
        {"adapters": list(names), "base": run.workspace.base_hash, "alpha": run.workspace.adapter.alpha},
    )
    _save_ingredients(run, folder, names, bank)
    return run.workspace.base_hash


@on_process_zero
def _save_ingredients(run: Run, folder: pathlib.Path, names: Sequence[str], bank: Any) -> None:
    for k, name in enumerate(names):
        one = jax.tree.map(lambda x, k=k: x[k], bank)
        target = folder / "ingredients" / name
        if run.workspace.adapter.rank:
            adapter, head_dim = run.workspace.adapter, run.workspace.model_config.head_dim
            save_peft(
                target,
                one,
                adapter.rank,
                adapter.alpha,
                str(run.workspace.base_folder),
                run.workspace.model_type,
                head_dim,
            )
            # By this the merge refuses an adapter that was trained on another base. One trained on a quantised base
            # is merged into the floats that stand in the folder.
            base = {"folder": str(run.workspace.base_folder), "hash": run.workspace.folder_hash}
            write_json(target / MANIFEST, {"base": base, "quantize": run.settings.model.quantize})
        else:
            save_params(
                target,
                run.workspace.model_config,
                one,
                model_type=run.workspace.model_type,
                tokenizer_folder=run.workspace.base_folder,
                token_ids=run.workspace.token_ids,
            )


def load_bank(run: Run, stage: str = "policy", names: Sequence[str] | None = None) -> Any:
    """The adapter bank of a stage of this run, on the mesh; its adapters must be `names`, by default all rewards."""
    names = list(run.audience.rewards if names is None else names)
    bank, note = load_tree(run.workdir.path / stage / BANK)
    if note.get("adapters") != names:
        raise UserError(f"{stage}: the bank holds {note.get('adapters')}, this run needs {names}")
    return run.devices.shard(bank)


TRAINER = Trainer(settings_of, train)
STAGE = Stage("policy", run, PolicySettings)
