"""Feedback of Personalized Soups: distinct pairs, without the sentence that states the preference."""

import pytest
from support.raw_data import read, write

from pjrlhf.data.preferences import PAPER
from pjrlhf.data.readers.psoups import PROFILES, without_sentence

NO_COMMAS = "Generate a response that is concise and to the point without being verbose."


def row(profile="P1A", question="Why is the sky blue?", answers=("Light.", "Rayleigh scattering."), sentence=None):
    sentence = PAPER[profile].sentence if sentence is None else sentence
    return {"user_input": f"{question} {sentence}", "completion_a": answers[0], "completion_b": answers[1]}


# Distinct pairs per preference, in thousands, of the published 8,959 to 9,356; every one stands five times.
DISTINCT = dict(zip(PROFILES, (3, 4, 2, 3, 4, 4), strict=True))


@pytest.fixture
def folder(tmp_path):
    for profile, count in DISTINCT.items():
        rows = [row(profile, f"Question {i}?") for i in range(count)] * 5 + [row(profile, "Tie?", ("Yes.", "Yes."))]
        write(tmp_path / f"data/rm_training/{profile}.json", rows)
    write(tmp_path / "data/koala_eval_50.json", [{"id": "koala_0", "prompt": "Not a pair."}])
    return tmp_path / "data"


def test_pairs_are_distinct(folder):
    found = read("psoups", folder)
    counts = {profile: sum(one["user_id"] == profile for one in found.good) for profile in PROFILES}
    assert counts == DISTINCT
    assert found.dropped == {"repeated pairs": 4 * sum(DISTINCT.values()), "equal answers": 6} and not found.bad
    assert found.good[0] == {
        "prompt": "Question 0?",
        "chosen": "Light.",
        "rejected": "Rayleigh scattering.",
        "user_id": "P1A",
        "objective": "P1A",
        "user_text": PAPER["P1A"].sentence,
    }
    some = read("psoups", folder, profiles=("P2A", "P2B"))
    assert {one["user_id"] for one in some.good} == {"P2A", "P2B"}
    assert [one["prompt"] for one in read("psoups", folder / "rm_training", profiles=("P2A",)).good] == [
        "Question 0?",
        "Question 1?",
    ]


@pytest.mark.parametrize("profile", PROFILES)
def test_sentences_are_found_whatever_their_punctuation(profile):
    sentence = PAPER[profile].sentence
    for variant in (sentence, sentence.replace(",", ""), sentence.rstrip("."), sentence.lower(), sentence + "\n"):
        assert without_sentence(f"How, and why? {variant}", profile) == "How, and why?"
        assert without_sentence(f"{variant} How, and why?", profile) == "How, and why?"
    other = next(name for name in PROFILES if name != profile)
    assert without_sentence(f"Why? {PAPER[other].sentence}", profile) == f"Why? {PAPER[other].sentence}"


def test_a_stated_preference_stays_where_it_is_asked_for(tmp_path):
    path = write(tmp_path / "one_text/P2A.json", [row("P2A", sentence=NO_COMMAS)])
    assert read("psoups", path).good[0]["prompt"] == "Why is the sky blue?"
    assert read("psoups", path, stated=True).good[0]["prompt"] == f"Why is the sky blue? {NO_COMMAS}"


def test_the_copy_on_the_hub_has_numbers_of_people(tmp_path):
    rows = [
        {"prompt": f"<|user|>\nWhy? {NO_COMMAS} \n<|assistant|>\n", "chosen": "a", "rejected": "b", "uid": 3},
        {"prompt": "Why?", "chosen": "a", "rejected": "a", "uid": 3},
        {"prompt": "Why?", "chosen": "a", "rejected": "b", "uid": 6},
    ]
    write(tmp_path / "psoups/data/train-00000-of-00001.parquet", rows)
    write(tmp_path / "psoups/data/test-00000-of-00001.parquet", rows[:1])
    found = read("psoups", tmp_path / "psoups")
    assert [(one["prompt"], one["user_id"]) for one in found.good] == [("Why?", "P2A"), ("Why?", "P3B")]
    assert found.dropped == {"equal answers": 1}


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"prompt": "Why?", "chosen": "a", "rejected": "b", "uid": 7}, "bad uid"),
        ({"prompt": "Why?", "chosen": "a", "rejected": "b", "uid": "x"}, "bad uid"),
        ({"prompt": "Why?", "chosen": "a", "rejected": "b"}, "no preference"),
        ({"prompt": "Why?", "chosen": "a", "rejected": None, "uid": 1}, "rejected is null"),
        ({"prompt": PAPER["P1A"].sentence, "chosen": "a", "rejected": "b", "uid": 1}, "empty prompt"),
        ({"user_input": "Why?", "completion_a": "a", "uid": 1}, "missing completion_b"),
    ],
)
def test_bad_rows_are_named(tmp_path, bad, reason):
    good = {"prompt": "Why?", "chosen": "a", "rejected": "c", "uid": 1}
    found = read("psoups", write(tmp_path / "train.jsonl", [good, bad]))
    assert found.bad == [("train.jsonl line 2", reason)] and len(found.good) == 1
