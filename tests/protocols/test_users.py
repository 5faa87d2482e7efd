"""What a finished run of user models leaves behind, and how new people and vectors of users are treated."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny, tiny_users
from support.tiny_users import pairs_of, trained_of

from pjrlhf.errors import UserError
from pjrlhf.models.users import UserModel, fit_clusters
from pjrlhf.protocols.cold_start import _turned, fit_changed_minds, fit_new_users
from pjrlhf.protocols.users import _generation

pytestmark = pytest.mark.slow  # many programs to compile

MODELS = ("pooled", "individualized", "cluster", "permuted")


@pytest.fixture(scope="module")
def summary(people):
    return json.loads((people / "report" / "summary.json").read_text())


@pytest.fixture(scope="module")
def trained(people):
    """The individualized model of the finished run."""
    run = tiny.start(people, tiny_users.settings())
    return trained_of(run, "individualized", pairs_of(run))


def test_files_of_a_run(people):
    expected = [
        *("config.json", "manifest.json", "metrics.jsonl", "report/index.html", "report/summary.json"),
        *(f"population/{part}.jsonl" for part in ("train", "heldout", "new_users")),
        *(f"preference/{name}/model.safetensors" for name in MODELS),
        *("sft/model/model.safetensors", "sft/model/tokenizer.json"),
    ]
    assert [name for name in expected if not (people / name).is_file()] == []
    stages = json.loads((people / "manifest.json").read_text())["stages"]
    assert list(stages) == ["sft", "population", "preference", "evaluate_users"]
    steps = {stage: [row["step"] for row in tiny.lines(people, f"preference/{stage}")] for stage in MODELS}
    assert steps.pop("cluster") == [1, 2, 3]  # the other half is its warm start
    assert set(map(tuple, steps.values())) == {(1, 2, 3, 4, 5, 6)}


def test_figures_of_the_report(summary):
    # Beside the models stands the base, by its own log-probs.
    assert set(summary["accuracy"]) == set(summary["length_matched"]) == {*MODELS, "base"}
    assert set(summary["grid"]) == set(MODELS)
    for found in summary["accuracy"].values():
        each = [user["accuracy"] for user in found["users"].values()]
        assert list(found["users"]) == ["user00", "user01", "user02", "user03"]
        assert found["mean"] == pytest.approx(np.mean(each)) and found["worst"] == min(each)
        assert found["low"] <= found["mean"] <= found["high"] and 0 <= found["generic"] <= 1
    assert summary["accuracy"]["pooled"]["generic"] == summary["accuracy"]["pooled"]["mean"]
    assert summary["ceiling"]["majority_fraction"] == 0.75
    assert set(summary["gain"]) == set(MODELS) - {"pooled"}
    each = [summary["accuracy"][name]["users"] for name in ("cluster", "pooled")]
    gains = [each[0][user]["accuracy"] - each[1][user]["accuracy"] for user in each[0]]
    assert summary["gain"]["cluster"]["mean"] == pytest.approx(np.mean(gains))
    assert summary["gain"]["cluster"]["against"] == "pooled" and summary["gain"]["cluster"]["users"] == 4
    assert set(summary["cold_start"]) == {"individualized"} and set(summary["cold_start"]["individualized"]) == {
        "0",
        "2",
    }
    assert set(summary["embedding"]) == set(MODELS) - {"pooled"}
    assert len(summary["embedding"]["cluster"]["x"]) == 4
    for cells in summary["grid"].values():
        assert len(cells) == 4


def test_accuracy_is_the_share_of_positive_margins(trained, summary):
    examples = trained.pairs.tables["heldout"].examples
    margins = trained.margins("heldout", trained.pairs.users("heldout"))
    first = [margin > 0 for margin, example in zip(margins, examples, strict=True) if example.user_id == "user00"]
    assert summary["accuracy"]["individualized"]["users"]["user00"]["accuracy"] == pytest.approx(np.mean(first))
    rows = [5, 0, 3]  # in any order and any company
    some = trained.margins("heldout", trained.pairs.users("heldout"), rows)
    np.testing.assert_allclose(some, margins[rows], rtol=1e-4, atol=1e-6)


def new_rows(trained):
    """Rows of new people's held-out pairs."""
    examples = trained.pairs.tables["new_users"].examples
    found = {}
    for i, example in enumerate(examples):
        if example.held_out:
            found.setdefault(example.user_id, []).append(i)
    return found


