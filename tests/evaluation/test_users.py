"""Statistics of user models in closed form."""

import math

import numpy as np
import pytest
from scipy import special

from pjrlhf.errors import UserError
from pjrlhf.evaluation.users import (
    accuracy_by,
    by_powers_of_two,
    calibration_error,
    choice_accuracy,
    cold_start_curve,
    length_matched,
    paired_gain,
    principal_axes,
    rate_of_people,
    user_accuracy,
)

pytestmark = pytest.mark.filterwarnings("error")

# anna: 3 of 4, bert: 1 of 2, cleo: 0 of 1.
MARGINS = np.array([1.0, -1.0, 0.5, 2.0, -3.0, 0.1, -0.1])
USERS = np.array(["anna", "bert", "anna", "anna", "anna", "bert", "cleo"])
TASTES = {"anna": "short", "bert": "short", "cleo": "long"}


def test_people_weigh_the_same_in_the_mean_and_pairs_in_the_micro_average():
    found = user_accuracy(MARGINS, USERS, groups=TASTES, resamples=100)
    assert found["mean"] == pytest.approx((3 / 4 + 1 / 2 + 0) / 3)
    assert found["micro"] == pytest.approx(4 / 7)
    assert found["worst"] == found["worst_decile"] == 0.0
    assert found["majority"] == pytest.approx(5 / 8) and found["minority"] == 0.0
    assert found["low"] <= found["mean"] <= found["high"] and found["pairs"] == 7
    assert found["users"] == {
        "anna": {"accuracy": 0.75, "pairs": 4, "group": "short"},
        "bert": {"accuracy": 0.5, "pairs": 2, "group": "short"},
        "cleo": {"accuracy": 0.0, "pairs": 1, "group": "long"},
    }


def test_people_weigh_the_same_however_many_answers_they_judge():
    verdicts = [1.0, 0.0, 1.0, -1.0, math.nan, -0.5, math.nan]
    found = rate_of_people(verdicts, ["anna", "anna", "anna", "bert", "bert", "cleo", "dora"], resamples=100)
    assert found["users"] == pytest.approx({"anna": 5 / 6, "bert": 0.0, "cleo": 0.25})
    assert found["mean"] == pytest.approx((5 / 6 + 0 + 0.25) / 3) and found["ties"] == 1 / 5 and found["n"] == 5
    assert found["low"] <= found["mean"] <= found["high"]
    nobody = rate_of_people([math.nan], ["anna"])
    assert nobody["users"] == {} and nobody["n"] == 0 and math.isnan(nobody["mean"]) and math.isnan(nobody["ties"])
    with pytest.raises(UserError, match="users: 1 for 2 verdicts"):
        rate_of_people([1.0, 1.0], ["anna"])


def test_only_the_sign_counts_and_a_tie_is_no_hit():
    found = user_accuracy([0.0, -0.0, 1e-30, math.inf, -math.inf], ["a"] * 5)
    assert found["mean"] == 0.4 and found["low"] == found["high"] == 0.4
    assert user_accuracy(MARGINS * 1e6, USERS) == user_accuracy(MARGINS, USERS)
    assert user_accuracy(np.zeros(6), np.repeat(["a", "b"], 3))["mean"] == 0.0


def test_the_worst_tenth_of_forty_people_are_four():
    # Person i is right on i of 40 pairs, in an order that does not give the answer away.
    people = np.random.default_rng(0).permutation(40)
    margins = np.concatenate([np.where(np.arange(40) < i, 1.0, -1.0) for i in people])
    users = np.repeat([f"user{i}" for i in people], 40)
    found = user_accuracy(margins, users)
    assert found["worst"] == 0.0
    assert found["worst_decile"] == pytest.approx(np.mean([0, 1, 2, 3]) / 40)
    kept = np.isin(users, [f"user{i}" for i in range(1, 40)])
    assert user_accuracy(margins[kept], users[kept])["worst_decile"] == pytest.approx(np.mean([1, 2, 3]) / 40)


def test_the_result_depends_on_the_seed_but_not_on_the_order_of_the_pairs():
    rng = np.random.default_rng(1)
    margins, users = rng.normal(size=400), rng.choice([f"u{i}" for i in range(20)], 400)
    order = rng.permutation(400)
    found = user_accuracy(margins, users, seed=3)
    assert found == user_accuracy(margins[order], users[order], seed=3)
    assert (found["low"], found["high"]) != tuple(user_accuracy(margins, users, seed=4)[k] for k in ("low", "high"))


def test_the_interval_is_over_people_not_pairs():
    # Ten people right on everything or nothing: a thousand pairs each add no evidence about people.
    few = user_accuracy(np.repeat([1.0, -1.0], 5), [f"u{i}" for i in range(10)])
    many = user_accuracy(np.repeat([1.0, -1.0], 5000), np.repeat([f"u{i}" for i in range(10)], 1000))
    assert (few["low"], few["high"]) == (many["low"], many["high"])
    assert few["high"] - few["low"] > 0.4


