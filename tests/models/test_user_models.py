"""Reward models of people on frozen features: what all must hold, closed forms of each, and traps of public code."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize, special

from pjrlhf.errors import UserError
from pjrlhf.models.user_models import pref, vpl
from pjrlhf.models.user_models.base import Comparisons, Person, Slots, UserRewards
from pjrlhf.models.user_models.carp import Carp
from pjrlhf.models.user_models.impchat import Impchat
from pjrlhf.models.user_models.individual import Individual
from pjrlhf.models.user_models.kinds import kinds, user_model
from pjrlhf.models.user_models.lore import Lore
from pjrlhf.models.user_models.mrm import Mrm
from pjrlhf.models.user_models.p2p import P2p
from pjrlhf.models.user_models.pal import Pal
from pjrlhf.models.user_models.pooled import Pooled
from pjrlhf.models.user_models.pplug import Pplug, attended
from pjrlhf.models.user_models.pref import Pref
from pjrlhf.models.user_models.pttt import Pttt
from pjrlhf.models.user_models.vpl import Vpl

WIDTH, PEOPLE = 6, 4
SMALL = {"vpl": {"hidden": 8, "latent": 4, "guidance": 0.1}, "gpo": {"hidden": 8}, "pttt": {"hidden": 8}}
SMALL |= {"pplug": {"hidden": 8}, "impchat": {"hidden": 8}, "p2p": {"hidden": 8, "bases": 3}, "carp": {"hidden": 4}}
FITS = {"fit_steps": 5}  # where a state is fitted
QUICK = ("pooled", "lore", "pttt")  # of each source one; the others take seconds to compile
all_kinds = pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in QUICK else pytest.mark.slow) for kind in kinds()]
)


class Made:
    """A small model of a kind, with random parameters and compiled functions of `params` and further arguments."""

    def __init__(self, kind):
        fields = {field.name for field in dataclasses.fields(kinds()[kind])}
        settings = SMALL.get(kind, {}) | {key: value for key, value in FITS.items() if key in fields}
        self.model = user_model({"kind": kind, **settings}, "models.x")
        params = self.model.init(jax.random.key(0), WIDTH, PEOPLE)
        leaves, tree = jax.tree.flatten(params)  # also what starts at zero
        noise = [0.1 * jax.random.normal(jax.random.key(i), leaf.shape) for i, leaf in enumerate(leaves)]
        self.params = jax.tree.unflatten(tree, [a + b for a, b in zip(leaves, noise, strict=True)])
        self.person, self.meet, self.margins = map(jax.jit, (self.model.person, self.model.meet, self.model.margins))
        self.gradient = jax.jit(jax.value_and_grad(lambda p, one: self.model.loss(p, one, KEY, jnp.int32(0))[0]))

    def as_met(self, context, test):
        """Margins of a new person."""
        return self.margins(self.params, self.meet(self.params, context), test)


made = functools.cache(Made)
KEY = jax.random.key(1)


def pairs(count, seed=0, weight=None):
    chosen, rejected = jax.random.normal(jax.random.key(seed), (2, count, WIDTH))
    return Comparisons(chosen, rejected, jnp.ones(count) if weight is None else jnp.asarray(weight, jnp.float32))


def close(one, other, tolerance=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), one, other)


@all_kinds
def test_padding_does_not_matter(kind):
    it = made(kind)
    real, noise = pairs(3), pairs(2, seed=9, weight=[0, 0])
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), real, noise)
    close(*[it.as_met(context, pairs(4, seed=2)) for context in (real, both)], tolerance=1e-4)
    close(
        *[it.gradient(it.params, Person(jnp.int32(1), jnp.float32(3), x, x))[0] for x in (real, both)], tolerance=1e-4
    )


@all_kinds
def test_the_order_of_comparisons_does_not_matter(kind):
    turned = jax.tree.map(lambda x: x[::-1], pairs(3))
    close(*[made(kind).as_met(context, pairs(4, seed=2)) for context in (pairs(3), turned)], tolerance=1e-4)


@all_kinds
def test_exchanged_answers_turn_the_margin_around_and_others_beside_them_do_not_matter(kind):
    it, test = made(kind), pairs(4, seed=2)
    margins = it.as_met(pairs(3), test)
    close(margins, -it.as_met(pairs(3), test.reversed()))
    other = test.replace(chosen=test.chosen.at[1:].set(7.0))
    close(margins[:1], it.as_met(pairs(3), other)[:1])


@all_kinds
def test_nobody_is_the_generic_person_whatever_the_padding_holds(kind):
    it, test = made(kind), pairs(4, seed=2)
    states = [it.meet(it.params, pairs(3, seed).first(0)) for seed in (0, 1)]
    close(*[it.margins(it.params, state, test) for state in states])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(states))
    if it.model.slots.source == "id":
        close(states[0], jax.tree.map(lambda x: x[0], it.params["table"]))


@all_kinds
def test_only_the_row_of_the_person_learns(kind):
    it = made(kind)
    one = Person(jnp.int32(2), jnp.float32(5), pairs(3), pairs(3, seed=1))
    _, gradient = it.gradient(it.params, one)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    if it.model.slots.source == "id":
        for leaf in jax.tree.leaves(gradient["table"]):
            moved = np.abs(np.asarray(leaf)).reshape(PEOPLE + 1, -1).sum(1) > 0
            assert moved.tolist() == [False, False, True, False, False]
        close(*[it.person(it.params, one.row, context) for context in (one.context, pairs(3, seed=5))])
    elif it.model.slots.source != "nobody":
        close(*[it.person(it.params, jnp.int32(row), one.context) for row in (1, 2)])


@all_kinds
def test_gradients_without_a_context_are_finite(kind):
    it = made(kind)
    one = Person(jnp.int32(1), jnp.float32(5), pairs(3).first(0), pairs(3, seed=1))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(it.gradient(it.params, one)))


@all_kinds
def test_slots_say_what_a_model_reads(kind):
    it, test = made(kind), pairs(4, seed=2)
    same = np.allclose(*[it.as_met(context, test) for context in (pairs(3), pairs(3).reversed())], atol=1e-5)
    assert same == (it.model.slots.source == "nobody"), "reversed labels make another person"


def test_parts_outside_the_lists_are_refused():
    with pytest.raises(ValueError, match="source='mood' is unknown; choose one of nobody, id, pairs"):
        Slots("mood", "nothing", "nowhere")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bases": 3}, "models.x: .* has no kind; choose one of carp, "),
        ({"kind": "lor"}, "models.x.kind: 'lor' is unknown; did you mean 'lore'"),
        ({"kind": "lore", "bases": 0}, "models.x.bases: 0 is out of range"),
        ({"kind": "lore", "base": 2}, "models.x.base: no such setting; did you mean models.x.bases"),
        ({"kind": "pathlib:Path"}, "models.x.kind: pathlib:Path is no user model; derive it from"),
        (3, "models.x: 3 has no kind"),
    ],
)
def test_bad_entries_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        user_model(values, "models.x")


def test_pooled_is_bradley_terry():
    model, context = Pooled(), pairs(5)
    params = jax.tree.map(jnp.zeros_like, model.init(jax.random.key(0), WIDTH, PEOPLE))
    loss, gradient = jax.value_and_grad(model.bradley_terry)(params, {}, context)
    assert loss == pytest.approx(np.log(2))
    close(gradient["head"]["layer0"]["kernel"][:, 0], -(context.chosen - context.rejected).mean(0) / 2)


def test_a_new_head_is_the_mode_of_its_posterior():
    """Ridge logistic regression around the shared head, by scipy."""
    model, context = Individual(precision=2.0, fit_steps=800), pairs(12)
    head = np.asarray(jax.random.normal(jax.random.key(3), (WIDTH,)), np.float64)
    params = {"shared": {"head": jnp.asarray(head, jnp.float32)}, "table": {"offset": jnp.zeros((1, WIDTH))}}
    x = np.asarray(context.chosen - context.rejected, np.float64)
    found = optimize.minimize(lambda o: np.logaddexp(0, -x @ (head + o)).sum() + o @ o, np.zeros(WIDTH))
    close(jax.jit(model.meet)(params, context)["offset"], found.x, tolerance=2e-3)
    # The loss of training has the same optimum, whatever part of the person's comparisons a step sees.
    one = Person(jnp.int32(0), jnp.float32(12), context, context)
    loss = Individual(precision=2.0, alpha=1.0).loss(params, one, jax.random.key(0), jnp.int32(0))[0]
    assert 12 * loss == pytest.approx(np.logaddexp(0, -x @ head).sum(), rel=1e-5)


def test_alpha_weighs_the_generic_head():
    params = {"shared": {"head": jnp.ones(WIDTH)}, "table": {"offset": jnp.full((2, WIDTH), 0.5)}}
    one = Person(jnp.int32(1), jnp.float32(1e9), pairs(3), pairs(3))
    losses = [float(Individual(alpha=alpha).loss(params, one, KEY, jnp.int32(0))[0]) for alpha in (0.0, 0.25, 1.0)]
    assert losses[1] == pytest.approx(0.75 * losses[0] + 0.25 * losses[2], rel=1e-5)


def test_lore_mixes_its_basis():
    model = Lore(bases=2)
    basis = jax.random.normal(jax.random.key(0), (WIDTH, 2))
    params, x = {"shared": {"basis": basis}}, pairs(3).chosen
    sure = model.rewards(params, {"weights": jnp.array([50.0, 0.0])}, x)
    close(sure, x @ basis[:, 0])
    half = model.rewards(params, {"weights": jnp.zeros(2)}, x)
    close(half, x @ basis.mean(1))


def test_pal_is_the_distance_to_an_ideal_point():
    model = Pal(prototypes=2, dimensions=2)
    params = {"shared": {"projection": jnp.eye(WIDTH, 2), "prototypes": jnp.array([[1.0, 0.0], [0.0, 3.0]])}}
    x = jnp.zeros((1, WIDTH)).at[0, :2].set(jnp.array([1.0, 1.0]))
    # The middle of the prototypes is (1/2, 3/2), which is 1/4 + 1/4 away.
    assert model.rewards(params, {"weights": jnp.zeros(2)}, x)[0] == pytest.approx(-0.5)


def test_the_start_of_pref_completes_a_matrix_of_its_rank():
    rng = np.random.default_rng(0)
    signs = np.sign(rng.normal(size=(8, 1)) * rng.normal(size=(1, 12)))
    labels = (signs + 1) / 2
    own, of_pairs = pref.completed(labels, 1)
    np.testing.assert_allclose(own @ of_pairs.T, signs / 2, atol=1e-9)
    labels[0, 3] = np.nan
    own, of_pairs = pref.completed(labels, 1)
    assert np.sign(own @ of_pairs.T)[0, 3] == signs[0, 3]


def test_the_start_of_pref_tells_opposite_people_apart():
    """Pairs that both directions of a question share are one question."""
    question = np.asarray(pairs(8).chosen - pairs(8).rejected)
    both, rows = np.concatenate([question, -question]), np.repeat([1, 2], 8)
    asked, column, sign = pref.distinct(both)
    assert len(asked) == 8 and (column[:8] == column[8:]).all() and (sign[:8] == -sign[8:]).all()
    model = Pref(factors=2)
    everything = Comparisons(jnp.asarray(both), jnp.zeros_like(both), jnp.ones(16))
    params = model.start(model.init(jax.random.key(0), WIDTH, 2), rows, everything)
    states = [model.person(params, jnp.int32(row), everything) for row in (1, 2)]
    margins = [model.margins(params, state, everything) for state in states]
    close(margins[0], -margins[1])
    assert (margins[0][:6] > 0).all(), "WIDTH questions can be fitted at least"


def test_the_most_informative_question_is_undecided_and_new():
    model = Pref(factors=2, active=True, precision=1.0)
    params = {"shared": {"features": jnp.eye(WIDTH, 2)}}
    state = {"weights": jnp.array([3.0, 0.0])}
    along, across = jnp.eye(WIDTH)[0], jnp.eye(WIDTH)[1]
    pool = Comparisons(jnp.stack([along, across, -across]), jnp.zeros((3, WIDTH)), jnp.ones(3))
    nothing = pool.replace(weight=jnp.zeros(3))
    value = model.informativeness(params, state, nothing, pool)
    assert value[1] == pytest.approx(1 / 16) and value[1] > 10 * value[0]
    assert value[1] == pytest.approx(float(value[2])), "which answer was preferred is not known yet"
    asked = pool.replace(weight=jnp.array([0.0, 1.0, 0.0]))
    again = model.informativeness(params, state, asked, pool)
    assert again[1] == pytest.approx(1 / 16 / 1.25), "Sigma = 1 + 1/4 across"
    assert Pref().informativeness(params, state, asked, pool) is None


def test_the_divergence_of_vpl():
    assert vpl.kl_divergence(jnp.zeros(3), jnp.zeros(3)) == 0
    # KL(N(m, s^2) | N(0, 1)) = (s^2 + m^2 - 1) / 2 - log s
    expected = (np.exp(-1.0) + 0.25 - 1) / 2 + 0.5
    assert vpl.kl_divergence(jnp.array([0.5]), jnp.array([-1.0])) == pytest.approx(expected)


def test_vpl_reads_latents_alike_in_training_and_evaluation():
    """The authors scale them to a length in training alone."""
    model, params = made("vpl").model, made("vpl").params
    assert model.normalized
    z, x = jnp.array([0.1, -0.2, 0.3, 0.0]), pairs(3).chosen
    close(model.decoded(params, z, x), model.decoded(params, 5 * z, x), tolerance=1e-3)
    state = {"mean": z, "log_variance": jnp.full(4, -1.0)}
    close(model.rewards(params, state, x), model.decoded(params, z, x))
    plain = Vpl(hidden=8, latent=4, normalized=False)
    assert not np.allclose(plain.decoded(params, z, x), plain.decoded(params, 5 * z, x), atol=1e-3)


def test_a_collapsed_posterior_is_seen():
    apart = {"mean": jnp.array([[0.5, 0.0], [-0.5, 0.001]]), "log_variance": jnp.zeros((2, 2))}
    assert Vpl().described(apart)["active_units"] == 0.5
    alike = jax.tree.map(lambda x: x * 0, apart)
    assert Vpl().described(alike) == {"kl": 0.0, "active_units": 0.0}


def test_swap_guidance_wants_opposite_people_apart():
    z = jnp.array([1.0, -2.0])
    assert vpl.cosine(z, -z) == pytest.approx(-1) and vpl.cosine(z, z) == pytest.approx(1)
    model, params = made("vpl").model, made("vpl").params
    one = Person(jnp.int32(0), jnp.float32(3), pairs(3), pairs(3))
    metrics = model.loss(params, one, jax.random.key(0), jnp.int32(0))[1]
    here, there = (model.person(params, one.row, context) for context in (one.context, one.context.reversed()))
    expected = (1 + vpl.cosine(here["mean"], there["mean"])) / 2
    expected += (1 - vpl.cosine(here["log_variance"], there["log_variance"])) / 2
    assert metrics["guidance"] == pytest.approx(float(expected))


def test_the_weight_of_the_divergence_is_annealed_in_cycles():
    model = Vpl(kl_period=100)
    found = [float(model.annealed(jnp.int32(step))) for step in (0, 50, 99, 100)]
    assert found == pytest.approx([0.1, 0.55, 1.0, 0.1], abs=1e-3)
    assert Vpl().annealed(jnp.int32(7)) == 1.0


def test_a_step_of_adam_is_as_long_as_its_rate():
    model, params = made("mrm").model, made("mrm").params
    context = pairs(5)
    gradient = jax.grad(lambda w: model.bradley_terry(params, {"weights": w}, context))(params["weights"])
    moved = model.person(params, jnp.int32(0), context)["weights"] - params["weights"]
    np.testing.assert_allclose(moved, -model.inner_rate * np.sign(gradient), rtol=1e-3)


def test_the_outer_gradient_goes_through_the_inner_step():
    """Against a finite difference."""
    model = Mrm(bases=2, inner_steps=3, inner_rate=0.05)
    params = model.init(jax.random.key(0), WIDTH, 0)
    one = Person(jnp.int32(0), jnp.float32(4), pairs(4), pairs(4, seed=1))

    def loss(first):
        changed = {**params, "basis": params["basis"].at[0, 0].add(first)}
        return model.loss(changed, one, jax.random.key(0), jnp.int32(0))[0]

    step = 1e-2
    difference = (loss(step) - loss(-step)) / (2 * step)
    assert jax.grad(loss)(0.0) == pytest.approx(float(difference), rel=2e-2, abs=1e-4)


def test_robust_weights_favour_people_who_are_served_badly():
    losses = jnp.array([0.2, 0.5, 1.4])
    weights = special.expit((np.asarray(losses) - 0.5) / 0.5)
    expected = (weights * np.asarray(losses)).sum() / weights.sum()
    assert Mrm(gamma=0.5).over_people(losses) == pytest.approx(expected)
    np.testing.assert_allclose(jax.grad(Mrm(gamma=0.5).over_people)(losses), weights / weights.sum(), rtol=1e-5)
    assert Mrm(gamma=0.0).over_people(losses) == pytest.approx(0.7)


def test_fast_weights_are_a_matrix_in_closed_form():
    model, params = made("pttt").model, made("pttt").params
    context, x = pairs(3), pairs(4, seed=2).chosen
    keys, head = model.keys(params, x), params["head"]
    value = params["value"] @ head
    fast = sum(
        jnp.outer(value, difference)
        for difference in model.keys(params, context.chosen) - model.keys(params, context.rejected)
    )
    expected = keys @ (params["slow"] + model.eta * fast).T @ head
    close(model.rewards(params, model.person(params, jnp.int32(0), context), x), expected, tolerance=1e-4)


def test_fast_weights_prefer_what_the_person_chose():
    """Before any training: the answer that was chosen gains, the rejected one loses, and reversed labels turn that."""
    model = Pttt(hidden=32)
    params = model.init(jax.random.key(0), WIDTH, 0)
    context = pairs(1)
    nobody, person, opposite = (
        model.margins(params, model.meet(params, one), context)[0]
        for one in (context.first(0), context, context.reversed())
    )
    assert opposite < nobody < person


HISTORIES = pytest.mark.parametrize("kind", ["pplug", pytest.param("impchat", marks=pytest.mark.slow)])


@HISTORIES
def test_a_history_is_what_was_chosen(kind):
    """The answers that were turned down do not matter: a model that reads them has labelled pairs."""
    it, test = made(kind), pairs(4, seed=2)
    context = pairs(3)
    other = context.replace(rejected=pairs(3, seed=7).rejected)
    close(it.as_met(context, test), it.as_met(other, test), tolerance=0)
    assert it.model.slots.source == "history"


def test_attention_is_over_what_is_there():
    keys, weight = jnp.array([[9.0, 0.0], [0.0, 9.0], [9.0, 0.0]]), jnp.array([1.0, 1.0, 0.0])
    sure = attended(jnp.array([[9.0, 0.0]]), keys, keys, weight)
    close(sure, jnp.array([[9.0, 0.0]]))
    close(attended(jnp.zeros((1, 2)), keys, keys, weight), jnp.array([[4.5, 4.5]]))
    close(attended(jnp.zeros((1, 2)), keys, keys, jnp.zeros(3)), jnp.zeros((1, 2)))


def test_pplug_gives_the_head_one_token():
    """Without a query of its own an answer sees the mean of the history."""
    model, params = Pplug(hidden=3), Pplug(hidden=3).init(KEY, WIDTH, 0)
    params, context = {**params, "query": jnp.zeros((WIDTH, WIDTH))}, pairs(5)
    x = pairs(2, seed=2).chosen
    token = context.chosen.mean(0) @ params["projector"]
    close(model.token(params, model.meet(params, context), x), jnp.stack([token, token]))
    first, second = params["head"]["layer0"], params["head"]["layer1"]
    h = jnp.concatenate([x, jnp.stack([token, token])], axis=1) @ first["kernel"] + first["bias"]
    expected = jnp.where(h > 0, h, 0.2 * h) @ second["kernel"] + second["bias"]
    close(model.rewards(params, model.meet(params, context), x), expected[:, 0])


def test_the_retrieval_score_is_likeness_to_the_history():
    model, zero, x = Impchat(hidden=WIDTH), jnp.zeros((WIDTH, WIDTH)), pairs(2, seed=2).chosen
    params = {"head": jnp.zeros(WIDTH), "style": jnp.eye(WIDTH), "query": zero, "value": zero}
    context = pairs(5)
    like = x @ context.chosen.mean(0) / np.sqrt(WIDTH)
    close(model.rewards(params, model.meet(params, context), x), like)
    # Without a query all of the history counts alike, and preference is style.
    alike = {**params, "style": zero, "value": jnp.eye(WIDTH)}
    close(model.rewards(alike, model.meet(alike, context), x), like)
    close(model.rewards({**params, "head": x[0]}, model.meet(params, context.first(0)), x), x @ x[0])
    # The answer that is most like what is asked counts alone where the query is sharp.
    sharp = {**alike, "query": 50 * jnp.eye(WIDTH)}
    history = jnp.eye(WIDTH)[:2]
    two = Comparisons(history, -history, jnp.ones(2))
    close(model.rewards(sharp, model.meet(sharp, two), history), jnp.full(2, WIDTH**-0.5))


def test_a_linear_hypernetwork_is_a_bilinear_reward():
    """r(x) = x V (w_0 + W mean_j d_j): the toy of docs/user_models.md where V is the identity."""
    model, context, x = P2p(hidden=0, bases=WIDTH), pairs(5), pairs(3, seed=2).chosen
    kernel = jnp.concatenate([jnp.zeros((WIDTH, WIDTH)), 2.0 * jnp.eye(WIDTH)])
    head = jnp.arange(float(WIDTH))
    params = {"basis": jnp.eye(WIDTH), "hypernetwork": {"layer0": {"kernel": kernel, "bias": head}}}
    mean = (context.chosen - context.rejected).mean(0)
    close(model.rewards(params, model.meet(params, context), x), x @ (head + 2.0 * mean))
    close(model.meet(params, context.first(0))["weights"], head)


def test_a_profile_does_not_grow_with_the_history():
    twice = jax.tree.map(lambda x: jnp.concatenate([x, x]), pairs(3))
    close(P2p().profile(twice), P2p().profile(pairs(3)))


def test_a_hypernetwork_that_ignores_its_profile_is_seen():
    weights = jnp.array([[1.0, 3.0], [3.0, 1.0]])
    assert P2p().described({"weights": weights})["spread"] == pytest.approx(1 / np.sqrt(5))
    assert P2p().described({"weights": jnp.ones((2, 3))})["spread"] == 0.0


def drawn_carp(nobody=0.0):
    model = Carp(hidden=3)
    params = model.init(KEY, WIDTH, 0)
    return model, {**params, "nobody": nobody * params["nobody"]}


def test_opposite_critiques_give_opposite_rewards():
    """The absolute value of the cosine in the authors' code gives them the same."""
    (model, params), context, x = drawn_carp(), pairs(4), pairs(3, seed=2).chosen
    own, other = (model.rewards(params, model.meet(params, one), x) for one in (context, context.reversed()))
    close(own, -other)
    u = (context.chosen - context.rejected).mean(0) @ params["critiques"]
    a = x @ params["answers"]
    expected = model.scale * (a @ u) / (np.linalg.norm(a, axis=1) * np.linalg.norm(u))
    close(own, expected, tolerance=1e-4)


