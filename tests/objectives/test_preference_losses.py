"""Pairwise losses against published definitions, and the mixture of personal and generic rows."""

import inspect
import json
import pathlib
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjrlhf.objectives.preference import (
    PAIRWISE,
    implicit_rewards,
    mixture,
    pairwise_loss,
    sft_term,
    takes,
    user_dropout,
)

# Written by tests/golden/make_losses.py from the definitions in the papers, in float64.
GOLDEN = json.loads((pathlib.Path(__file__).parent.parent / "golden" / "losses.json").read_text())
INPUTS = {name: np.array(values, np.float32) for name, values in GOLDEN["inputs"].items()}
LOGPS, REFERENCE, LENGTHS = (
    np.stack([INPUTS[form.format(side)] for side in ("chosen", "rejected")]) for form in ("{}", "ref_{}", "{}_length")
)


def label(case):
    return " ".join([case["kind"], *(f"{k}={v}" for k, v in case["options"].items())])


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=label)
def test_losses_and_gradients_are_those_of_the_papers(case):
    settings = dict(case["options"])
    if "margin" in settings:
        settings["margin"] = INPUTS["margin"]
    beta = settings.pop("beta")

    def total(logps):
        losses = pairwise_loss(case["kind"], logps, REFERENCE, beta, lengths=LENGTHS, **settings)
        return losses.sum(), losses

    (_, losses), gradients = jax.value_and_grad(total, has_aux=True)(LOGPS)
    assert losses.shape == LOGPS[0].shape and losses.dtype == jnp.float32
    np.testing.assert_allclose(losses, case["losses"], rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(gradients[0], case["chosen_gradient"], rtol=2e-4, atol=1e-6)
    np.testing.assert_allclose(gradients[1], case["rejected_gradient"], rtol=2e-4, atol=1e-6)


def test_every_loss_has_golden_numbers():
    assert {case["kind"] for case in GOLDEN["cases"]} == set(PAIRWISE)


@pytest.mark.parametrize("kind", PAIRWISE)
def test_far_from_the_reference_losses_and_gradients_stay_finite(kind):
    far = jnp.array([[1e4, -1e4, 1e4, -1e4], [-1e4, 1e4, 1e4, -1e4]])

    def total(logps):
        return pairwise_loss(kind, logps, 0 * far, 0.1, lengths=jnp.ones_like(far)).sum()

    value, gradients = jax.value_and_grad(total)(far)
    assert np.isfinite(value) and np.isfinite(gradients).all()


@pytest.mark.parametrize("kind", PAIRWISE)
def test_a_step_down_the_gradient_prefers_chosen_more(kind):
    """At the reference, where all of them push chosen from rejected."""
    zero, one = jnp.zeros((2, 1)), jnp.ones((2, 1))
    chosen, rejected = jax.grad(lambda logps: pairwise_loss(kind, logps, zero, 0.1, lengths=one).sum())(zero)
    assert (chosen < rejected).all()


def test_smoothing_and_robustness_undo_each_other_on_flipped_labels():
    """With a fraction e of flipped pairs the robust loss is, on average, the plain one on clean pairs."""
    e, beta = 0.2, 0.1
    kept = pairwise_loss("robust", LOGPS, REFERENCE, beta, label_smoothing=e)
    flipped = pairwise_loss("robust", LOGPS[::-1], REFERENCE[::-1], beta, label_smoothing=e)
    clean = pairwise_loss("sigmoid", LOGPS, REFERENCE, beta)
    np.testing.assert_allclose((1 - e) * kept + e * flipped, clean, rtol=1e-4, atol=1e-5)


def test_the_reward_shift_of_bco_carries_no_gradient():
    def total(delta):
        return pairwise_loss("bco_pair", LOGPS, REFERENCE, 0.1, delta=delta).sum()

    assert jax.grad(total)(0.3) == 0.0
    assert not np.allclose(total(0.3), total(0.0))


def test_implicit_rewards_explain_the_dpo_loss_and_carry_no_gradient():
    chosen, rejected = implicit_rewards(LOGPS, REFERENCE, 0.1)
    want = pairwise_loss("sigmoid", LOGPS, REFERENCE, 0.1)
    np.testing.assert_allclose(np.log1p(np.exp(rejected - chosen)), want, rtol=1e-5)
    gradient = jax.grad(lambda logps: implicit_rewards(logps, REFERENCE, 0.1)[0].sum())(LOGPS)
    np.testing.assert_array_equal(gradient, np.zeros_like(LOGPS))


def test_the_sft_term_is_per_token():
    got = sft_term(jnp.array([-6.0, -1.0, 0.0]), jnp.array([3, 1, 0]))
    np.testing.assert_allclose(got, [2.0, 1.0, 0.0])


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="pairwise loss 'sigmoyd': unknown; did you mean sigmoid"):
        pairwise_loss("sigmoyd", LOGPS, REFERENCE, 0.1)
    with pytest.raises(ValueError, match="'ipo' has no label_smoothing"):
        pairwise_loss("ipo", LOGPS, REFERENCE, 0.1, label_smoothing=0.1)
    with pytest.raises(ValueError, match="'apo_zero' has no margin"):
        pairwise_loss("apo_zero", LOGPS, REFERENCE, 0.1, margin=INPUTS["margin"])
    with pytest.raises(ValueError, match="'sigmoid' has no delta"):
        pairwise_loss("sigmoid", LOGPS, REFERENCE, 0.1, delta=1.0)
    with pytest.raises(ValueError, match=r"label_smoothing=0.5 is not in"):
        pairwise_loss("robust", LOGPS, REFERENCE, 0.1, label_smoothing=0.5)
    with pytest.raises(ValueError, match="'sigmoid_norm' works per token; give lengths"):
        pairwise_loss("sigmoid_norm", LOGPS, REFERENCE, 0.1)
    with pytest.raises(ValueError, match="a pairwise loss cannot take colour; it may take lengths"):
        takes("margin", "colour")


