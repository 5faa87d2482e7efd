"""Comparisons of given answers by people of conflicting persona, as in P-RLHF's length experiment."""

import collections
import gzip
import itertools
import json
import random

import numpy as np
import pytest
from support import tiny
from support.tiny_users import settings, write_records

from pjrlhf.data import synthetic
from pjrlhf.errors import UserError
from pjrlhf.feedback import population

COUNT, LONG = 24, "word " * 60
PEOPLE = {
    "population.users": 4,
    "population.new_users": 2,
    "population.personas": ("longer", "shorter"),
    "population.fractions": (0.75, 0.25),
    "population.pairs_per_user": 32,
    "population.heldout_pairs_per_user": 16,
    "population.new_pairs_per_user": 40,
}


def request(i):
    return f"question number {i} ?"


def pairs():
    """Longer and shorter answers in either column; one pair of equal length and one that does not fit, too."""
    answers = [("yes", "yes , and more of it"), ("no , and far more", "no")]
    records = [{"prompt": request(i), "brief": answers[i % 2][0], "full": answers[i % 2][1]} for i in range(COUNT)]
    # The others have more words or more tokens, yet as many characters or too many.
    return [
        *records,
        {"prompt": request(0), "brief": "a b c d", "full": "abcdefg"},
        {"prompt": request(1), "brief": "yes", "full": LONG},
    ]


def length_settings(tmp_path):
    """The catalogue's :style_pairs on a few generated records."""
    answers = [{"prompt": request(i), "response": f"answer {i} of many , and more of it"} for i in range(COUNT)]
    sizes = {
        "model.tokenizer.vocab_size": 300,
        "model.max_length": 64,
        "data.max_prompt": 24,
        "data.prompt_buckets": (),
        "data.max_completion": 32,
        "data.long_completion": "drop",
    }
    config = settings("style_pairs", **PEOPLE, **sizes, **{"data.heldout_fraction": 0.25, "data.max_bad_fraction": 0.5})
    config.data.prompts.path = config.population.data.path = write_records(tmp_path / "pairs.jsonl", pairs())
    config.sft.data.path = write_records(tmp_path / "answers.jsonl", answers)
    config.population.data.columns = {"chosen": "brief", "rejected": "full"}
    return config


def read(run):
    folder = run.workdir.path / "population"
    names = (population.TRAIN, population.HELDOUT, population.NEW)
    return [[json.loads(line) for line in (folder / name).read_text().splitlines()] for name in names]


@pytest.fixture
def made(tmp_path):
    run = tiny.start(tmp_path / "run", length_settings(tmp_path))
    return run, population.run(run)


def test_everybody_labels_by_characters_and_own_taste(made):
    run, info = made
    train, held, new = read(run)
    crowd = info["people"] | info["new_people"]
    assert collections.Counter(info["people"].values()) == {"longer": 3, "shorter": 1}
    for record in train + held + new:
        chosen, rejected = (record[side][0]["content"] for side in ("chosen", "rejected"))
        longer = len(chosen) > len(rejected)
        assert record["persona"] == crowd[record["user_id"]] == ("longer" if longer else "shorter")
    assert {r["user_id"] for r in train} == {r["user_id"] for r in held} == set(info["people"])
    assert {r["user_id"] for r in new} == set(info["new_people"])


def test_pairs_are_split_by_prompt_and_nobody_labels_one_twice(made):
    run, _ = made
    train, held, new = read(run)
    assert {r["request"] for r in train} <= set(run.records.requests[0])
    assert {r["request"] for r in held} <= set(run.records.requests[1])
    assert {r["held_out"] for r in new} == {True, False}
    for records in (train, held, new):
        seen = collections.Counter((r["user_id"], r["request"]) for r in records)
        assert max(seen.values()) == 1


def test_pairs_that_do_not_fit_or_do_not_differ_are_left_out(made):
    run, info = made
    assert info["given_pairs"] == COUNT + 1  # without the one that is too long
    texts = {r[side][0]["content"] for part in read(run) for r in part for side in ("chosen", "rejected")}
    assert texts == {"yes", "no", "yes , and more of it", "no , and far more"}
    # Everybody met the pair of equal length on one side of the split.
    assert sum(info["ties"].values()) == 4 + 2


def test_long_answers_are_judged_whole_where_their_beginning_is_read(tmp_path):
    config = length_settings(tmp_path)
    config.data.long_completion = "truncate"
    run = tiny.start(tmp_path / "run", config)
    assert population.run(run)["given_pairs"] == COUNT + 2
    found = [r for part in read(run) for r in part if r["request"] == request(1) and "chosen" in r]
    texts = {r["persona"]: [r[side][0]["content"] for side in ("chosen", "rejected")] for r in found if LONG in str(r)}
    assert texts and all(pair == ["yes", LONG][:: -1 if persona == "longer" else 1] for persona, pair in texts.items())


def test_the_base_never_sees_a_held_out_request(made):
    run, _ = made
    asked = {example.prompt[0]["content"] for example in run.records.completions}
    assert asked == set(run.records.requests[0])


def test_pairs_of_other_prompts(tmp_path):
    config = length_settings(tmp_path)
    records = [record | {"prompt": "what else ?"} for record in pairs()]
    config.population.data.path = write_records(tmp_path / "others.jsonl", records)
    with pytest.raises(UserError, match=r"population\.data: none of 25 pairs belongs to train\.jsonl"):
        population.run(tiny.start(tmp_path / "run", config))


