"""Experience of K policies: what is zero at the start, where penalties go, and that policies do not mix."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.small_policies import ADAPTERS, EOS, KINDS, MODEL, PAD, bank, base, close, fresh_bank, prompts, value_heads

from pjrlhf.errors import UserError
from pjrlhf.objectives import policy_gradient as pg
from pjrlhf.objectives.multi_objective import standardize, weighted_sum
from pjrlhf.objectives.scalarization import GDPO, RULES, WeightedSum
from pjrlhf.rollout.experience import ExperienceConfig, experience, sample
from pjrlhf.rollout.sampler import Sampling

K, n, P, N = 3, 4, 5, 6
SAMPLING = Sampling(max_new_tokens=N, eos_id=EOS, pad_id=PAD, temperature=0.9)
BETA = np.array([0.1, 0.5, 2.0], np.float32)
SCORES = np.random.default_rng(0).normal(0, 4, (K * n, 1)).astype(np.float32)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _collect(kind, config, numbers, ids, *arguments):
    # One compiled program for many settings: these numbers are traced.
    config = dataclasses.replace(config, **numbers)
    sampling = dataclasses.replace(SAMPLING, eos_id=ids[0], pad_id=ids[1])
    return experience(MODEL, ADAPTERS[kind], config, sampling, *arguments)


def collect(kind, config, *arguments, ids=(EOS, PAD)):
    """(rows, statistics) as numpy arrays; arguments from `trainable` on."""
    numbers = {name: getattr(config, name) for name in ("lam", "missing_eos_penalty")}
    config = dataclasses.replace(config, lam=0.0, missing_eos_penalty=0.0)
    return jax.device_get(_collect(kind, config, numbers, ids, base(), *arguments))


draw = jax.jit(sample, static_argnums=(0, 1, 2))


@functools.cache
def sampled(kind):
    """Prompts and responses of K noisy policies; some responses are made to end early."""
    prompt = prompts(K * n, P)
    one_hot = jnp.eye(K)
    out = jax.device_get(
        draw(MODEL, ADAPTERS[kind], SAMPLING, base(), bank(kind, K), one_hot, prompt, jax.random.key(3))
    )
    lengths = np.arange(K * n) % (N + 1)
    lengths[lengths == 0] = N
    tokens = np.where(np.arange(N) == lengths[:, None] - 1, EOS, np.where(out["tokens"] < 2, 5, out["tokens"]))
    tokens[lengths == N, -1] = 7  # cut off
    valid = np.arange(N) < lengths[:, None]
    return prompt, {"tokens": np.where(valid, tokens, PAD), "valid": valid}


def run(kind, policies, config=None, scores=SCORES):
    trainable = {"bank": policies, "heads": value_heads(K)}
    return collect(kind, config or ExperienceConfig(), trainable, *sampled(kind), scores, BETA)


WHITE = ExperienceConfig(whiten_rewards=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_policy_has_no_kl(kind):
    rows, statistics = run(kind, fresh_bank(kind, K), WHITE)
    # The low-rank product with b = 0 adds exact zeros; full parameters are multiplied in groups, so they may round.
    tolerance = 0 if kind == "lora" else 1e-5
    np.testing.assert_allclose(statistics["objective/kl"], 0.0, atol=tolerance)
    assert (np.abs(run(kind, bank(kind, K), WHITE)[1]["objective/kl"]) > 1e-2).all()
    assert rows["logps"].min() < -1


@pytest.mark.parametrize("kind", ADAPTERS)
def test_policies_in_one_batch_do_not_mix(kind):
    """Rows and statistics, with whitening, equal those of K separate batches."""
    rows, statistics = run(kind, bank(kind, K), WHITE)
    for k in range(K):
        alone = jax.tree.map(lambda x, k=k: x[k : k + 1], {"bank": bank(kind, K), "heads": value_heads(K)})
        prompt, response = jax.tree.map(lambda x, k=k: x[k * n : (k + 1) * n], sampled(kind))
        got = collect(kind, WHITE, alone, prompt, response, SCORES[k * n : (k + 1) * n], BETA[k : k + 1])
        want = jax.tree.map(lambda x, k=k: x[k : k + 1], (rows, statistics))
        close(got, want, 2e-5)


@functools.cache
def plain():
    return run("lora", bank("lora", K))


def test_rows_hold_what_was_sampled():
    prompt, response = sampled("lora")
    rows, statistics = plain()
    tokens = np.concatenate([prompt["prompt"], response["tokens"]], 1).reshape(K, n, P + N)
    np.testing.assert_array_equal(rows["tokens"], tokens)
    np.testing.assert_array_equal(rows["response"], tokens[..., P:])
    mask = response["valid"].reshape(K, n, N)
    np.testing.assert_array_equal(rows["mask"], mask)
    for name in ("logps", "advantages"):
        assert rows[name].shape == (K, n, N) and not rows[name][~mask].any()
    for name in ("values", "returns"):
        assert rows[name].shape == (K, n, N, 1) and not rows[name][~mask].any()
    close(statistics["completions/mean_length"], mask.sum(2).mean(1))
    close(statistics["completions/stopped_ratio"], (rows["response"] == EOS).any(2).mean(1))
    close(statistics["objective/scores"], SCORES.reshape(K, n).mean(1))
    assert len(set(statistics["completions/stopped_ratio"])) > 1


def test_sampled_log_probabilities_are_those_that_are_trained_on():
    prompt = prompts(K * n, P)
    one_hot, key = jnp.eye(K), jax.random.key(5)
    out = draw(MODEL, ADAPTERS["lora"], SAMPLING, base(), bank("lora", K), one_hot, prompt, key)
    trainable = {"bank": bank("lora", K), "heads": value_heads(K)}
    rows, _ = collect("lora", ExperienceConfig(), trainable, prompt, out, SCORES, BETA)
    close(rows["logps"].reshape(K * n, N), out["logps"])


def total_rewards(statistics):
    """Reward of the sequences without their KL, summed over the n of each policy."""
    return n * (statistics["objective/rlhf_reward"] + BETA * statistics["objective/kl"])


def test_scores_are_clipped_and_a_response_without_end_is_penalised():
    stopped = (sampled("lora")[1]["tokens"] == EOS).any(1)
    assert 0 < stopped.sum() < K * n and np.abs(SCORES).max() > 5
    want = np.clip(SCORES[:, 0], -5, 5) - 1.0 * ~stopped
    close(total_rewards(plain()[1]), want.reshape(K, n).sum(1), 1e-4)
    config = ExperienceConfig(missing_eos_penalty=3.0, score_clip=0.0)
    close(
        total_rewards(run("lora", bank("lora", K), config)[1]),
        (SCORES[:, 0] - 3.0 * ~stopped).reshape(K, n).sum(1),
        1e-4,
    )


def test_padding_that_looks_like_eos_is_no_end():
    """Where pad and EOS are one token, only the mask tells a finished response from a cut one."""
    prompt = prompts(K * n, P)
    cut = {"tokens": np.where(np.arange(N) < 3, 7, EOS) + np.zeros((K * n, 1), int), "valid": np.arange(N) < 3}
    cut["valid"] = np.broadcast_to(cut["valid"], (K * n, N))
    trainable = {"bank": bank("lora", K), "heads": value_heads(K)}
    _, statistics = collect("lora", ExperienceConfig(), trainable, prompt, cut, SCORES, BETA, ids=(EOS, EOS))
    assert not statistics["completions/stopped_ratio"].any()


def test_advantages_are_whitened_per_policy_and_returns_are_not():
    rows, _ = plain()
    for k in range(K):
        inside = rows["advantages"][k][rows["mask"][k] > 0]
        close(inside.mean(), 0.0, 1e-4)
        close(inside.std(), 1.0, 1e-4)
    assert np.abs(rows["returns"]).max() > 2


def test_returns_add_up_kl_and_score():
    """At lambda 1 the return of the first token is the reward of the whole response."""
    rows, statistics = run("lora", bank("lora", K), ExperienceConfig(lam=1.0))
    close(rows["returns"][:, :, 0, 0].mean(1), statistics["objective/rlhf_reward"], 1e-4)


def test_the_kl_is_that_to_the_base():
    """Against the log-probabilities that a bank equal to the base gives."""
    reference = run("lora", fresh_bank("lora", K))[0]["logps"]
    rows, statistics = plain()
    kl = np.asarray(pg.kl_estimate(rows["logps"], reference)).sum(2)
    close(statistics["objective/kl"], kl.mean(1), 1e-4)


# ---- several objectives, and estimators without a critic

S = 2
VECTORS = np.random.default_rng(1).normal(0, 2, (K * n, S)).astype(np.float32)
WEIGHTS = np.random.default_rng(2).dirichlet(np.ones(S), K * n).astype(np.float32)


def several(config, combination, weights=WEIGHTS, heads_each=1):
    trainable = {"bank": bank("lora", K), "heads": value_heads(K, heads_each)}
    goal = {"weights": weights, "mix": np.eye(K, dtype=np.float32), "group": np.zeros(K * n, np.int32)}
    run = jax.jit(experience, static_argnums=(0, 1, 2, 3, 11))
    arguments = (base(), trainable, *sampled("lora"), VECTORS, BETA, goal, combination)
    return jax.device_get(run(MODEL, ADAPTERS["lora"], config, SAMPLING, *arguments))


def totals(statistics, rows):
    """Per answer: every objective and the weighted sum, less penalty and KL, as the estimators compare them."""
    reference = run("lora", fresh_bank("lora", K))[0]["logps"]
    kl = (rows["logps"] - reference).sum(2)
    stopped = (rows["response"] == EOS).any(2)
    rest = 1.0 * ~stopped + BETA[:, None] * kl
    vectors, weights = VECTORS.reshape(K, n, S), WEIGHTS.reshape(K, n, S)
    return vectors - rest[..., None], (vectors * weights).sum(2) - rest


def test_one_hot_weights_give_the_experience_of_that_objective():
    one_hot = np.tile(np.array([[0.0, 1.0]], np.float32), (K * n, 1))
    rows, statistics = several(ExperienceConfig(), WeightedSum(), one_hot)
    want, expected = run("lora", bank("lora", K), scores=VECTORS[:, 1:])
    for name in ("advantages", "returns", "values"):
        close(rows[name], want[name], 1e-6)
    close(statistics["objective/scores"], expected["objective/scores"])


def test_the_baseline_of_rloo_is_the_mean_of_the_other_answers():
    config = ExperienceConfig(estimator="rloo", samples_per_prompt=2, score_clip=0.0)
    rows, statistics = several(config, WeightedSum())
    total = totals(statistics, rows)[1].reshape(K, n // 2, 2)
    want = (total - total[..., ::-1]).reshape(K, n, 1) * rows["mask"]
    close(rows["advantages"], want, 1e-4)
    assert not rows["returns"].any()


@pytest.mark.parametrize("kind", ["sum", "gdpo"])
def test_group_advantages_are_those_of_grpo_and_gdpo(kind):
    config = ExperienceConfig(estimator="group", samples_per_prompt=4, score_clip=0.0)
    rows, statistics = several(config, RULES.get(kind)(), heads_each=1 if kind == "sum" else S)
    each, total = totals(statistics, rows)
    for k in range(K):
        if kind == "sum":
            want = standardize(total[k].reshape(-1, 4), np.ones((1, 4), bool), axis=1).reshape(-1)
        else:
            weights = WEIGHTS.reshape(K, n, S)[k].reshape(-1, 4, S)
            heads = standardize(each[k].reshape(-1, 4, S), np.ones((1, 4, 1), bool), axis=1)
            want = standardize(weighted_sum(heads, weights), np.ones((n // 4, 4), bool), axis=None).reshape(-1)
        close(rows["advantages"][k], np.asarray(want)[:, None] * rows["mask"][k], 2e-4)


def test_every_head_has_values_of_its_own():
    rows, statistics = several(ExperienceConfig(lam=1.0), GDPO(), heads_each=S)
    assert rows["values"].shape == rows["returns"].shape == (K, n, N, S)
    each = totals(statistics, rows)[0]
    close(rows["returns"][:, :, 0], each, 1e-4)
    assert statistics["heads"].shape == (K, S)


@pytest.mark.parametrize("wrong", [{"estimator": "td"}, {"estimator": "rloo"}, {"estimator": "group"}])
def test_wrong_estimators(wrong):
    with pytest.raises(UserError, match=r"estimator '(td|rloo|group)': (unknown|compares)"):
        ExperienceConfig(**wrong)
