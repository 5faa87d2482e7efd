"""Which question tells most: closed forms, exact posteriors, and a simulation in which the choice has to pay."""

import numpy as np
import pytest
from scipy.special import expit, xlogy

from pjrlhf.serving.people.questions import expected_information


def information(margins, gradients, seen_margins=(), seen_gradients=None, variance=1.0):
    gradients = np.asarray(gradients, float)
    seen = np.zeros((0, gradients.shape[1])) if seen_gradients is None else np.asarray(seen_gradients, float)
    return expected_information(np.asarray(margins, float), gradients, np.asarray(seen_margins, float), seen, variance)


def entropy(p):
    return -(xlogy(p, p) + xlogy(1 - p, 1 - p))


@pytest.mark.parametrize("variance", [0.01, 0.9, 1.1, 30.0, 1e4])
def test_without_answers_it_is_the_integral_over_the_prior(variance):
    margins, slopes = np.array([0.0, 0.7, -3.0]), np.array([[1.0], [2.0], [0.5]])
    w = np.linspace(-9, 9, 400_001) * variance**0.5
    prior = np.exp(-(w**2) / (2 * variance))
    prior /= prior.sum()
    p = expit(margins[:, None] + slopes * w)
    mean = p @ prior
    found, chance = information(margins, slopes, variance=variance)
    np.testing.assert_allclose(chance, mean, atol=2e-5)
    np.testing.assert_allclose(found, entropy(mean) - entropy(p) @ prior, atol=2e-5)


def test_a_little_doubt_tells_half_the_variance_of_the_margin_times_that_of_the_answer():
    margins = np.linspace(-4, 4, 9)
    p = expit(margins)
    found, _ = information(margins, np.ones((9, 1)), variance=1e-4)
    np.testing.assert_allclose(found, p * (1 - p) * 1e-4 / 2, rtol=1e-3)


def test_what_was_answered_narrows_the_posterior():
    """The precision is that of the prior and of every answer, in many dimensions as in few."""
    rng = np.random.default_rng(0)
    for D, N in ((3, 20), (200, 5)):
        new, seen, margins = rng.normal(size=(7, D)), rng.normal(size=(N, D)), rng.normal(size=N)
        p = expit(margins)
        covariance = np.linalg.inv(np.eye(D) / 2.0 + (seen * (p * (1 - p))[:, None]).T @ seen)
        spread = np.einsum("md,de,me->m", new, covariance, new)
        want, chance = information(np.ones(7), np.sqrt(spread)[:, None])
        found, got = information(np.ones(7), new, margins, seen, variance=2.0)
        np.testing.assert_allclose(found, want, rtol=1e-8)
        np.testing.assert_allclose(got, chance, rtol=1e-8)


def fitted(features, answers):
    """The mode of the posterior of a logistic model with prior N(0, I)."""
    w = np.zeros(features.shape[1])
    for _ in range(30):
        p = expit(features @ w)
        precision = np.eye(len(w)) + (features * (p * (1 - p))[:, None]).T @ features
        w = w - np.linalg.solve(precision, w - features.T @ (answers - p))
    return w


def test_it_is_near_that_of_the_exact_posterior():
    rng = np.random.default_rng(1)
    seen, answers, new = rng.normal(size=(6, 2)), rng.integers(2, size=6), rng.normal(size=(40, 2)) * 2
    axis = np.linspace(-6, 6, 301)
    grid = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
    chances = expit(grid @ seen.T)
    posterior = np.exp(-(grid**2).sum(1) / 2) * np.where(answers, chances, 1 - chances).prod(1)
    posterior /= posterior.sum()
    p = expit(grid @ new.T)
    exact = entropy(posterior @ p) - posterior @ entropy(p)
    w = fitted(seen, answers)
    found, _ = information(new @ w, new, seen @ w, seen)
    assert np.corrcoef(exact, found)[0, 1] > 0.97
    assert exact[np.argmax(found)] > 0.95 * exact.max()
    np.testing.assert_allclose(found, exact, atol=0.04)


def pref_rule(w, new, seen):
    """sigma'(w.v)^2 v' S v with the covariance S of the posterior (PReF, arXiv 2503.06358)."""
    p, q = expit(new @ w), expit(seen @ w)
    covariance = np.linalg.inv(np.eye(len(w)) + (seen * (q * (1 - q))[:, None]).T @ seen)
    return (p * (1 - p)) ** 2 * np.einsum("md,de,me->m", new, covariance, new)


def accuracy(rule, seed, asked=6, dimensions=3, pool=40):
    """On new pairs, after some questions to a person with linear preferences; most pairs of the pool hardly differ."""
    rng = np.random.default_rng(seed)
    w = rng.normal(size=dimensions)
    pairs = rng.normal(size=(pool, dimensions)) * np.where(rng.random((pool, 1)) < 0.75, 0.3, 1.5)
    answers = rng.random(pool) < expit(pairs @ w)
    new = rng.normal(size=(300, dimensions))
    order, chosen = rng.permutation(pool).tolist(), []
    for _ in range(asked):
        found = fitted(pairs[chosen], answers[chosen])
        rest = [i for i in order if i not in chosen]
        if rule == "information":
            scores, _ = information(pairs[rest] @ found, pairs[rest], pairs[chosen] @ found, pairs[chosen])
        else:
            scores = pref_rule(found, pairs[rest], pairs[chosen]) if rule == "pref" else -np.arange(len(rest))
        chosen.append(rest[int(np.argmax(scores))])
    return ((new @ fitted(pairs[chosen], answers[chosen]) > 0) == (new @ w > 0)).mean()


def test_informative_questions_pay():
    """Forty people, the same pool for each rule: PReF's rule and ours ask about as well, and far better than chance."""
    random, ours, pref = (
        np.array([accuracy(rule, seed) for seed in range(40)]) for rule in ("random", "information", "pref")
    )
    gain = ours - random
    assert gain.mean() > 0.05 and gain.mean() > 3 * gain.std() / np.sqrt(len(gain))
    assert abs(ours.mean() - pref.mean()) < 0.03
