"""Fronts against closed forms, counting and sampling."""

import itertools
import math
import sys
import types

import numpy as np
import pytest

from pjrlhf.errors import UserError
from pjrlhf.evaluation import pareto
from pjrlhf.evaluation.pareto import EvaluatedFront, hypervolume, non_dominated, sparsity, violations
from pjrlhf.objectives.simplex import simplex_grid

pytestmark = pytest.mark.filterwarnings("error")

POINTS = np.array([[5.0, 5.0], [4.0, 6.0], [2.0, 7.0], [7.0, 4.0]])


def front_metrics(*arguments, **named):
    return pareto.front_metrics(EvaluatedFront(*arguments, **named))


def sphere(n, objectives, seed=0):
    """Points of the positive unit sphere, none of which dominates another."""
    x = np.abs(np.random.default_rng(seed).normal(size=(n, objectives)))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_published_hypervolumes():
    assert hypervolume(-POINTS, [-10, -10]) == 38.0
    assert hypervolume(POINTS, [0, 0]) == 39.0


@pytest.mark.parametrize("objectives", [1, 2, 3, 4, 5, 6])
def test_a_box_a_pair_of_boxes_and_the_corners(objectives):
    one = np.ones(objectives)
    assert hypervolume([2 * one], -one) == pytest.approx(3.0**objectives)
    assert hypervolume([one], one) == hypervolume([one], 2 * one) == 0.0
    assert hypervolume(np.zeros((0, objectives)), one) == 0.0
    low, high = one.copy(), one.copy()
    low[0], high[-1] = 3, 3  # union of two boxes = sum less intersection
    assert hypervolume([low, high], 0 * one) == pytest.approx(5.0 if objectives > 1 else 3.0)
    # Box k reaches 2 in objective k and 1 elsewhere: the unit cube, and one more cube for each.
    assert hypervolume(one + np.eye(objectives), 0 * one) == pytest.approx(objectives + 1)


@pytest.mark.parametrize("objectives", [2, 3, 4, 5])
def test_hypervolume_by_counting_cells(objectives):
    rng = np.random.default_rng(objectives)
    for n in (1, 2, 5, 12, 30):
        points = rng.integers(-1, 6, (n, objectives))  # duplicates, dominated ones and some below the reference
        cells = np.array(list(itertools.product(range(5), repeat=objectives)))
        covered = (points[:, None, :] > cells).all(2).any(0).sum()
        assert hypervolume(points, np.zeros(objectives)) == pytest.approx(covered, abs=1e-9)


@pytest.mark.parametrize("objectives", [2, 3, 4])
def test_hypervolume_by_sampling(objectives):
    points = sphere(30, objectives)
    samples = np.random.default_rng(1).random((40_000, objectives))
    fraction = (points[:, None, :] > samples).all(2).any(0).mean()
    assert hypervolume(points, np.zeros(objectives)) == pytest.approx(fraction, abs=4 * 0.5 / 200)


@pytest.mark.parametrize("objectives", [1, 2, 3, 4])
def test_dominated_points_by_comparing_all_pairs(objectives):
    rng = np.random.default_rng(objectives)
    for points in (rng.normal(size=(40, objectives)), rng.integers(0, 4, (40, objectives))):
        beaten = [((points >= p).all(1) & (points > p).any(1)).any() for p in points]
        np.testing.assert_array_equal(non_dominated(points), ~np.array(beaten))


@pytest.mark.parametrize("objectives", [2, 3, 4])
def test_what_the_hypervolume_does_not_depend_on(objectives):
    rng = np.random.default_rng(4)
    points, reference = rng.random((20, objectives)), rng.random(objectives) * 0.2
    volume = hypervolume(points, reference)
    assert volume > 0
    order, turned = rng.permutation(20), rng.permutation(objectives)
    shift, scale = rng.normal(size=objectives), rng.random(objectives) + 0.5
    for same in (
        hypervolume(points[order], reference),
        hypervolume(points[:, turned], reference[turned]),
        hypervolume(np.vstack([points, points]), reference),
        hypervolume(np.vstack([points, points - rng.random(points.shape)]), reference),
        hypervolume(np.vstack([points, reference - 1, reference + 5 * np.eye(objectives)[0]]), reference),
        hypervolume(points[non_dominated(points)], reference),
        hypervolume(points + shift, reference + shift),
        hypervolume(points * scale, reference * scale) / scale.prod(),
    ):
        assert same == pytest.approx(volume, rel=1e-9)
    assert hypervolume(np.vstack([points, np.ones(objectives)]), reference) > volume
    assert hypervolume(points, reference - 0.1) > volume


def test_non_dominated_points():
    points = [[1, 1], [2, 0], [0, 2], [1, 1], [1, 0], [0, 0], [2, -1]]
    np.testing.assert_array_equal(non_dominated(points), [1, 1, 1, 1, 0, 0, 0])
    assert non_dominated(sphere(50, 3)).all()
    assert non_dominated(np.zeros((0, 2))).shape == (0,)
    np.testing.assert_array_equal(non_dominated([[3.0], [1.0], [3.0]]), [1, 0, 1])


