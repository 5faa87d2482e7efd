"""Combinations of objectives: one objective is plain PPO, one-hot weights are one objective, min-norm mixtures are
least.
"""

import dataclasses
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjrlhf.errors import UserError
from pjrlhf.objectives import multi_objective as mo
from pjrlhf.objectives.scalarization import (
    GDPO,
    PAMA,
    RULES,
    CombinationRule,
    MinNorm,
    Tchebycheff,
    WeightedSum,
    factors,
    make_rule,
    schedule,
    section,
)
from pjrlhf.settings import rule_of

n, T, S = 12, 5, 3


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def mask():
    lengths = np.random.default_rng(1).integers(1, T + 1, n)
    return (np.arange(T) < lengths[:, None]).astype(np.float32)


def simplex(seed, columns=S):
    return np.random.default_rng(seed).dirichlet(np.ones(columns), n).astype(np.float32)


ONE_REWARD = {
    "sum": WeightedSum(),
    "tchebycheff": Tchebycheff(ideal=0.0),
    "gdpo": GDPO(),
    "pama": PAMA(noon=False),
    "mgda": MinNorm(heads="per_reward"),
    "equal": MinNorm(heads="per_reward", weights="equal"),
}


@pytest.mark.parametrize("name", ONE_REWARD)
def test_one_objective_is_plain_ppo(name):
    rule, scores, advantages = ONE_REWARD[name], draw(2, n, 1), draw(3, n, T, 1)
    ones = np.ones((n, 1), np.float32)
    assert len(rule.names(["r"])) == 1
    np.testing.assert_array_equal(rule.rewards(scores, ones), scores)
    mixed, _ = rule.advantages(jnp.asarray(advantages), ones, mask())
    np.testing.assert_array_equal(mixed, advantages[..., 0] * mask())


@pytest.mark.parametrize("k", range(S))
def test_one_hot_weights_are_that_objective_to_the_last_bit(k):
    p = np.broadcast_to(np.eye(S, dtype=np.float32)[k], (n, S))
    scores, advantages = draw(4, n, S), draw(5, n, T, S)
    np.testing.assert_array_equal(WeightedSum().rewards(scores, p)[:, 0], scores[:, k])
    mixed, _ = GDPO().advantages(jnp.asarray(advantages), p, mask())
    np.testing.assert_array_equal(mixed, advantages[..., k] * mask())


def test_heads_are_as_many_as_their_rewards():
    names = [f"r{i}" for i in range(S)]
    (choices,) = (rule_of(field).allowed for field in dataclasses.fields(MinNorm) if field.name == "heads")
    for rule in [RULES[kind]() for kind in RULES] + [MinNorm(heads=heads) for heads in choices]:
        assert rule.rewards(np.random.default_rng(0).random((n, S)), simplex(6)).shape == (n, len(rule.names(names)))


def test_the_mixture_has_the_least_norm_on_the_simplex():
    advantages = draw(7, n, T, S) * np.array([0.3, 1.0, 2.0], np.float32)
    mixed, info = MinNorm(heads="per_reward").advantages(jnp.asarray(advantages), simplex(8), mask())
    norm = np.square(mixed).sum()
    steps = np.linspace(0, 1, 41)
    grid = [(a, b, 1 - a - b) for a in steps for b in steps if a + b <= 1 + 1e-9]
    best = min(np.square((advantages * np.array(c) * mask()[..., None]).sum(-1)).sum() for c in grid)
    assert norm <= best * (1 + 1e-5)
    assert info["weights"].sum() == pytest.approx(1) and info["weights"][0] > info["weights"][2]


@pytest.mark.parametrize("normalize", ["none", "gradient"])
def test_a_head_without_advantages_takes_no_part(normalize):
    """It would otherwise take all the weight, and training would stand still."""
    advantages = draw(9, n, T, S)
    advantages[..., 1] = 0
    rule = MinNorm(heads="per_reward", normalize=normalize)
    mixed, info = rule.advantages(jnp.asarray(advantages), simplex(10), mask())
    assert info["weights"][1] == 0 and info["weights"].sum() == pytest.approx(1)
    two = rule.advantages(jnp.asarray(advantages[..., [0, 2]]), simplex(10, 2), mask())[0]
    np.testing.assert_allclose(mixed, two, atol=1e-5)
    nothing, info = rule.advantages(jnp.zeros((n, T, S)), simplex(10), mask())
    assert not nothing.any() and np.isfinite(info["weights"]).all()


