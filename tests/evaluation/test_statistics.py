"""Intervals and rank statistics against what is known in closed form."""

import math

import numpy as np
import pytest

from pjrlhf.errors import UserError
from pjrlhf.evaluation.statistics import bootstrap_interval, chord_gap, kendall, spearman

pytestmark = pytest.mark.filterwarnings("error")


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    samples = rng.choice([1, 0, -1], p=[0.48, 0.2, 0.32], size=(200, 80))
    intervals = np.array([bootstrap_interval(sample, statistic="ratio", resamples=600) for sample in samples])
    covered = np.mean((intervals[:, 0] <= 0.6) & (intervals[:, 1] >= 0.6))
    assert 0.89 <= covered <= 0.99


def test_the_width_is_that_of_the_normal_approximation_where_it_holds():
    values = np.random.default_rng(1).normal(2.0, 3.0, 400)
    low, high = bootstrap_interval(values)
    error = values.std(ddof=1) / 20
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)
    narrow = bootstrap_interval(values, level=0.5)
    assert low < narrow[0] < narrow[1] < high


def test_the_same_seed_gives_the_same_interval():
    values = np.random.default_rng(2).normal(size=50)
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
    assert bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)


@pytest.mark.parametrize("statistic", ["mean", "ratio"])
def test_copies_of_a_row_are_no_evidence(statistic):
    values = np.random.default_rng(4).choice([1.0, 0.0, -1.0], size=40)
    copies, labels = np.repeat(values, 9), np.repeat(np.arange(40), 9)
    honest = bootstrap_interval(copies, labels, statistic)
    assert honest == pytest.approx(bootstrap_interval(values, statistic=statistic))
    naive = bootstrap_interval(copies, statistic=statistic)
    assert (honest[1] - honest[0]) / (naive[1] - naive[0]) == pytest.approx(3.0, rel=0.15)


def test_labels_may_be_text_and_need_no_order():
    values = np.array([1, -1, 1, 1, -1, 0, 1, -1])
    labels = np.array(list("abcdabcd"))
    order = np.argsort(labels, kind="stable")
    assert bootstrap_interval(values, labels, "ratio") == bootstrap_interval(values[order], labels[order], "ratio")


@pytest.mark.parametrize(
    ("values", "clusters", "statistic", "expected"),
    [
        ([0.1] * 7, None, "mean", 0.1),
        ([0.1] * 7, [0, 0, 0, 1, 1, 2, 3], "mean", 0.1),
        ([5.0], None, "mean", 5.0),
        ([0.0, 0.0], None, "mean", 0.0),
        ([1.0, 3.0], [0, 0], "mean", 2.0),
        ([1, 1, 1], None, "ratio", 1.0),
        ([-1, -1, 0], None, "ratio", 0.0),
        ([1, 0, 0, 0], None, "ratio", 1.0),
        ([1, -1, 1, -1], [0, 0, 1, 1], "ratio", 0.5),
    ],
)
def test_without_spread_both_ends_are_the_statistic(values, clusters, statistic, expected):
    assert bootstrap_interval(values, clusters, statistic) == pytest.approx((expected, expected))


def test_nothing_to_count_is_nan():
    for values, statistic in [([], "mean"), ([], "ratio"), ([0, 0, 0], "ratio")]:
        assert all(math.isnan(end) for end in bootstrap_interval(values, statistic=statistic))


def test_ties_do_not_leave_resamples_without_a_denominator():
    # One decided value in twenty: one in eight plain resamples would hold none and divide by zero.
    low, high = bootstrap_interval([1, -1] + [0] * 38, statistic="ratio")
    assert 0 <= low < high <= 1


def test_small_and_lopsided_samples_stay_finite():
    for n in range(2, 12):
        for wins in range(1, n):
            low, high = bootstrap_interval([1] * wins + [-1] * (n - wins), statistic="ratio", resamples=300)
            assert 0 <= low <= wins / n <= high <= 1


def test_bad_input_is_named():
    with pytest.raises(UserError, match="2 of 3 are not finite"):
        bootstrap_interval([1.0, math.nan, math.inf])
    with pytest.raises(UserError, match="2 labels for 3 values"):
        bootstrap_interval([1.0, 2.0, 3.0], [0, 1])
    with pytest.raises(UserError, match="median"):
        bootstrap_interval([1.0, 2.0], statistic="median")


def test_rank_correlations():
    x = [0, 1, 2, 3]
    assert spearman(x, np.exp(x)) == kendall(x, np.exp(x)) == pytest.approx(1.0)
    assert spearman(x, [9, 4, 1, 0]) == kendall(x, [9, 4, 1, 0]) == pytest.approx(-1.0)
    # One swap of neighbours: rho = 1 - 6 * 2 / (4 * 15), tau = (5 - 1) / 6.
    assert spearman(x, [0, 2, 1, 3]) == pytest.approx(0.8)
    assert kendall(x, [0, 2, 1, 3]) == pytest.approx(2 / 3)
    for test in (spearman, kendall):
        assert test(x, [5, 5, 5, 5]) == test([2, 2], [0, 1]) == test([1], [1]) == 0.0


def test_chord_gap_of_a_parabola():
    # w (1 - w) is 0 at both ends, so the gap is the function itself, whatever straight line is added.
    w = np.linspace(0, 1, 5)
    gap = chord_gap(w, w * (1 - w) + 3 - 2 * w)
    assert gap == pytest.approx({"mean": (3 / 16 + 1 / 4 + 3 / 16) / 3, "min": 3 / 16, "max": 1 / 4})
    mirrored = chord_gap(w[::-1], -(w * (1 - w))[::-1])
    assert mirrored == pytest.approx({"mean": -gap["mean"], "min": -gap["max"], "max": -gap["min"]})
    assert chord_gap(w, 4 * w - 1) == pytest.approx({"mean": 0, "min": 0, "max": 0}, abs=1e-12)


def test_chord_gap_without_a_middle():
    assert chord_gap([0, 1], [5, 2]) == {"mean": 0.0, "min": 0.0, "max": 0.0}
    with pytest.raises(UserError, match="two different ends"):
        chord_gap([0.5, 0.5], [1, 2])
