"""Entries that read a person's comparisons: new people, and whether they read at all."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny, tiny_serving, tiny_users
from support.serving import answering, send
from support.tiny_users import pairs_of, trained_of

import pjrlhf
from pjrlhf.algorithms import pdpo
from pjrlhf.data.schema import Example, in_conversation
from pjrlhf.errors import UserError
from pjrlhf.feedback.history import RunBase
from pjrlhf.feedback.served import _chosen_first, with_teller
from pjrlhf.feedback.writers.attributes import choose
from pjrlhf.feedback.writers.base import Shot
from pjrlhf.feedback.writers.fewshot import FewShot
from pjrlhf.pipeline import stages
from pjrlhf.protocols import in_context
from pjrlhf.runtime.features import prompt_features
from pjrlhf.runtime.run import Run
from pjrlhf.serving.engine import Engine
from pjrlhf.serving.opening import open_run

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
    (folder / "run" / "config.json").write_text(json.dumps(stages.read(config).to_dict()))
    pdpo.run(started)
    return started


def trained(run, name):
    entry = run.section(pdpo.PreferenceSettings).entry(name)
    return trained_of(run, name, pairs_of(run, **entry.users.texts))


@pytest.mark.slow
def test_new_people_are_met_with_k_comparisons_and_no_step(run):
    one = trained(run, "reads")
    found = in_context.new_people(one, (0, 1, 2))
    table = one.pairs.tables["new_users"]
    people = {e.user_id for e in table.examples if e.held_out}
    assert set(found) == {0, 1, 2} and {len(accuracies) for accuracies in found.values()} == {len(people)}
    # With the k of training they are those of the prompts of training, and with none the prompts alone are left.
    rows = [i for i, e in enumerate(table.examples) if e.held_out]
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


def test_the_records_are_read_once(run, monkeypatch):
    """Controls, new people and answers have other texts before the same comparisons."""
    one = trained(run, "reads")
    monkeypatch.setattr(run.records, "comparisons", None)
    in_context.new_people(one, (0, 2))
    in_context.controls(one, "heldout", resamples=2, seed=0)
    monkeypatch.setattr(run, "sampler", lambda *_: lambda name, prompts, *rest: prompts)
    assert one.answers(["what is honey ?"], ["user0"])


def test_new_people_with_the_k_of_training_are_not_met_again(run, monkeypatch):
    one, asked = trained(run, "reads"), []
    told = in_context.told
    monkeypatch.setattr(in_context, "told", lambda *given, **changes: asked.append(changes) or told(*given, **changes))
    in_context.new_people(one, (0, 1, 2))
    assert asked == [{"count": 0}, {"count": 1}]


def test_prompts_are_compared_by_the_mean_of_their_states(run):
    prompts = ["what is honey and rain ?", "what is rain ?"]
    hidden = jax.jit(lambda backbone, ids: backbone.policies()(ids, jnp.ones(ids.shape, bool))[0])
    for prompt, found in zip(prompts, prompt_features(run, prompts), strict=True):
        states = hidden(run.workspace.backbone, jnp.array([run.text.prompt_ids(prompt)]))
        np.testing.assert_allclose(found, np.asarray(states, np.float32)[0].mean(0), rtol=1e-4, atol=1e-5)


def test_each_prompt_is_embedded_once_whatever_reads_it(run, monkeypatch):
    """For all controls, numbers of comparisons and entries, and in a process that comes later."""
    one, scorer, embedded = trained(run, "reads"), run.scorer, []

    def counted(size=0):
        found = scorer(size)
        return lambda name, rows, *rest: embedded.extend(rows if "prompts" in name else ()) or found(name, rows, *rest)

    monkeypatch.setattr(run, "scorer", counted)
    shutil.rmtree(run.workdir.path / "features", ignore_errors=True)
    told = in_context.told(one, "heldout", similar=True)
    asked = {e.original for part in one.pairs.parts.values() for e in part[0]}
    assert len(embedded) == len({tuple(ids) for ids in embedded}) == len(asked) > 2
    for changes in ({"count": 1}, {"count": 3}, {"flipped": True}, {"others": True}):
        in_context.told(one, "new_users", similar=True, **changes)
    assert len(embedded) == len(asked)
    later = in_context.told(trained(run, "reads"), "heldout", similar=True)
    assert later.pairs.tables["heldout"].examples == told.pairs.tables["heldout"].examples
    more = prompt_features(run, ["what is honey and salt ?", "what is sun ?", "what is honey and salt ?"])
    assert len(embedded) == len(asked) + 1 and (more[0] == more[2]).all()
    for file in (run.workdir.path / "features").glob("prompts-*"):
        file.write_bytes(file.read_bytes()[:-7])
    np.testing.assert_allclose(prompt_features(run, ["what is sun ?"])[0], more[1], rtol=1e-5, atol=1e-6)


def served(run, name, **reads):
    """The catalogue of an entry, perhaps with other things that it reads."""
    found = open_run(str(run.workdir.path), name)
    changed = dataclasses.replace(found.people.reads, **reads)
    return with_teller(dataclasses.replace(found, people=dataclasses.replace(found.people, reads=changed)))


def place_of(catalogue):
    model = catalogue.model
    return answering(catalogue, Engine(model.backbone, model.tokenizer, catalogue.bank, 0, tiny_serving.SETTINGS))


def test_a_server_reads_what_people_tell_it(run):
    """The answer is that of the trained entry after the text that its writer makes of the stored comparisons."""
    catalogue, prompt = served(run, "reads"), "what is honey ?"
    topics = ("sun", "rain", "honey", "wind")
    votes = [{"prompt": f"what is {one} ?", "chosen": ANSWERS[1], "rejected": ANSWERS[0]} for one in topics]
    with place_of(catalogue) as place:

        def ask(path, body, status=200):
            found = send(place, body, path)
            assert found[0] == status, found
            return found[1]

        body = {"prompt": prompt, "user": "ana", "max_tokens": 4, "temperature": 0, "echo": True}
        assert send(place, None, "/page/about", "GET")[1]["learns"], "the page lets people vote"
        assert ask("/v1/completions", body)["choices"][0]["text"].startswith(prompt), "nothing is known yet"
        ask("/v1/users", {"id": "ana"})
        assert ask("/v1/users/ana/feedback", {"comparisons": votes})["comparisons"] == 4
        found = ask("/v1/completions", body)
        whole = found["choices"][0]["text"]
        text, _, rest = whole.partition(f"\n{prompt}")
        lines = text.split("\n")
        assert len(lines) == 2, "the last two, without the one on what is asked"
        assert all(f"do {ANSWERS[1]}" in line and f"not {ANSWERS[0]}" in line for line in lines)
        assert found["pjrlhf"]["user"] == {"id": "ana", "known": True}
        personal = pjrlhf.load_personal(run.workdir.path / "preference" / "reads")
        assert personal.generate([f"{text}\n{prompt}"], [None], max_new_tokens=4) == [rest]
        # Others have their own text, the base has none, and ids cannot have one.
        for other in ({"user": "bo"}, {"user": None}, {"model": "base"}):
            assert ask("/v1/completions", body | other)["choices"][0]["text"].startswith(prompt)
        refused = ask("/v1/completions", body | {"prompt": [1, 5]}, 400)
        assert "is token ids, and this entry reads comparisons" in refused["error"]["message"]
        pairs = [{"prompt": prompt, "answers": list(ANSWERS)}]
        refused = ask("/v1/users/ana/next", {"pairs": pairs}, 400)
        assert "cannot say which pair tells most" in refused["error"]["message"]
        # What has no room in the prompts of training is left out, the oldest first.
        long = " ".join(["what is honey and rain ?"] * 7)
        asked = ask("/v1/completions", body | {"prompt": long})["choices"][0]["text"].partition(f"\n{long}")[0]
        assert asked == lines[1]


def test_a_server_knows_the_names_of_training(run):
    catalogue = served(run, "named")
    name = next(iter(catalogue.people.registry.rows))
    for user, want in ((name, f"Person: {name}"), ("zoe", "Person: anybody"), (None, "Person: anybody")):
        assert catalogue.told(catalogue.voice(None, None, user), "what is rain ?") == f"{want}\nwhat is rain ?"
    assert catalogue.told(catalogue.voice("base", None, name), "what is rain ?") == "what is rain ?"
    with pytest.raises(UserError, match="nobody writes here; serve the run with pjrlhf serve"):
        bare = open_run(str(run.workdir.path), "named")
        bare.told(bare.voice(None, None, name), "what is rain ?")


def votes_on(*topics, good=1):
    return [
        Example(prompt=f"what is {one} ?", chosen=ANSWERS[good], rejected=ANSWERS[1 - good], where=one)
        for one in topics
    ]


@pytest.mark.parametrize(("chat", "long_prompt"), [(False, "drop"), (True, "truncate_left")])
def test_a_server_asks_the_base_as_a_run_does(run, chat, long_prompt):
    """Log-ratios under an attribute, and features of prompts, of which only their texts are new."""
    asked = dataclasses.replace(
        run.settings, data=run.settings.data.replace(chat=chat, long_prompt=long_prompt, max_bad_fraction=0.5)
    )
    with_chat = Run(asked, run.sections, run.workdir)
    catalogue = open_run(str(run.workdir.path), "reads")
    base = with_teller(dataclasses.replace(catalogue, chat=chat)).people.teller.base
    lengths = dataclasses.replace(base._reader.lengths, long_prompt=long_prompt)
    base._reader = dataclasses.replace(base._reader, lengths=lengths)
    votes = [*votes_on("sun", "rain"), *votes_on("honey and rain", good=0)]
    long = votes_on(" ".join(["honey"] * 60))
    read = [in_conversation(one) if chat else one for one in votes + long]
    for words in ("", "be brief ."):
        want = RunBase(with_chat).margins(read, words)
        assert np.isnan(want).tolist() == [*[False] * 3, long_prompt == "drop"] and abs(want[0] - want[2]) > 1e-3
        np.testing.assert_allclose(base.margins(votes + long, words), want, rtol=1e-4, atol=1e-5)
    prompts = [one.prompt for one in read[:3]]
    np.testing.assert_allclose(
        base.features([one.prompt for one in votes]), prompt_features(with_chat, prompts), rtol=1e-4, atol=1e-5
    )


def test_a_server_reads_the_comparisons_most_like_what_is_asked(run):
    topics = ("sun", "rain", "honey and rain", "wind", "honey")
    votes = [*votes_on(*topics), *votes_on("sun", good=0)]
    catalogue, prompt = served(run, "reads", similar=True, history=3), "what is honey ?"
    assert not catalogue.people.learns and catalogue.laid_out(None) is catalogue, "the base is asked as it was loaded"
    features = dict(zip(topics, prompt_features(run, [f"what is {one} ?" for one in topics]), strict=True))
    others = [one for one in topics if one != "honey"]
    mean = np.mean([features[one] for one in others], axis=0)
    likeness = {
        one: (features[one] - mean) @ (features["honey"] - mean) / np.linalg.norm(features[one] - mean)
        for one in others
    }
    best = sorted(others, key=lambda one: -likeness[one])
    rows = sorted(
        (i for i, one in enumerate(votes) if one.where != "honey"), key=lambda i: (best.index(votes[i].where), -i)
    )
    want = FewShot(**{name: x for name, x in WRITER.items() if name != "kind"})
    shots = [Shot(votes[i], _chosen_first(votes[i])) for i in rows[:3][::-1]]
    assert catalogue.people.told(prompt, "ana", votes) == "\n".join([*map(want.shot, shots), prompt])
    # One comparison is the most similar one, none is none.
    assert catalogue.people.told(prompt, "ana", votes[:1]).count("\n") == 1
    assert catalogue.people.told(prompt, "ana", votes_on("honey")) == prompt


def test_a_server_chooses_attributes_by_what_people_chose(run, monkeypatch):
    """By the log-ratios of the run, and without reading a comparison twice."""
    attributes = ("be brief .", "be long .", "it can melt .")
    spec = {"kind": "attributes", "attributes": attributes, "most": 2, "beta": 1.0}
    catalogue = served(run, "reads", history=4, writer=spec)
    found = set()
    for good in (0, 1):
        votes = votes_on("sun", "rain", "wind", "snow", good=good)
        margins = np.array([RunBase(run).margins(votes, words) for words in ("", *attributes)])
        want = " ".join(attributes[a] for a in choose((margins[1:] - margins[0]).T, 2, 1.0))
        prompt = "what is honey ?"
        assert catalogue.people.told(prompt, "ana", votes) == (f"{want}\n{prompt}" if want else prompt)
        found.add(want)
        kept = catalogue.people.teller.base._logps
        with monkeypatch.context() as patch:
            patch.setattr(kept, "_score", None)  # it would be called for what is not kept
            catalogue.people.told("what is salt ?", "ana", votes[1:])
    assert len(found) == 2, "opposite people have the same text: this test could not fail"
    assert catalogue.people.told("what is honey ?", "ana", ()) == "what is honey ?"
    # Without a list they are the sentences of the run's preferences.
    plain = served(run, "reads", history=4, writer="attributes").people.teller.base
    assert plain.sentences == run.audience.sentences and any(plain.sentences.values())


@pytest.mark.parametrize(
    ("reads", "reason"),
    [
        (
            {"writer": "profile"},
            "its writer asks a language model, whose log of requests would keep what people delete",
        ),
        ({"writer": {"kind": "identity", "column": "c"}}, "its writer reads the column 'c' of records"),
    ],
)
def test_what_a_server_cannot_write_is_refused_at_its_start(run, reads, reason):
    with pytest.raises(UserError, match=f"--entry reads: is not served, because {reason}"):
        served(run, "reads", **reads)


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
    assert set(summary["gain"]) == set(summary["people_win_rate"]) == {*config.preference.models} - {"pooled"}
    assert "Accuracy by the text before the prompt" in (tmp_path / "report" / "index.html").read_text()