def test_conflicting_heads_are_balanced_and_their_cosine_is_logged():
    one = draw(11, n, T)
    advantages = jnp.stack([one, -3 * one], -1)
    rule = MinNorm(heads="per_reward")
    mixed, info = rule.advantages(advantages, simplex(12, 2), mask())
    np.testing.assert_allclose(info["weights"], [0.75, 0.25], atol=1e-5)
    np.testing.assert_allclose(mixed, 0, atol=1e-5)
    assert info["gradient_cosine"] == pytest.approx(-1)


def test_equal_weights_are_the_mean_of_the_heads():
    advantages = draw(13, n, T, S)
    rule = MinNorm(heads="per_reward", weights="equal")
    mixed, _ = rule.advantages(jnp.asarray(advantages), simplex(14), mask())
    np.testing.assert_allclose(mixed, advantages.mean(-1) * mask(), atol=1e-6)


def test_objectives_of_disjoint_answers_have_the_min_norm_weights_of_their_gram_matrix():
    """heads per_preference, against the general solver on the whole matrix."""
    group, advantages = np.arange(n) % 4, draw(15, n, T, 1)
    rule = MinNorm(heads="per_preference")
    mixed, _ = rule.advantages(jnp.asarray(advantages), simplex(16), mask(), jnp.asarray(group))
    apart = advantages * (group[:, None] == np.arange(4))[:, None]
    c = mo.min_norm_weights(mo.gram_matrix(apart * mask()[..., None]))
    np.testing.assert_allclose(mixed, 4 * np.asarray(c)[group][:, None] * advantages[..., 0] * mask(), rtol=2e-3)
    with pytest.raises(ValueError, match="train on a fixed set"):
        rule.advantages(jnp.asarray(advantages), simplex(16), mask())
    # The weights follow from the advantages of the only head, whatever made its reward.
    other = Tchebycheff(across="min_norm")
    assert other.needs_preference_groups and not Tchebycheff().needs_preference_groups
    same, _ = other.advantages(jnp.asarray(advantages), simplex(16), mask(), jnp.asarray(group))
    np.testing.assert_array_equal(same, mixed)


def test_control_asks_for_rewards_equal_to_the_weights():
    p = simplex(17)
    rule = MinNorm()
    reward, control = np.asarray(rule.rewards(p, p)).T
    np.testing.assert_allclose(control, 0, atol=1e-7)
    np.testing.assert_allclose(reward, (p * p).sum(1), rtol=1e-6)
    assert (rule.rewards(p + 0.1, p)[:, 1] < 0).all()
    for heads in ("reward_sum+control", "per_reward+control", "control"):
        one, four = (MinNorm(heads=heads, control_weight=w).rewards(p + 0.1, p) for w in (1.0, 4.0))
        np.testing.assert_allclose(four[:, -1], 4 * one[:, -1], rtol=1e-6)
        np.testing.assert_array_equal(four[:, :-1], one[:, :-1])
    hinge = MinNorm(sided="hinge")
    np.testing.assert_array_equal(hinge.rewards(p + 0.1, p)[:, 1], 0)


def test_the_smooth_tchebycheff_reward_of_equal_distances():
    """-m log(S exp(d / m)) = -d - m log S where all weighted distances are d; between that and -max d otherwise."""
    p = np.full((n, S), 1 / S, np.float32)
    got = Tchebycheff(ideal=1.0, smoothing=0.2).rewards(jnp.full((n, S), 0.4), p)
    np.testing.assert_allclose(got[:, 0], -0.6 / S - 0.2 * np.log(S), rtol=1e-5)
    scores = draw(21, n, S)
    exact, smooth = (Tchebycheff(smoothing=m).rewards(jnp.asarray(scores), p)[:, 0] for m in (0.0, 0.2))
    np.testing.assert_allclose(exact, -((1 - scores) / S).max(1), rtol=1e-5)
    assert (smooth <= exact).all() and (smooth >= exact - 0.2 * np.log(S) - 1e-6).all()


def test_inside_jit_and_under_vmap():
    rule, p = MinNorm(heads="per_reward"), simplex(18)
    advantages = jnp.asarray(draw(19, 2, n, T, S))
    run = jax.jit(jax.vmap(lambda a: rule.advantages(a, p, mask())[0]))
    for k in range(2):
        np.testing.assert_allclose(run(advantages)[k], rule.advantages(advantages[k], p, mask())[0], atol=1e-5)