def test_what_losses_take():
    """The options of a loss are those of its function."""
    for name, loss in PAIRWISE.items():
        parameters = inspect.signature(loss.function).parameters.values()
        assert loss.options == {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}, name
    assert {name for name, loss in PAIRWISE.items() if loss.for_rewards} == {"sigmoid", "robust", "hinge"}


def test_losses_from_outside(monkeypatch):
    """A plain function takes no options; `takes` declares them."""
    module = types.ModuleType("losses_from_outside")
    module.squared = lambda w, l, beta: jnp.square(1 - beta * (w - l))
    module.shifted = takes("margin")(lambda w, l, beta, *, margin=0.0: module.squared(w, l, beta) + margin)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    plain = pairwise_loss("losses_from_outside:squared", LOGPS, REFERENCE, 0.1)
    w, l = LOGPS - REFERENCE
    np.testing.assert_allclose(plain, (1 - 0.1 * (w - l)) ** 2, rtol=1e-5)
    moved = pairwise_loss("losses_from_outside:shifted", LOGPS, REFERENCE, 0.1, margin=INPUTS["margin"])
    np.testing.assert_allclose(moved, plain + INPUTS["margin"], rtol=1e-5)
    with pytest.raises(ValueError, match="squared' has no margin"):
        pairwise_loss("losses_from_outside:squared", LOGPS, REFERENCE, 0.1, margin=1.0)
    with pytest.raises(ValueError, match="pairwise loss 'losses_from_outside:__name__': is not a function"):
        pairwise_loss("losses_from_outside:__name__", LOGPS, REFERENCE, 0.1)


def linear_losses(offsets, users, features, signs):
    """DPO-like losses of a linear model with one offset per user; user 0 has none."""
    theta = jnp.where((users > 0)[:, None], offsets["own"][users], 0.0) + offsets["shared"]
    return -jax.nn.log_sigmoid(signs * (features * theta).sum(1))


def linear_problem(pairs=8, width=3, users=4):
    rng = np.random.default_rng(0)
    params = {
        "own": jnp.asarray(rng.standard_normal((users + 1, width)), jnp.float32),
        "shared": jnp.asarray(rng.standard_normal(width), jnp.float32),
    }
    features = rng.standard_normal((pairs, width)).astype(np.float32)
    signs = rng.choice([-1.0, 1.0], pairs).astype(np.float32)
    return params, rng.integers(1, users + 1, pairs), features, signs


def test_the_mixture_is_alpha_times_one_mean_plus_the_rest_of_the_other():
    losses = jnp.array([1.0, 2.0, 3.0, 10.0, 20.0, 30.0])
    generic = jnp.arange(6) >= 3
    total, count = mixture(losses, generic, 0.3)
    np.testing.assert_allclose(total / count, 0.3 * 2 + 0.7 * 20, rtol=1e-6)
    # The third pair is padding, and its loss is no number.
    weight = jnp.array([1.0, 1.0, 0.0, 1.0, 1.0, 0.0])
    total, count = mixture(losses.at[2].set(jnp.nan), generic, 0.3, weight)
    np.testing.assert_allclose(total / count, 0.3 * 1.5 + 0.7 * 15, rtol=1e-6)


