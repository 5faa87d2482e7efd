"""What a run asks, and the rows that it shows: chat template or plain text."""

import json
import logging
import re

import pytest
from support import tiny, tiny_users

from pjrlhf.data.schema import Example, validate
from pjrlhf.errors import UserError

TURN = [{"role": "user", "content": "what is rain ?"}]


def write(folder, records):
    return tiny_users.write_records(folder / "records.jsonl", records)


@pytest.fixture
def base(tmp_path):
    return tiny_users.save_base(tmp_path)


def without_template(folder):
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    del settings["chat_template"]
    file.write_text(json.dumps(settings))


def started(tmp_path, base, **changes):
    lengths = {"data__max_prompt": 20, "data__max_completion": 20}
    return tiny.start(tmp_path / "run", tiny_users.settings("records", model__path=str(base), **lengths, **changes))


def test_requests_are_turns_where_the_tokenizer_has_a_template(tmp_path, base, caplog):
    with caplog.at_level(logging.INFO, logger="absl"):
        assert started(tmp_path, base).records.ask("what is rain ?") == TURN
        assert "requests are turns of the chat template (the tokenizer has a chat template)" in caplog.text
        assert (
            started(tmp_path, base, data__chat=False).records.ask("what is rain ?", "briefly")
            == "what is rain ? briefly"
        )
        assert "requests are plain text (data.chat=False)" in caplog.text
        without_template(base)
        assert started(tmp_path, base).records.ask("what is rain ?") == "what is rain ?"
        assert "requests are plain text (the tokenizer has no chat template)" in caplog.text
    run = started(tmp_path, base, data__chat=True)
    with pytest.raises(UserError, match="the tokenizer has no chat template"):
        run.text.encode([run.records.ask("what is rain ?")])


def test_a_new_tokenizer_has_a_template(tmp_path):
    assert tiny.start(tmp_path, tiny.settings()).records.chat


@pytest.mark.parametrize("chat", [True, False])
def test_records_are_asked_as_requests_are(tmp_path, base, chat):
    """User models, reward models and fine-tuning read a prompt as the policy does."""
    records = [
        {"prompt": q, "chosen": " it holds air .", "rejected": " it can burn .", "objective": "P2A"} for q in "ab"
    ]
    run = started(tmp_path, base, data__chat=chat)
    (first, second), _ = run.records.comparisons({"kind": "jsonl", "path": write(tmp_path, records)}, "reward.data")
    asked, _ = run.records.asked([first, second])
    assert asked.prompt == run.records.ask("a")
    assert (asked.chosen, asked.rejected) == (
        ("it holds air .", "it can burn .") if chat else (first.chosen, first.rejected)
    )


def test_transcripts_are_asked_as_turns(tmp_path, base):
    run = started(tmp_path, base)
    turns = [*TURN, {"role": "assistant", "content": "it holds air ."}, {"role": "user", "content": "why ? briefly"}]
    text = "\n\nHuman: what is rain ?\n\nAssistant: it holds air .\n\nHuman: why ?\n\nAssistant:"
    assert run.records.ask(text, "briefly") == turns


def test_packed_rows_score_what_the_mask_says(tmp_path, base):
    run = started(tmp_path, base)
    answers = [
        [{"role": "assistant", "content": "it can burn ."}, *TURN, {"role": "assistant", "content": "it ."}],
        "it .",
    ]
    examples = [Example(prompt=TURN, completion=answer, where="here") for answer in answers]
    table = run.text.tokenized(examples, run.text.lengths, "mine", "completion")
    packed = run.text.pack(list(table), ("completion",))
    scored = [int((packed.answer == a).sum()) for a in range(2)]
    assert scored == [int(table[0]["completion_mask"].sum()), len(table[1]["completion"])]
    assert scored[0] < len(table[0]["completion"])


@pytest.mark.parametrize("turns", ["all", "last"])
def test_which_turns_are_trained(tmp_path, base, turns):
    answer = [
        {"role": "assistant", "content": "it can burn ."},
        *TURN,
        {"role": "assistant", "content": "it holds air ."},
    ]
    path = write(tmp_path, [{"messages": [*TURN, *answer]}])
    config = tiny.settings(sft__turns=turns)
    with config.ignore_type():
        config.sft.data = {"kind": "jsonl", "path": path}
    (example,) = tiny.start(tmp_path / "run", config).records.completions
    if turns == "all":
        assert (example.prompt, example.completion) == (TURN, answer)
    else:
        assert (example.prompt, example.completion) == ([*TURN, *answer[:2]], "it holds air .")


def test_buckets_beyond_the_limit_are_not_used(tmp_path, base):
    run = started(tmp_path, base, data__prompt_buckets=(8, 20, 64), data__completion_buckets=(64,))
    assert (run.text.prompt_lengths, run.text.completion_lengths) == ((8, 20), (20,))


def test_records_that_the_tokenizer_does_not_know_are_warned_of_once(tmp_path, base, caplog):
    run = started(tmp_path, base)
    for name, text in (("known", "it can burn ."), ("strange", "it is zyzzyva .")):
        examples, _ = validate([{"prompt": TURN, "completion": text}] * 4, "completion")
        for _ in range(2):
            run.text.tokenized(examples, run.text.lengths, name, "completion")
    assert caplog.text.count("the tokenizer does not know") == 1
    assert re.search(
        r"strange: the tokenizer does not know [\d.]+ % of all tokens: a model reads .* <unk>", caplog.text
    )


def test_the_first_row_of_every_source_is_shown_once(tmp_path, base, caplog):
    run = started(tmp_path, base)
    answer = [
        {"role": "assistant", "content": "it can burn ."},
        *TURN,
        {"role": "assistant", "content": "it holds air ."},
    ]
    records = [{"messages": [*TURN, *answer]}, {"prompt": TURN, "completion": "it"}]
    examples, _ = validate(records, "completion")
    with caplog.at_level(logging.INFO, logger="absl"):
        for _ in range(2):
            table = run.text.tokenized(examples, run.text.lengths, "mine", "completion")
    assert caplog.text.count("mine: the first row as the model reads it") == 1
    lines = caplog.text.split("mine: the first row")[1].split("\n")[1:]
    assert [line.split(":")[0].strip() for line in lines[:4]] == [
        f"prompt, {len(table[0]['prompt'])} tokens, mask 0",
        "completion, 4 tokens, mask 1",
        "completion, 6 tokens, mask 0",
        "completion, 5 tokens, mask 1",
    ]
    assert "'air':" in lines[3] and "'</s>':2" in lines[3]