@pytest.mark.slow
@pytest.mark.real_data
def test_real_answers_of_conflicting_length(tmp_path, shared):
    config = settings("style_pairs", **PEOPLE, **{"data.max_completion": 160, "model.max_length": 224})
    config.data.long_completion, config.data.max_bad_fraction = "drop", 0.95
    for spec in (config.data.prompts, config.population.data, config.sft.data):
        name = "style_pairs" if spec is not config.sft.data else "responses"
        with gzip.open(shared / "data" / "alpaca_eval" / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
            # Evenly spaced, for the files are ordered by model.
            part = list(itertools.islice(lines, 0, None, 6 if name == "style_pairs" else 40))
        (tmp_path / name).write_text("".join(part), encoding="utf-8")
        spec.path = str(tmp_path / name)
    run = tiny.start(tmp_path / "run", config)
    info = population.run(run)
    assert info["given_pairs"] > 50
    train, held, _ = read(run)
    assert not {r["request"] for r in train} & {r["request"] for r in held}
    ratio = [
        len(r["chosen"][0]["content"]) / len(r["rejected"][0]["content"]) for r in held if r["persona"] == "shorter"
    ]
    assert max(ratio) < 1


def test_people_take_turns_in_how_much_they_compare(tmp_path):
    config = length_settings(tmp_path)
    config.population.pairs_in_turn = (1, 3)
    run = tiny.start(tmp_path / "run", config)
    population.run(run)
    counts = collections.Counter(record["user_id"] for record in read(run)[0])
    assert all(counts[user] <= most for user, most in zip(sorted(counts), (1, 3, 1, 3), strict=True))
    assert sum(counts.values()) >= 6  # of at most 8, two of which may be ties


def test_many_people_draw_from_one_pool(tmp_path, monkeypatch):
    """The answers that are sampled are those of the pool, whoever compares them."""
    asked = []

    def sampled(run, prompts, keys, name):
        asked.append(len(prompts))
        return [synthetic.answer(prompt, (), random.Random(i)) for i, prompt in enumerate(prompts)]

    monkeypatch.setattr(population, "sample_base", sampled)
    changes = {"population.users": 50, "population.pool": 9, "population.pairs_per_user": 4}
    run = tiny.start(tmp_path / "run", settings(**{**PEOPLE, "population.personas": ("P2A", "P2B"), **changes}))
    population.run(run)
    assert asked == [18, 18, 18]
    train = read(run)[0]
    counts = collections.Counter(record["user_id"] for record in train)
    assert len(counts) == 50 and max(counts.values()) <= 4
    assert (
        len({(record["request"], *sorted(map(str, (record["chosen"], record["rejected"])))) for record in train}) <= 9
    )


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_people_who_contradict_themselves(share):
    config = population.PopulationSettings(contradicting=share, personas=("P2A", "P3A", "P3B"), fractions=(1, 1, 2))
    people = population.people_of(config, "user", 20, random.Random(0))
    without = population.people_of(config.replace(contradicting=0.0), "user", 20, random.Random(0))
    assert sum(person.contradicts for person in people.values()) == 20 * share
    assert {name: person.persona for name, person in people.items()} == {
        name: person.persona for name, person in without.items()
    }
    assert all(person.stated in config.personas for person in people.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"contradicting": 0.5, "personas": ("P3A",), "fractions": (1.0,)},
            "contradicting: there is one persona alone",
        ),
        ({"pool": 5, "data": {"kind": "jsonl", "path": "x"}}, "pool: the pairs of population.data are all there is"),
    ],
)
def test_mistakes_in_populations(changes, message):
    with pytest.raises(UserError, match=message):
        population.PopulationSettings().replace(**changes).check()


def test_people_who_weigh_personas(tmp_path):
    """Everybody's label is the sign of their own weighted sum of standardised scores."""
    config = length_settings(tmp_path)
    config.population.mixture = 0.5
    run = tiny.start(tmp_path / "run", config)
    info = population.run(run)
    crowd = info["people"] | info["new_people"]
    assert all(sum(taste.values()) == pytest.approx(1) and min(taste.values()) >= 0 for taste in crowd.values())
    assert len({tuple(taste.values()) for taste in crowd.values()}) == len(crowd)
    for record in itertools.chain(*read(run)):
        taste = crowd[record["user_id"]]
        assert record["taste"] == taste and record["persona"] == max(taste, key=taste.get)
        chosen, rejected = (record[side][0]["content"] for side in ("chosen", "rejected"))
        # The two scores are opposite and have one spread.
        assert (len(chosen) - len(rejected)) * (taste["longer"] - taste["shorter"]) > 0


def test_scores_of_different_units_count_alike(tmp_path):
    run = tiny.start(tmp_path / "run", length_settings(tmp_path))
    labels = population.Labels(run)
    labels.calibrate(("longer",), [("q", "ab", "abcd")])  # lengths 2 and 4 have a standard deviation of 1
    assert labels.gap({"longer": 0.5}, "q", "abc", "a") == pytest.approx(1.0)
    labels.calibrate(("longer",), [("q", "ab", "abcdefghij"), ("q", "ab", "abcdefghij")])
    assert labels.gap({"longer": 0.5}, "q", "abc", "a") == pytest.approx(0.25)


def test_concentrated_mixtures_are_even_and_fractions_are_means():
    rng = np.random.default_rng(0)
    even = population.tastes(("a", "b"), (0.5, 0.5), 1e5, rng)
    assert even == pytest.approx({"a": 0.5, "b": 0.5}, abs=0.02)
    drawn = [population.tastes(("a", "b", "c"), (3.0, 1.0, 0.0), 0.3, rng) for _ in range(2000)]
    assert np.mean([taste["a"] for taste in drawn]) == pytest.approx(0.75, abs=0.03)
    assert all(set(taste) == {"a", "b"} for taste in drawn)