@pytest.mark.parametrize(
    ("size", "interleaved"),
    [
        pytest.param(size, interleaved, marks=pytest.mark.slow if size in (2, 16) else ())
        for size in (1, 2, 4, 16)
        for interleaved in (True, False)
    ],
)
def test_the_mixture_does_not_depend_on_micro_batches(size, interleaved):
    """Not even where a micro-batch holds one of the two groups only."""
    params, users, features, signs = linear_problem()
    users = np.concatenate([users, 0 * users])
    features, signs = np.tile(features, (2, 1)), np.tile(signs, 2)
    generic = np.arange(len(users)) >= len(users) // 2
    order = np.arange(16).reshape(2, 8).T.ravel() if interleaved else np.arange(16)

    def summed(params, rows):
        losses = linear_losses(params, users[rows], features[rows], signs[rows])
        return mixture(losses, generic[rows], 0.7)

    def direct(params):
        losses = linear_losses(params, users, features, signs)
        return 0.7 * losses[~generic].mean() + 0.3 * losses[generic].mean()

    want, count = jax.grad(direct)(params), 0.0
    got = jax.tree.map(jnp.zeros_like, params)
    for start in range(0, 16, size):
        gradient, part = jax.grad(summed, has_aux=True)(params, order[start : start + size])
        got, count = jax.tree.map(jnp.add, got, gradient), count + part
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x / count, y, rtol=1e-5, atol=1e-7), got, want)


def test_user_dropout_has_the_gradient_of_the_mixture_in_expectation():
    params, users, features, signs = linear_problem()
    alpha, draws = 0.7, 20_000

    def dropped(params, key):
        return linear_losses(params, user_dropout(key, users, alpha), features, signs).mean()

    def mixed(params):
        both = [linear_losses(params, u, features, signs) for u in (users, 0 * users)]
        total, count = mixture(jnp.concatenate(both), np.arange(16) >= 8, alpha)
        return total / count

    @jax.jit
    def moments(params):
        gradients = jax.vmap(jax.grad(dropped), (None, 0))(params, jax.random.split(jax.random.key(0), draws))
        return jax.tree.map(lambda x: (x.mean(0), x.std(0)), gradients)

    for name, want in jax.grad(mixed)(params).items():
        mean, deviation = moments(params)[name]
        error = 5 * deviation / draws**0.5 + 1e-6
        assert (np.abs(mean - want) <= error).all(), name
        # Fine enough to tell alpha from another one.
        assert (error < 0.1 * np.abs(want).max()).all(), name


def test_user_dropout_at_the_ends():
    users = jnp.array([0, 3, 5])
    np.testing.assert_array_equal(user_dropout(jax.random.key(0), users, 1.0), users)
    np.testing.assert_array_equal(user_dropout(jax.random.key(0), users, 0.0), 0 * users)


@pytest.mark.parametrize("kind", PAIRWISE)
def test_a_soft_label_is_the_expected_loss_of_both_orders(kind):
    options = PAIRWISE.get(kind).options
    chosen = {"lengths": LENGTHS} | ({"margin": INPUTS["margin"]} if "margin" in options else {})
    exchanged = {"lengths": LENGTHS[::-1]} | ({"margin": -INPUTS["margin"]} if "margin" in options else {})
    certain = pairwise_loss(kind, LOGPS, REFERENCE, 0.3, **chosen)
    other = pairwise_loss(kind, LOGPS[::-1], REFERENCE[::-1], 0.3, **exchanged)
    p = np.linspace(0.5, 1, len(certain), dtype=np.float32)
    found = pairwise_loss(kind, LOGPS, REFERENCE, 0.3, preference=p, **chosen)
    np.testing.assert_allclose(found, p * certain + (1 - p) * other, rtol=1e-5)
    ones = pairwise_loss(kind, LOGPS, REFERENCE, 0.3, preference=np.ones_like(p), **chosen)
    np.testing.assert_array_equal(ones, certain)


@pytest.mark.parametrize("kind", ["sigmoid", "sigmoid_norm"])
def test_soft_labels_that_are_all_equal_are_label_smoothing(kind):
    p = np.full(len(LOGPS[0]), 0.8, np.float32)
    soft = pairwise_loss(kind, LOGPS, REFERENCE, 0.3, lengths=LENGTHS, preference=p)
    smoothed = pairwise_loss(kind, LOGPS, REFERENCE, 0.3, lengths=LENGTHS, label_smoothing=0.2)
    np.testing.assert_allclose(soft, smoothed, rtol=1e-5)


@pytest.mark.parametrize("kind", ["sigmoid", "ipo", "hinge"])
def test_the_best_reward_of_a_tie_is_equal_rewards(kind):
    """IPO pulls half its target either way, and the others have their least loss where both rewards are equal."""

    def total(gap):
        w, l = gap / 2, -gap / 2
        return pairwise_loss(kind, (w, l), (0 * w, 0 * l), 1.0, preference=jnp.full(1, 0.5)).sum()

    np.testing.assert_allclose(jax.grad(total)(jnp.zeros(1)), 0, atol=1e-6)
    assert total(jnp.full(1, 1.5)) > total(jnp.zeros(1))
