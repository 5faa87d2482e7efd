"""HelpSteer2: verdicts, ratings of five aspects, and pairs by each aspect."""

import pytest
from support.raw_data import odd, read, write

from pjrlhf.data.readers.helpsteer2 import ASPECTS, prompt


def verdict(strength, part="train", **changes):
    base = {
        "split": part,
        "prompt": "What is a prime?",
        "response_1": "A number.",
        "response_2": "A number with two divisors.",
        "preference_strength": strength,
        "preference_statement": "Response 2 is better.",
        "preference_elaboration": "It is right.",
        "three_most_similar_preferences": [{"strength": strength, "statement": "", "elaboration": ""}],
        "all_preferences_unprocessed": [],
    }
    return {**base, **changes}


def rated(response, prompt="What is a prime?", **ratings):
    return {"prompt": prompt, "response": response, **dict.fromkeys(ASPECTS, 2), **ratings}


def test_a_positive_strength_is_for_the_second_response(tmp_path):
    rows = [
        verdict(2),
        verdict(-3),
        verdict(0),
        verdict(1, "val"),
        verdict(1, response_1="A number with two divisors."),
    ]
    write(tmp_path / "HelpSteer2/preference/preference.jsonl.gz", rows)
    write(tmp_path / "HelpSteer2/train.jsonl.gz", [rated("A number.")])
    for path in (tmp_path / "HelpSteer2", tmp_path / "HelpSteer2/preference"):
        found = read("helpsteer2", path)
        assert [(one["chosen"], one["margin"]) for one in found.good] == [
            ("A number with two divisors.", 2.0),
            ("A number.", 3.0),
        ]
        assert found.dropped == {"ties": 1, "other split": 1, "identical answers": 1}
    assert len(read("helpsteer2", tmp_path / "HelpSteer2", split="validation").good) == 1


def test_ratings_are_rewards(tmp_path):
    write(tmp_path / "train.jsonl", [rated("Yes.", helpfulness=4, verbosity=0)])
    write(tmp_path / "validation.jsonl", [rated("No.")])
    (found,) = read("helpsteer2", tmp_path, gives="answers").good
    assert found["rewards"] == {"helpfulness": 4, "correctness": 2, "coherence": 2, "complexity": 2, "verbosity": 0}
    assert found["completion"] == "Yes."


def test_aspects_disagree_as_people(tmp_path):
    rows = [
        rated("Short.", helpfulness=1, verbosity=0),
        rated("Long, and right.", helpfulness=3, verbosity=3),
        rated("Alone.", prompt="Who?"),
        rated("One.", prompt="Why?"),
        rated("One.", prompt="Why?", helpfulness=4),
    ]
    path = write(tmp_path / "train.jsonl", rows)
    found = read(
        "helpsteer2", path, gives="aspects", aspects=("helpfulness", "coherence", "verbosity"), aspect_as_user=True
    )
    assert [(one["chosen"], one["objective"], one["user_id"], one["margin"]) for one in found.good] == [
        ("Long, and right.", "helpfulness", "helpfulness", 2.0),
        ("Long, and right.", "verbosity", "verbosity", 3.0),
    ]
    assert found.dropped == {"ties in coherence": 1, "answers without a second one": 1, "identical answers": 1}
    assert "user_id" not in read("helpsteer2", path, gives="aspects").good[0]


def test_marks_of_turns_become_messages():
    assert prompt("Hello.") == "Hello."
    assert prompt("Hello.\n<extra_id_1>Assistant\nHi.\nHow are you?\n<extra_id_1>User\nFine.") == [
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "Hi.\nHow are you?"},
        {"role": "user", "content": "Fine."},
    ]


@pytest.mark.parametrize(
    ("settings", "change", "reason"),
    [
        ({}, {"preference_strength": 4}, "bad preference_strength"),
        ({}, {"preference_strength": None}, "preference_strength is null"),
        ({}, {"prompt": "Hello.\n<extra_id_1>Assistant\n\n<extra_id_1>User\nFine."}, "empty prompt"),
        ({}, {"response_2": ""}, "empty response_2"),
        ({"gives": "answers"}, {"coherence": 5}, "bad coherence"),
        ({"gives": "aspects"}, {"coherence": None}, "coherence is null"),
    ],
)
def test_bad_rows_are_named(tmp_path, settings, change, reason):
    good = rated("Yes.") if settings else verdict(1)
    found = read("helpsteer2", write(tmp_path / "preference.jsonl", [good, good | change]), **settings)
    assert found.bad == [("preference.jsonl line 2", reason)]


def test_values_of_another_type_are_bad_rows_and_no_tracebacks(tmp_path):
    assert read("helpsteer2", write(tmp_path / "a.jsonl", list(odd(verdict(1))))).bad
    for gives in ("answers", "aspects"):
        assert read("helpsteer2", write(tmp_path / "a.jsonl", list(odd(rated("Yes.")))), gives=gives).bad
