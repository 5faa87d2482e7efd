"""Collective Alignment 1: rankings with ties, for oneself and for the world."""

import pytest
from support.raw_data import odd, read, write

from pjrlhf.data.readers.collective_alignment import pairs, ranking
from pjrlhf.data.records import RecordError
from pjrlhf.errors import UserError


def assessment(who, personal="A>B=C>D", world="D>C>B>A"):
    blocks = {
        "unacceptable": [{"rationale": "", "rating": ["D"]}],
        "personal": [{"rationale": "Clear.", "ranking": personal}] if personal else [],
        "world": [{"rationale": "Fair.", "ranking": world}] if world else [],
    }
    return {
        "annotator_id": who, "conversation_id": "c1", "importance": "Very", "representativeness": "Very",
        "subjectivity": "Opinion", "ranking_blocks": blocks,
    }  # fmt: skip


def row(*assessments, **changes):
    answers = {"A": "Apples.", "B": "Berries.", "C": "Cherries.", "D": "Dates."}
    base = {
        "prompt_id": "p1",
        "prompt": {"id": "c1", "messages": [{"role": "user", "content": "Which fruit?"}]},
        "responses": [
            {"response_index": letter, "messages": [{"role": "assistant", "content": said}]}
            for letter, said in answers.items()
        ],
        "metadata": {"assessments": list(assessments)},
    }
    return {**base, **changes}


def test_all_pairs_of_unequal_rank(tmp_path):
    path = write(tmp_path / "comparisons.jsonl", [row(assessment("ann"))])
    found = read("collective_alignment", path)
    assert [(one["chosen"][0], one["rejected"][0]) for one in found.good if one["objective"] == "personal"] == [
        *[("A", "B"), ("A", "C"), ("A", "D"), ("B", "D"), ("C", "D")]
    ]
    assert len([one for one in found.good if one["objective"] == "world"]) == 6 and found.dropped == {"ties": 1}
    assert found.good[0]["user_id"] == "ann" and found.good[0]["prompt"] == [
        {"role": "user", "content": "Which fruit?"}
    ]
    found = read("collective_alignment", path, pair="extremes", rankings=("personal",)).good
    assert [(one["chosen"], one["rejected"]) for one in found] == [("Apples.", "Dates.")]


def test_missing_and_further_rankings_are_counted(tmp_path):
    rows = [row(assessment("ann", personal=None), assessment("bob", world="A=B=C=D"), assessment("ann", world="A>D"))]
    found = read("collective_alignment", write(tmp_path / "comparisons.jsonl", rows), pair="extremes")
    assert [(one["user_id"], one["objective"], one["chosen"]) for one in found.good] == [
        ("ann", "world", "Dates."),
        ("bob", "personal", "Apples."),
        ("ann", "personal", "Apples."),
    ]
    assert found.dropped == {"no personal ranking": 1, "ties": 8, "further assessments by the same person": 1}


def test_demographics_are_told(tmp_path):
    write(tmp_path / "comparisons.jsonl", [row(assessment("ann"), assessment("bob"))])
    people = [
        {"annotator_id": "ann", "demographics": {"age": "25-34", "country_of_residence": "Chile", "x": None}},
        {"annotator_id": "eve", "demographics": {}, "assessments": []},
    ]
    write(tmp_path / "annotators.jsonl", people)
    write(tmp_path / "merged_comparisons_annotators.jsonl", [{"odd": 1}])
    found = read("collective_alignment", tmp_path, demographics=True, pair="extremes", rankings=("world",))
    assert [one.get("user_text") for one in found.good] == ["age: 25-34; country of residence: Chile", None]
    with pytest.raises(UserError, match=r"^data.path: is one file, without annotators.jsonl"):
        read("collective_alignment", tmp_path / "comparisons.jsonl", demographics=True)


@pytest.mark.parametrize("value", ["A>B>E", "A>B>A", "", "A>>B", "A,B"])
def test_rankings_name_answers_once(value):
    with pytest.raises(RecordError, match="bad ranking"):
        ranking(value, "ABCD")


def test_tiers():
    assert ranking(" B > A=C ", "ABCD") == [["B"], ["A", "C"]]
    assert list(pairs([["B"], ["A", "C"]], "all")) == [("B", "A"), ("B", "C")]
    assert list(pairs([["A", "B"]], "extremes")) == list(pairs([["A", "B"]], "all")) == []


def test_a_bad_assessment_leaves_the_others(tmp_path):
    bad = assessment("bob") | {"ranking_blocks": {"personal": [{"ranking": "A>Z"}]}}
    rows = [row(assessment("ann"), bad, assessment(None)), row(metadata={"assessments": None})]
    found = read("collective_alignment", write(tmp_path / "comparisons.jsonl", rows), pair="extremes")
    assert [reason for _, reason in found.bad] == ["bad ranking", "annotator_id is null", "assessments is null"]
    assert found.bad[2][0] == "comparisons.jsonl line 2" and len(found.good) == 2


def test_values_of_another_type_are_bad_rows_and_no_tracebacks(tmp_path):
    write(tmp_path / "comparisons.jsonl", list(odd(row(assessment("ann"), assessment("bob")))))
    write(tmp_path / "annotators.jsonl", list(odd({"annotator_id": "ann", "demographics": {"age": 7}})))
    assert read("collective_alignment", tmp_path, demographics=True).bad