@pytest.mark.parametrize(
    "groups, present",
    [
        (None, set()),
        ({"anna": "x", "bert": "x", "cleo": "x"}, {"majority"}),
        ({"anna": "x", "bert": "y", "cleo": "z"}, set()),
        # Whoever is not measured still says which persona is the largest.
        (TASTES | {"dora": "long", "emil": "long"}, {"majority", "minority"}),
    ],
)
def test_majority_and_minority_only_where_they_exist(groups, present):
    found = user_accuracy(MARGINS, USERS, groups=groups)
    assert {"majority", "minority"} & set(found) == present
    if len(present) == 2:
        assert found["majority"] == 0.0 and found["minority"] == pytest.approx(5 / 8)


def test_bad_input_is_named():
    with pytest.raises(UserError, match="2 of 3 are nan"):
        user_accuracy([math.nan, 1.0, math.nan], ["a", "b", "c"])
    with pytest.raises(UserError, match="1 of 1 are nan"):
        length_matched([math.nan], ["a"], [1], [1])
    with pytest.raises(UserError, match="no pairs"):
        user_accuracy([], [])
    with pytest.raises(UserError, match="users: 1 for 2"):
        user_accuracy([1.0, 2.0], ["a"])
    with pytest.raises(UserError, match="1 people, first 'cleo'"):
        user_accuracy(MARGINS, USERS, groups={"anna": "x", "bert": "y"})
    with pytest.raises(UserError, match="fraction 0"):
        length_matched(MARGINS, USERS, np.ones(7), np.ones(7), fraction=0)
    with pytest.raises(UserError, match="lengths: 6 and 7"):
        length_matched(MARGINS, USERS, np.ones(6), np.ones(7))
    with pytest.raises(UserError, match="negative or not finite"):
        length_matched(MARGINS, USERS, np.ones(7), -np.ones(7))


def test_length_matching_keeps_the_relatively_closest_quarter():
    # Relative differences .5, .1, .5, 0, .9, .5, .2, 1: two of eight are kept, 7 to 7 and 90 to 100, though 1 to 2 is
    # the smaller absolute difference.
    chosen = np.array([1, 90, 2, 7, 10, 50, 8, 0])
    rejected = np.array([2, 100, 1, 7, 1, 100, 10, 5])
    margins = np.array([1.0, 1.0, 1.0, -1.0, 1.0, 1.0, 1.0, 1.0])
    users = np.array(["a", "a", "a", "b", "b", "b", "a", "b"])
    found = length_matched(margins, users, chosen, rejected, groups={"a": "x", "b": "y", "c": "y"}, resamples=50)
    assert found["pairs"] == 2 and found["max_difference"] == pytest.approx(0.1)
    assert found["users"]["a"]["accuracy"] == 1.0 and found["users"]["b"]["accuracy"] == 0.0
    assert found["majority"] == 0.0
    everything = length_matched(margins, users, chosen, rejected, fraction=1.0)
    assert everything == user_accuracy(margins, users) | {"max_difference": 1.0}


def test_pairs_that_differ_alike_are_kept_together():
    found = length_matched(MARGINS, USERS, np.zeros(7), np.zeros(7))
    assert found == user_accuracy(MARGINS, USERS) | {"max_difference": 0.0}


def test_kinds_of_people_are_counted_apart():
    users, kinds = list("aabbcd"), {"a": "new", "c": "old", "b": "new", "z": "nobody"}
    found = accuracy_by([1, -1, 1, 1, 0, 5], users, kinds, resamples=100)
    assert list(found) == ["new", "old"]  # without those of no kind, and kinds without people
    assert found["new"]["mean"] == 0.75 and found["new"]["users"] == 2 and found["old"]["mean"] == 0
    assert found["new"]["low"] <= 0.75 <= found["new"]["high"]


def test_ranges_between_powers_of_two():
    counts = {"a": 16, "b": 0, "c": 3, "d": 1, "e": 2, "f": 31, "g": 7}
    ranges = {"b": "0", "d": "1", "e": "2-3", "c": "2-3", "g": "4-7", "a": "16-31", "f": "16-31"}
    assert by_powers_of_two(counts) == ranges and next(iter(by_powers_of_two(counts))) == "b"


def test_the_cold_start_curve_counts_people_and_rises_in_k():
    curve = cold_start_curve({16: [1.0, 1.0], 2: [0.5, 0.7, 0.9], 0: [0.6]}, resamples=100)
    assert list(curve) == ["0", "2", "16"]
    assert curve["0"] == {"mean": 0.6, "low": 0.6, "high": 0.6, "users": 1}
    assert curve["2"]["mean"] == pytest.approx(0.7) and curve["2"]["users"] == 3
    assert 0.5 <= curve["2"]["low"] < 0.7 < curve["2"]["high"] <= 0.9
    with pytest.raises(UserError, match="with 4 comparisons"):
        cold_start_curve({4: []})
    with pytest.raises(UserError, match="not finite"):
        cold_start_curve({1: [0.5, math.nan]})


