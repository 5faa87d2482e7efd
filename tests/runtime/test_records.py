"""Requests of a run: texts and conversations."""

import logging

import pytest
from support import tiny, tiny_users

from pjrlhf.data.messages import Conversation
from pjrlhf.errors import UserError

SYSTEM = {"role": "system", "content": "be kind ."}
ASKED = {"role": "user", "content": "what is rain ?"}
ANSWER = {"role": "assistant", "content": "it holds air ."}
AGAIN = {"role": "user", "content": "what is wind ?"}
TALK = [SYSTEM, ASKED, ANSWER, AGAIN]
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}


def started(folder, records, **changes):
    """A run of the synthetic environment with prompts of its own."""
    config = tiny.settings(data__max_prompt=30, **changes)
    with config.ignore_type():
        config.data.prompts = {"kind": "jsonl", "path": tiny_users.write_records(folder / "prompts.jsonl", records)}
    return tiny.start(folder / "run", config)


def test_conversations_are_requests_in_all_their_forms(tmp_path):
    records = [
        {"prompt": "what is snow ?"},
        {"prompt": TALK},
        {"messages": [*TALK, ANSWER]},  # the same
        {"messages": [ASKED, ANSWER]},
        {"prompt": [{"role": "user", "content": [{"type": "text", "text": "what is fire ?"}]}]},
        {"prompt": [{**ASKED, "name": None}, ANSWER, AGAIN]},
    ]
    train, held = started(tmp_path, records).records.requests
    found = [*train, *held]
    assert len(found) == 5 and "what is snow ?" in found
    for wanted in (TALK, [ASKED], [{"role": "user", "content": "what is fire ?"}], [ASKED, ANSWER, AGAIN]):
        assert wanted in found
    assert all(isinstance(request, str | Conversation) for request in found)


@pytest.mark.parametrize(
    ("turn", "of_talk", "of_turn"),
    [
        (
            "user",
            [*TALK[:-1], {**AGAIN, "content": "what is wind ? keep it short ."}],
            [{"role": "user", "content": "x keep it short ."}],
        ),
        (
            "system",
            [{**SYSTEM, "content": "be kind . keep it short ."}, *TALK[1:]],
            [{"role": "system", "content": "keep it short ."}, {"role": "user", "content": "x"}],
        ),
    ],
)
def test_preferences_end_the_turn_of_the_setting(tmp_path, turn, of_talk, of_turn):
    records = started(tmp_path, [{"prompt": TALK}, {"prompt": "x"}], data__preference_turn=turn).records
    request = Conversation(TALK, {"tools": [TOOL]})
    assert records.ask(request, "keep it short .") == Conversation(of_talk, {"tools": [TOOL]})
    assert records.ask(request) == request and records.ask(request) != TALK
    assert records.ask("x", "keep it short .") == of_turn


def test_arguments_of_the_template_tell_requests_apart_and_come_back_from_files(tmp_path):
    with_tools = Conversation(TALK, {"tools": [TOOL], "style": "plain"})
    assert with_tools != TALK and Conversation(TALK) != with_tools and Conversation(TALK) == TALK
    assert len({with_tools, Conversation(TALK), Conversation(TALK, with_tools.options)}) == 2
    from pjrlhf.feedback.comparisons import preference_record

    run = started(tmp_path, [{"prompt": TALK}, {"prompt": "x"}])
    path = tiny_users.write_records(tmp_path / "pairs.jsonl", [preference_record(run, with_tools, "it .", "air .")])
    (example,), _ = run.records.made(path, "reward.data")
    assert example.prompt == example.original == with_tools and "request" not in example.extra
    path = tiny_users.write_records(tmp_path / "pairs.jsonl", [preference_record(run, "x", "it .", "air .")])
    (example,), _ = run.records.made(path, "reward.data")
    assert (example.prompt, example.original) == ([{"role": "user", "content": "x"}], "x")


