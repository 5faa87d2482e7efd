"""K policies by PPO against K rewards in one program (Personalized Soups, arXiv 2310.11564; checklist of Huang et
al. 2023).
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from pjrlhf.data.batching import batches
from pjrlhf.errors import UserError
from pjrlhf.models.adapters import AdapterConfig, Policies, init_bank
from pjrlhf.models.decoder import Decoder
from pjrlhf.models.huggingface import fingerprint, save_params
from pjrlhf.models.peft import save_peft
from pjrlhf.models.storage import load_tree, save_tree
from pjrlhf.objectives import policy_gradient as pg
from pjrlhf.parallel.mesh import shard_batch, shard_params
from pjrlhf.rollout import scoring
from pjrlhf.rollout.experience import ExperienceConfig, experience, reward_scores, sample
from pjrlhf.stages import reward
from pjrlhf.stages.context import Run
from pjrlhf.stages.merge import MANIFEST
from pjrlhf.training import loop
from pjrlhf.training.metrics import Metrics
from pjrlhf.training.optimizer import make_optimizer, per_ingredient
from pjrlhf.training.state import State
from pjrlhf.training.workdir import disk_errors, write_json

BANK = "bank.safetensors"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPOConfig:
    """Settings of the PPO update; `epochs` passes over the batch, each in `minibatches` parts."""

    epochs: int = 2
    minibatches: int = 2
    clip: float = 0.2
    value_clip: float = 0.2
    value_weight: float = 0.1
    entropy_weight: float = 0.0


def ppo_loss(
    model: Decoder, adapter: AdapterConfig, config: PPOConfig, temperature: float, trainable: Any, base: Any, rows: Any
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Sum over the K policies of their PPO losses; `rows` as made by `rollout.experience`, leaves [K, n, ...].

    Each policy's loss is a mean over its own tokens, and no parameter belongs to two policies, so the gradient is
    that of K separate runs. Metrics are [K].
    """
    K, n, total = rows["tokens"].shape
    N = rows["mask"].shape[2]
    mix = jnp.eye(K)
    policies = Policies(model, adapter, base, trainable["bank"], mix)
    tokens, valid = rows["tokens"].reshape(K * n, total), rows["valid"].reshape(K * n, total)
    states = scoring.response_states(policies, tokens, valid, total - N)
    logps, entropy = scoring.token_logps(policies, states, rows["response"].reshape(K * n, N), temperature)
    values = scoring.apply_heads(trainable["heads"], states, mix)

    def per_policy(logps, entropy, values, rows):
        policy_loss, metrics = pg.ppo_policy_loss(logps, rows["logps"], rows["advantages"], rows["mask"], config.clip)
        value_loss, value_clipped = pg.value_loss(
            values, rows["values"], rows["returns"], rows["mask"], config.value_clip
        )
        entropy = pg.masked_mean(entropy, rows["mask"])
        loss = policy_loss + config.value_weight * value_loss - config.entropy_weight * entropy
        metrics |= {
            "loss/policy_avg": policy_loss,
            "loss/value_avg": value_loss,
            "val/clipfrac_avg": value_clipped,
            "policy/entropy_avg": entropy,
        }
        return loss, metrics

    shape = (K, n, N)
    losses, metrics = jax.vmap(per_policy)(logps.reshape(shape), entropy.reshape(shape), values.reshape(shape), rows)
    return losses.sum(), metrics


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
        grad = jax.grad(ppo_loss, argnums=4, has_aux=True)
        gradient, metrics = grad(model, adapter, config, temperature, trainable, base, part)
        updates, opt_state = tx.update(gradient, opt_state, trainable)
        return (optax.apply_updates(trainable, updates), opt_state), metrics

    keys = jax.random.split(key, config.epochs)
    order = jax.vmap(lambda k: jax.random.permutation(k, n))(keys)
    order = order.reshape(config.epochs * config.minibatches, n // config.minibatches)
    (trainable, opt_state), metrics = jax.lax.scan(step, (trainable, opt_state), order)
    first = metrics["policy/approxkl_avg"][0]
    metrics = jax.tree.map(lambda x: x.mean(0), metrics)
    return trainable, opt_state, metrics | {"policy/first_approxkl": first}


class Prompts(Sequence):
    """Row i is one request as every policy reads it: {"prompts": K lists of ids, "reward_prompt": ids of the plain
    request}.

    `stated` says whether policy k's own preference sentence follows the request: "never", "always", or "half"
    (each request comes once with and once without it). The reward models always read the plain request.
    """

    def __init__(self, run: Run, stated: str):
        if stated not in ("never", "always", "half"):
            raise UserError(f"prompt_preference {stated!r}: unknown; choose never, always or half")
        self.run = run
        self.requests = run.requests[0]
        self.forms = (False, True) if stated == "half" else (stated == "always",)
        self._ids = functools.cache(lambda request, names: run.tokenizer.encode_prompt(run.ask(request, names)))

    def __len__(self) -> int:
        return len(self.requests) * len(self.forms)

    def __getitem__(self, i: int) -> dict[str, Any]:
        request = self.requests[i // len(self.forms)]
        own = [
            (name,) if self.forms[i % len(self.forms)] and name in self.run.registry else ()
            for name in self.run.rewards
        ]
        return {"prompts": [self._ids(request, names) for names in own], "reward_prompt": self._ids(request, ())}


class Policy:
    """The method for `training.loop.run`: rollouts, scores and PPO updates of all K policies in one jitted step."""

    def __init__(self, run: Run):
        self.run, config = run, run.config.policy
        self.ppo = PPOConfig(**config.ppo)
        self.experience = ExperienceConfig(**config.experience)
        self.sampling = run.sampling(top_k=config.top_k, top_p=float(config.top_p))
        if self.sampling.truncated:
            raise UserError(
                f"policy.top_k={config.top_k}, policy.top_p={config.top_p}: truncated sampling would train on other "
                "probabilities than it samples from; set them to 0 and 1"
            )
        if self.sampling.temperature <= 0:
            raise UserError("temperature: a policy cannot learn from greedy samples; set it above 0, for example to 1")
        updates = config.steps * self.ppo.epochs * self.ppo.minibatches
        self.optimizer = per_ingredient(make_optimizer(config.optimizer.to_dict(), updates))
        source = Prompts(run, run.config.prompt_preference)
        self.batches = batches(source, config.rollouts, seed=run.config.seed, collate=self.collate)
        self.rewarder = reward.load(run)
        self._update = jax.jit(self._step, donate_argnums=0)

    def collate(self, rows: Sequence[Any]) -> Any:
        """n rows of `Prompts` -> {"prompt", "valid" [n, K, P], "reward_prompt", "reward_valid" [n, K, Q]}."""
        run, K = self.run, len(self.run.rewards)
        prompts = [ids for row in rows for ids in row["prompts"]]
        plain = [row["reward_prompt"] for row in rows for _ in range(K)]
        longest = max(map(len, prompts + plain))
        if longest > run.lengths.prompt:
            raise UserError(f"prompts: one has {longest} tokens, more than data.max_prompt; raise it")
        prompt, valid = run.pad_prompts(prompts)
        reward_prompt, reward_valid = run.pad_prompts(plain)
        arrays = {"prompt": prompt, "valid": valid, "reward_prompt": reward_prompt, "reward_valid": reward_valid}
        return {name: x.reshape(len(rows), K, -1) for name, x in arrays.items()}

    def init(self) -> State:
        run, K = self.run, len(self.run.rewards)
        trainable = {
            "bank": init_bank(run.base, run.adapter, K, jax.random.fold_in(run.key, 30)),
            "heads": scoring.init_heads(K, run.model_config.hidden_size),
        }
        beta = jnp.full((K,), float(run.config.policy.kl.coefficient))
        state = State.create(jax.random.fold_in(run.key, 31), trainable, self.optimizer, beta=beta)
        return shard_params(run.mesh, state)

    def _step(self, state: State, base: Any, rewarder: Any, batch: Any) -> tuple[State, Metrics]:
        kl, model, adapter = self.run.config.policy.kl, self.run.model, self.run.adapter
        sampling, mix = self.sampling, jnp.eye(len(self.run.rewards))
        draw, shuffle = jax.random.split(jax.random.fold_in(state.rng, state.step))
        prompt = {"prompt": batch["prompt"], "valid": batch["valid"]}
        plain = {"prompt": batch["reward_prompt"], "valid": batch["reward_valid"]}
        response = sample(model, adapter, sampling, base, state.trainable["bank"], mix, prompt, draw)
        scores = reward_scores(model, adapter, base, rewarder, mix, plain, response)
        beta = state.extra["beta"]
        rows, statistics = experience(
            model, adapter, self.experience, sampling, base, state.trainable, prompt, response, scores, beta
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
        metrics = {name: (x, jnp.ones_like(x)) for name, x in {**statistics, **metrics}.items()}
        # The x axis that methods share: answers sampled so far, of all policies.
        metrics["samples"] = ((state.step + 1.0) * rows["mask"].shape[0] * rows["mask"].shape[1], jnp.ones(()))
        state = state.replace(step=state.step + 1, trainable=trainable, opt_state=opt_state, extra={"beta": beta})
        return state, metrics

    def step(self, state: State, batch: Any) -> tuple[State, Metrics]:
        # Rows of one policy stand one after another: [n, K, P] -> [K n, P].
        rows = {name: x.swapaxes(0, 1).reshape(-1, x.shape[2]) for name, x in batch.items()}
        return self._update(state, self.run.base, self.rewarder, shard_batch(self.run.mesh, rows))


def run(run: Run) -> dict[str, Any]:
    """Trains the policies; writes <workdir>/policy/bank.safetensors and one folder per ingredient (PEFT, or a full
    model).
    """
    config = run.config.policy
    state = loop.run(
        Policy(run),
        run.workdir,
        "policy",
        steps=config.steps,
        checkpoint_every=run.config.checkpoint_every,
        log_every=run.config.log_every,
        ingredients=run.rewards,
        show=("objective/scores", "objective/kl"),
        watch=("loss/policy_avg", "loss/value_avg", "objective/kl"),
    )
    with disk_errors(run.workdir.path / "policy"):
        base_hash = save(run, state.trainable["bank"])
    return {"ingredients": list(run.rewards), "rollouts_per_policy": config.steps * config.rollouts, "base": base_hash}


def save(run: Run, bank: Any) -> str:
    """Writes the bank, and each policy as a folder of its own; returns the fingerprint of the base."""
    folder = run.workdir.stage("policy")
    bank = jax.device_get(bank)
    base_hash = fingerprint(run.base_folder)
    note = {"rewards": list(run.rewards), "base": base_hash, "alpha": run.adapter.alpha}
    save_tree(folder / BANK, bank, note)
    for k, name in enumerate(run.rewards):
        one = jax.tree.map(lambda x, k=k: x[k], bank)
        target = folder / "ingredients" / name
        if run.adapter.rank:
            save_peft(target, one, run.adapter.rank, run.adapter.alpha, str(run.base_folder))
            # By this the merge refuses an adapter that was trained on another base.
            write_json(target / MANIFEST, {"base": {"folder": str(run.base_folder), "hash": base_hash}})
        else:
            save_params(target, run.model_config, one, tokenizer_folder=run.base_folder, token_ids=run.token_ids)
    return base_hash


def load_bank(run: Run) -> Any:
    """The adapter bank of this run, one policy per name in `run.rewards`, on the mesh."""
    bank, note = load_tree(run.workdir.path / "policy" / BANK)
    if note.get("rewards") != list(run.rewards):
        raise UserError(f"policy: the bank holds {note.get('rewards')}, this run needs {list(run.rewards)}")
    return shard_params(run.mesh, bank)
