"""K policies by PPO, or a critic-free relative, against rewards of one or several objectives, in one program
(Personalized Soups, arXiv 2310.11564; checklist of Huang et al. 2023).

Soups, MORL, Prompted-MORL, MOC and CLP are settings of it: what the policies are trained for (see `goals`), how their
objectives become one advantage (see `objectives.scalarization`), and what estimates it.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pjrlhf.algorithms import reward
from pjrlhf.algorithms.targets import Rows, Targets
from pjrlhf.data.batching import batches
from pjrlhf.errors import UserError
from pjrlhf.models.adapters import AdapterConfig, Policies, init_bank
from pjrlhf.models.decoder import Decoder
from pjrlhf.models.huggingface import save_params
from pjrlhf.models.peft import MANIFEST, save_peft
from pjrlhf.models.storage import load_tree, save_tree
from pjrlhf.objectives import policy_gradient as pg
from pjrlhf.objectives.scalarization import make_rule
from pjrlhf.parallel.mesh import shard_params
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
from pjrlhf.runtime.context import Run
from pjrlhf.training.metrics import Metrics
from pjrlhf.training.optimizer import make_optimizer, per_ingredient
from pjrlhf.training.state import State
from pjrlhf.training.workdir import disk_errors, write_json

BANK = "bank.safetensors"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPOConfig:
    """Settings of the PPO update; `epochs` passes over the batch, each in `minibatches` parts. `policies_at_once`, 0
    for all, have their gradients taken together: fewer change no gradient, but the memory of the step.
    """

    epochs: int = 2
    minibatches: int = 2
    policies_at_once: int = 0
    clip: float = 0.2
    value_clip: float = 0.2
    vf_coef: float = 0.1
    entropy_coef: float = 0.0


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


class Policy:
    """The method for `training.loop.run`: rollouts, scores and PPO updates of all K policies in one jitted step.

    Args:
      settings: a section like `config.policy`, which it is by default.
      rewarder: reward models as `reward.load` gives them, which it is by default.
    """

    def __init__(self, run: Run, settings: Any = None, rewarder: Any = None):
        settings = settings or settings_of(run)
        self.run, self.settings = run, settings
        self.goals = Targets(run, settings)
        self.ppo = PPOConfig(**settings.ppo)
        self.experience = ExperienceConfig(**settings.experience)
        if self.experience.estimator != "gae":
            self.ppo = dataclasses.replace(self.ppo, vf_coef=0.0)
        try:
            self.combination = make_rule(settings.combine.to_dict())
        except ValueError as error:
            raise UserError(f"policy.combine: {error}") from error
        self._check()
        self.sampling = run.sampling(top_k=settings.top_k, top_p=float(settings.top_p))
        if self.sampling.truncated:
            raise UserError(
                f"policy.top_k={settings.top_k}, policy.top_p={settings.top_p}: truncated sampling would train on "
                "other probabilities than it samples from; set them to 0 and 1"
            )
        if self.sampling.temperature <= 0:
            raise UserError("temperature: a policy cannot learn from greedy samples; set it above 0, for example to 1")
        updates = settings.steps * self.ppo.epochs * self.ppo.minibatches
        optimizer = make_optimizer(settings.optimizer.to_dict(), updates)
        # Adapters that one policy mixes are trained together.
        self.optimizer = optimizer if self.goals.mix == "weights" else per_ingredient(optimizer)
        prompts = settings.rollouts // self.experience.samples_per_prompt
        source = Rows(run, self.goals, settings.steps * prompts)
        self.batches = batches(source, prompts, seed=run.config.seed, collate=self.collate)
        self.rewarder = rewarder or reward.load(run)
        self._update = run.training_step(self._step)

    def _check(self) -> None:
        """Raises UserError for settings that do not go together."""
        settings, combine = self.settings, self.combination
        if settings.rollouts % self.experience.samples_per_prompt:
            raise UserError(
                f"policy.rollouts={settings.rollouts}: not a multiple of samples_per_prompt="
                f"{self.experience.samples_per_prompt}; make it one"
            )
        together, policies = self.ppo.policies_at_once, len(self.goals.policies)
        if together and (together < 0 or policies % together or self.goals.mix == "weights"):
            raise UserError(
                f"policy.ppo.policies_at_once={together}: must divide the {policies} policies, which must not share "
                "adapters (policy.mix=own); set it to 1, or to 0 for all"
            )
        if settings.scale not in ("std", "quantiles"):
            raise UserError(f"policy.scale {settings.scale!r}: unknown; choose std or quantiles")
        if combine.needs_calibrated_rewards and settings.scale != "quantiles":
            raise UserError(
                "policy.combine: the rule compares rewards with preference weights, so they must be on one scale; set "
                "policy.scale to quantiles"
            )
        if combine.needs_preference_groups and self.goals.kind not in ("grid", "fixed"):
            raise UserError("policy.combine: the rule needs a fixed set of preferences; set preferences.kind to grid")

    @property
    def ingredients(self) -> tuple[str, ...]:
        """Names for [K] metrics; a policy alone needs none."""
        return () if self.goals.sampled else self.goals.policies

    def collate(self, rows: Sequence[Any]) -> Any:
        """m rows of `Rows`, each for s samples, n = m s -> {"prompt", "valid" [n, K, P], "reward_prompt",
        "reward_valid" [n, K, Q], "weights" [n, K, S], "objectives" [n, K, S], "group" [n, K]}.
        """
        run, K = self.run, len(self.goals.policies)
        rows = [row for row in rows for _ in range(self.experience.samples_per_prompt)]
        prompts = [ids for row in rows for ids in row["prompts"]]
        plain = [row["reward_prompt"] for row in rows for _ in range(K)]
        longest = max(map(len, prompts + plain))
        if longest > run.lengths.prompt:
            raise UserError(f"prompts: one has {longest} tokens, more than data.max_prompt; raise it")
        prompt, valid = run.pad_prompts(prompts)
        reward_prompt, reward_valid = run.pad_prompts(plain)
        arrays = {"prompt": prompt, "valid": valid, "reward_prompt": reward_prompt, "reward_valid": reward_valid}
        goals = [goal for row in rows for goal in row["goals"]]
        arrays["weights"] = np.array([goal.weights for goal in goals], np.float32)
        arrays["objectives"] = np.array([goal.objectives for goal in goals], np.int32)
        arrays["group"] = np.array([goal.group for goal in goals], np.int32)
        return {name: x.reshape(len(rows), K, *x.shape[1:]) for name, x in arrays.items()}

    def init(self) -> State:
        return self.run.create(self._initial, self.run.base)

    def _initial(self, base: Any) -> State:
        run, goals = self.run, self.goals
        heads = len(self.combination.names(goals.scored))
        trainable = {
            "bank": init_bank(base, run.adapter, len(goals.adapters), jax.random.fold_in(run.key, 30)),
            "heads": init_value_heads(len(goals.policies), heads, run.model_config.hidden_size),
        }
        beta = jnp.full((len(goals.policies),), float(self.settings.kl.coefficient))
        return State.create(jax.random.fold_in(run.key, 31), trainable, self.optimizer, beta=beta)

    def _step(self, state: State, base: Any, rewarder: Any, batch: Any) -> tuple[State, Metrics]:
        kl, model, adapter = self.settings.kl, self.run.model, self.run.adapter
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
        for i, name in enumerate(self.run.rewards):
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
        return self._update(state, self.run.base, self.rewarder, self.run.place(rows))


def settings_of(run: Run) -> Any:
    """The section of the stage, told in prompts as the run says."""
    settings = run.config.policy.copy_and_resolve_references()
    with settings.unlocked():
        settings.prompt_preference = run.config.prompt_preference
    return settings


def run(run: Run) -> dict[str, Any]:
    """Trains the policies; writes <workdir>/policy/bank.safetensors and one folder per adapter (PEFT, or a full
    model).
    """
    return train(run, settings_of(run), "policy")


def train(run: Run, settings: Any, stage: str) -> dict[str, Any]:
    """The same by the section `settings`, into <workdir>/<stage>."""
    method = Policy(run, settings)
    state = run.train(
        method,
        stage,
        settings.steps,
        ingredients=method.ingredients,
        show=("objective/scores", "objective/kl"),
        watch=("loss/policy_avg", "loss/value_avg", "objective/kl"),
    )
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
    save_tree(folder / BANK, bank, {"adapters": list(names), "base": run.base_hash, "alpha": run.adapter.alpha})
    _save_ingredients(run, folder, names, bank)
    return run.base_hash


@on_process_zero
def _save_ingredients(run: Run, folder: pathlib.Path, names: Sequence[str], bank: Any) -> None:
    for k, name in enumerate(names):
        one = jax.tree.map(lambda x, k=k: x[k], bank)
        target = folder / "ingredients" / name
        if run.adapter.rank:
            adapter, head_dim = run.adapter, run.model_config.head_dim
            save_peft(target, one, adapter.rank, adapter.alpha, str(run.base_folder), run.model_type, head_dim)
            # By this the merge refuses an adapter that was trained on another base. One trained on a quantised base
            # is merged into the floats that stand in the folder.
            base = {"folder": str(run.base_folder), "hash": run.folder_hash}
            write_json(target / MANIFEST, {"base": base, "quantize": run.config.model.quantize})
        else:
            save_params(
                target,
                run.model_config,
                one,
                model_type=run.model_type,
                tokenizer_folder=run.base_folder,
                token_ids=run.token_ids,
            )


def load_bank(run: Run, stage: str = "policy", names: Sequence[str] | None = None) -> Any:
    """The adapter bank of a stage of this run, on the mesh; its adapters must be `names`, by default `run.rewards`."""
    names = list(run.rewards if names is None else names)
    bank, note = load_tree(run.workdir.path / stage / BANK)
    if note.get("adapters") != names:
        raise UserError(f"{stage}: the bank holds {note.get('adapters')}, this run needs {names}")
    return shard_params(run.mesh, bank)