@pytest.mark.parametrize(("log_scale", "size"), [(9.0, 100.0), (-9.0, 0.01)])
def test_the_temperature_of_carp_is_limited(log_scale, size):
    """The authors' code throws the limited value away."""
    model, params = drawn_carp()
    params = {**params, "log_scale": jnp.float32(log_scale)}
    answer = jnp.linalg.pinv(params["answers"].T)[:, 0][None]  # a(x) is the first axis
    assert model.rewards(params, {"critique": jnp.eye(3)[0]}, answer)[0] == pytest.approx(size, rel=1e-4)


def test_the_loss_of_carp_is_infonce_in_both_directions():
    (model, params), context, query = drawn_carp(1.0), pairs(4), pairs(3, seed=2)
    loss = model.loss(params, Person(jnp.int32(0), jnp.float32(7), context, query), KEY, jnp.int32(0))[0]
    own, other = (model.meet(params, one) for one in (context, context.reversed()))
    rejected = model.rewards(params, own, query.rejected)
    parts = []
    for one, against in zip(
        model.rewards(params, own, query.chosen), model.rewards(params, other, query.chosen), strict=True
    ):
        to_answers = -special.log_softmax(np.array([one, *rejected]))[0]
        to_critiques = -special.log_softmax(np.array([one, against]))[0]
        parts.append((to_answers + to_critiques) / 2)
    assert loss == pytest.approx(np.mean(parts), rel=1e-4)
    # Of nobody, with one comparison in the query, Bradley-Terry is left.
    one = Person(jnp.int32(0), jnp.float32(7), context.first(0), query.first(1))
    expected = model.bradley_terry(params, model.meet(params, context.first(0)), query.first(1))
    assert model.loss(params, one, KEY, jnp.int32(0))[0] == pytest.approx(float(expected), rel=1e-4)


def test_every_kind_is_a_file_with_a_formula():
    for name, kind in kinds().items():
        assert issubclass(kind, UserRewards) and kind.__module__.endswith(f".{name}")
