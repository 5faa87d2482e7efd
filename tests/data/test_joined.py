"""Preference records from votes on pairs, multiple-choice questions, several answers to a prompt, and ratings."""

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
    assert examples[2].where == "votes.csv record 3" and examples[2].user_id == "bob"


def test_users_with_few_votes_are_left_out_and_counted(votes, caplog):
    with caplog.at_level("INFO"):
        assert {record["user_id"] for record in records({**votes, "min_votes": 2})} == {"ann"}
    assert "2 votes of 1 users; left out 2 ties, and 1 votes of 1 users with fewer than 2" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"votes": ""}, "data kind 'votes': needs 'votes'; set --config.data.votes"),
        ({"votes": "nowhere.csv"}, "nowhere.csv: no such file; set --config.data.votes to a file that exists"),
        ({"left": "c"}, "pairs.jsonl record 1: no column 'c' .found .*; give its name with --config.data.left=<yours>"),
        ({"user": "who"}, "votes.csv record 1: no column 'who'"),
    ],
)
def test_bad_votes(votes, changes, message):
    with pytest.raises(UserError, match=message):
        open_source({**votes, **changes})


@pytest.mark.parametrize(
    ("vote", "reason"),
    [
        ("9,ann,left", "unknown pair"),
        ("7,ann,lft", "unknown verdict"),
        ("7,ann,", "unknown verdict"),
        ("7,,left", "empty worker"),
        ("6,ann,left", "ambiguous pair"),
    ],
)
def test_a_vote_that_cannot_be_counted_is_a_bad_record_and_no_tie(votes, tmp_path, caplog, vote, reason):
    with (tmp_path / "pairs.jsonl").open("a") as file:
        for right in "xy":
            file.write(json.dumps({"id": 6, "text": "which ?", "a": "this", "b": right}) + "\n")
    (tmp_path / "votes.csv").write_text(f"id,worker,winner\n7,ann,Left \n{vote}\n8,ann,EQUAL\n")
    with caplog.at_level("INFO"):
        examples, bad = validate(open_source(votes), "preference", max_bad_fraction=0.5)
    assert [example.chosen for example in examples] == ["because"] and "left out 1 ties" in caplog.text
    assert [(where, why) for where, why, _ in bad.items] == [("votes.csv record 2", reason)]


def test_a_pair_that_stands_twice_alike_and_own_words_for_a_tie(votes, tmp_path):
    (tmp_path / "pairs.jsonl").write_text((tmp_path / "pairs.jsonl").read_text("utf-8") * 2, "utf-8")
    (tmp_path / "votes.csv").write_text("id,worker,winner\n7,ann,left\n7,bob,undecided\n")
    assert len(records({**votes, "ties": ("Undecided",)})) == 1
    assert len(records({**votes, "ties": "undecided"})) == 1


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
        (json.dumps([{"question": "?"}]), "travel.json record 1: no column 'options' .*--config.data.options=<yours>"),
        (json.dumps(["by train"]), "travel.json record 1: no column 'question' .found str"),
        (json.dumps(QUESTION), "travel.json: holds a dict, not a list of records"),
        ("[", "travel.json: cannot be read"),
        ("[" * 5000, "travel.json: cannot be read .nested too deeply"),
    ],
)
def test_bad_questions(tmp_path, content, message):
    (tmp_path / "travel.json").write_text(content)
    with pytest.raises(UserError, match=message):
        open_source({"kind": "choices", "path": str(tmp_path / "travel.json")})


def test_a_question_without_options_is_a_bad_record(tmp_path):
    questions = [QUESTION, {**QUESTION, "options": ["by train"]}, {**QUESTION, "options": None}]
    (tmp_path / "travel.json").write_text(json.dumps(questions))
    source = open_source({"kind": "choices", "path": str(tmp_path / "travel.json")})
    examples, bad = validate(source, "preference", max_bad_fraction=0.5)
    assert len(examples) == 2 and bad.counts == {"not a question": 1, "missing options": 1}
    assert "travel.json record 2: options is not a list of two or more" in bad.items[0][2]


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