def test_new_people_move_their_own_rows_only(trained):
    before = tiny.bits(trained.trainable)
    found = fit_new_users(trained, (0, 1, 2), steps=20, learning_rate=1.0)
    assert tiny.bits(trained.trainable) == before
    assert len(found[0]) == 2
    # Without a comparison of theirs they are the generic user.
    nobody = np.zeros(len(trained.pairs.tables["new_users"]), np.int32)
    generic = {
        user: (trained.margins("new_users", nobody, rows) > 0).mean() for user, rows in new_rows(trained).items()
    }
    assert found[0] == pytest.approx(list(generic.values()))
    assert found[1] != found[0] or found[2] != found[0], "fitting changes nothing"
    # Each person and k is fitted alone: the others beside them do not matter.
    alone = fit_new_users(trained, (2,), steps=20, learning_rate=1.0)
    assert alone[2] == pytest.approx(found[2])


def test_too_few_comparisons_of_new_people(trained):
    with pytest.raises(UserError, match="cold start: no new user has 1000 comparisons and others to test on; ask for"):
        fit_new_users(trained, (0, 1000), steps=1, learning_rate=0.1)


def test_people_who_change_their_mind(trained):
    """Each way to fit a row equals a fit that is known."""
    options = {"steps": 20, "learning_rate": 1.0}
    before, found = fit_new_users(trained, (0, 2), **options), fit_changed_minds(trained, 2, (0, 2, 3), **options)
    wrong, generic = ([1 - accuracy for accuracy in before[k]] for k in (2, 0))
    for way in ("all", "latest", "continued"):  # before the first new comparison everybody is who they were
        assert found[way][0] == pytest.approx(wrong)
    assert found["new"][0] == pytest.approx(generic)
    assert found["latest"][2] == pytest.approx(found["new"][2])  # nothing old is left
    assert len({tuple(found[way][3]) for way in found}) > 1, "the ways do not differ"


def test_turned_pairs_have_the_opposite_margins(trained):
    part, users = "new_users", np.zeros(len(trained.pairs.tables["new_users"]), np.int32)
    before = trained.margins(part, users)
    turned = trained._margins.__class__(
        trained.entry, trained.users, _turned(trained.pairs), trained.backbone, trained.run.scorer(8)
    )
    np.testing.assert_allclose(turned(trained.trainable, part, users), -before, atol=1e-5)


def test_answers_for_everybody(trained):
    groups = {"user00": "P2A", "user01": "P2A", "user02": "P2B", "user03": "P2A"}
    examples = trained.pairs.tables["heldout"].examples[:2]
    section, kept = _generation(trained, examples, groups)
    prompts = [example.prompt for example in examples]
    assert list(section) == list(groups)
    assert [(one["user"], one["prompt"]) for one in kept] == [(user, prompt) for user in groups for prompt in prompts]
    for user, found in section.items():
        assert found["group"] == groups[user] and set(found["score"]) == {"P2A", "P2B"}
        assert found["answers"] == len(examples)
        assert 0 <= found["length"] <= 10
        own = [len(one["answer"].split()) for one in kept if one["user"] == user]
        assert found["length"] == np.mean(own)
    assert {one["model"] for one in kept} == {"individualized"}


# ---- centres from vectors of everybody's own


T, D = 2, 3
MODEL = UserModel(kind="individualized", num_users=8, tokens=T, width=D)


