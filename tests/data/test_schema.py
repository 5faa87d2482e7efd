"""Records are read as TRL's columns say, or refused with a reason that names them."""

import functools
import gzip
import json
import math
import re

import numpy as np
import pytest

from pjrlhf.data import schema
from pjrlhf.data.messages import options_of, text_of, transcript, with_text
from pjrlhf.data.records import RecordError
from pjrlhf.data.schema import parse, validate
from pjrlhf.errors import UserError

PAIR = {"prompt": "Sky?", "chosen": " blue", "rejected": " green"}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def test_explicit_prompt_and_personal_columns():
    record = PAIR | {
        "user_id": 7,
        "user_text": "likes blue",
        "objective": "style",
        "preference_weights": [0.25, 0.75],
        "rewards": {"style": np.float32(0.5), "length": None},
        "margin": 2,
        "source": b"caf\xc3\xa9",
    }
    example = parse(record, "preference", where="row 0")
    assert (example.prompt, example.chosen, example.rejected) == ("Sky?", " blue", " green")
    assert (example.user_id, example.user_text, example.objective) == ("7", "likes blue", "style")
    assert (example.preference_weights, example.rewards, example.margin) == ([0.25, 0.75], {"style": 0.5}, 2.0)
    assert (example.extra, example.where) == ({"source": "café"}, "row 0")


def test_every_form_of_a_pair_of_conversations_is_one_example():
    turns = [user("Sky?"), assistant("Blue."), user("Why?")]
    forms = [
        {"prompt": turns, "chosen": [assistant("Light.")], "rejected": [assistant("Paint.")]},
        {"prompt": turns, "chosen": [*turns, assistant("Light.")], "rejected": [*turns, assistant("Paint.")]},
        {"chosen": [*turns, assistant("Light.")], "rejected": [*turns, assistant("Paint.")]},
        {"prompt": turns, "chosen": "Light.", "rejected": "Paint."},
        {
            "prompt": {"role": [t["role"] for t in turns], "content": [t["content"].encode() for t in turns]},
            "chosen": [assistant("Light.") | {"name": None}],
            "rejected": [assistant("Paint.")],
        },
    ]
    for form in forms:
        example = parse(form, "preference")
        assert (example.prompt, example.chosen, example.rejected) == (turns, "Light.", "Paint.")


@pytest.mark.parametrize("repeat", [False, True])
def test_text_prompt_of_conversations_is_one_user_turn(repeat):
    opening = [user("Sky?")] if repeat else []
    record = {
        "prompt": "Sky?",
        "chosen": [*opening, assistant("Blue.")],
        "rejected": [*opening, assistant("Green.")],
    }
    example = parse(record, "preference")
    assert (example.prompt, example.chosen, example.rejected) == ([user("Sky?")], "Blue.", "Green.")


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        (
            "\n\nHuman: Sky?\n\nAssistant: It is",
            "\n\nHuman: Sky?\n\nAssistant: It was",
            "\n\nHuman: Sky?\n\nAssistant:",
        ),
        (
            "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
            "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: e",
            "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:",
        ),
    ],
)
def test_implicit_prompt_of_texts(chosen, rejected, prompt):
    example = parse({"chosen": chosen, "rejected": rejected}, "preference")
    assert example.prompt == prompt
    assert (prompt + example.chosen, prompt + example.rejected) == (chosen, rejected)


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        ("The sky is blue", "The sky is bright", "missing prompt"),
        ("Sky?\n\nAssistant: blue", "Sky?\n\nAssistant: green", "missing prompt"),
        ("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: b\n\nAssistant: b", "missing prompt"),
        ([user("a"), assistant("b")], [user("c"), assistant("b")], "no shared prompt"),
    ],
)
def test_a_prompt_is_guessed_from_transcripts_and_conversations_alone(chosen, rejected, reason):
    """A misnamed column must not turn the first words of the answers into a prompt."""
    with pytest.raises(RecordError) as error:
        parse({"question": "Sky?", "chosen": chosen, "rejected": rejected}, "preference")
    assert error.value.reason == reason


