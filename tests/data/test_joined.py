"""Preference records from votes on pairs and from multiple-choice questions."""

import json

import pytest

from pjrlhf.data.schema import validate
from pjrlhf.data.sources import open_source
from pjrlhf.errors import UserError

PAIRS = [
    {"id": 7, "text": "why ?", "a": "because", "b": "no idea"},
    {"id": 8, "text": "how\u2028so ?", "a": "like this", "b": "like that"},
]
VOTES = 'id,worker,winner,note\n7,ann,left,"two\nlines"\n8,ann,right,\n7,bob,right,\n8,bob,tie,\n7,eve,tie,\n'


@pytest.fixture
def votes(tmp_path):
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(p, ensure_ascii=False) + "\n" for p in PAIRS), "utf-8")
    (tmp_path / "votes.csv").write_text(VOTES)
    names = {"prompt": "text", "left": "a", "right": "b"}
    return {"kind": "votes", "path": f"{tmp_path}/pairs.jsonl", "votes": f"{tmp_path}/votes.csv", **names}


def records(spec):
    source = open_source(spec)
    return [source[i] for i in range(len(source))]


def test_a_vote_is_a_record_of_its_voter(votes):
    assert records(votes) == [
        {"prompt": "why ?", "chosen": "because", "rejected": "no idea", "user_id": "ann"},
        {"prompt": "how\u2028so ?", "chosen": "like that", "rejected": "like this", "user_id": "ann"},
        {"prompt": "why ?", "chosen": "no idea", "rejected": "because", "user_id": "bob"},
    ]
    examples, _ = validate(open_source(votes), "preference")
    assert examples[2].where == "votes.csv row 2" and examples[2].user_id == "bob"


def test_users_with_few_votes_are_left_out_and_counted(votes, caplog):
    with caplog.at_level("INFO"):
        assert {record["user_id"] for record in records({**votes, "min_votes": 2})} == {"ann"}
    assert "2 votes of 1 users; left out 2 ties, and 1 votes of 1 users with fewer than 2" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"votes": ""}, "data kind 'votes': needs 'votes'; set it in the config"),
        ({"votes": "nowhere.csv"}, "nowhere.csv: no such file; check 'votes'"),
        ({"left": "c"}, "pairs.jsonl record 1: no column 'c' .found .*; give its name in the config"),
        ({"user": "who"}, "votes.csv record 1: no column 'who'"),
    ],
)
def test_bad_votes(votes, changes, message):
    with pytest.raises(UserError, match=message):
        open_source({**votes, **changes})


def test_a_vote_on_an_unknown_pair(votes, tmp_path):
    (tmp_path / "votes.csv").write_text("id,worker,winner\n9,ann,left\n")
    with pytest.raises(UserError, match=r"votes.csv: a vote on pair '9', which is not in .*pairs.jsonl"):
        open_source(votes)


QUESTION = {"question": "where to ?", "preference": "I hate boats.", "options": ["by train", "by ferry", "by yacht"]}


def test_a_question_is_a_pair_per_wrong_option(tmp_path):
    (tmp_path / "travel.json").write_text(json.dumps([QUESTION, {**QUESTION, "options": ["on foot", "by canoe"]}]))
    (tmp_path / "LICENSE").write_text("free")
    found = records({"kind": "choices", "path": str(tmp_path)})
    assert [(r["chosen"], r["rejected"]) for r in found] == [
        ("by train", "by ferry"),
        ("by train", "by yacht"),
        ("on foot", "by canoe"),
    ]
    assert [r["question"] for r in found] == ["travel 0", "travel 0", "travel 1"]
    assert {r["user_text"] for r in found} == {"I hate boats."} and {r["group"] for r in found} == {"travel"}
    assert found[0]["user_id"] != found[2]["user_id"], "every question is another person"
    assert records({"kind": "choices", "path": f"{tmp_path}/travel.json"}) == found


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            json.dumps([{**QUESTION, "options": ["by train"]}]),
            "travel.json question 0: options is not a list of",
        ),
        (json.dumps([{"question": "?"}]), "travel.json record 1: no column 'options'"),
        (json.dumps(["by train"]), "travel.json record 1: no column 'question' .found str"),
        ("[", "travel.json: cannot be read"),
    ],
)
def test_bad_questions(tmp_path, content, message):
    (tmp_path / "travel.json").write_text(content)
    with pytest.raises(UserError, match=message):
        open_source({"kind": "choices", "path": str(tmp_path / "travel.json")})


def test_a_folder_without_questions(tmp_path):
    with pytest.raises(UserError, match=r"a folder without \.json files"):
        open_source({"kind": "choices", "path": str(tmp_path)})


@pytest.mark.real_data
def test_real_votes_and_questions(shared):
    folder = shared / "data" / "llmfao"
    spec = {"kind": "votes", "path": str(folder / "pairs-crowd.jsonl"), "votes": str(folder / "crowd-comparisons.csv")}
    found = records({**spec, "prompt": "text", "left": "result_x", "right": "result_y", "min_votes": 50})
    assert len({record["user_id"] for record in found}) == 32 and len(found) == 4186
    path = str(shared / "data" / "prefeval")
    found = records({"kind": "choices", "path": path, "options": "classification_task_options"})
    assert len({r["question"] for r in found}) == 765 and len({r["group"] for r in found}) == 15