def test_the_grids_of_the_literature():
    np.testing.assert_allclose(simplex_grid(2), [[k / 10, 1 - k / 10] for k in range(11)], atol=1e-12)
    thirteen = {(1 / 3, 1 / 3, 1 / 3)}
    for row in ((1, 0, 0), (0.8, 0.1, 0.1), (0.6, 0.2, 0.2), (0.4, 0.4, 0.2)):
        thirteen |= set(itertools.permutations(row))
    assert len(thirteen) == 13
    np.testing.assert_allclose(simplex_grid(3), sorted(thirteen), atol=1e-9)
    assert [len(simplex_grid(n)) for n in (4, 5, 6)] == [19, 26, 34]


@pytest.mark.parametrize("objectives", [2, 3, 4, 5, 6])
def test_grids_are_symmetric_and_held_out_points_are_others(objectives):
    grid, held_out = simplex_grid(objectives), simplex_grid(objectives, held_out=True)
    assert len(held_out) == (10 if objectives == 2 else 2 * objectives)
    for rows in (grid, held_out):
        np.testing.assert_allclose(rows.sum(1), 1, atol=1e-9)
        np.testing.assert_allclose(rows.mean(0), 1 / objectives, atol=1e-9)
        assert rows.min() >= 0 and len(np.unique(rows.round(6), axis=0)) == len(rows)
        assert rows.tolist() == sorted(rows.tolist())
    for corner in np.eye(objectives):
        assert (grid == corner).all(1).any()
    assert held_out.min() > 0
    assert np.abs(held_out[:, None] - grid).max(2).min() > 0.04


@pytest.mark.parametrize("objectives", [2, 3, 4])
def test_the_best_rewards_of_a_sphere_are_in_full_control(objectives):
    # On the unit sphere the best point for weights w is w / |w|.
    p = simplex_grid(objectives)
    rewards = p / np.linalg.norm(p, axis=1, keepdims=True)
    found = front_metrics(p, rewards, np.zeros(objectives), targets=rewards + 0.1)
    assert found["mip"] == pytest.approx(np.linalg.norm(p, axis=1).mean())
    assert found["eum"] == pytest.approx(found["mip"])
    assert found["mse"] == pytest.approx(0.01)
    assert found["violations"] == 0 and found["edges"] == objectives * (len(p) - 1)
    assert found["dominated"] == 0.0
    assert found["spearman"] > 0.95 and found["tau"] > 0.85
    if objectives == 2:
        assert found["spearman"] == found["tau"] == pytest.approx(1.0)
    assert set(found) == {
        *("hypervolume", "spearman", "tau", "mse", "mip", "eum", "dominated"),
        *("sparsity", "prompt_tau", "violations", "edges"),
    }


def test_a_policy_that_ignores_or_inverts_the_weights():
    p = simplex_grid(2)
    ignored = front_metrics(p, np.ones_like(p), [0, 0])
    assert ignored["spearman"] == ignored["tau"] == ignored["sparsity"] == ignored["dominated"] == 0.0
    assert ignored["hypervolume"] == 1.0 and ignored["violations"] == 0 and ignored["mse"] is None
    inverted = front_metrics(p, 1 - p, [0, 0])
    straight = front_metrics(p, p, [0, 0])
    # The same front, of which everybody gets the wrong point.
    for same in ("hypervolume", "eum", "sparsity", "dominated"):
        assert inverted[same] == pytest.approx(straight[same])
    assert inverted["spearman"] == inverted["tau"] == pytest.approx(-1.0)
    assert inverted["violations"] == inverted["edges"] == 20
    # sum p (1 - p) * 2 / 11 with sum k = 55 and sum k^2 = 385
    assert inverted["mip"] == pytest.approx(2 * (5.5 - 3.85) / 11) and inverted["eum"] > inverted["mip"]


def test_controllability_is_per_objective_and_ties_survive_rounding():
    p = np.array([[0.3, 0.7], [1 - 0.7, 0.7], [0.9, 1 - 0.9]])
    found = pareto.controllability(p, [[1, 5], [1, 5], [2, 5]])
    np.testing.assert_allclose(found["spearman"], [1, 0])
    np.testing.assert_allclose(found["kendall"], [1, 0])


def test_tau_of_prompts_by_hand():
    p = np.array([[0.6, 0.3, 0.1], [1 / 3, 1 / 3, 1 / 3], [0.0, 0.0, 1.0]])
    rewards = np.array([[[3, 2, 1], [1, 2, 3], [3, 1, 2]], np.ones((3, 3)), [[1, 1, 2], [5, 5, 5], [0, 1, 2]]])
    # 1, -1, (2 - 1) / 3; the middle says nothing; 1, 0, and two concordant pairs over sqrt(2 * 3).
    expected = np.mean([1, -1, 1 / 3, 1, 0, 2 / math.sqrt(6)])
    assert pareto.prompt_tau(p, rewards) == pytest.approx(expected)
    assert pareto.prompt_tau(p[:1], rewards[:1, :1]) == pytest.approx(1.0)
    with pytest.raises(UserError, match="equally"):
        pareto.prompt_tau(p[1:2], rewards[1:2])
    with pytest.raises(UserError, match=r"\(3, 3\); give \[preferences, prompts"):
        pareto.prompt_tau(p, p)