def test_a_guessed_prompt_is_said_and_counted(caplog):
    answers = {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]}
    validate([answers, PAIR], "preference", source_name="train")
    assert "train: 1 of 2 records have no prompt; it is what both answers start with" in caplog.text


def test_a_null_completion_is_bad_unless_the_record_is_of_another_form():
    with pytest.raises(RecordError, match="completion is null"):
        parse({"prompt": "Sky?", "completion": None, "text": "Blue."}, "completion")
    turns = {"messages": [user("Sky?"), assistant("Blue.")], "prompt": None, "completion": None, "text": None}
    assert parse(turns, "completion").completion == "Blue."


def test_a_null_column_counts_where_the_record_needs_it():
    for kind, record in (("preference", PAIR), ("prompt", {"prompt": "Sky?"})):
        assert parse({**record, "completion": None}, kind).prompt == record["prompt"], "of another kind of data"
    assert parse({"prompt": None, "messages": [user("Sky?")]}, "prompt").prompt == [user("Sky?")]
    for kind, record in (
        ("prompt", {}),
        ("prompt", {"chosen": "a", "rejected": None}),
        ("completion", {"completion": "a"}),
    ):
        with pytest.raises(RecordError, match=r"^prompt is null"):
            parse({"prompt": None, **record}, kind)


def test_forms_of_a_completion():
    turns = [user("Sky?"), assistant("Blue.")]
    assert parse({"prompt": "Sky?", "completion": " Blue."}, "completion").completion == " Blue."
    assert parse({"messages": turns}, "completion") == parse(
        {"prompt": turns[:1], "completion": turns[1:]}, "completion"
    )
    assert parse({"messages": turns}, "completion").completion == "Blue."
    text = parse({"text": "Sky."}, "completion")
    assert (text.prompt, text.completion) == ("", "Sky.")


CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}
RESULT = {"role": "tool", "content": "2"}


def test_messages_keep_what_they_say_besides_their_content():
    thinking = assistant("Blue.") | {"reasoning_content": "Light."}
    assert parse({"messages": [user("Sky?"), thinking]}, "completion").completion == [thinking]
    turns = [user("f(1)?"), CALL, RESULT, assistant("2")]
    example = parse({"messages": turns}, "completion")
    assert (example.prompt, example.completion) == (turns[:1], turns[1:])
    pair = parse({"prompt": turns[:1], "chosen": turns[1:], "rejected": [assistant("3")]}, "preference")
    assert (pair.chosen, pair.rejected) == (turns[1:], "3")
    assert text_of(pair.chosen) == "2\n2" and text_of(pair.rejected) == "3"
    # Columnar files give all messages all keys.
    wide = [{"tool_calls": None, "name": None, **message} for message in turns]
    assert parse({"messages": wide}, "completion") == example
    assert (
        parse({"messages": [user("Sky?"), assistant("Blue.") | {"tool_calls": []}]}, "completion").completion == "Blue."
    )


def test_content_parts_of_text_are_one_text():
    parts = [{"type": "text", "text": "Sky"}, {"type": "input_text", "text": "?"}, " Why"]
    example = parse({"messages": [{"role": "user", "content": parts}, assistant("Blue.")]}, "completion")
    assert example.prompt == [user("Sky? Why")]
    with pytest.raises(RecordError, match="prompt has a content part of type 'image'"):
        parse({"prompt": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]}, "prompt")


def test_arguments_of_tool_calls_become_objects():
    told = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    (message,) = parse({"messages": [user("f(1)?"), CALL | {"tool_calls": [told]}]}, "completion").completion
    assert message["tool_calls"] == [told | {"function": {"name": "f", "arguments": {"x": 1}}}]
    for wrong in ({"function": {"name": "f", "arguments": "{x"}}, {"arguments": {}}, "f(1)"):
        with pytest.raises(RecordError, match="bad tool_calls in messages"):
            parse({"messages": [user("f(1)?"), CALL | {"tool_calls": [wrong]}]}, "completion")