def test_a_pair_and_a_voter_are_the_same_as_numbers_and_as_text(votes, tmp_path):
    """The pairs have the number 7, the votes the digits 7, and a voter both."""
    lines = [{"id": 7.0, "worker": 3, "winner": "left"}, {"id": "7", "worker": "3", "winner": "right"}]
    (tmp_path / "votes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = records({**votes, "votes": f"{tmp_path}/votes.jsonl"})
    assert [record["user_id"] for record in found] == ["3", "3"]


@pytest.mark.parametrize("worker", [True, 1.5, [3]])
def test_a_voter_without_a_name_is_a_bad_record(votes, tmp_path, worker):
    lines = [{"id": 7, "worker": worker, "winner": "left"}, {"id": 7, "worker": "ann", "winner": "left"}]
    (tmp_path / "votes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    _, bad = validate(open_source({**votes, "votes": f"{tmp_path}/votes.jsonl"}), "preference", max_bad_fraction=0.5)
    assert bad.counts == {"worker is no name": 1}


def test_two_columns_of_one_name_are_refused(votes, tmp_path):
    (tmp_path / "votes.csv").write_text("id,worker,winner,winner\n7,ann,left,right\n")
    with pytest.raises(UserError, match=r"votes.csv: cannot be read \(two columns are called 'winner'\); correct it"):
        open_source(votes)


def answers(folder, *records, **spec):
    lines = "".join(f"{json.dumps(record)}\n" if isinstance(record, dict) else record for record in records)
    (folder / "answers.jsonl").write_text(lines)
    return {"kind": "answers", "path": f"{folder}/answers.jsonl", **spec}


def test_pairs_of_answers_are_of_one_prompt_and_differ(tmp_path):
    given = [
        {"prompt": p, "text": t} for p, t in (("a", "1"), ("b", "9"), ("a", "2"), ("a", "1"), ("a", "3"), ("c", " "))
    ]
    found = records(answers(tmp_path, *given, completion="text", pairs=9))
    assert found == [{"prompt": "a", "chosen": x, "rejected": y} for x, y in (("1", "2"), ("1", "3"), ("2", "3"))]
    few = answers(tmp_path, *given, completion="text", pairs=2)
    assert len(records(few)) == 2 and records(few) == records(few)
    assert all(record in found for record in records(few))
    assert len(validate(open_source(few), "preference")[0]) == 2


@pytest.mark.parametrize(
    ("rows", "spec", "message"),
    [
        ([{"prompt": "a", "completion": "1"}], {}, "answers.jsonl: no prompt has two different answers"),
        ([{"prompt": "a", "response": "1"}], {}, "answers.jsonl line 1: has no texts 'prompt' and 'completion'"),
        ([{"prompt": "a", "completion": 3}], {}, "answers.jsonl line 1: has no texts"),
        (["{\n"], {}, "answers.jsonl"),
        ([{"prompt": "a", "completion": "1"}], {"pairs": -1}, "data.pairs: -1 is not a whole number above 0"),
        ([{"prompt": "a", "completion": "1"}], {"pairs": "x"}, "data.pairs: 'x' is not a whole number above 0"),
    ],
)
def test_answers_that_make_no_pairs(tmp_path, rows, spec, message):
    with pytest.raises(UserError, match=message):
        open_source(answers(tmp_path, *rows, **spec))


def ratings(folder, *people, statements=("a", "b", "c", "d"), **spec):
    (folder / "people.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in people))
    (folder / "statements.json").write_text(json.dumps([{"text": text} for text in statements]))
    files = {"path": f"{folder}/people.jsonl", "statements": f"{folder}/statements.json"}
    return {"kind": "ratings", **files, "prompt": "which ?", "page": 2, **spec}


def test_who_rates_a_statement_higher_prefers_it(tmp_path):
    """On pages of two statements: none is on two pages, equal and missing ratings say nothing."""
    spec = ratings(tmp_path, {"user_id": "ann", "ratings": [1, 5, 3, 3]}, {"user_id": "bob", "ratings": [2, 0, 4, 1]})
    shared = {"prompt": "which ?"}
    assert records(spec) == [
        {**shared, "user_id": "ann", "group": "page 1", "chosen": "b", "rejected": "a"},
        {**shared, "user_id": "bob", "group": "page 2", "chosen": "c", "rejected": "d"},
    ]
    assert len(validate(open_source(spec), "preference")[0]) == 2
    few = ratings(tmp_path, {"user_id": "ann", "ratings": [1, 2, 3, 4]}, page=4, pairs=3)
    assert len(records(few)) == 3 and records(few) == records(few)
    assert {one["chosen"] > one["rejected"] for one in records(few)} == {True}


@pytest.mark.parametrize(
    ("person", "spec", "message"),
    [
        ({"user_id": "ann"}, {}, "people.jsonl record 1: no column 'ratings'"),
        ({"user_id": "ann", "ratings": [1]}, {}, "is no list of 4 numbers"),
        ({"user_id": "ann", "ratings": [1, 2, 3, "4"]}, {}, "is no list of 4 numbers"),
        ({"user_id": "ann", "ratings": [1, 2, 3, 4]}, {"prompt": ""}, "'ratings': needs 'prompt'"),
        ({"user_id": "ann", "ratings": [1, 2, 3, 4]}, {"text": "words"}, "no column 'words'"),
        ({"user_id": "ann", "ratings": [1, 2, 3, 4]}, {"pairs": -1}, "data.pairs: -1 is not a whole number"),
    ],
)
def test_bad_ratings(tmp_path, person, spec, message):
    with pytest.raises(UserError, match=message):
        validate(open_source(ratings(tmp_path, person, **spec)), "preference")
