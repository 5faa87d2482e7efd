"""Conversations through the chat templates of public families, token by token against transformers."""

import gzip
import json
import logging
import random

import pytest
from support.chat_templates import END, FAMILIES, START, Family, chatml
from support.encoding import encode_pair

from pjrlhf.data.messages import Conversation, as_request, as_turns, dialogue, with_words
from pjrlhf.data.records import RecordError
from pjrlhf.data.schema import parse
from pjrlhf.data.tokenization import Tokenizer, load_tokenizer

SYSTEM = {"role": "system", "content": "Be kind."}
ASKED, AGAIN = ({"role": "user", "content": text} for text in ("What is rain?", "And snow?"))
ANSWER = {"role": "assistant", "content": "Water that falls."}
PROMPTS = {
    "one turn": [ASKED],
    "system": [SYSTEM, ASKED],
    "turns": [ASKED, ANSWER, AGAIN],
    "system and turns": [SYSTEM, ASKED, ANSWER, AGAIN],
}
WORDS = "Keep it short."


def merged(prompt):
    """The system turn at the beginning of the first message of the user."""
    if prompt[0]["role"] != "system":
        return prompt
    first = {**prompt[1], "content": f"{prompt[0]['content']}\n\n{prompt[1]['content']}"}
    return [first, *prompt[2:]]


def rendered(backend, messages, **options):
    return backend.apply_chat_template(messages, tokenize=True, return_dict=False, **options)


@pytest.mark.parametrize("turn", ["user", "system"])
@pytest.mark.parametrize("words", ["", WORDS])
@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_and_answers_are_those_of_transformers(name, prompt, words, turn):
    family, backend = FAMILIES[name], FAMILIES[name].backend()
    tokenizer = Tokenizer(backend)
    prompt = with_words(prompt, words, turn)
    wanted = list(prompt) if family.knows_system else merged(prompt)
    ids = tokenizer.encode_prompt(prompt)
    assert ids == rendered(backend, wanted, add_generation_prompt=True)
    text = tokenizer.decode(ids, False)
    assert all(message["content"] in text for message in prompt) and text.count(WORDS) == bool(words)
    before, after = encode_pair(tokenizer, prompt, "Ice.")
    whole = rendered(backend, [*wanted, {"role": "assistant", "content": "Ice."}])
    assert [*before, *after] == whole[: len(before) + len(after)] and before == ids[: len(before)]
    assert not tokenizer.decode(whole[len(before) + len(after) :], False).strip()
    answer = "<think>\n\n</think>\n\nIce." if name == "qwen3" else "Ice."
    assert tokenizer.decode(after[:-1], False).strip() == answer and after[-1] == tokenizer.eos_id


def test_words_are_only_where_they_are_told_to_be():
    prompt = Conversation(PROMPTS["system and turns"], {"tools": [1]})
    by_user, by_system = with_words(prompt, WORDS), with_words(prompt, WORDS, "system")
    assert by_user == Conversation([*prompt[:-1], {**AGAIN, "content": f"And snow? {WORDS}"}], {"tools": [1]})
    assert by_system == Conversation([{**SYSTEM, "content": f"Be kind. {WORDS}"}, *prompt[1:]], {"tools": [1]})
    assert with_words([ASKED], WORDS, "system") == [{"role": "system", "content": WORDS}, ASKED]
    assert with_words("What is rain?", WORDS, "system") == f"What is rain? {WORDS}"


def test_a_variable_of_the_template_reaches_it():
    backend = FAMILIES["qwen3"].backend()
    prompt = Conversation(PROMPTS["turns"], {"enable_thinking": False})
    ids = Tokenizer(backend).encode_prompt(prompt)
    assert ids == rendered(backend, PROMPTS["turns"], add_generation_prompt=True, enable_thinking=False)
    assert Tokenizer(backend).decode(ids, False).endswith("<think>\n\n</think>\n\n")


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if not family.knows_system])
def test_a_template_without_system_role_is_told_of_once(name, caplog):
    tokenizer = Tokenizer(FAMILIES[name].backend())
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="absl"):
        for _ in range(2):
            tokenizer.encode_prompt([SYSTEM, ASKED])
            encode_pair(tokenizer, [SYSTEM, ASKED], "Ice.")
    assert caplog.text.count("knows no system role") == 1


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    "prompt",
    [
        [SYSTEM, SYSTEM, ASKED],
        [ASKED, SYSTEM, AGAIN],
        [ASKED, SYSTEM],
        [SYSTEM],
        [{"role": "developer", "content": "Be brief."}, ASKED],
        [{"role": "user", "content": " "}],
        [{"role": "stranger", "content": "Hello"}],
        [ANSWER, ASKED],
        [ASKED, ASKED],
        [ASKED, {"role": "assistant", "content": ""}, AGAIN],
    ],
)
def test_odd_conversations_are_rendered_or_refused(name, prompt):
    tokenizer = Tokenizer(FAMILIES[name].backend())
    try:
        assert tokenizer.encode_prompt(prompt)
    except RecordError as error:
        assert "\n" not in str(error)