@pytest.mark.parametrize("as_text", [False, True])
def test_tools_and_variables_of_the_template_come_with_the_prompt(as_text):
    tool = {"type": "function", "function": {"name": "f", "description": None}}
    columns = {"tools": [tool], "chat_template_kwargs": {"enable_thinking": False, "style": None}}
    if as_text:
        columns = {name: json.dumps(value) for name, value in columns.items()}
    for prompt in ("f(1)?", [user("f(1)?")]):
        example = parse({"prompt": prompt, "completion": "2", **columns}, "completion")
        assert list(example.prompt) == [user("f(1)?")] and not example.extra
        tools = [{"type": "function", "function": {"name": "f"}}]
        assert options_of(example.prompt) == {"tools": tools, "enable_thinking": False}
        told = with_text(example.prompt, "Be brief.")
        assert list(told) == [user("Be brief.\nf(1)?")] and options_of(told) == options_of(example.prompt)
    assert options_of(parse({"prompt": "f(1)?", "tools": [], "chat_template_kwargs": None}, "prompt").prompt) == {}
    for name, wrong in (("tools", "f"), ("tools", [1]), ("tools", 1), ("chat_template_kwargs", [1])):
        with pytest.raises(RecordError, match=f"bad {name}"):
            parse({"prompt": "f(1)?", name: wrong}, "prompt")
    for name in ("tokenize", "chat_template", "messages", "tools", "max_length", "tokenizer_kwargs"):
        with pytest.raises(RecordError, match=f"{name} cannot be set there; leave it out"):
            parse({"prompt": "f(1)?", "chat_template_kwargs": {name: "a"}}, "prompt")


def test_a_conversation_answers_from_the_first_turn_of_the_assistant_on():
    opened = [assistant("Ask me."), user("Sky?"), assistant("Blue."), user("Why?"), assistant("Light.")]
    for turns, start in ((opened[1:], 1), (opened, 2), ([RESULT, *opened[1:]], 2)):
        example = parse({"messages": turns}, "completion")
        assert (example.prompt, example.completion) == (turns[:start], turns[start:])
    for turns in (opened[:4], opened[1:2], opened[:1]):
        if turns[-1] != assistant("Blue."):
            with pytest.raises(RecordError, match=r"messages is not an answer|empty"):
                parse({"messages": turns}, "completion")


def test_answers_may_share_their_first_turns():
    start = [user("Sky?"), assistant("Blue.")]
    chosen, rejected = ([*start, user(text), assistant(text)] for text in ("Why?", "Sure?"))
    example = parse({"chosen": chosen, "rejected": rejected}, "preference")
    assert (example.prompt, example.chosen, example.rejected) == (start[:1], chosen[1:], rejected[1:])