def test_the_axes_are_the_principal_ones():
    rng = np.random.default_rng(2)
    rotation, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    spread = rng.normal(size=(200, 6)) * np.array([5.0, 2.0, 0.1, 0.1, 0.1, 0.1])
    vectors = spread @ rotation + 7.0
    points = principal_axes(vectors)
    values = np.linalg.eigvalsh(np.cov(vectors.T))[::-1]
    np.testing.assert_allclose(np.cov(points.T), np.diag(values[:2]), atol=1e-9)
    np.testing.assert_allclose(points.mean(0), 0, atol=1e-9)


def test_the_axes_have_one_sign_and_do_not_depend_on_the_order_of_the_people():
    rng = np.random.default_rng(3)
    vectors = rng.normal(size=(12, 2, 4)).astype(np.float32)  # user tokens are flattened
    points, order = principal_axes(vectors), rng.permutation(12)
    np.testing.assert_array_equal(points, principal_axes(vectors))
    np.testing.assert_allclose(principal_axes(vectors[order]), points[order], atol=1e-9)
    np.testing.assert_allclose(principal_axes(vectors + 3.0), points, atol=1e-5)
    # Along (1, -1) both loadings are equally large: the first decides, whatever rounding says.
    np.testing.assert_allclose(principal_axes([[1, -1], [-1, 1]]), [[math.sqrt(2), 0], [-math.sqrt(2), 0]], atol=1e-9)


@pytest.mark.parametrize("vectors", [np.ones((1, 3)), np.ones((4, 3)), np.ones((3, 1))])
def test_people_who_do_not_differ_lie_on_one_point(vectors):
    np.testing.assert_array_equal(principal_axes(vectors), np.zeros((len(vectors), 2)))


def test_vectors_must_be_finite():
    with pytest.raises(UserError, match="not finite"):
        principal_axes([[0.0, math.nan], [1.0, 2.0]])


# ---- gains and questions


def people(**accuracies):
    return {name: {"accuracy": value} for name, value in accuracies.items()}


def test_a_gain_is_counted_person_by_person():
    one, other = people(ann=0.9, bob=0.6, eve=0.2, new=1.0), people(bob=0.5, ann=0.7, eve=0.2, old=0.0)
    found = paired_gain(one, other, resamples=200)
    assert found["mean"] == pytest.approx((0.2 + 0.1 + 0.0) / 3) and found["users"] == 3
    assert found["low"] <= found["mean"] <= found["high"]
    back = paired_gain(other, one, resamples=200)
    assert back["mean"] == pytest.approx(-found["mean"])
    # People differ more than the models do: what they share does not widen the interval.
    ann, spread = np.linspace(0, 0.8, 30), 0.01 * np.arange(30) / 30
    found = paired_gain(
        people(**{f"u{i}": a + 0.1 + s for i, (a, s) in enumerate(zip(ann, spread, strict=True))}),
        people(**{f"u{i}": a for i, a in enumerate(ann)}),
    )
    assert 0.1 < found["low"] < found["high"] < 0.11


def test_a_gain_over_nobody():
    with pytest.raises(UserError, match="gain: no person is in both models"):
        paired_gain(people(ann=1.0), people(bob=1.0))


def test_a_question_is_right_when_its_option_beats_all_others():
    questions = ["a", "b", "a", "b", "a", "c"]
    found = choice_accuracy([0.1, 1.0, 2.0, 0.0, 3.0, -1.0], questions, resamples=100)
    assert found["mean"] == pytest.approx(1 / 3), "a is right; b is tied with one, c is wrong"
    assert found["chance"] == pytest.approx((1 / 4 + 1 / 3 + 1 / 2) / 3) and found["questions"] == 3
    # Guessing is right as often as it says.
    scores = np.random.default_rng(0).normal(size=(4000, 4))
    margins = (scores[:, :1] - scores[:, 1:]).ravel()
    found = choice_accuracy(margins, np.repeat(np.arange(4000), 3).astype(str), resamples=100)
    assert found["mean"] == pytest.approx(found["chance"], abs=0.03) and found["chance"] == 0.25
    with pytest.raises(UserError, match="1 of 2 are nan"):
        choice_accuracy([1.0, math.nan], ["a", "b"])


def test_calibration_error():
    """Confident and right half of the time is off by a half less the rest; certainty that comes true is not."""
    sure = special.logit(0.9)
    assert calibration_error([sure] * 9 + [-sure]) == pytest.approx(0.0)
    assert calibration_error([sure, -sure]) == pytest.approx(0.4)
    assert calibration_error([0.0, 0.0]) == pytest.approx(0.5), "a tie is no hit"
    assert calibration_error([50.0]) == pytest.approx(0.0)
    # Bins keep errors of different confidence from cancelling.
    low = special.logit(0.6)
    assert calibration_error([sure] * 2 + [low, -low]) == pytest.approx((2 * 0.1 + 2 * 0.1) / 4)
    with pytest.raises(UserError, match="margins: 1 of 2 are nan"):
        calibration_error([np.nan, 1.0])
