"""Experience of K policies: what is zero at the start, where penalties go, and that policies do not mix."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.small_policies import EOS, KINDS, PAD, backbone, bank, close, fresh_bank, prompts, value_heads

from pjrlhf.errors import UserError
from pjrlhf.objectives import policy_gradient as pg
from pjrlhf.objectives.multi_objective import standardize, weighted_sum
from pjrlhf.objectives.scalarization import GDPO, RULES, WeightedSum
from pjrlhf.rollout.batches import Rollout, ScoredRollout, TargetBatch, join_rows, split_rows
from pjrlhf.rollout.experience import ExperienceConfig, Recipe, experience, sample
from pjrlhf.rollout.sampler import Sampling

K, n, P, N = 3, 4, 5, 6
SAMPLING = Sampling(max_new_tokens=N, eos_ids=(EOS,), pad_id=PAD, temperature=0.9)
BETA = np.array([0.1, 0.5, 2.0], np.float32)
SCORES = np.random.default_rng(0).normal(0, 4, (K, n, 1)).astype(np.float32)

collect = jax.jit(experience, static_argnums=0)
draw = jax.jit(sample, static_argnames="sampling")


def recipe(config=ExperienceConfig(), rule=WeightedSum(), sampling=SAMPLING):  # noqa: B008 - frozen
    return Recipe(config, sampling, rule)


def scored(prompt, rollout, scores=SCORES, weights=None):
    """Responses with their rewards, by default of one objective."""
    targets = TargetBatch(
        objectives=np.broadcast_to(np.arange(scores.shape[2], dtype=np.int32), scores.shape),
        weights=np.ones_like(scores) if weights is None else weights,
        group=np.zeros(scores.shape[:2], np.int32),
    )
    return ScoredRollout(prompt, rollout, scores, targets)


def sampled_prompts():
    return split_rows(prompts(K * n, P), K)


@functools.cache
def sampled(kind):
    """Prompts and responses of K noisy policies; some responses are made to end early."""
    prompt = sampled_prompts()
    out = jax.device_get(draw(backbone(kind), bank(kind, K), jnp.eye(K), prompt, SAMPLING, jax.random.key(3)))
    lengths = (np.arange(K * n) % (N + 1)).reshape(K, n, 1)
    lengths[lengths == 0] = N
    tokens = np.where(np.arange(N) == lengths - 1, EOS, np.where(out.tokens < 2, 5, out.tokens))
    tokens[..., -1][lengths[..., 0] == N] = 7  # cut off
    valid = np.arange(N) < lengths
    return prompt, Rollout(np.where(valid, tokens, PAD), valid, out.logps)


def run(kind, policies, config=ExperienceConfig(), scores=SCORES):  # noqa: B008 - frozen
    trainable = {"bank": policies, "value_heads": value_heads(K)}
    arguments = backbone(kind), trainable, scored(*sampled(kind), scores), BETA
    return jax.device_get(collect(recipe(config), *arguments))


WHITE = ExperienceConfig(whiten_rewards=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_policy_has_no_kl(kind):
    rows, statistics = run(kind, fresh_bank(kind, K), WHITE)
    # The low-rank product with b = 0 adds exact zeros; full parameters are multiplied in groups, so they may round.
    tolerance = 0 if kind == "lora" else 1e-5
    np.testing.assert_allclose(statistics["objective/kl"], 0.0, atol=tolerance)
    assert (np.abs(run(kind, bank(kind, K), WHITE)[1]["objective/kl"]) > 1e-2).all()
    assert rows.logps.min() < -1


@pytest.mark.parametrize("kind", KINDS)
def test_policies_in_one_batch_do_not_mix(kind):
    """Rows and statistics, with whitening, equal those of K separate batches."""
    rows, statistics = run(kind, bank(kind, K), WHITE)
    for k in range(K):
        trainable = {"bank": bank(kind, K), "value_heads": value_heads(K)}
        alone = jax.tree.map(lambda x, k=k: x[k : k + 1], (trainable, scored(*sampled(kind)), BETA))
        want = jax.tree.map(lambda x, k=k: x[k : k + 1], (rows, statistics))
        close(collect(recipe(WHITE), backbone(kind), *alone), want, 2e-5)


@functools.cache
def plain():
    return run("lora", bank("lora", K))


def test_rows_hold_what_was_sampled():
    prompt, response = sampled("lora")
    rows, statistics = plain()
    np.testing.assert_array_equal(rows.tokens, np.concatenate([prompt.tokens, response.tokens], 2))
    np.testing.assert_array_equal(rows.valid, np.concatenate([prompt.valid, response.valid], 2))
    np.testing.assert_array_equal(rows.response, response.tokens)
    np.testing.assert_array_equal(rows.mask, response.valid)
    assert rows.prompt_length == P and rows.mix is None and rows.temperature == SAMPLING.temperature
    for x in (rows.logps, rows.advantages):
        assert x.shape == (K, n, N) and not x[~response.valid].any()
    for x in (rows.values, rows.returns):
        assert x.shape == (K, n, N, 1) and not x[~response.valid].any()
    close(statistics["completions/mean_length"], rows.mask.sum(2).mean(1))
    close(statistics["completions/stopped_ratio"], (rows.response == EOS).any(2).mean(1))
    close(statistics["objective/scores"], SCORES.mean((1, 2)))
    assert len(set(statistics["completions/stopped_ratio"])) > 1


def test_sampled_log_probabilities_are_those_that_are_trained_on():
    trainable = {"bank": bank("lora", K), "value_heads": value_heads(K)}
    out = draw(backbone("lora"), trainable["bank"], jnp.eye(K), sampled_prompts(), SAMPLING, jax.random.key(5))
    assert out.tokens.shape == (K, n, N)
    rows, _ = collect(recipe(), backbone("lora"), trainable, scored(sampled_prompts(), out), BETA)
    close(rows.logps, out.logps)


def test_rows_of_all_policies_are_sampled_as_if_they_were_one_batch():
    arguments = backbone("lora"), bank("lora", K), jnp.eye(K)
    apart = draw(*arguments, sampled_prompts(), SAMPLING, jax.random.key(5))
    joined = draw(*arguments, prompts(K * n, P), SAMPLING, jax.random.key(5))
    close(join_rows(apart), joined, 0)


def total_rewards(statistics):
    """Reward of the sequences without their KL, summed over the n of each policy."""
    return n * (statistics["objective/rlhf_reward"] + BETA * statistics["objective/kl"])


def test_scores_are_clipped_and_a_response_without_end_is_penalised():
    stopped = (sampled("lora")[1].tokens == EOS).any(2)
    assert 0 < stopped.sum() < K * n and np.abs(SCORES).max() > 5
    close(total_rewards(plain()[1]), (np.clip(SCORES[..., 0], -5, 5) - 1.0 * ~stopped).sum(1), 1e-4)
    config = ExperienceConfig(missing_eos_penalty=3.0, score_clip=0.0)
    close(total_rewards(run("lora", bank("lora", K), config)[1]), (SCORES[..., 0] - 3.0 * ~stopped).sum(1), 1e-4)


def test_padding_that_looks_like_eos_is_no_end():
    """Where pad and EOS are one token, only the mask tells a finished response from a cut one."""
    valid = np.broadcast_to(np.arange(N) < 3, (K, n, N))
    cut = Rollout(np.where(valid, 7, EOS), valid, np.zeros((K, n, N), np.float32))
    trainable = {"bank": bank("lora", K), "value_heads": value_heads(K)}
    alike = recipe(sampling=dataclasses.replace(SAMPLING, pad_id=EOS))
    _, statistics = collect(alike, backbone("lora"), trainable, scored(sampled_prompts(), cut), BETA)
    assert not statistics["completions/stopped_ratio"].any()
    several = recipe(sampling=dataclasses.replace(SAMPLING, eos_ids=(EOS, 7)))
    _, statistics = collect(several, backbone("lora"), trainable, scored(sampled_prompts(), cut), BETA)
    assert statistics["completions/stopped_ratio"].all()


def test_advantages_are_whitened_per_policy_and_returns_are_not():
    rows, _ = plain()
    for k in range(K):
        inside = rows.advantages[k][rows.mask[k] > 0]
        close(inside.mean(), 0.0, 1e-4)
        close(inside.std(), 1.0, 1e-4)
    assert np.abs(rows.returns).max() > 2


def test_returns_add_up_kl_and_score():
    """At lambda 1 the return of the first token is the reward of the whole response."""
    rows, statistics = run("lora", bank("lora", K), ExperienceConfig(lam=1.0))
    close(rows.returns[:, :, 0, 0].mean(1), statistics["objective/rlhf_reward"], 1e-4)


def test_the_kl_is_that_to_the_base():
    """Against the log-probabilities that a bank equal to the base gives."""
    reference = run("lora", fresh_bank("lora", K))[0].logps
    rows, statistics = plain()
    kl = np.asarray(pg.kl_estimate(rows.logps, reference)).sum(2)
    close(statistics["objective/kl"], kl.mean(1), 1e-4)


# ---- several objectives, and estimators without a critic

S = 2
VECTORS = np.random.default_rng(1).normal(0, 2, (K, n, S)).astype(np.float32)
WEIGHTS = np.random.default_rng(2).dirichlet(np.ones(S), (K, n)).astype(np.float32)


def several(config, rule, weights=WEIGHTS, heads_each=1):
    trainable = {"bank": bank("lora", K), "value_heads": value_heads(K, heads_each)}
    arguments = backbone("lora"), trainable, scored(*sampled("lora"), VECTORS, weights), BETA
    return jax.device_get(collect(recipe(config, rule), *arguments))


def totals(rows):
    """Per answer: every objective and the weighted sum, less penalty and KL, as the estimators compare them."""
    reference = run("lora", fresh_bank("lora", K))[0].logps
    kl = (rows.logps - reference).sum(2)
    stopped = (rows.response == EOS).any(2)
    rest = 1.0 * ~stopped + BETA[:, None] * kl
    return VECTORS - rest[..., None], (VECTORS * WEIGHTS).sum(2) - rest


def test_one_hot_weights_give_the_experience_of_that_objective():
    one_hot = np.broadcast_to(np.array([0.0, 1.0], np.float32), (K, n, S))
    rows, statistics = several(ExperienceConfig(), WeightedSum(), one_hot)
    want, expected = run("lora", bank("lora", K), scores=VECTORS[..., 1:])
    for name in ("advantages", "returns", "values"):
        close(getattr(rows, name), getattr(want, name), 1e-6)
    close(statistics["objective/scores"], expected["objective/scores"])


def test_the_baseline_of_rloo_is_the_mean_of_the_other_answers():
    config = ExperienceConfig(estimator="rloo", samples_per_prompt=2, score_clip=0.0)
    rows, _ = several(config, WeightedSum())
    total = totals(rows)[1].reshape(K, n // 2, 2)
    want = (total - total[..., ::-1]).reshape(K, n, 1) * rows.mask
    close(rows.advantages, want, 1e-4)
    assert not rows.returns.any()


@pytest.mark.parametrize("kind", ["sum", "gdpo"])
def test_group_advantages_are_those_of_grpo_and_gdpo(kind):
    config = ExperienceConfig(estimator="group", samples_per_prompt=4, score_clip=0.0)
    rows, _ = several(config, RULES.get(kind)(), heads_each=1 if kind == "sum" else S)
    each, total = totals(rows)
    for k in range(K):
        if kind == "sum":
            want = standardize(total[k].reshape(-1, 4), np.ones((1, 4), bool), axis=1).reshape(-1)
        else:
            weights = WEIGHTS[k].reshape(-1, 4, S)
            heads = standardize(each[k].reshape(-1, 4, S), np.ones((1, 4, 1), bool), axis=1)
            want = standardize(weighted_sum(heads, weights), np.ones((n // 4, 4), bool), axis=None).reshape(-1)
        close(rows.advantages[k], np.asarray(want)[:, None] * rows.mask[k], 2e-4)


def test_every_head_has_values_of_its_own():
    rows, statistics = several(ExperienceConfig(lam=1.0), GDPO(), heads_each=S)
    assert rows.values.shape == rows.returns.shape == (K, n, N, S)
    each = totals(rows)[0]
    close(rows.returns[:, :, 0], each, 1e-4)
    assert statistics["head_weights"].shape == (K, S)


@pytest.mark.parametrize("wrong", [{"estimator": "td"}, {"estimator": "rloo"}, {"estimator": "group"}])
def test_wrong_estimators(wrong):
    with pytest.raises(UserError, match=r"estimator:? '(td|rloo|group)':? (is unknown|compares)"):
        ExperienceConfig(**wrong)
