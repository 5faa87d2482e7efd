"""PersonalRewardBench: the part of a comparison is that inside its person."""

import pytest
from support.raw_data import odd, read, write


def row(user="user1", part="train", **changes):
    base = {
        "user_id": user,
        "context": [
            {"role": "user", "content": "Plan my day."},
            {"role": "model", "content": "Start with a walk."},
            {"role": "user", "content": "And then?"},
        ],
        "chosen": {"role": "model", "content": "Breakfast."},
        "rejected": {"role": "model", "content": "Taxes."},
        "chosen_score": 80.0,
        "rejected_score": 35.0,
        "dataset": "PRISM",
        "personalizable_query": "Yes",
        "query_reasoning": "...",
        "personalizable_responses": "Yes",
        "response_reasoning": "...",
        "agreement": 1.0,
        "split": part,
        "prediction_judge": "A",
        "prediction_flip_judge": "B",
        "reasoning_judge": "...",
    }
    return {**base, **changes}


def test_the_model_is_the_assistant(tmp_path):
    (found,) = read("personal_rewardbench", write(tmp_path / "train-00000.parquet", [row()])).good
    assert found == {
        "prompt": [
            {"role": "user", "content": "Plan my day."},
            {"role": "assistant", "content": "Start with a walk."},
            {"role": "user", "content": "And then?"},
        ],
        "chosen": "Breakfast.",
        "rejected": "Taxes.",
        "user_id": "user1",
        "part": "train",
        "margin": 45.0,
    }


def test_the_column_split_parts_the_comparisons_of_a_person(tmp_path):
    parts = ["train", "train", "val", "test"]
    write(tmp_path / "data/test-00000-of-00001.parquet", [row(user, part) for user in ("u1", "u2") for part in parts])
    write(tmp_path / "data/train-00000-of-00001.parquet", [row("u3")])
    path = tmp_path / "data"
    counts = {part: len(read("personal_rewardbench", path, split="test", part=part).good) for part in set(parts)}
    assert counts == {"train": 4, "val": 2, "test": 2}
    found = read("personal_rewardbench", path, split="test", part="val")
    assert found.dropped == {"other parts of a person": 6} and {one["user_id"] for one in found.good} == {"u1", "u2"}
    assert len(read("personal_rewardbench", path, split="test").good) == 8


def test_scores_may_be_absent_and_ties_are_counted(tmp_path):
    rows = [
        row(chosen_score=None),
        row(rejected_score=80.0),
        row(chosen={"role": "model", "content": "Taxes."}),
        {name: value for name, value in row().items() if "score" not in name},
    ]
    found = read("personal_rewardbench", write(tmp_path / "train.jsonl", rows))
    assert ["margin" in one for one in found.good] == [False, False]
    assert found.dropped == {"ties": 1, "identical answers": 1} and not found.bad


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"chosen_score": 10.0}, "chosen scores below rejected"),
        ({"context": None}, "context is null"),
        ({"context": "Plan my day."}, "bad context"),
        ({"context": [{"role": "model", "content": "Hello."}]}, "prompt ends with the assistant"),
        ({"chosen": "Breakfast."}, "missing content"),
        ({"chosen": {"role": "model", "content": None}}, "content is null"),
        ({"user_id": None}, "user_id is null"),
    ],
)
def test_bad_rows_are_named(tmp_path, change, reason):
    found = read("personal_rewardbench", write(tmp_path / "train.jsonl", [row(), row(**change)]))
    assert found.bad == [("train.jsonl line 2", reason)] and len(found.good) == 1


def test_values_of_another_type_are_bad_rows_and_no_tracebacks(tmp_path):
    assert read("personal_rewardbench", write(tmp_path / "a.jsonl", list(odd(row())))).bad
