"""Counting: outcomes per prompt and the rates made from them."""

import dataclasses
import itertools
import math

import numpy as np
import pytest

from pjrlhf.errors import UserError
from pjrlhf.evaluation.winrate import aggregate, win_rate
from pjrlhf.judges.judge import ScoreJudge, combo_outcomes
from pjrlhf.rewards.scorers import scorer

TABLE = np.array([[1, 1, -1], [1, 0, -1], [-1, -1, 1], [0, 0, 0], [1, 0, 0], [0, -1, 0], [1, 1, 1]], np.int8)


JUDGE = ScoreJudge(lambda prompt, text, name: scorer(name)(prompt, text))


def test_outcomes_have_one_column_per_criterion_in_order():
    a, b = ['one "two"', "x"], ["one", "x y z"]
    outcomes = combo_outcomes(
        JUDGE,
        ["p", "q"],
        a,
        b,
        ("long", "short", "dialogue"),
    )
    assert outcomes.tolist() == [[1, -1, 1], [-1, 1, 0]]
    with pytest.raises(UserError, match="empty"):
        combo_outcomes(JUDGE, ["p", "q"], a, b, ())


def test_the_side_with_more_criteria_wins_the_prompt():
    assert aggregate(TABLE).tolist() == [1, 0, -1, 0, 1, -1, 1]
    assert aggregate(-TABLE).tolist() == (-aggregate(TABLE)).tolist()


def test_the_sum_does_not_overflow_the_small_type():
    assert aggregate(np.ones((1, 200), np.int8)).tolist() == [1]


def test_criteria_on_their_own_count_each_once():
    rate = win_rate(aggregate(TABLE, "mean"))
    assert (rate.wins, rate.losses, rate.ties, rate.n) == (8, 5, 8, 21)
    assert rate.rate_half == pytest.approx(((TABLE.mean(1) + 1) / 2).mean())
    with pytest.raises(UserError, match="sum_sign or mean"):
        aggregate(TABLE, "median")


def test_every_way_to_three_outcomes():
    for outcomes in itertools.product((-1, 0, 1), repeat=3):
        rate = win_rate(np.array(outcomes), resamples=50)
        assert rate.wins + rate.losses + rate.ties == rate.n == 3
        mirror = win_rate(-np.array(outcomes), resamples=50)
        assert (mirror.wins, mirror.losses, mirror.ties) == (rate.losses, rate.wins, rate.ties)
        assert rate.rate_half + mirror.rate_half == pytest.approx(1.0)
        if rate.wins + rate.losses:
            assert rate.rate == rate.wins / (rate.wins + rate.losses)
            assert 0 <= rate.low <= rate.high <= 1
        else:
            assert math.isnan(rate.rate) and math.isnan(rate.low) and math.isnan(rate.high)


def test_nothing_to_count():
    rate = win_rate(np.zeros((0, 3)))
    assert rate.n == 0 and math.isnan(rate.rate) and math.isnan(rate.rate_half)


def test_combinations_of_one_prompt_share_its_cluster():
    # Every prompt has one outcome, told eight times: no more is known than from telling it once.
    once = np.repeat([1, -1], [20, 12])
    told = np.repeat(once[:, None], 8, axis=1)
    first, eight = win_rate(once), win_rate(told)
    assert eight.n == 8 * first.n and eight.rate == first.rate
    assert (eight.low, eight.high) == (first.low, first.high)
    flat = win_rate(told.ravel(), np.repeat(np.arange(32), 8))
    assert dataclasses.asdict(flat) == dataclasses.asdict(eight)
    naive = win_rate(told.ravel())
    assert naive.high - naive.low < 0.6 * (eight.high - eight.low)


def test_outcomes_beyond_a_win_are_refused():
    with pytest.raises(UserError, match="outcomes"):
        win_rate(np.array([0, 1, 3]))


def test_missing_verdicts_are_counted_and_change_no_rate():
    outcomes = np.array([[1, -1], [0, 1], [1, 1], [-1, 0]], float)
    hole = np.vstack([outcomes, [[math.nan, 1]]])
    with_hole = np.vstack([hole, [[math.nan, math.nan]]])
    found, without = win_rate(with_hole), win_rate(np.append(outcomes.ravel(), 1), [0, 0, 1, 1, 2, 2, 3, 3, 4])
    assert found.unjudged == 3 and found.n == 9
    assert dataclasses.replace(found, unjudged=0) == without
    # A combination with a missing verdict has no outcome, not that of the others.
    np.testing.assert_array_equal(aggregate(hole), [0, 1, 1, -1, math.nan])


def test_a_soft_verdict_is_part_of_a_win():
    rate = win_rate(np.array([0.5, -0.2, 0.0, 1.0]))
    assert (rate.wins, rate.losses, rate.ties) == (2, 1, 1)
    assert rate.rate_half == pytest.approx((0.75 + 0.4 + 0.5 + 1) / 4) and rate.rate == pytest.approx(2 / 3)
