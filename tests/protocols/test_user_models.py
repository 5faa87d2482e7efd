"""Reward models of people side by side: features once, no leaks between parts, controls, and the report."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny, tiny_user_models, tiny_users

from pjrlhf.algorithms.user_rewards import train
from pjrlhf.errors import UserError
from pjrlhf.feedback.feature_pairs import FeaturePairs, Part, TrainingPeople, padded
from pjrlhf.models.storage import save_tree
from pjrlhf.models.user_models.individual import Individual
from pjrlhf.models.user_models.lore import Lore
from pjrlhf.models.user_models.pooled import Pooled
from pjrlhf.models.user_models.pref import Pref
from pjrlhf.models.user_models.pttt import Pttt
from pjrlhf.pipeline import stages
from pjrlhf.protocols.met_people import Fitted, known_people, new_people
from pjrlhf.protocols.user_models import UserModelsSettings, summarized
from pjrlhf.runtime.features import encoded
from pjrlhf.serving.opening import open_run
from pjrlhf.serving.people.rewards import FILE, open_scorer

WIDTH, SIZE = 4, 6


def world(people=12, count=40, seed=0, held=0.25):
    """(features [A, WIDTH], part of people "even*" who want the first feature high and "odd*" who want it low)."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(200, WIDTH)).astype(np.float32)
    answers, names = [], []
    for i in range(people):
        pairs = rng.choice(200, (count, 2), replace=True)
        better = features[pairs[:, 0], 0] > features[pairs[:, 1], 0]
        turn = better != (i % 2 == 0)
        answers.append(np.where(turn[:, None], pairs[:, ::-1], pairs))
        names += [f"{'odd' if i % 2 else 'even'}{i}"] * count
    personas = tuple(name.rstrip("0123456789") for name in names)
    held_out = rng.random(len(names)) < held
    return features, Part(np.concatenate(answers), np.array(names), held_out, personas)


def chosen(part, rows):
    kept = np.flatnonzero(rows)
    return Part(part.answers[kept], part.people[kept], part.held_out[kept], tuple(part.personas[i] for i in kept))


@pytest.fixture(scope="module")
def parts():
    features, train_part = world(held=0.0)
    _, new = world(people=4, seed=0)
    return features, train_part, new


def trained(model, features, part, permuted=None):
    people = TrainingPeople(part, permuted)
    params, metrics = train(
        "x", model, features, people, jax.random.key(0), np.random.default_rng(0), batch=8, context=SIZE, query=4
    )
    return Fitted(model, params), metrics


def accuracy(fitted, new, count, reverse=False):
    people = new_people(*new, SIZE, SIZE)
    context = people.context.reversed() if reverse else people.context
    return float((people.labelled(fitted.margins(fitted.met(context, count), people))[0] > 0).mean())


@pytest.mark.parametrize(
    ("model", "least"),
    [
        pytest.param(Individual(steps=150), 0.65, id="individual", marks=pytest.mark.slow),
        pytest.param(Lore(steps=150), 0.8, id="lore"),
        pytest.param(Pttt(steps=300, hidden=16), 0.7, id="pttt", marks=pytest.mark.slow),
    ],
)
def test_people_who_want_opposites_are_served(parts, model, least):
    """The pooled model is at chance; personal ones learn people from few comparisons, and the opposite from reversed
    ones.
    """
    features, part, new = parts
    pooled, _ = trained(Pooled(steps=150), features, part)
    assert abs(accuracy(pooled, (features, new), SIZE) - 0.5) < 0.2
    fitted, metrics = trained(model, features, part)
    assert metrics["loss"] < 0.69
    assert accuracy(fitted, (features, new), SIZE) > least
    assert accuracy(fitted, (features, new), SIZE, reverse=True) < 1 - least


def test_people_exchanged_in_training_teach_nothing(parts):
    features, part, _ = parts
    fitted, _ = trained(Lore(steps=150), features, part, np.random.default_rng(1))
    known = known_people(features, part, part, TrainingPeople(part), SIZE)
    margins, _ = known.labelled(fitted.margins(fitted.known(known), known))
    assert abs((margins > 0).mean() - 0.5) < 0.2


def test_a_step_never_scores_what_it_tells():
    _, part = world(people=3, count=5)
    people = TrainingPeople(part)
    plan = people.batches(40, 4, context=4, query=4, rng=np.random.default_rng(0))
    for place in np.ndindex(plan.rows.shape):
        query = plan.query[place][plan.query_weight[place] > 0]
        context = plan.context[place][plan.context_weight[place] > 0]
        assert len(query) == 2 and not set(query) & set(context), "half of five comparisons are asked"
        assert set(people.rows[query]) | set(people.rows[context]) == {plan.rows[place]}
        assert plan.counts[place] == 5 and plan.rows[place] > 0
    sizes = plan.context_weight.sum(-1)
    assert {0, 3} <= set(sizes.ravel().astype(int)) and sizes.max() == 3


