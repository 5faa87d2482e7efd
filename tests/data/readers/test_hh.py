"""Transcripts of HH-RLHF and of VPL's copy: where the prompt ends, and what two objectives say."""

import pytest
from support.raw_data import read, write

from pjrlhf.data.schema import validate
from pjrlhf.data.sources import open_source

ASKED = "\n\nHuman: Hello\n\nAssistant: Hi.\n\nHuman: How do I boil an egg?\n\nAssistant:"


def row(chosen=" Nine minutes.", rejected=" No idea.", prompt=ASKED):
    return {"chosen": prompt + chosen, "rejected": prompt + rejected}


@pytest.fixture
def folder(tmp_path):
    for name, count in (("helpful-base", 3), ("harmless-base", 2), ("helpful-online", 1)):
        write(tmp_path / f"hh-rlhf/{name}/train.jsonl.gz", [row()] * count)
        write(tmp_path / f"hh-rlhf/{name}/test.jsonl.gz", [row()])
    attempts = [{"min_harmlessness_score_transcript": 0.1, "num_params": 52, "transcript": ASKED, "tags": None}]
    write(tmp_path / "hh-rlhf/red-team-attempts/red_team_attempts.jsonl.gz", attempts)
    return tmp_path / "hh-rlhf"


def test_folders_are_objectives(folder):
    found = read("hh_rlhf", folder)
    assert [one["objective"] for one in found.good] == ["helpful"] * 3 + ["harmless"] * 2 + ["helpful"]
    assert found.good[0] == {"prompt": ASKED, "chosen": " Nine minutes.", "rejected": " No idea."} | {
        "objective": "helpful"
    }
    assert len(read("hh_rlhf", folder, split="test").good) == 3
    one = read("hh_rlhf", folder, name="harmless-base", objective_as_user=True).good
    assert [record["user_id"] for record in one] == ["harmless"] * 2
    assert [x["objective"] for x in read("hh_rlhf", folder / "harmless-base/test.jsonl.gz").good] == ["harmless"]


def test_the_prompt_is_a_conversation_where_requests_are_chats(folder):
    examples, _ = validate(open_source({"kind": "hh_rlhf", "path": str(folder)}), "preference")
    from pjrlhf.data.messages import transcript

    assert isinstance(examples[0].prompt, str)
    assert [turn["role"] for turn in transcript(examples[0].prompt) or ()] == ["user", "assistant", "user"]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (row(chosen=""), "empty chosen"),
        (row(chosen=" Same.", rejected=" Same. "), "chosen equals rejected"),
        ({"chosen": ASKED + " a", "rejected": "\n\nHuman: Other\n\nAssistant: b"}, "the prompts differ"),
        ({"chosen": "Hello", "rejected": "Hi"}, "no transcript"),
        ({"chosen": "\n\nAssistant: a", "rejected": "\n\nAssistant: b"}, "no transcript"),
        ({"chosen": ASKED + " a", "rejected": None}, "rejected is null"),
        ({"chosen": ASKED + " a"}, "missing rejected"),
    ],
)
def test_bad_rows_are_named(tmp_path, bad, reason):
    found = read("hh_rlhf", write(tmp_path / "train.jsonl", [row(), bad]), name="helpful-base")
    assert found.bad == [("train.jsonl line 2", reason)] and len(found.good) == 1


# Rows of the test files, in hundreds of the published 2,157, 1,886 and 4,043.
ROWS = {"helpful": 2, "harmless": 1, "both": 3}


def relabelled(objective, label):
    whole = row(prompt=ASKED.removeprefix("\n\n"))
    responses = [whole["chosen"], whole["rejected"]]
    return {
        "Index": 0,
        "data_subset": objective,
        "prompt": ASKED,
        "responses": responses,
        "original_label": 0,
        "objective": objective,
        "label": label,
        "chosen": responses[label],
        "rejected": responses[1 - label],
    }


def test_the_relabelled_set_has_two_people_who_disagree(tmp_path):
    rows = {"helpful": [relabelled("helpful", 0)] * 2, "harmless": [relabelled("harmless", 1)]}
    rows["both"] = rows["helpful"] + rows["harmless"]
    for name, content in rows.items():
        write(tmp_path / f"relabeled_hh_rlhf/{name}/test.jsonl.gz", content)
    for name, count in ROWS.items():
        assert len(read("vpl_hh", tmp_path / "relabeled_hh_rlhf", split="test", name=name).good) == count
    helpful, _, harmless = read("vpl_hh", tmp_path / "relabeled_hh_rlhf", split="test").good
    assert helpful["prompt"] == harmless["prompt"] == ASKED
    assert (helpful["user_id"], helpful["chosen"]) == ("helpful", " Nine minutes.")
    assert (harmless["user_id"], harmless["chosen"]) == ("harmless", " No idea.")
    bad = read("vpl_hh", write(tmp_path / "test.jsonl", [relabelled("helpful", 0) | {"objective": "kind"}]))
    assert bad.bad == [("test.jsonl line 1", "bad objective")]