def test_sparsity_by_hand():
    # Gaps 1, 2 and 3, 1 between (0, 4), (1, 1), (3, 0); the copy and the dominated point do not count.
    assert sparsity([[1, 1], [0, 4], [3, 0], [1, 1], [0, 0]]) == pytest.approx((1 + 4 + 9 + 1) / 2)
    assert sparsity([[1, 1]]) == sparsity(np.zeros((0, 2))) == 0.0


def test_violations_by_hand():
    p = simplex_grid(2)[::5]  # weights 0, .5, 1
    assert violations(p, [[0, 2], [1, 1], [2, 0]]) == (0, 4)
    assert violations(p, [[0, 2], [-1, 1], [2, 0]]) == (1, 4)
    assert violations(p, [[0, 2], [-1, 1], [2, 0]], tolerance=1.0) == (0, 4)
    assert violations(p[::-1], [[2, 0], [-1, 3], [0, 2]]) == (2, 4)
    # Towards the first corner (.2, .4, .4) passes the centre and (.2, .2, .6) goes straight, three edges; turning the
    # third objective up leads from the centre to (.2, .2, .6), the only other pair in proportion.
    p = np.array([[0.2, 0.4, 0.4], [1 / 3, 1 / 3, 1 / 3], [0.2, 0.2, 0.6], [1, 0, 0]])
    rewards = np.zeros((4, 3))
    assert violations(p, rewards) == (0, 4)
    rewards[1, 0] = 1
    assert violations(p, rewards) == (1, 4)
    rewards[0, 0] = 2
    assert violations(p, rewards) == (2, 4)
    assert violations([[0.5, 0.5]], [[1, 1]]) == (0, 0)
    assert violations(np.repeat([[0.0, 1.0], [1.0, 0.0]], 2, axis=0), np.zeros((4, 2))) == (0, 8)


def test_metrics_do_not_depend_on_the_order_of_points_or_objectives():
    rng = np.random.default_rng(7)
    p, rewards = simplex_grid(3), rng.random((13, 3))
    found = front_metrics(p, rewards, np.zeros(3), targets=p)
    order, turned = rng.permutation(13), rng.permutation(3)
    again = front_metrics(p[order][:, turned], rewards[order][:, turned], np.zeros(3), targets=p[order][:, turned])
    assert again == pytest.approx(found)
    assert 0 < found["violations"] < found["edges"] and 0 < found["dominated"] < 1 and found["eum"] > found["mip"]
    assert front_metrics(p.astype(np.float32), rewards, np.zeros(3), p) == pytest.approx(found)


def test_bad_input_is_named():
    p = simplex_grid(2)
    with pytest.raises(UserError, match="1 of 2 rows are not finite"):
        non_dominated([[1, 2], [math.nan, 0]])
    with pytest.raises(UserError, match=r"points: shape \(3,\)"):
        hypervolume([1, 2, 3], [0])
    for reference in ([0, 0, 0], 0, [0, math.inf]):
        with pytest.raises(UserError, match="each of 2 objectives"):
            hypervolume(p, reference)
    with pytest.raises(ValueError, match="at least two"):
        simplex_grid(1)
    with pytest.raises(UserError, match=r"\(11, 2\) and \(10, 2\)"):
        front_metrics(p, p[:10], [0, 0])
    with pytest.raises(UserError, match=r"targets: shape \(10, 2\)"):
        front_metrics(p, p, [0, 0], targets=p[:10])
    for off in ([0.5, 0.6], [-0.5, 1.5]):
        with pytest.raises(UserError, match="1 of 2 are off the simplex"):
            front_metrics([[0.5, 0.5], off], np.ones((2, 2)), [0, 0])
    with pytest.raises(UserError, match=r"\(11, 2\) and \(1, 3\)"):
        pareto.expected_utility(p, np.ones((1, 3)))


def test_a_metric_from_outside(monkeypatch):
    module = types.ModuleType("metrics_from_outside")
    module.best_reward = lambda front: float(front.rewards.max())
    module.best_reward.__name__ = "best_reward"
    module.nothing = pareto.metric("nothing, %", digits=1, scale=100)(lambda front: None)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    metrics = pareto.chosen_metrics(("metrics_from_outside:best_reward", "metrics_from_outside:nothing"))
    assert list(metrics)[:-2] == list(pareto.METRICS) and list(metrics)[-2:] == ["best_reward", "nothing"]
    front = EvaluatedFront(simplex_grid(2), simplex_grid(2), np.zeros(2))
    found = pareto.front_metrics(front, metrics)
    assert found["best_reward"] == 1.0 and found["nothing"] is None
    assert pareto.described(metrics)["best_reward"] == {
        "heading": "best reward",
        "digits": 3,
        "scale": 1,
        "averaged": True,
    }
    for wrong, message in (("hipervolume", "did you mean hypervolume"), ("math:pi", "is not a function of an Evalu")):
        with pytest.raises(UserError, match=message):
            pareto.chosen_metrics((wrong,))
