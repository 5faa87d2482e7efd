"""Surface features by hand, and the fit against known weights, finite differences and its limits."""

import math

import numpy as np
import pytest
from scipy import optimize, special, stats

from pjrlhf.errors import UserError
from pjrlhf.evaluation import surface
from pjrlhf.evaluation.surface import features, fit, margins

pytestmark = pytest.mark.filterwarnings("error")


def simulate(truth, pairs, seed=0):
    """Differences, users and the weights' own choices: a row of `truth` [U + 1, 6] per user, `pairs` of each but 0."""
    rng = np.random.default_rng(seed)
    users = np.repeat(np.arange(1, len(truth)), pairs)
    x = rng.normal(size=(len(users), truth.shape[1]))
    first = rng.random(len(users)) < special.expit((truth[users] * x).sum(1))
    return np.where(first[:, None], x, -x), users


@pytest.fixture(scope="module")
def people():
    rng = np.random.default_rng(1)
    shared = np.array([1.0, -0.5, 0.0, 0.5, 0.0, -1.0])
    truth = np.vstack([shared, shared + rng.normal(0, 0.5, (5, 6))])
    return truth, *simulate(truth, 500)


def test_features_by_hand():
    answer = "\n# Big cats\n\n- **Lions** roar!\n- Do `cats` purr? Not at 3.5 kHz\n"
    # 7 words in the first three sentences, 5 in the last: the stop inside 3.5 ends none, but its sides are words.
    words = ["big", "cats", "lions", "roar", "do", "cats", "purr", "not", "at", "3", "5", "khz"]
    visible = "".join(answer.split())
    found = dict(zip(surface.NAMES, features("Which CATS purr, and at what pitch?", answer), strict=True))
    assert found == pytest.approx(
        {
            "characters": math.log1p(len(answer.strip())),
            "words per sentence": math.log1p(len(words) / 4),
            "lines": math.log1p(3),
            "non-letters": sum(not c.isalpha() for c in visible) / len(visible),
            "marks": math.log1p(7),  # a heading, two items, two of bold, two of code
            "overlap": 3 / 11,  # cats, purr, at
        }
    )


def test_features_of_odd_answers():
    np.testing.assert_array_equal(features("a prompt", " \n\t"), np.zeros(6))
    np.testing.assert_array_equal(features("", ""), np.zeros(6))
    assert features("x", "...!?")[3] == 1.0 and features("x", "...!?")[5] == 0.0
    np.testing.assert_allclose(features("", "猫です。犬です。")[1:3], [math.log1p(1), math.log1p(1)])
    np.testing.assert_array_equal(features("p", "  padded text. "), features("p", "padded text."))
    np.testing.assert_array_equal(features("p", "a\nb"), features("p", "a\r\nb") - [math.log(5 / 4), 0, 0, 0, 0, 0])
    # A minus inside a line, an asterisk without a space, and a hash tag mark nothing.
    assert features("p", "5 - 3 is *two*\n#cats\n-1")[4] == 0.0
    assert features("p", "uses ``a`b`` here")[4] == math.log1p(3)
    assert features("p", "```\nx = 1\n```\n| a | b |\n1. one")[4] == math.log1p(4)


def test_marks_are_found_in_linear_time():
    for filler in ("`", " ", "\n", "1", "#", "."):
        assert np.isfinite(features("p", "a" + filler * 200_000 + "b")).all()


def test_known_weights_are_recovered(people):
    truth, differences, users = people
    weights = fit(differences, users, 5, l2=1e-3, user_l2=1e-3)
    chance = special.expit((truth[users] * differences).sum(1))
    for user in range(1, 6):
        x, p = differences[users == user], chance[users == user]
        # Errors in units of the Fisher information are standard normal.
        error = weights[user] - truth[user]
        assert error @ (x.T * (p * (1 - p))) @ x @ error < stats.chi2.ppf(0.999, 6)


def test_few_pairs_of_many_people_are_served_best_by_shrunken_deviations():
    rng = np.random.default_rng(2)
    truth = np.vstack([np.zeros(6), rng.normal(0, 0.7, 6) + rng.normal(0, 0.5, (40, 6))])
    train, test = simulate(truth, 30, seed=3), simulate(truth, 300, seed=4)
    loss = {l2: np.logaddexp(0, -margins(fit(*train, 40, user_l2=l2), *test)).mean() for l2 in (0.03, 4.0, math.inf)}
    assert loss[4.0] < loss[math.inf] - 0.01 and loss[4.0] < loss[0.03] - 0.01


def test_swapping_the_answers_flips_the_margin_and_the_weights(people):
    _, differences, users = people
    x = features("p", "Short.") - features("p", "A longer answer, with\n- an item.")
    weights = fit(differences, users, 5)
    assert margins(weights, [x], [2]) == -margins(weights, [-x], [2])
    np.testing.assert_allclose(fit(-differences, users, 5), -weights, atol=1e-6)
    assert (margins(weights, np.zeros((3, 6)), [0, 1, 2]) == 0).all()