def test_a_template_that_rewrites_the_prompt_once_it_is_answered_is_refused():
    """Otherwise what the user asks would be trained on as if it were the answer."""
    asked = chatml().replace("{{ m['role']", "{{ ('Q: ' if loop.last and m['role'] == 'user' else '') + m['role']")
    tokenizer = Tokenizer(Family(asked, (START, END)).backend())
    assert tokenizer.encode_prompt([ASKED])
    with pytest.raises(RecordError, match="the chat template rewrites a prompt once it is answered"):
        encode_pair(tokenizer, [ASKED], "Ice.")


@pytest.mark.real_data
@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_a_public_tokenizer(shared, tmp_path, prompt):
    source = shared / "tokenizers" / "deepseek_r1"
    (tmp_path / "tokenizer_config.json").write_bytes((source / "tokenizer_config.json").read_bytes())
    (tmp_path / "tokenizer.json").write_bytes(gzip.decompress((source / "tokenizer.json.gz").read_bytes()))
    tokenizer = load_tokenizer(tmp_path)
    prompt = with_words(prompt, WORDS, "system")
    assert tokenizer.encode_prompt(prompt) == rendered(tokenizer.backend, list(prompt), add_generation_prompt=True)


ROLES = ("system", "user", "assistant", "tool", "developer", "stranger", "", None, 1)
CONTENTS = (
    "What is rain?",
    "",
    " ",
    None,
    7,
    ["a", {"type": "text", "text": "b"}],
    [{"type": "image"}],
    {"a": 1},
    "\x00\ud800",
)
EXTRAS = (
    {},
    {"tool_calls": [{"name": "f", "arguments": "{}"}]},
    {"reasoning_content": "so"},
    {"name": 3},
    {"tool_calls": 1},
)


def odd(rng):
    """A record whose prompt may be anything that looks like a conversation."""
    talk = [
        {"role": rng.choice(ROLES), "content": rng.choice(CONTENTS), **rng.choice(EXTRAS)}
        if rng.random() < 0.15
        else {"role": rng.choice(ROLES[:3]), "content": "What is rain?"}
        for _ in range(rng.randrange(5))
    ]
    if rng.random() < 0.1:
        talk = rng.choice([dict(enumerate(talk)), {"role": "user", "content": "x"}, [talk], "text", ["text"], None])
    elif rng.random() < 0.7:
        talk.append(ASKED)
    columns = rng.choice([{}, {}, {}, {"tools": [{}]}, {"chat_template_kwargs": {"a": 1}}, {"tools": "["}])
    return {rng.choice(["prompt", "messages"]): talk, **columns}


def test_any_conversation_is_used_or_refused_in_one_line():
    rng, families, used = random.Random(0), [Tokenizer(family.backend()) for family in FAMILIES.values()], 0
    for _ in range(2000):
        record = odd(rng)
        try:
            prompt = as_request(parse(record, "prompt").prompt)
            assert json.loads(json.dumps(prompt)) == (prompt if isinstance(prompt, str) else list(prompt))
            for asked in (prompt, with_words(prompt, WORDS), with_words(prompt, WORDS, "system")):
                assert isinstance(dialogue(asked), str) and hash(asked) == hash(as_request(asked))
                assert WORDS in dialogue(asked) or asked is prompt
                rng.choice(families).encode_prompt(asked if isinstance(asked, list) else as_turns(asked))
            used += 1
        except RecordError as error:
            assert "\n" not in str(error) and len(str(error)) < 500
    assert 100 < used < 1900
