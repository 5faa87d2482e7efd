"""Policies: weights of rewards that change during training, and settings that are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny

from pjrlhf.algorithms import policy, policy_metrics
from pjrlhf.errors import UserError
from pjrlhf.pipeline import stages
from pjrlhf.rollout.batches import ScoredRollout

POINT = (0.5, 0.0, 0.3, 0.2)


def fixed(folder, **changes):
    """The method of one policy for fixed weights, with the reward models of a finished run."""
    changes |= {"policy__preferences": {"kind": "fixed", "points": (POINT,)}, "policy__prompt_preference": "never"}
    return policy.method_of(tiny.start(folder, tiny.settings(**changes)))


@pytest.mark.slow
def test_a_schedule_multiplies_the_preference_weights(finished):
    """An update at step 3 is that of a method without schedules on weights multiplied by hand."""
    given = {"P1A": {"start": 1.0, "end": 0.0, "steps": 4}, "P2B": [[2, 0.5], [4, 2.5]]}
    plain, changing = fixed(finished), fixed(finished, policy__reward_weights=given)
    state, batch = plain.init().replace(step=np.int32(3)), next(plain.batches)
    rollout = plain.rollout(plain.backbone, state.trainable["bank"], batch, jax.random.key(1))
    scores = np.random.default_rng(0).standard_normal((1, 4, 4)).astype(np.float32)
    scored = ScoredRollout(batch.prompts, rollout, scores, batch.targets)
    by_hand = batch.targets.weights * np.float32([0.25, 1, 1, 1.5])
    weighed = scored.replace(targets=batch.targets.replace(weights=by_hand))
    found, want = (
        jax.jit(method.update)(method.backbone, state, one, jax.random.key(2))
        for method, one in ((changing, scored), (plain, weighed))
    )
    np.testing.assert_allclose(want[1]["objective/scores"], (scores * by_hand).sum(2).mean(1), rtol=1e-5)
    for one, other in ((found[0].trainable, want[0].trainable), (found[1], want[1])):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), one, other)


def test_a_state_has_no_weak_types(finished):
    """A step that adapts the KL coefficient would make a strong one of it, and all programs would compile again."""
    state = fixed(finished, policy__kl__target=3.0).init()
    assert not any(getattr(x, "weak_type", False) for x in jax.tree.leaves(state))


@pytest.mark.slow
def test_factors_are_logged_and_one_of_1_changes_nothing(finished):
    plain, one = fixed(finished), fixed(finished, policy__reward_weights={"P1A": 1, "P2B": [[0, 1.0], [2, 0.0]]})
    states = plain.init(), one.init()
    (_, without), (state, metrics) = (m.step(s, next(m.batches)) for m, s in zip((plain, one), states, strict=True))
    np.testing.assert_allclose(metrics["objective/scores"][0], without["objective/scores"][0], rtol=1e-6)
    assert [float(metrics[f"rewards/{name}/weight"][0]) for name in ("P1A", "P2B")] == [1, 1]
    _, metrics = one.step(state, next(one.batches))
    assert [float(metrics[f"rewards/{name}/weight"][0]) for name in ("P1A", "P2B")] == [1, 0.5]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"policy__reward_weights": {"P9": 1.0}},
            r"policy\.reward_weights: 'P9' is not one of P1A, P1B, P2A, P2B, helpful; name one of these",
        ),
        ({"policy__reward_weights": {"P1A": "slow"}}, r"policy\.reward_weights\.P1A: 'slow' is no schedule"),
        (
            {"policy__reward_weights": {"P1A": 0.5}, "policy__combine": {"kind": "pama"}},
            "reward_weights: combine.kind 'pama' does not weigh rewards by the preference weights alone",
        ),
        (
            {"policy__ppo__accumulation_steps": 3},
            r"ppo\.accumulation_steps: 3 does not divide the 2 answers of a minibatch",
        ),
        ({"adapter__dropout": 0.1}, r"adapter\.dropout=0\.1: policies are trained without dropout, because PPO"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        stages.read(tiny.settings(**changes))


def test_correlations_of_rewards_are_over_the_answers_that_both_know():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(12, 3)).astype(np.float32) - 30
    scores[:, 2] += scores[:, 0]
    known = rng.random((12, 3)) < 0.7
    want = []
    for s, t in ((0, 1), (0, 2), (1, 2)):
        both = known[:, s] & known[:, t]
        want.append(np.corrcoef(scores[both, s], scores[both, t])[0, 1])
    total, count = policy_metrics.correlations(jnp.where(known, scores, 0.0), jnp.array(known))
    np.testing.assert_allclose([total, count], [sum(want), 3], rtol=1e-4)
    known[:, 1] = False
    total, count = policy_metrics.correlations(jnp.where(known, scores, 0.0), jnp.array(known))
    np.testing.assert_allclose([total, count], [want[1], 1], rtol=1e-4)
