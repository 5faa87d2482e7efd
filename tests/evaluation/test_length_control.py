"""Win rates at equal lengths: closed forms, simulated judges that like length, and an optimizer of another library."""

import math

import numpy as np
import pytest
from scipy import optimize, special

from pjrlhf.evaluation.length_control import Comparisons, about_length, fit, length_controlled

FEW = {"resamples": 200}


def one(verdicts, lengths, baseline, instructions=None, **options):
    instructions = range(len(verdicts)) if instructions is None else instructions
    return length_controlled({"m": Comparisons(verdicts, lengths, baseline, instructions)}, **(FEW | options))["m"]


@pytest.mark.parametrize("instructions", [None, [0, 0, 1, 1, 2, 2]])
def test_at_equal_lengths_length_control_changes_nothing(instructions):
    """The scores of a logistic regression with an intercept sum to 0, so that its mean is that of the wins."""
    verdicts = np.array([1, 1, -1, 0, 0.5, math.nan])
    found = one(verdicts, np.full(6, 9), np.full(6, 9), instructions)
    assert found.controlled == pytest.approx(3.25 / 5, abs=1e-4) and found.low < found.controlled < found.high
    assert found.form == ("minimal" if instructions is None else "instructions") and found.length_effect == 0


def test_without_a_verdict_there_is_no_rate():
    found = one([math.nan], [1], [2])
    assert math.isnan(found.controlled) and math.isnan(found.low) and math.isnan(found.length_effect)
    assert length_controlled({}) == {}


def test_two_differences_of_lengths_have_a_closed_form():
    """Answers that are longer win 80 %, shorter ones 40 %: at equal lengths the log-odds lie in the middle."""
    n = 100_000
    longer, verdicts = np.arange(n) % 2, np.ones(n)
    verdicts[::2][: int(0.6 * n / 2)] = -1
    verdicts[1::2][: int(0.2 * n / 2)] = -1
    found = one(verdicts, np.where(longer, 30, 10), np.full(n, 20), resamples=4)
    expected = special.expit((special.logit(0.8) + special.logit(0.4)) / 2)
    assert found.controlled == pytest.approx(expected, abs=1e-4)
    assert found.length_effect * np.tanh(1) == pytest.approx((special.logit(0.8) - special.logit(0.4)) / 2, abs=1e-3)


def simulated(seed, models=(0.3, -0.8, 0.9, 0.0), instructions=300, difficulty=1.5, effect=1.5, repeats=1):
    """(comparisons by a judge that likes length, the true rates at equal lengths)."""
    rng = np.random.default_rng(seed)
    gamma = difficulty * rng.standard_normal(instructions)
    found, true = {}, {}
    for m, theta in enumerate(models):
        x = np.tile(np.arange(instructions), repeats)
        baseline = rng.integers(20, 400, len(x))
        lengths = rng.integers(20, 400, len(x)) + 80  # every model writes more, which its raw rate gains from
        difference = lengths - baseline
        logits = theta + effect * np.tanh(difference / difference.std()) + gamma[x]
        verdicts = np.where(rng.random(len(x)) < special.expit(logits), 1, -1)
        found[f"m{m}"] = Comparisons(verdicts, lengths, baseline, x)
        true[f"m{m}"] = special.expit(theta + gamma).mean()
    return found, true


def test_the_minimal_form_recovers_the_rate_at_equal_lengths():
    models, true = simulated(0, (0.3,), 20_000, difficulty=0.0)
    found = length_controlled(models, resamples=20)["m0"]
    assert found.form == "minimal" and found.length_effect == pytest.approx(1.5, abs=0.1)
    assert found.controlled == pytest.approx(true["m0"], abs=0.01)
    assert (1 + models["m0"].verdicts.mean()) / 2 > true["m0"] + 0.05


def test_several_models_on_the_same_instructions_tell_their_difficulty():
    """The rates and the effect of length, which the minimal form understates where instructions differ much."""
    errors, raw, covered, effects, minimal = [], [], [], [], []
    for seed in range(6):
        models, true = simulated(seed)
        for name, found in length_controlled(models, **FEW).items():
            errors.append(found.controlled - true[name])
            raw.append((1 + models[name].verdicts.mean()) / 2 - true[name])
            covered.append(found.low <= true[name] <= found.high)
            assert found.form == "instructions"
            effects.append(found.length_effect)
            minimal.append(length_controlled({name: models[name]}, resamples=2)[name].length_effect)
    assert abs(np.mean(errors)) < 0.02 < 0.06 < np.mean(raw)
    assert np.mean(covered) >= 0.8
    assert abs(np.mean(effects) - 1.5) < abs(np.mean(minimal) - 1.5)


def test_several_comparisons_of_one_model_tell_it_too():
    models, true = simulated(0, (0.5,), 100, repeats=20)
    found = length_controlled(models, **FEW)["m0"]
    assert found.form == "instructions" and found.controlled == pytest.approx(true["m0"], abs=0.03)
    assert found.length_effect == pytest.approx(1.5, abs=0.15)


def test_whole_instructions_are_drawn():
    """Comparisons of one instruction say the same, so repeating them makes no interval narrower."""
    models, _ = simulated(1, (0.3,), 100, effect=0.0)
    m = models["m0"]
    once = one(m.verdicts, m.lengths, m.baseline, m.instructions, resamples=1000)
    often = one(*(np.tile(x, 9) for x in (m.verdicts, m.lengths, m.baseline, m.instructions)), resamples=1000)
    assert often.high - often.low > 0.6 * (once.high - once.low)


@pytest.mark.parametrize("count", [1, 3])
def test_swapping_the_answers_turns_rates_around(count):
    models, _ = simulated(2, (0.3, -0.2, 0.8)[:count], 60)
    turned = {
        name: Comparisons(-np.asarray(m.verdicts), m.baseline, m.lengths, m.instructions) for name, m in models.items()
    }
    for name, found in length_controlled(models, **FEW).items():
        other = length_controlled(turned, **FEW)[name]
        assert other.controlled == pytest.approx(1 - found.controlled, abs=1e-3)
        assert (other.low, other.high) == pytest.approx((1 - found.high, 1 - found.low), abs=1e-3)
        assert other.length_effect == pytest.approx(found.length_effect, abs=1e-3)


def test_coefficients_are_those_of_a_general_optimizer():
    rng = np.random.default_rng(0)
    features = np.stack([np.ones(50), *rng.standard_normal((2, 50))], axis=1)
    wins, counts = rng.random(50), rng.integers(0, 4, (3, 50))
    penalty, prior = np.array([0.0, 1.0, 2.0]), np.array([0.0, 0.0, 1.0])

    def loss(weights, counts):
        logits = features @ weights
        return counts @ (np.logaddexp(0, logits) - wins * logits) + penalty @ (weights - prior) ** 2 / 2

    found = fit(features, wins, counts, penalty, prior)
    for weights, own in zip(found, counts, strict=True):
        expected = optimize.minimize(loss, prior, (own,), tol=1e-10).x
        np.testing.assert_allclose(weights, expected, atol=1e-5)


def test_who_always_wins_has_all_of_them():
    found = one(np.ones(40), np.arange(40), np.arange(40)[::-1], np.arange(40) // 2)
    assert [found.controlled, found.low, found.high] == pytest.approx([1.0] * 3, abs=1e-3)


@pytest.mark.parametrize(("text", "found"), [("It is brief.", True), ("words:long", True), ("polite", False)])
def test_criteria_about_length(text, found):
    assert about_length(text) == found
