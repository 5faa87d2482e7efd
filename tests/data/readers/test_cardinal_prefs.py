"""CardinalPrefs: the sign of the utility chooses, its size is the margin."""

import pytest
from support.raw_data import odd, read, write

from pjrlhf.data.schema import parse

ASKED = "\n\nHuman: Hello.\n\nAssistant: Hi.\n\nHuman: Tea or coffee?\n\nAssistant:"


def row(utility=2.5, **changes):
    base = {
        "prompt": "Hello.",
        "response1": f"{ASKED} Tea.",
        "response2": f"{ASKED} Coffee.",
        "net_utility": utility,
        "data_source": "hh-rlhf",
        "labeler": 2,
        "is_multi_turn": True,
    }
    return {**base, **changes}


def test_the_sign_chooses_and_the_size_is_the_margin(tmp_path):
    path = write(tmp_path / "train.parquet", [row(), row(-40.0), row(0.0), row(1.0, response2=f"{ASKED} Tea.")])
    found = read("cardinal_prefs", path)
    parsed = [parse(one, "preference") for one in found.good]
    assert [(one.prompt, one.chosen.strip(), one.margin, one.user_id) for one in parsed] == [
        (ASKED, "Tea.", 2.5, "2"),
        (ASKED, "Coffee.", 40.0, "2"),
    ]
    assert found.dropped == {"ties": 1, "identical answers": 1}


def test_conversations_and_answers_alone_are_read(tmp_path):
    turns = [{"role": "user", "content": "Hello."}]
    tea, coffee = ([*turns, {"role": "assistant", "content": said}] for said in ("Tea.", "Coffee."))
    rows = [row(response1=tea, response2=coffee), row(response1=str(tea), response2=str(coffee))]
    rows.append(row(response1="Tea.", response2="Coffee."))
    for one in read("cardinal_prefs", write(tmp_path / "train.jsonl", rows)).good:
        parsed = parse(one, "preference")
        assert parsed.chosen == "Tea." and parsed.prompt in ("Hello.", turns)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"net_utility": None}, "net_utility is null"),
        ({"labeler": None}, "labeler is null"),
        ({"response1": "[{'role'"}, "bad response1"),
        ({"response1": 3}, "response1 is not text"),
    ],
)
def test_bad_rows_are_named(tmp_path, change, reason):
    found = read("cardinal_prefs", write(tmp_path / "train.jsonl", [row(), row(**change)]))
    assert found.bad == [("train.jsonl line 2", reason)] and len(found.good) == 1


def test_values_of_another_type_are_bad_rows_and_no_tracebacks(tmp_path):
    assert read("cardinal_prefs", write(tmp_path / "a.jsonl", list(odd(row())))).bad