def test_permuted_people_keep_their_numbers_of_comparisons():
    _, part = world(people=3, count=5)
    people, other = TrainingPeople(part), TrainingPeople(part, np.random.default_rng(0))
    assert (np.bincount(people.rows) == np.bincount(other.rows)).all()
    assert (people.rows != other.rows).any() and (people.pairs == other.pairs).all()


def test_what_people_tell_is_not_what_they_are_tested_on():
    features, part = world(people=3)
    people = TrainingPeople(part)
    known = known_people(features, part, part, people, SIZE)
    new = new_people(features, part, SIZE, pool=10)
    for one in (known, new):
        for person in range(len(one.names)):
            told = {row.tobytes() for row in one.context.chosen[person] - one.context.rejected[person]}
            tested = one.tested.chosen[person] - one.tested.rejected[person]
            real = tested[one.tested.weight[person] > 0]
            assert not told & {row.tobytes() for row in real if row.any()}
    assert known.rows.tolist() == people.registry.indices(known.names).tolist() and (new.rows == 0).all()
    assert new.context.weight.shape[1] == 10


def test_too_few_comparisons_of_new_people():
    features, part = world(people=3, count=8)
    with pytest.raises(UserError, match="user_models: no new person has 60 comparisons on prompts of training"):
        new_people(features, part, 60, 60)


def test_active_questions_are_asked_once_and_the_others_in_their_order():
    features, part = world(people=3)
    people = new_people(features, part, SIZE, pool=12)
    params = Pref(factors=2).init(jax.random.key(0), WIDTH, 3)
    plain = Fitted(Pref(factors=2, fit_steps=5), params).asked(people.context, SIZE)
    np.testing.assert_array_equal(plain.chosen, people.context.chosen[:, :SIZE])
    active = Fitted(Pref(factors=2, fit_steps=5, active=True), params).asked(people.context, SIZE)
    for told, pool in zip(active.chosen, people.context.chosen, strict=True):
        drawn = [row.tobytes() for row in np.asarray(told)]
        assert len(set(drawn)) == SIZE and set(drawn) <= {row.tobytes() for row in np.asarray(pool)}
    assert (active.chosen != plain.chosen).any()
    assert (active.weight == 1).all(), "padding is no question"


def test_the_cost_of_a_person_is_that_of_the_state():
    features, part = world(people=3)
    model = Pttt(hidden=8)
    fitted = Fitted(model, model.init(jax.random.key(0), WIDTH, 3))
    found = fitted.cost(new_people(features, part, SIZE, SIZE), SIZE)
    assert found["bytes"] == 8 * 4 and 0 < found["milliseconds"] < 1e4


def test_a_loss_that_is_not_finite_stops_the_run(parts):
    features, part, _ = parts
    with pytest.raises(UserError, match=r"user_models\.models\.x: the loss is not finite after 50 steps; lower its"):
        trained(Pooled(steps=50), features * np.float32(np.inf), part)


def test_padding_holds_nobody_elses_comparisons():
    features, part = world(people=2, count=3)
    found = padded(features, part, [np.array([0, 1]), np.array([4])])
    assert found.weight.tolist() == [[1, 1], [1, 0]]
    np.testing.assert_array_equal(found.chosen[1, 0], features[part.answers[4, 0]])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"kind": "jsonl"}, "new_user_fraction": 0.0}, "new_user_fraction: is 0, and nobody is new"),
        ({"seeds": (1, 1)}, r"seeds: \(1, 1\) is empty or repeats one"),
        ({"counts": (0,)}, r"counts: \(0,\) has no number above 0"),
        ({"batch_size": 4}, "batch_size: 4 is less than query=8"),
        ({"models": {}}, "models: there is none; add an entry"),
        ({"models": {"x": {"kind": "nope"}}}, "models.x.kind: 'nope' is unknown"),
        ({"models": {"a/b": {"kind": "lore"}}}, "models: 'a/b' holds '/'"),
        ({"states": ()}, "states: is empty"),
        ({"encoder": "encoders.py:nope"}, "encoder 'encoders.py:nope'"),
        ({"encoder": "math:pi"}, "encoder 'math:pi': is not a function of prompts and completions"),
        ({"encoder": "json:dumps"}, "encoder 'json:dumps': wants 'obj'; an encoder gets prompts and completions alone"),
        ({"encoder": "builtins:zip", "states": ("last",)}, "states: are those of the base, and an encoder is given"),
    ],
)
def test_settings_that_do_not_go_together(changes, message):
    with pytest.raises(UserError, match=message):
        UserModelsSettings(**changes)