def test_a_source_of_held_out_prompts_is_held_out_whole(tmp_path):
    path = tiny_users.write_records(
        tmp_path / "held.jsonl", [{"prompt": "what is wind ?", "answer": 2}, {"prompt": "what is snow ?"}]
    )
    records = [{"prompt": "what is wind ?", "answer": 1}, {"prompt": "what is fire ?"}, {"prompt": "what is rain ?"}]
    found = started(tmp_path, records, data__heldout_prompts={"kind": "jsonl", "path": path}).records
    train, held = found.requests
    assert sorted(train) == ["what is fire ?", "what is rain ?"]
    assert sorted(held) == ["what is snow ?", "what is wind ?"]
    assert found.columns_of(["what is wind ?"]).columns["answer"] == [2]  # that of the held-out record
    assert not {"what is snow ?", "what is wind ?"} & {example.prompt for example in found.completions}


def test_prompts_of_the_synthetic_environment_have_their_own_held_out_part():
    with pytest.raises(UserError, match=r"heldout_prompts: prompts='synthetic' has its own held-out part"):
        tiny.start(None, tiny.settings(data__heldout_prompts={"kind": "jsonl", "path": "test.jsonl"}))


def test_prompts_that_the_model_cannot_read_are_left_out_and_named(tmp_path, caplog):
    long = [ASKED, ANSWER, *[{**AGAIN, "content": "what is wind ? " * 10}]]
    records = [{"prompt": f"what is {topic} ?"} for topic in ("rain", "wind", "snow")] + [{"prompt": long}]
    with pytest.raises(UserError, match=r"prompts.jsonl line 4: prompt too long .*raise --config.data.max_prompt"):
        _ = started(tmp_path, records).records.requests
    run = started(tmp_path, records, data__max_bad_fraction=0.3)
    with caplog.at_level(logging.WARNING, logger="absl"):
        train, held = run.records.requests
    assert len(train) + len(held) == 3 and "left out" in caplog.text
    cut = started(tmp_path, records, data__long_prompt="truncate_left").records.requests
    assert long in [*cut[0], *cut[1]]


def test_a_conversation_where_requests_are_text_names_its_record(tmp_path):
    run = started(tmp_path, [{"prompt": "x"}, {"prompt": TALK}], data__chat=False)
    with pytest.raises(UserError, match=r"prompts.jsonl line 2: the prompt is a conversation, and requests are plain"):
        _ = run.records.requests


def test_a_text_with_tools_where_requests_are_text_says_that_tools_are_the_reason(tmp_path):
    tools = [{"type": "function", "function": {"name": "f"}}]
    run = started(tmp_path, [{"prompt": "x"}, {"prompt": "y", "tools": tools}], data__chat=False)
    told = r"jsonl line 2: the prompt has tools, which a chat template reads, .* give prompts as text, without tools"
    with pytest.raises(UserError, match=told):
        _ = run.records.requests
    run = started(tmp_path, [{"prompt": "y", "chat_template_kwargs": {"a": 1}}], data__chat=False)
    with pytest.raises(UserError, match="the prompt has chat_template_kwargs, which a chat template reads"):
        _ = run.records.requests


def test_answers_to_held_out_conversations_are_not_fine_tuned_on(tmp_path):
    prompts = [{"prompt": TALK}, {"prompt": [ASKED]}, {"prompt": "what is snow ?"}]
    texts = [*TALK, ANSWER], [ASKED, ANSWER], [{"role": "user", "content": "what is snow ?"}, ANSWER]
    path = tiny_users.write_records(tmp_path / "sft.jsonl", [{"messages": text} for text in texts])
    config = tiny.settings(data__max_prompt=30)
    with config.ignore_type():
        config.data.prompts = {"kind": "jsonl", "path": tiny_users.write_records(tmp_path / "p.jsonl", prompts)}
        config.sft.data = {"kind": "jsonl", "path": path}
    records = tiny.start(tmp_path / "run", config).records
    (held,) = records.requests[1]
    left = [text for text in texts if text[: len(records.ask(held))] != records.ask(held)]
    assert len(left) < 3 and len(records.completions) == len(left)
