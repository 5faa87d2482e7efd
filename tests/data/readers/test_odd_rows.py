"""Rows that are nested otherwise than a set: each is a bad record or a plain error, whatever stands in them."""

import copy
import json
from typing import Any

import pytest

from pjrlhf.data.records import RecordError
from pjrlhf.data.schema import parse
from pjrlhf.data.sources import open_source
from pjrlhf.errors import UserError

ASKED = "\n\nHuman: Why?\n\nAssistant:"
RATED = {"response": "a", "annotations": {"helpfulness": {"Rating": "5"}, "honesty": {"Rating": "N/A"}}}
WORSE = {"response": "b", "annotations": {"helpfulness": {"Rating": "1"}, "honesty": {"Rating": "N/A"}}}
TURN = {"turn": 0, "role": "model", "content": "x", "score": 9, "if_chosen": True}
ROWS = {
    "shp": {"post_id": "p", "domain": "d", "history": "h", "human_ref_A": "a", "human_ref_B": "b", "labels": 1}
    | {"score_ratio": 3.0},
    "tldr": {
        "info": {"id": "t", "post": "p", "title": "t", "subreddit": "s"},
        "summaries": [{"text": "a", "policy": "sup1"}, {"text": "bb", "policy": "sup2"}],
        "choice": 0,
        "worker": "w",
        "split": "train",
        "extra": {"confidence": 1},
    },
    "psoups": {"prompt": "p", "chosen": "a", "rejected": "b", "uid": 1},
    "hh_rlhf": {"chosen": f"{ASKED} a", "rejected": f"{ASKED} b"},
    "vpl_hh": {"chosen": f"{ASKED} a", "rejected": f"{ASKED} b", "objective": "helpful"},
    "ultrafeedback": {"instruction": "i", "completions": [RATED, WORSE]},
    "prism": {
        "conversation_id": "c",
        "user_id": "u",
        "conversation_history": [
            {"turn": 0, "role": "user", "content": "q"},
            TURN,
            {**TURN, "content": "y", "score": 1, "if_chosen": False},
        ],
        "performance_attributes": {"fluency": 3},
    },
}
SETTINGS: dict[str, dict[str, Any]] = {
    "hh_rlhf": {"name": "helpful-base"},
    "tldr": {"policies": "supervised"},
    "ultrafeedback": {"aspects": ("helpfulness",)},
}
ODD = (None, 7, -1.5, True, "", "text", [], [[]], {}, {"a": [None]}, [None], ["text", 1])


def changed(value):
    """Copies of a value with one of the values inside replaced by something else, or gone."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield {name: other for name, other in value.items() if name != key}
            yield from ({**value, key: odd} for odd in ODD)
            yield from ({**value, key: new} for new in changed(inner))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield value[:i] + value[i + 1 :]
            yield from ([*value[:i], odd, *value[i + 1 :]] for odd in ODD)
            yield from ([*value[:i], new, *value[i + 1 :]] for new in changed(inner))


def given(kind, path):
    """(records, bad ones) of a file or folder."""
    source = open_source({"kind": kind, "path": str(path), **SETTINGS.get(kind, {})})
    good, bad = 0, 0
    for i in range(len(source)):
        try:
            parse(source[i], "preference", where=source.where(i))
            good += 1
        except RecordError:
            bad += 1
    return good, bad


@pytest.mark.parametrize("kind", ROWS)
def test_one_odd_value_is_one_bad_record_at_most(kind, tmp_path):
    rows = [copy.deepcopy(ROWS[kind]), *changed(ROWS[kind])]
    path = tmp_path / ("conversations.jsonl" if kind == "prism" else "train.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if kind == "prism":
        person = {"user_id": "u", "num_completed_conversations": 1, "stated_prefs": {"values": 3}}
        (tmp_path / "survey.jsonl").write_text(json.dumps(person) + "\n")
        path = tmp_path
    good, bad = given(kind, path)
    assert good >= 1 and bad >= 5


def test_odd_people_of_prism_are_told(tmp_path):
    person = {
        "user_id": "u",
        "num_completed_conversations": 1,
        "stated_prefs": {"values": 3, "other_text": "x"},
        "self_description": "d",
        "system_string": "s",
    }
    (tmp_path / "conversations.jsonl").write_text(json.dumps(ROWS["prism"]) + "\n")
    for odd in changed(person):
        (tmp_path / "survey.jsonl").write_text(json.dumps(odd) + "\n")
        try:
            assert sum(given("prism", tmp_path)) <= 1
        except UserError as error:
            assert "\n" not in str(error)