@pytest.mark.parametrize("kind", RULES)
def test_a_section_with_defaults_makes_every_rule(kind):
    assert make_rule({**section(), "kind": kind}) == RULES[kind]()


def test_the_fields_of_a_section_belong_to_one_rule_each():
    names = [field.name for _, rule in RULES.items() for field in dataclasses.fields(rule)]
    assert len(set(names)) == len(names) and "kind" not in names
    assert all(rule_of(field).help for _, rule in RULES.items() for field in dataclasses.fields(rule))


def test_fields_reach_their_rule():
    given = {"kind": "min_norm", "heads": "per_reward", "control_weight": 4.0}
    assert make_rule(section() | given) == make_rule(given) == MinNorm(heads="per_reward", control_weight=4.0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kind": "mean"}, "kind: combination rule 'mean': unknown; choose one of sum, tchebycheff"),
        ({"kind": "min_nrom"}, "did you mean min_norm"),
        ({"kind": 3}, "kind: combination rule 3: unknown"),
        ({"kind": "min_norm", "heads": "all"}, "heads: 'all' is unknown; choose one of per_reward"),
        ({"kind": "tchebycheff", "smoothing": -1.0}, "smoothing: -1.0 is out of range; choose a number at least 0"),
        ({"kind": "tchebycheff", "smoothing": float("nan")}, "smoothing: nan is not finite"),
        ({"kind": "sum", "ideal": 2.0}, "ideal: rule 'sum' has no such setting; leave it at 1.0"),
        ({"kind": "pama", "nono": True}, "nono: rule 'pama' has no such setting; it has noon"),
        ({"kind": "json:dumps"}, "'json:dumps': is not a dataclass that inherits from CombinationRule"),
    ],
)
def test_wrong_settings(wrong, message):
    with pytest.raises(UserError) as caught:
        make_rule({**section(), **wrong})
    assert message in str(caught.value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Worst(CombinationRule):
    """A rule from outside the package: the advantage of the objective with the least reward."""

    slack: float = 0.0

    def names(self, objectives):
        return ("worst",)

    def rewards(self, scores, p):
        return scores.min(-1, keepdims=True) + self.slack

    def advantages(self, advantages, p, mask, group=None):
        return advantages[..., 0] * mask, {"weights": jnp.ones(1), "gradient_cosine": jnp.zeros(())}


def test_a_rule_from_outside(monkeypatch):
    module = types.ModuleType("rules_from_outside")
    module.Worst = Worst
    monkeypatch.setitem(sys.modules, module.__name__, module)
    rule = make_rule({**section(), "kind": "rules_from_outside:Worst", "slack": 1.0})
    assert rule == Worst(slack=1.0) and not rule.standardizes_heads
    np.testing.assert_array_equal(rule.rewards(draw(2, n, S), simplex(6)), draw(2, n, S).min(-1, keepdims=True) + 1)


# ---- weights that change during training


@pytest.mark.parametrize(
    ("spec", "steps", "want"),
    [
        (0.5, [0, 7, 1000], [0.5, 0.5, 0.5]),
        ({"start": 1.0, "end": 0.0, "steps": 10}, [0, 3, 10, 99], [1, 0.7, 0, 0]),
        ([[2, 0.0], [4, 1.0], [8, 0.5]], [0, 2, 3, 4, 6, 8, 9], [0, 0, 0.5, 1, 0.75, 0.5, 0.5]),
    ],
    ids=["constant", "linear", "points"],
)
def test_factors_lie_on_the_lines_between_the_points(spec, steps, want):
    found = jax.jit(jax.vmap(lambda step: factors([schedule(spec)], step)))(jnp.array(steps))
    np.testing.assert_allclose(found[:, 0], want, rtol=1e-6)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("fast", "is no schedule; give a number"),
        (True, "is no schedule"),
        ([], "is no schedule"),
        ([[0, 1.0], [1]], "is no schedule"),
        ({"start": 1.0, "end": 0.0}, "is no schedule"),
        ({"start": 1.0, "end": 0.0, "steps": 0}, "steps do not rise"),
        ([[5, 1.0], [5, 0.0]], "steps do not rise"),
        ([[-1, 1.0]], "steps do not rise"),
        (-0.5, "below 0 would train against the reward"),
        (float("nan"), "is no schedule"),
    ],
)
def test_wrong_schedules(spec, message):
    with pytest.raises(UserError, match=message):
        schedule(spec)