def test_the_unit_of_a_feature_does_not_matter(people):
    _, differences, users = people
    unit = np.array([1.0, 1e3, 1e-3, 10.0, 0.1, 7.0])
    np.testing.assert_allclose(fit(differences * unit, users, 5) * unit, fit(differences, users, 5), atol=1e-6)


def test_people_without_pairs_get_the_shared_weights(people):
    _, differences, users = people
    weights = fit(differences, users + 2, 9)
    assert weights.shape == (10, 6)
    for stranger in (1, 2, 8, 9):
        np.testing.assert_array_equal(weights[stranger], weights[0])
    assert (weights[3:8] != weights[0]).all()
    np.testing.assert_allclose(weights[3:8], fit(differences, users, 5)[1:], atol=1e-6)


def test_strong_penalties_give_the_pooled_fit_and_then_nothing(people):
    _, differences, users = people
    pooled = fit(differences, users, 5, user_l2=math.inf)
    np.testing.assert_array_equal(pooled, np.tile(pooled[0], (6, 1)))
    np.testing.assert_allclose(fit(differences, users, 5, user_l2=1e8), pooled, atol=1e-4)
    np.testing.assert_allclose(fit(differences, np.zeros_like(users), 5), pooled, atol=1e-6)
    np.testing.assert_allclose(fit(differences, users, 5, l2=1e9, user_l2=1e9), 0, atol=1e-4)


def test_pooling_is_plain_ridge_logistic_regression():
    # One feature that is always 1: n l2-penalised wins, whose best w solves n sigmoid(-w) = l2 w.
    w = optimize.brentq(lambda w: 30 * special.expit(-w) - 2 * w, 0, 10)
    assert fit(np.ones((30, 1)), np.zeros(30, int), 0, l2=2.0) == pytest.approx(np.array([[w]]), abs=1e-6)
    # Of one person, w and v share the work in proportion to 1 / precision.
    rows = fit(np.ones((30, 1)), np.ones(30, int), 1, l2=3.0, user_l2=6.0)
    assert rows == pytest.approx(np.array([[w * 2 / 3], [w]]), abs=1e-6)


def test_the_gradient_is_that_of_the_objective():
    rng = np.random.default_rng(5)
    x, users, flat = rng.normal(size=(40, 3)), rng.integers(0, 5, 40), rng.normal(size=15)
    arguments = x, users, np.array([[0.5], [2.0], [2.0], [2.0], [2.0]])
    numeric = optimize.approx_fprime(flat, lambda f: surface._objective(f, *arguments)[0], 1e-6)
    np.testing.assert_allclose(surface._objective(flat, *arguments)[1], numeric, atol=1e-5)
    # And the objective is the formula.
    w, v = flat[:3], np.vstack([np.zeros(3), flat[3:].reshape(4, 3)])
    loss = -np.log(special.expit(((w + v[users]) * x).sum(1))).sum() + 0.25 * (w**2).sum() + (v**2).sum()
    assert surface._objective(flat, *arguments)[0] == pytest.approx(loss / 40)


def test_separable_pairs_and_a_dead_feature_stay_finite():
    differences = np.array([[1.0, 0.0], [2.0, 0.0]])
    weights = fit(differences, [1, 2], 2)
    assert np.isfinite(weights).all() and (weights[:, 1] == 0).all() and (weights[:, 0] > 0).all()


def test_the_order_of_the_pairs_does_not_matter(people):
    _, differences, users = people
    order = np.random.default_rng(6).permutation(len(users))
    np.testing.assert_allclose(fit(differences[order], users[order], 5), fit(differences, users, 5), atol=1e-6)


def test_bad_input_is_named():
    x = np.ones((3, 6))
    with pytest.raises(UserError, match="no pairs"):
        fit(np.zeros((0, 6)), np.zeros(0, int), 2)
    with pytest.raises(UserError, match=r"shapes \(3, 6\) and \(2,\)"):
        fit(x, [1, 1], 2)
    with pytest.raises(UserError, match="1 of 3 pairs are not finite"):
        fit(np.vstack([x[:2], np.full(6, math.nan)]), [0, 1, 2], 2)
    for users in ([0, 1, 3], [-1, 0, 1], [0.0, 1.0, 2.0], ["a", "b", "c"]):
        with pytest.raises(UserError, match=r"whole numbers in 0\.\.2"):
            fit(x, users, 2)
    for penalties in ({"l2": 0}, {"user_l2": -1}, {"l2": math.inf}, {"l2": math.nan}, {"user_l2": math.nan}):
        with pytest.raises(UserError, match="not positive"):
            fit(x, [0, 1, 2], 2, **penalties)
    with pytest.raises(UserError, match=r"\(3, 5\) for differences of shape \(3, 6\)"):
        margins(np.ones((3, 5)), x, [0, 1, 2])
    with pytest.raises(UserError, match=r"whole numbers in 0\.\.1"):
        margins(np.ones((2, 6)), x, [0, 1, 2])
