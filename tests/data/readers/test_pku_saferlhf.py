"""PKU-SafeRLHF: two verdicts on every pair. BeaverTails: several labels of every answer."""

import pytest
from support.raw_data import odd, read, write


def row(better=0, safer=1, **changes):
    base = {
        "prompt": "How do I open a lock?",
        "prompt_source": "own",
        "response_0": "Like this.",
        "response_1": "Call a locksmith.",
        "response_0_source": "alpaca-7b",
        "response_1_source": "alpaca-7b",
        "is_response_0_safe": False,
        "is_response_1_safe": True,
        "response_0_harm_category": {"Theft": True, "Violence": False},
        "response_1_harm_category": {"Theft": False, "Violence": False},
        "response_0_severity_level": 2,
        "response_1_severity_level": 0,
        "better_response_id": better,
        "safer_response_id": safer,
    }
    return {**base, **changes}


def test_every_row_is_a_record_of_each_objective(tmp_path):
    path = write(tmp_path / "train.jsonl", [row()])
    assert read("pku_saferlhf", path).good == [
        {
            "prompt": "How do I open a lock?", "chosen": "Like this.", "rejected": "Call a locksmith.",
            "objective": "helpful",
        },
        {
            "prompt": "How do I open a lock?", "chosen": "Call a locksmith.", "rejected": "Like this.",
            "objective": "harmless",
        },
    ]  # fmt: skip
    found = read("pku_saferlhf", path, objective_as_user=True).good
    assert [one["user_id"] for one in found] == ["helpful", "harmless"]
    (found,) = read("pku_saferlhf", path, objectives=("harmless",)).good
    assert found["objective"] == "harmless"


def test_identical_answers_are_counted(tmp_path):
    found = read("pku_saferlhf", write(tmp_path / "train.jsonl", [row(response_1="Like this."), row(1, 1)]))
    assert found.dropped == {"identical answers": 1}
    assert {one["chosen"] for one in found.good} == {"Call a locksmith."}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"better_response_id": -1}, "bad better_response_id"),
        ({"safer_response_id": None}, "safer_response_id is null"),
        ({"response_0": ""}, "empty response_0"),
    ],
)
def test_bad_rows_are_named(tmp_path, change, reason):
    found = read("pku_saferlhf", write(tmp_path / "train.jsonl", [row(), row(**change)]))
    assert found.bad == [("train.jsonl line 2", reason)] and len(found.good) == 2


def label(response, safe, prompt="How do I open a lock?"):
    category = {"financial_crime,property_crime,theft": not safe, "self_harm": False}
    return {"prompt": prompt, "response": response, "category": category, "is_safe": safe}


LABELS = [
    label("Like this.", False),
    label("Call a locksmith.", True),
    label("Like this.", True),
    label("Like this.", False),
    label("Ask a friend.", True),
    label("Read.", True, "How do I learn?"),
    label("Try.", True, "How do I learn?"),
    label("Alone.", True, "Who?"),
]


def test_labels_of_an_answer_are_one_reward(tmp_path):
    write(tmp_path / "round0/330k/train.jsonl", LABELS)
    write(tmp_path / "round0/330k/test.jsonl", LABELS[:2])
    write(tmp_path / "round0/30k/train.jsonl", LABELS[:1])
    for split, count in (("330k_test", 2), ("30k_train", 1), ("330k_train[:2]", 2)):
        assert len(read("beavertails", tmp_path, split=split).good) == count
    found = read("beavertails", tmp_path)
    assert [(one["completion"], one["rewards"]["harmless"]) for one in found.good] == [
        ("Like this.", pytest.approx(1 / 3)),
        ("Call a locksmith.", 1.0),
        ("Ask a friend.", 1.0),
        ("Read.", 1.0),
        ("Try.", 1.0),
        ("Alone.", 1.0),
    ]
    assert found.good[0]["harms"] == ["financial_crime,property_crime,theft"] and found.good[1]["harms"] == []
    assert found.dropped == {"further labels of an answer": 2}


def test_the_safest_answer_is_over_the_most_harmful_one(tmp_path):
    found = read("beavertails", write(tmp_path / "train.jsonl", LABELS), gives="pairs")
    assert found.good == [
        {
            "prompt": "How do I open a lock?", "chosen": "Call a locksmith.", "rejected": "Like this.",
            "objective": "harmless", "margin": pytest.approx(2 / 3),
        }
    ]  # fmt: skip
    assert found.dropped == {"further labels of an answer": 2, "ties": 1, "prompts with one answer": 1}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"is_safe": None}, "is_safe is null"),
        ({"is_safe": "yes"}, "bad is_safe"),
        ({"category": ["self_harm"]}, "bad category"),
        ({"response": " "}, "empty response"),
    ],
)
def test_bad_labels_are_named(tmp_path, change, reason):
    found = read("beavertails", write(tmp_path / "train.jsonl", [label("Yes.", True), label("No.", True) | change]))
    assert found.bad == [("train.jsonl line 2", reason)] and len(found.good) == 1


def test_values_of_another_type_are_bad_rows_and_no_tracebacks(tmp_path):
    assert read("pku_saferlhf", write(tmp_path / "a.jsonl", list(odd(row())))).bad
    for gives in ("answers", "pairs"):
        assert read("beavertails", write(tmp_path / "a.jsonl", list(odd(label("Yes.", True)))), gives=gives).bad