ENCODERS = """
import numpy as np

def lengths(prompts, completions):
    assert len(prompts) == len(completions) == len(set(zip(map(str, prompts), completions)))
    return [[str(p).count("sun"), len(c), c.count("yes")] for p, c in zip(prompts, completions)]

def flat(completions): return [len(c) for c in completions]
def few(completions): return np.zeros((len(completions) - 1, 2))
def nan(completions): return np.full((len(completions), 2), np.nan)
def fails(completions): raise RuntimeError("no connection")
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("flat", r"gives an array of shape \(2,\) for 2 answers; return one vector each"),
        ("few", r"gives an array of shape \(1, 2\) for 2 answers"),
        ("nan", "gives vectors that are not finite for 2 of 2 answers"),
        ("fails", r"failed \(.*no connection\); correct it"),
    ],
)
def test_what_an_encoder_may_not_give(tmp_path, name, message):
    (tmp_path / "encoders.py").write_text(ENCODERS)
    with pytest.raises(UserError, match=rf"encoder '.*encoders.py:{name}': {message}"):
        encoded(f"{tmp_path}/encoders.py:{name}", ["a", "b"], ["c", "d"])


def test_vectors_of_an_encoder_are_those_of_whole_texts(tmp_path):
    """Answers that only differ beyond the limit of tokens have vectors of their own."""
    (tmp_path / "encoders.py").write_text(ENCODERS)
    word = "yes " * 40
    records = [
        {"prompt": "what is sun ?", "chosen": f"{word}{i} .", "rejected": "no .", "user_id": f"u{user}"}
        for user in range(8)
        for i in ("a", "longer")
    ]
    config = tiny_user_models.settings(
        {"pooled": {"kind": "pooled", "steps": 5}},
        user_models__encoder=f"{tmp_path}/encoders.py:lengths",
        data__long_completion="truncate",
    )
    with config.ignore_type():
        config.user_models.data = {"kind": "jsonl", "path": tiny_users.write_records(tmp_path / "own.jsonl", records)}
    config.stages = ("sft", "user_models")
    run = tiny.start(tmp_path / "run", config)
    run.scorer = lambda: pytest.fail("the base is not asked")
    data = FeaturePairs(run, run.section(UserModelsSettings))
    assert sorted(map(tuple, data.states.tolist())) == [(1, 4, 0), (1, 163, 40), (1, 168, 40)]


def test_a_server_says_that_it_calls_no_encoder(tmp_path):
    save_tree(tmp_path / FILE, {"params": {}}, {"user_rewards": {"kind": "pooled"}, "encoder": "encoders:mini"})
    with pytest.raises(UserError, match="was trained on vectors of 'encoders:mini', which a server does not call"):
        open_scorer(tmp_path / FILE, {})


def result(margins, people, new=0.5):
    """What a seed finds of an entry, for `summarized`."""
    margins = np.array(margins, float)
    one = (margins, np.array(people))
    return {
        "known": one,
        "generic": one,
        "curve": {0: one, 1: (margins + new, np.array(people))},
        "flip": {"flipped": 0.5, "accuracy": 0.25},
        "ece": 0.1,
        "cost": {"bytes": 8.0, "milliseconds": 2.0},
        "described": {},
        "vectors": {name: np.array([i, 1.0]) for i, name in enumerate(people)},
        "loss": 0.5,
        "seconds": 1.0,
        "grid": {"seen_user_seen_prompt": 1.0},
        "personas": {},
    }


def test_seeds_are_joined_by_person():
    settings = UserModelsSettings(
        models={"pooled": {"kind": "pooled"}, "lore": {"kind": "lore"}}, counts=(0, 1), resamples=20
    )
    runs = [
        {"pooled": result([-1, 1], ["a", "b"]), "lore": result([1, 1], ["a", "b"])},
        {"pooled": result([-1, -1], ["a", "b"]), "lore": result([-1, 1], ["a", "b"])},
    ]
    found = summarized(settings, runs, 0)
    people = {
        name: {user: one["accuracy"] for user, one in x["users"].items()} for name, x in found["accuracy"].items()
    }
    assert people == {"pooled": {"a": 0.0, "b": 0.5}, "lore": {"a": 0.5, "b": 1.0}}
    assert found["gain"]["lore"]["mean"] == pytest.approx(0.5) and found["gain"]["lore"]["against"] == "pooled"
    assert found["user_models"]["lore"]["seeds"] == [1.0, 0.5]
    assert found["user_models"]["lore"]["source"] == "id" and found["user_models"]["lore"]["new_gain"]["users"] == 2
    assert set(found["cold_start"]["lore"]) == {"0", "1"} and found["controls"] == []


@pytest.mark.slow
def test_a_whole_run(tmp_path, monkeypatch):
    path = tiny.run(tmp_path, tiny_user_models.settings())
    summary = json.loads((path / "report" / "summary.json").read_text())
    assert set(summary["accuracy"]) == set(tiny_user_models.MODELS) == set(summary["user_models"])
    assert summary["controls"] == ["permuted"] and set(summary["cold_start"]["pref"]) == {"0", "2", "4"}
    assert all(len(one["seeds"]) == 2 for one in summary["user_models"].values())
    assert summary["user_models"]["pooled"]["bytes"] == 0 and summary["user_models"]["vpl"]["kl"] is not None
    assert summary["accuracy"]["pooled"]["mean"] == summary["accuracy"]["pooled"]["generic"]
    assert set(summary["grid"]["pref"]) == {
        f"{who}_prompt" for who in ("seen_user_seen", "seen_user_unseen", "unseen_user_unseen")
    }
    assert "Parts, controls and costs" in (path / "report" / "index.html").read_text()
    _check_served(path)
    # Features are computed once: a second start of the stage reads them, and a damaged file is made again.
    run = tiny.start(path, tiny_user_models.settings())
    settings = run.section(UserModelsSettings)
    first = FeaturePairs(run, settings).states
    monkeypatch.setattr(type(run), "scorer", lambda self: pytest.fail("computed again"))
    np.testing.assert_array_equal(FeaturePairs(run, settings).states, first)
    monkeypatch.undo()
    (file,) = (path / "features").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-4])
    np.testing.assert_allclose(FeaturePairs(run, settings).states, first, atol=1e-5)


def _check_served(path):
    """A server gives new people the states of the report, from the texts of their comparisons."""
    run = tiny.start(path, tiny_user_models.settings())
    settings = run.section(UserModelsSettings)
    data = FeaturePairs(run, settings)
    parts, table = data.split(0), data._tables["new_users"]
    reduction = data.reduction(parts["train"])
    people = new_people(reduction(data.states), parts["new_users"], 4, 4)
    rows_of = parts["new_users"].of_people()
    told = [rows[~parts["new_users"].held_out[rows]][:4] for rows in (rows_of[name] for name in people.names)]
    for name in ("pref", "vpl", "pooled"):
        scorer = open_run(str(path), name).people.scorer
        for i, rows in enumerate(told):
            state = scorer.fit(scorer.generic, [table.examples[row] for row in rows])
            context = jax.tree.map(lambda x, i=i: x[i], people.context)
            want = scorer.model.meet(scorer.params, context)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), state, want)


@pytest.mark.slow
def test_own_records(tmp_path):
    """The split is by prompt and by person, whatever a column `held_out` says; ties are left out."""
    records = [
        {
            "held_out": True,
            "prompt": f"what is {word} ?",
            "chosen": f"{a} {word} .",
            "rejected": f"{b} .",
            "user_id": f"u{user}",
        }
        for user in range(8)
        for word, a, b in (("sun", "yes", "no"), ("rain", "no", "yes"), ("wind", "yes", "no"), ("snow", "no", "yes"))
    ]
    records[0]["preference"] = 0.5
    path = tiny_users.write_records(tmp_path / "own.jsonl", records)
    config = tiny_user_models.settings({"pooled": {"kind": "pooled", "steps": 5}}, user_models__counts=(0, 1))
    with config.ignore_type():
        config.user_models.data = {"kind": "jsonl", "path": path}
    config.stages = ("sft", "user_models")
    run = tiny.start(tmp_path / "run", config)
    stages.stage_of("sft").run(run)
    data = FeaturePairs(run, run.section(UserModelsSettings))
    for seed in (0, 1):
        parts = data.split(seed)
        answers = {name: {tuple(row) for row in part.answers} for name, part in parts.items()}
        assert not answers["train"] & answers["heldout"]
        assert not set(parts["new_users"].people) & set(parts["train"].people)
        assert sum(len(part.people) for part in parts.values()) == len(records) - 1
        assert not parts["train"].held_out.any() and parts["heldout"].held_out.all()
    assert jnp.isfinite(data.reduced(parts["train"])).all()