def individuals(groups, seed=0):
    """Trained parameters of people near the centre of their group; and the centres [groups, T, D]."""
    rng = np.random.default_rng(seed)
    centres = 5 * rng.standard_normal((max(groups) + 1, T, D))
    generic = rng.standard_normal((T, D))
    offset = centres[list(groups)] - generic + 0.05 * rng.standard_normal((len(groups), T, D))
    table = np.concatenate([np.full((1, T, D), 7.0), offset])  # row 0 is nobody's
    return {"shared": {"generic": jnp.asarray(generic)}, "table": {"offset": jnp.asarray(table)}}, centres


def of_users(params, count):
    """(Centres in order of size, users' weights in that order [U + 1, C])."""
    centres = np.asarray(params["shared"]["centers"]).reshape(count, -1)
    order = np.lexsort(centres.T)
    return centres[order], np.asarray(jax.nn.softmax(params["table"]["weights"]))[:, order]


def test_people_apart_get_a_cluster_each():
    groups = (0, 1, 0, 2, 1, 0, 0, 0)
    params, centres = individuals(groups)
    found, weights = of_users(fit_clusters(MODEL, params, 3, jax.random.key(0)), 3)
    order = np.lexsort(centres.reshape(3, -1).T)
    np.testing.assert_allclose(found, centres.reshape(3, -1)[order], atol=0.15)
    place = np.argsort(order)[list(groups)]
    assert (weights[1:].argmax(1) == place).all() and (weights[1:].max(1) > 0.9).all()
    # The generic user is the population.
    np.testing.assert_allclose(weights[0], np.bincount(place) / 8, atol=0.01)
    # Users of the cluster model are near what they were.
    cluster = UserModel(kind="cluster", num_users=8, tokens=T, width=D, clusters=3)
    tokens, _ = cluster.apply(fit_clusters(MODEL, params, 3, jax.random.key(0), sharpness=20.0), jnp.arange(1, 9))
    np.testing.assert_allclose(tokens, MODEL.apply(params, jnp.arange(1, 9))[0], atol=0.3)


def test_the_order_of_people_does_not_matter():
    params, _ = individuals((0, 1, 0, 2, 1, 0, 0, 0))
    order = np.array([0, 5, 3, 8, 1, 7, 2, 6, 4])
    shuffled = {**params, "table": {"offset": params["table"]["offset"][order]}}
    centres, weights = of_users(fit_clusters(MODEL, params, 3, jax.random.key(0)), 3)
    again, other = of_users(fit_clusters(MODEL, shuffled, 3, jax.random.key(1)), 3)
    np.testing.assert_allclose(again, centres, rtol=1e-5)
    np.testing.assert_allclose(other, weights[order], rtol=1e-5)


@pytest.mark.parametrize("people", [1, 3])
def test_more_clusters_than_people(people):
    params, _ = individuals(range(people))
    model = UserModel(kind="individualized", num_users=people, tokens=T, width=D)
    found = fit_clusters(model, params, 5, jax.random.key(0))
    assert found["shared"]["centers"].shape == (5, T, D) and found["table"]["weights"].shape == (people + 1, 5)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(found))
    own = np.asarray(found["table"]["weights"])[1:].argmax(1)
    assert len(set(own)) == people
    vectors = model.apply(params, jnp.arange(1, people + 1))[0]
    np.testing.assert_allclose(found["shared"]["centers"][own], vectors, rtol=1e-5)


@pytest.mark.filterwarnings("ignore")  # k-means finds nothing to tell apart, and says so
def test_people_who_never_moved():
    params, _ = individuals((0,) * 8)
    params["table"]["offset"] = jnp.zeros_like(params["table"]["offset"])
    found = fit_clusters(MODEL, params, 2, jax.random.key(0))
    np.testing.assert_allclose(found["shared"]["centers"], np.stack([params["shared"]["generic"]] * 2), rtol=1e-5)