def test_transcripts_become_turns():
    turns = [user("Sky?"), assistant("Blue,\n\nand so on."), user("Why?")]
    text = "\n\nHuman: Sky?\n\nAssistant: Blue,\n\nand so on.\n\nHuman: Why?\n\nAssistant:"
    assert transcript(text) == turns
    for other in ("Why?", "\n\nHuman: Sky?", text + " Light.", "\n\nAssistant:", "\n\nHuman:\n\nAssistant:"):
        assert transcript(other) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"chosen": None}, "chosen is null"),
        ({"chosen": " \n"}, "empty chosen"),
        ({"rejected": ""}, "empty rejected"),
        ({"prompt": ""}, "empty prompt"),
        ({"prompt": []}, "empty prompt"),
        ({"rejected": " blue"}, "chosen equals rejected"),
        ({"chosen": 3, "rejected": 4}, "chosen is not text"),
        ({"chosen": [assistant(" blue")]}, "chosen and rejected differ in kind"),
        ({"prompt": 5}, "prompt is not text"),
        ({"prompt": [{"role": "user"}]}, "prompt is not a conversation"),
        ({"prompt": [user("a"), assistant("b")]}, "prompt ends with the assistant"),
        ({"chosen": [user("b")], "rejected": [assistant("c")]}, "chosen is not an answer"),
        ({"chosen": [assistant("")], "rejected": [assistant("c")]}, "empty chosen"),
        ({"prompt": None}, "prompt is null"),
        ({"prompt": None, "chosen": [user("a"), assistant("b")], "rejected": [user("c")]}, "prompt is null"),
        ({"prompt": [user(" ")]}, "empty user message in prompt"),
        ({"user_id": "a\ud800"}, "not UTF-8"),
        ({"chosen": "\udfff"}, "not UTF-8"),
        ({"note": {"\ud800": 1}}, "not UTF-8"),
        ({"user_id": 10**400}, "number too large"),
        ({"margin": 10**400}, "number too large"),
        ({"note": functools.reduce(lambda inner, _: [inner], range(5000), [])}, "nested too deeply"),
        ({"chosen": [{"role": "assistant"}], "rejected": [assistant("c")]}, "chosen is not a conversation"),
        ({"margin": math.nan}, "bad margin"),
        ({"margin": "1"}, "bad margin"),
        ({"margin": True}, "bad margin"),
        ({"preference": "A"}, "bad preference"),
        ({"preference": True}, "bad preference"),
        ({"preference": 0.4}, "bad preference"),
        ({"preference": math.nan}, "bad preference"),
        ({"rewards": {"a": math.nan}}, "bad rewards"),
        ({"rewards": {"a": "high"}}, "bad rewards"),
        ({"rewards": [1.0]}, "bad rewards"),
        ({"preference_weights": [0.5, 0.6]}, "bad preference_weights"),
        ({"preference_weights": {"a": 1.5, "b": -0.5}}, "bad preference_weights"),
        ({"preference_weights": []}, "bad preference_weights"),
        ({"user_id": True}, "user_id is no name"),
        ({"user_id": 1.5}, "user_id is no name"),
        ({"user_id": math.nan}, "user_id is no name"),
        ({"user_id": math.inf}, "user_id is no name"),
        ({"user_id": 2.0**53}, "user_id is no name"),
        ({"user_id": ["ann"]}, "user_id is no name"),
        ({"user_id": ""}, "empty user_id"),
        ({"objective": 1}, "objective is not text"),
        ({"chosen": b"\xff"}, "not UTF-8"),
    ],
)
def test_bad_record_has_a_reason(change, reason):
    with pytest.raises(RecordError) as error:
        parse(PAIR | change, "preference")
    assert error.value.reason == reason


@pytest.mark.parametrize("value", [7, 7.0, "7", np.int64(7), np.float64(7.0)])
def test_a_whole_number_and_its_digits_are_one_person(value):
    """A columnar file with gaps makes floats of whole numbers."""
    assert parse(PAIR | {"user_id": value}, "preference").user_id == "7"


def test_a_person_of_text_is_taken_as_written():
    assert [parse(PAIR | {"user_id": x}, "preference").user_id for x in ("7.0", " 7", "07", -0.0, 2**70)] == [
        *("7.0", " 7", "07", "0", str(2**70))
    ]


@pytest.mark.parametrize(
    ("kind", "columns", "absent"),
    [
        ("preference", {"chosen": "better"}, "no column 'better', which columns.chosen names"),
        ("preference", {"prompt": "ask", "rejected": "worse"}, "no column 'worse', which columns.rejected names"),
        ("preference", {"prompt": "ask"}, "no column 'ask', which columns.prompt names"),
        ("prompt", {"prompt": "ask"}, "no column 'ask', which columns.prompt names"),
        ("completion", {"completion": "reply"}, "no column 'reply', which columns.completion names"),
    ],
)
def test_a_mapped_column_that_no_record_has_is_named_with_those_there_are(kind, columns, absent):
    whole = {"preference": PAIR, "prompt": {"prompt": "Sky?"}, "completion": {"prompt": "Sky?", "completion": "blue"}}
    record = {f"their {name}" if name in columns else name: value for name, value in whole[kind].items()}
    found = rf"found columns {re.escape(str(list(record)))}; map them with --config\.data\.columns\."
    with pytest.raises(UserError, match=rf"{re.escape(absent)}; {found}"):
        validate([record] * 2, kind, columns=columns)


