"""Entries that read a person's comparisons: new people, and whether they read at all."""

import json

import numpy as np
import pytest
from support import tiny, tiny_users
from support.tiny_users import pairs_of, trained_of

from pjrlhf.algorithms import pdpo
from pjrlhf.errors import UserError
from pjrlhf.pipeline import stages
from pjrlhf.protocols import in_context

ANSWERS = ("it can shine .", "it can melt .")
WRITER = {"kind": "fewshot", "template": "{first_verdict} {first} {second_verdict} {second}", "verdicts": ("do", "not")}
READS = {"kind": "uniform", "history": 2, "writer": WRITER}
MODELS = {"pooled": {"kind": "uniform"}, "reads": READS, "named": {"kind": "uniform", "writer": "identity"}}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Entries that have taken a step, on records of people who prefer one of two answers."""
    folder = tmp_path_factory.mktemp("in_context")
    records = [
        {"prompt": f"what is {topic} ?", "chosen": pair[0], "rejected": pair[1], "user_id": f"user{i}"}
        for i, pair in enumerate((ANSWERS, ANSWERS[::-1]) * 4)
        for topic in ("sun", "rain", "wind", "snow", "river", "ocean", "stone", "sand")
    ]
    config = tiny_users.settings(
        "records",
        preference__models=MODELS,
        preference__data__path=tiny_users.write_records(folder / "records.jsonl", records),
        preference__heldout_fraction=0.25,
        preference__new_user_fraction=0.4,
        preference__steps=2,
        preference__mixture="exact",
        model__path=str(tiny_users.save_base(folder, max_length=80)),
        data__max_prompt=60,
        data__prompt_buckets=(),
        data__max_completion=8,
        data__chat=False,
    )
    started = tiny.start(folder / "run", config)
    pdpo.run(started)
    return started


def trained(run, name):
    entry = run.section(pdpo.PreferenceSettings).entry(name)
    return trained_of(run, name, pairs_of(run, **entry.users.texts))


def test_new_people_are_met_with_k_comparisons_and_no_step(run):
    one = trained(run, "reads")
    found = in_context.new_people(one, (0, 1, 2))
    table = one.pairs.tables["new_users"]
    people = {e.user_id for e in table.examples if e.extra["held_out"]}
    assert set(found) == {0, 1, 2} and {len(accuracies) for accuracies in found.values()} == {len(people)}
    # With the k of training they are those of the prompts of training, and with none the prompts alone are left.
    rows = [i for i, e in enumerate(table.examples) if e.extra["held_out"]]
    margins = one.margins("new_users", one.pairs.users("new_users"), rows)
    names = np.array([table.examples[i].user_id for i in rows])
    assert found[2] == [float((margins[names == name] > 0).mean()) for name in np.unique(names)]
    bare = in_context.told(one, "new_users", count=0)
    assert {e.prompt for e in bare.pairs.tables["new_users"].examples} == {
        e.prompt.split("\n")[-1] for e in table.examples
    }


def test_controls_change_the_text_alone(run):
    one = trained(run, "reads")
    own, others, flipped = (
        in_context.told(one, "heldout", **changes) for changes in ({}, {"others": True}, {"flipped": True})
    )
    np.testing.assert_array_equal(
        own.margins("heldout", own.pairs.users("heldout")), one.margins("heldout", one.pairs.users("heldout"))
    )
    for other in (others, flipped):
        for before, after in zip(
            own.pairs.tables["heldout"].examples, other.pairs.tables["heldout"].examples, strict=True
        ):
            assert (before.chosen, before.user_id) == (after.chosen, after.user_id)
            assert before.prompt.split("\n")[-1] == after.prompt.split("\n")[-1]
    found = in_context.controls(one, "heldout", resamples=20, seed=0)
    assert set(found) == {"own", "others", "nothing", "flipped", "turned"}
    assert 0 <= found["turned"] <= 1 and found["own"]["low"] <= found["own"]["mean"] <= found["own"]["high"]
    named = trained(run, "named")
    assert set(in_context.controls(named, "heldout", resamples=20, seed=0)) == {"own", "others"}
    assert len(set(map(tuple, in_context.new_people(named, (0, 1)).values()))) == 1, "it reads no comparisons"
    with pytest.raises(ValueError, match="entry 'pooled' reads no comparisons"):
        in_context.reads(trained(run, "pooled"))


def test_entries_without_rows_meet_new_people_only_where_they_read():
    config = tiny_users.settings(preference__models=MODELS)
    config.evaluate_users.update({"cold_start": (0, 1), "cold_start_models": ("reads", "named")})
    assert stages.read(config)
    config.evaluate_users.cold_start_models = ("pooled",)
    with pytest.raises(UserError, match="'pooled' has nothing of a person's own to fit; leave it out"):
        stages.read(config)


def test_answers_are_asked_after_the_text_of_the_person(run, monkeypatch):
    one, asked = trained(run, "reads"), []
    monkeypatch.setattr(run, "sampler", lambda *_: lambda name, prompts, *rest: asked.extend(prompts) or prompts)
    people = ["user0", "user1"]
    one.answers(["what is honey ?", "what is salt ?"], [user for user in people if user in one.pairs.registry.rows])
    preferred = {"user0": ANSWERS, "user1": ANSWERS[::-1]}
    people = [user for user in people if user in one.pairs.registry.rows]
    assert len(asked) == 2 * len(people) > 0
    for user, prompt in zip(np.repeat(people, 2), asked, strict=True):
        text, last = prompt.rsplit("\n", 1)
        good, bad = preferred[user]
        assert last in ("what is honey ?", "what is salt ?")
        assert text.count(f"do {good}") == text.count(f"not {bad}") == 2


@pytest.mark.slow
def test_the_variant_runs_whole(tmp_path):
    sizes = {key: value for key, value in tiny_users.TINY.items() if not key.startswith("population.personas")}
    config = tiny.catalogue("pdpo").get_config("context")
    config.update_from_flattened_dict(
        sizes
        | {
            "model.max_length": 128,
            "data.max_prompt": 96,
            "data.packing": "pack",
            "population.pool": 40,
            "population.personas": ("P2A", "P2B"),
            "evaluate_users.generate_for": 1,
            "evaluate_users.cold_start": (0, 2),
            "evaluate_users.cold_start_models": ("fewshot", "attributes", "individualized"),
        }
    )
    tiny.run(tmp_path, config)
    summary = json.loads((tmp_path / "report" / "summary.json").read_text())
    assert set(summary["context"]) == {*config.preference.models} - {"pooled", "individualized"}
    assert set(summary["cold_start"]) == {"fewshot", "attributes", "individualized"}
    assert set(summary["generation"]) == set(config.preference.models)
    assert set(summary["gain"]) == {*config.preference.models} - {"pooled"}
    assert "Accuracy by the text before the prompt" in (tmp_path / "report" / "index.html").read_text()