def test_an_optional_column_that_no_record_has_is_named_in_the_log(caplog):
    validate([PAIR], "preference", columns={"user_id": "annotator", "chosen": "chosen"})
    assert "no record has the column 'annotator' (user_id) of data.columns" in caplog.text


@pytest.mark.parametrize("name", [3, ["a"], None, {"a": "b"}])
def test_a_column_is_named_by_text(name):
    with pytest.raises(UserError, match=r"^columns\.chosen: .* is no name of a column; give it as text"):
        validate([PAIR], "preference", columns={"chosen": name})


def test_missing_column_says_what_was_found_and_how_to_map_it():
    record = {"question": "Sky?", "chosen": "a", "loser": "b"}
    with pytest.raises(RecordError, match=r"found columns \['question', 'chosen', 'loser'\].*columns\.rejected=YOURS"):
        parse(record, "preference")
    example = parse(record, "preference", columns={"prompt": "question", "rejected": "loser"})
    assert (example.prompt, example.chosen, example.rejected, example.extra) == ("Sky?", "a", "b", {})


def test_mapped_column_wins_over_one_of_our_name():
    example = parse(PAIR | {"text": "Sea?"}, "preference", columns={"prompt": "text"})
    assert (example.prompt, example.extra) == ("Sea?", {"prompt": "Sky?"})
    swapped = parse(PAIR, "preference", columns={"chosen": "rejected", "rejected": "chosen"})
    assert (swapped.chosen, swapped.rejected) == (" green", " blue")


@pytest.mark.parametrize(("kind", "columns"), [("pairs", None), ("preference", {"choosen": "a"})])
def test_unknown_kind_or_column_is_a_user_error(kind, columns):
    with pytest.raises(UserError, match=r"pairs|choosen"):
        parse(PAIR, kind, columns=columns)


def test_bad_records_are_named_counted_and_bounded():
    records = [PAIR] * 97 + [PAIR | {"chosen": ""}, PAIR | {"chosen": ""}, PAIR | {"rejected": " blue"}]
    examples, report = validate(records, "preference", source_name="train", max_bad_fraction=0.03)
    assert len(examples) == 97 and report.total == 100
    assert report.counts == {"empty chosen": 2, "chosen equals rejected": 1}
    assert [where for where, _, _ in report.items] == ["train row 97", "train row 98", "train row 99"]
    with pytest.raises(
        UserError, match=r"3 of 100 .*2 empty chosen.*train row 97: empty chosen.*max_bad_fraction=0.03"
    ):
        validate(records, "preference", source_name="train", max_bad_fraction=0.029)


def test_nothing_left_is_an_error_for_any_fraction():
    with pytest.raises(UserError, match="1 of 1"):
        validate([{"prompt": ""}], "prompt", max_bad_fraction=1.0)
    with pytest.raises(UserError, match="no records"):
        validate([], "prompt")


@pytest.mark.real_data
def test_real_pairs_map_by_columns(shared):
    path = shared / "data" / "alpaca_eval" / "style_pairs.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines]
    columns = {"chosen": "verbose", "rejected": "concise"}
    examples, report = validate(records, "preference", columns=columns, max_bad_fraction=0.05)
    assert len(examples) + len(report.items) == len(records) == 4799
    assert set(report.counts) <= {"chosen equals rejected", "empty chosen", "empty rejected"}
    longer = sum(len(e.chosen) > len(e.rejected) for e in examples) / len(examples)
    assert longer > 0.9  # a swapped mapping would give 0.06


def test_shared_length():
    assert schema.shared_length("abc", "abd") == 2
    assert schema.shared_length([1], [1, 2]) == 1
    assert schema.shared_length([], [1]) == 0
