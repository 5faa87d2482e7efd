"""Token rows hold what the text says: one BOS, one EOS, and a boundary that no character of an answer crosses."""

import dataclasses
import gzip
import itertools
import json
import logging
import random
import re

import numpy as np
import pytest
import tokenizers
import transformers
from support.encoding import encode_pair

from pjrlhf.data.messages import Conversation
from pjrlhf.data.records import RecordError
from pjrlhf.data.schema import Example
from pjrlhf.data.token_table import Lengths, tokenize
from pjrlhf.data.tokenization import Tokenizer, load_tokenizer
from pjrlhf.data.tokenizer_files import loading_class
from pjrlhf.errors import UserError
from pjrlhf.models.hf_config import read_eos_ids

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|pad|>", "<|bos|>", "<|im_start|>", "<|im_end|>"]
PAD, BOS, START, END = range(4)
CORPUS = "the cat sat on the mat, and then the cat ate the rat.\n\nAnswer: the rat sat on the hat! " * 3
HELLO = [{"role": "user", "content": "Hi"}]
ROOMY = Lengths(prompt=50, completion=50)


def backend(*, bos=False, template=None, vocab_size=0, **special):
    """A byte-level BPE tokenizer; its merges, learnt from CORPUS, freely cross spaces and punctuation."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    model.train_from_iterator([CORPUS[i : i + 40] for i in range(0, len(CORPUS), 7)], trainer)
    if bos:
        model.post_processor = tokenizers.processors.TemplateProcessing(
            single="<|bos|> $A", special_tokens=[("<|bos|>", BOS)]
        )
    special = {"bos_token": "<|bos|>", "eos_token": "<|im_end|>", "pad_token": "<|pad|>"} | special
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=model, **special)
    fast.chat_template = template
    return fast


def codes(text):
    """Ids of ASCII text where every character is a token."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    return [len(SPECIAL) + alphabet.index({" ": "Ġ", "\n": "Ċ"}.get(c, c)) for c in text]


@pytest.fixture(scope="module")
def deepseek(shared, tmp_path_factory):
    source, folder = shared / "tokenizers" / "deepseek_r1", tmp_path_factory.mktemp("deepseek")
    (folder / "tokenizer_config.json").write_bytes((source / "tokenizer_config.json").read_bytes())
    (folder / "tokenizer.json").write_bytes(gzip.decompress((source / "tokenizer.json.gz").read_bytes()))
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def gpt2(shared):
    return load_tokenizer(shared / "tokenizers" / "gpt2")


@pytest.fixture(scope="module")
def stories(shared):
    return load_tokenizer(shared / "models" / "stories260K")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for %}", "the chat template is no template .*Expected an expression.*; correct it"),
        ("{{ 'a", "the chat template is no template"),
        (3, "the chat template cannot be used .*a int, no text"),
        ({"rag": CHATML}, "the chat template cannot be used .*no default.*; give it one, named default"),
    ],
)
def test_a_chat_template_that_is_none_is_refused_when_the_tokenizer_is_read(template, message):
    made = backend(bos=True)
    made.chat_template = template
    with pytest.raises(UserError, match=message):
        Tokenizer(made)
    made.chat_template = {"default": CHATML, "rag": "{{ 1 }}"}
    assert Tokenizer(made).encode_prompt([{"role": "user", "content": "a"}])


def test_a_chat_template_that_writes_the_date_is_named(caplog):
    Tokenizer(backend(template=CHATML))
    assert "writes the date" not in caplog.text
    Tokenizer(backend(template="{{ strftime_now('%d') }}" + CHATML))
    assert "writes the date of today" in caplog.text and "date_string" in caplog.text


def test_golden_rows_of_a_chatml_template():
    tokenizer = Tokenizer(backend(template=CHATML))
    prompt = [START, *codes("user\nHi"), END, *codes("\n"), START, *codes("assistant\n")]
    assert tokenizer.encode_prompt(HELLO) == prompt
    assert encode_pair(tokenizer, HELLO, "Yo") == (prompt, [*codes("Yo"), END])
    assert encode_pair(tokenizer, HELLO, "Yo<|im_end|>\n") == (prompt, [*codes("Yo"), END])
    assert tokenizer.decode(prompt) == "user\nHi\nassistant\n"
    assert tokenizer.decode(prompt[:2], skip_special=False) == "<|im_start|>u"
    assert (tokenizer.vocab_size, tokenizer.has_chat_template) == (4 + 256, True)


@pytest.mark.real_data
def test_golden_rows_of_deepseek(deepseek):
    assert (deepseek.bos_id, deepseek.eos_id, deepseek.pad_id, deepseek.vocab_size) == (0, 1, 1, 128815)
    assert deepseek.encode_prompt(HELLO) == [0, 128803, 23166, 128804]
    assert encode_pair(deepseek, HELLO, "Hello world") == ([0, 128803, 23166, 128804], [19923, 2058, 1])
    assert encode_pair(deepseek, HELLO, "<think>no</think>Hello world")[1] == [19923, 2058, 1]
    two_turns = [*HELLO, {"role": "assistant", "content": "Hello world"}, {"role": "user", "content": "Hi"}]
    first = [0, 128803, 23166, 128804, 19923, 2058, 1]
    assert encode_pair(deepseek, two_turns, "Hello") == ([*first, 128803, 23166, 128804], [19923, 1])
    assert encode_pair(deepseek, "Hello", " world") == ([0, 19923], [2058, 1])  # its settings ask for a BOS


class OfAnotherModel(transformers.PreTrainedTokenizerFast):
    """A class of transformers for one kind of model."""


@pytest.mark.parametrize("split", ["WhitespaceSplit", "ByteLevel"])
def test_tokenizer_json_decides_how_text_is_split(monkeypatch, tmp_path, caplog, split):
    """transformers 5.0 to 5.20 make a Llama tokenizer of DeepSeek's file, which loses the spaces between words."""
    backend().save_pretrained(tmp_path)

    def from_pretrained(folder, **_):
        read = OfAnotherModel(tokenizer_file=f"{folder}/tokenizer.json", eos_token="<|im_end|>")
        read.backend_tokenizer.pre_tokenizer = {
            "WhitespaceSplit": tokenizers.pre_tokenizers.WhitespaceSplit(),
            "ByteLevel": tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        }[split]
        return read

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", from_pretrained)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode_prompt("the cat\n sat") == backend()("the cat\n sat")["input_ids"]
    differs = split == "WhitespaceSplit"
    assert ("reads it as OfAnotherModel, which splits text otherwise" in caplog.text) is differs
    assert isinstance(tokenizer.backend, OfAnotherModel) is not differs
    assert loading_class(tmp_path) == ("PreTrainedTokenizerFast" if differs else "AutoTokenizer")


def test_a_byte_level_tokenizer_that_calls_itself_llama_is_read_as_its_file_says(tmp_path):
    backend().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "LlamaTokenizerFast"}))
    text = "the cat  sat\n on 12 mats"
    assert load_tokenizer(tmp_path).encode_prompt(text) == backend()(text)["input_ids"]


@pytest.mark.real_data
def test_golden_rows_of_gpt2(gpt2):
    assert (gpt2.bos_id, gpt2.eos_id, gpt2.pad_id, gpt2.vocab_size) == (50256, 50256, 50256, 50257)
    assert encode_pair(gpt2, "Hello", " world") == ([15496], [995, 50256])
    assert encode_pair(gpt2, "Hello", " world<|endoftext|>") == ([15496], [995, 50256])
    assert encode_pair(gpt2, "Hello ", "world") == ([15496], [995, 50256])  # the space belongs to " world"
    assert encode_pair(gpt2, "", "Hello world") == ([50256], [15496, 995, 50256])
    assert gpt2.encode_prompt("") == [50256]


@pytest.mark.real_data
def test_golden_rows_of_stories(stories):
    assert (stories.bos_id, stories.eos_id, stories.pad_id, stories.vocab_size) == (1, 2, 0, 512)
    prompt, completion = encode_pair(stories, "Once upon a time", ", there was")
    assert (prompt, completion) == ([1, 403, 407, 261, 378], [432, 383, 286, 2])
    assert stories.encode_prompt("<s>Once upon a time")[:2] == [1, 403]
    assert stories.decode(prompt + completion) == "Once upon a time, there was"
    with pytest.raises(UserError, match="no chat template"):
        stories.encode_prompt(HELLO)


def check_boundary(tokenizer, text, cut):
    prompt, completion = encode_pair(tokenizer, text[:cut], text[cut:])
    alone, whole = tokenizer.encode_prompt(text[:cut]), tokenizer.encode_prompt(text)
    assert completion[-1] == tokenizer.eos_id and completion.count(tokenizer.eos_id) == 1
    if prompt == [tokenizer.start_id] and alone[0] != whole[0]:
        prompt = []  # no token of the prompt is left, and a start token replaces it
    assert prompt + completion == [*whole, tokenizer.eos_id]
    assert alone[: len(prompt)] == prompt
    assert len(prompt) == len(alone) or alone[len(prompt)] != completion[0]
    return len(prompt) < len(alone)


@pytest.mark.parametrize("bos", [False, True])
def test_boundary_of_any_cut(bos):
    tokenizer = Tokenizer(backend(bos=bos, vocab_size=400))
    assert (tokenizer.encode_prompt("the")[0] == BOS) is bos
    rng = random.Random(0)
    straddling = 0
    for _ in range(300):
        start = rng.randrange(len(CORPUS) - 60)
        text = CORPUS[start : start + rng.randint(4, 60)] + rng.choice(["", "é", "\n", " \u2028x", "."])
        cut = rng.randrange(1, len(text))
        if text[cut:].strip():
            straddling += check_boundary(tokenizer, text, cut)
    assert straddling > 50  # else the test would say nothing about merges across the boundary


@pytest.mark.real_data
@pytest.mark.parametrize("name", ["gpt2", "deepseek", "stories"])
def test_boundary_of_any_cut_with_real_tokenizers(request, name):
    tokenizer = request.getfixturevalue(name)
    text = "Once upon a time, there was a girl;\n\n she didn't like 12345 naïve  people. 你好 \U0001f642 Okay?\n"
    straddling = sum(check_boundary(tokenizer, text[i:], k) for i in (0, 5, 30) for k in range(1, len(text[i:]) - 2))
    assert straddling > 5


def test_pair_shares_the_shorter_prompt():
    tokenizer = Tokenizer(backend(vocab_size=400))
    merged, apart = next(
        (text, text[:-1] + "Z")
        for text in ("the cat", "the rat")
        if len(encode_pair(tokenizer, text[:-1], text[-1])[1]) == 2
    )
    alone = tokenizer.encode_prompt(merged[:-1])
    assert encode_pair(tokenizer, apart[:-1], apart[-1])[0] == alone
    prompt, (chosen, rejected) = tokenizer.encode_answers(merged[:-1], [merged[-1], apart[-1]])
    assert len(prompt) < len(alone) or prompt == [tokenizer.start_id]
    for text, (ids, _) in ((merged, chosen), (apart, rejected)):
        assert tokenizer.decode(prompt + ids) == text


def test_bos_comes_once_from_template_or_tokenizer():
    twice = Tokenizer(backend(bos=True, template="<|bos|>{{ messages[0]['content'] }}"))
    assert twice.encode_prompt([{"role": "user", "content": "a"}]) == [BOS, *codes("a")]
    assert twice.encode_prompt("<|bos|>a") == twice.encode_prompt("a") == [BOS, *codes("a")]
    assert twice.encode_prompt("") == [BOS]
    never = Tokenizer(backend(bos=True, template=CHATML))
    assert BOS not in never.encode_prompt(HELLO) + encode_pair(never, HELLO, "Yo")[0]  # the template decides
    without = Tokenizer(backend(bos_token=None))
    assert without.bos_id is None
    assert (without.encode_prompt("a"), without.encode_prompt("")) == (codes("a"), [END])


@pytest.mark.parametrize(
    ("special", "pad"),
    [
        ({}, PAD),
        ({"pad_token": "<|im_end|>"}, END),
        ({"pad_token": "<|im_end|>", "unk_token": "<|im_start|>"}, START),
        ({"pad_token": None, "unk_token": "<|im_start|>"}, START),
        ({"pad_token": None, "unk_token": "<|im_end|>"}, END),
    ],
)
def test_padding_token(special, pad):
    assert Tokenizer(backend(**special)).pad_id == pad


def test_end_of_sequence_is_required_and_can_be_named():
    with pytest.raises(UserError, match=r"no end-of-sequence token.*--config\.model\.eos_token"):
        Tokenizer(backend(eos_token=None))
    with pytest.raises(UserError, match=r"'</s>': not in the tokenizer's vocabulary"):
        Tokenizer(backend(eos_token=None), eos_token="</s>")
    tokenizer = Tokenizer(backend(), eos_token="!")
    assert encode_pair(tokenizer, "a", "b") == (codes("a"), codes("b!"))
    assert tokenizer.decode(codes("ab!")) == "ab"


def test_tokens_that_the_model_does_not_know_are_named():
    """A padding token added at the end is never given out; EOS and BOS must have a row, and so must every text."""
    size = len(SPECIAL) + 256
    assert Tokenizer(backend(pad_token="[PAD]"), rows=size).pad_id == END
    assert Tokenizer(backend(pad_token="[PAD]", unk_token="<|im_start|>"), rows=size).pad_id == START
    with pytest.raises(UserError, match=rf"EOS '</s>' has id {size}, and .* {size} rows; .*--config\.model\.eos_token"):
        Tokenizer(backend(eos_token="</s>"), rows=size)
    with pytest.raises(UserError, match=rf"BOS '<s>' has id {size}, and the model's embedding has {size} rows"):
        Tokenizer(backend(bos_token="<s>"), rows=size)
    fast = backend()
    fast.add_tokens(["<image>"])
    tokenizer = Tokenizer(fast, rows=size)
    with pytest.raises(RecordError, match=rf"token that the model does not know .*'<image>' has id {size}"):
        tokenizer.encode_answers("a", ["b<image>"])
    examples = [Example(prompt=text, where=text) for text in ("one", "two <image>")]
    table = tokenize(examples, "prompt", tokenizer, ROOMY, max_bad_fraction=0.5)
    assert (len(table), table.bad.counts) == (1, {"has a token that the model does not know": 1})


def test_the_whole_reason_of_the_library_is_said(tmp_path, monkeypatch):
    """A mistake in config.json, which the library reads too, follows in the second line of its message."""

    def refuse(*_, **__):
        raise ValueError("Class validation error:\n    the hidden size (16) is not a multiple of the heads (3)")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", refuse)
    with pytest.raises(UserError, match=r"ValueError: Class validation error: the hidden size .* and a config\.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["{}", "[]", '{"model": {"type": "Newer"}}', "{"])
def test_a_tokenizer_that_cannot_be_read_is_one_line(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=rf"tokenizer {tmp_path}: .*that transformers \d.* can read"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "template",
    [
        CHATML,
        CHATML.replace("<|im_end|>\n' }}", "<|im_end|>\n<|pad|>' }}"),
        CHATML.replace("<|im_end|>\n", "<|im_end|>"),
    ],
    ids=["newline follows", "EOS follows", "nothing follows"],
)
def test_an_answer_ends_with_the_turn_of_its_template(template):
    """The end of a turn is not the EOS of this tokenizer, as in Gemma."""
    tokenizer = Tokenizer(backend(template=template, eos_token="<|pad|>"))
    assert (tokenizer.eos_id, tokenizer.eos_ids) == (PAD, (PAD, END))
    assert encode_pair(tokenizer, HELLO, "Yo")[1] == [*codes("Yo"), END]
    assert encode_pair(tokenizer, HELLO, "Yo \n")[1] == [*codes("Yo \n"), END]
    assert encode_pair(tokenizer, "Hi", " Yo")[1] == [*codes(" Yo"), PAD]
    assert encode_pair(tokenizer, "Hi", " Yo<|im_end|>")[1] == [*codes(" Yo"), END]
    for token in ("<|pad|>", "<|im_end|>"):
        with pytest.raises(RecordError, match=rf"end-of-sequence inside an answer.*{re.escape(token)}"):
            encode_pair(tokenizer, HELLO, f"Yo{token}Yo")


def test_end_of_a_turn_by_text_is_named(caplog):
    with caplog.at_level(logging.WARNING, logger="absl"):
        tokenizer = Tokenizer(backend(template=CHATML.replace("<|im_end|>\n", "\n### End"), eos_token="<|pad|>"))
    assert tokenizer.eos_ids == (PAD,)
    assert "ends a turn with '\\n### End', which is no special token" in caplog.text


def test_tokens_that_end_answers_come_from_all_config_files(tmp_path, caplog):
    def load(generation, config, **special):
        Tokenizer(backend(vocab_size=300)).save(tmp_path)
        settings = json.loads((tmp_path / "tokenizer_config.json").read_text()) | special
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation, "temperature": 0.6}))
        (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": config, "pad_token_id": 0}))
        return load_tokenizer(tmp_path)

    assert load([START, BOS], PAD).eos_ids == (END, START, BOS, PAD)
    assert read_eos_ids(tmp_path) == [START, BOS, PAD]
    assert load(END, [END, -1]).eos_ids == (END,)
    assert load(None, None).eos_ids == (END,)
    nameless = load([START, END], None, eos_token=None)
    assert (nameless.eos_id, nameless.eos_ids) == (START, (START, END))
    with caplog.at_level(logging.WARNING, logger="absl"):
        assert load(codes("#")[0], 10**6).eos_ids == (END,)
    assert "the ordinary '#'" in caplog.text and "1000000 as EOS, which is not in the tokenizer" in caplog.text
    for wrong in ("</s>", [True], {"id": 1}, 1.5):
        with pytest.raises(UserError, match=r"generation_config\.json: eos_token_id=.* is not a token id"):
            load(wrong, None)


def test_sampled_answers_lose_the_token_that_ended_them():
    tokenizer = Tokenizer(backend(template=CHATML, eos_token="<|pad|>"), eos_ids=[START])
    tokenizer.eos_ids += (codes("!")[0],)  # a token that decoding does not leave out as special
    for end in (PAD, START, END, codes("!")[0]):
        assert tokenizer.decode_answer([*codes(" Yo! Yo"), end]) == "Yo! Yo"
    assert tokenizer.decode_answer([*codes(" Yo!"), END], prompt=codes("Hi")) == " Yo!"
    assert tokenizer.decode_answer([]) == ""


# Renders tool calls, tools, reasoning of the last turns alone, and a variable, as templates of the Qwen family do.
TOOLS = """{% if tools %}{{ '<|im_start|>tools\n' + tools|tojson + '<|im_end|>\n' }}{% endif %}
{%- set ns = namespace(asked=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.asked = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}
{%- if m.reasoning_content and loop.index0 > ns.asked %}{{ '(' + m.reasoning_content + ')' }}{% endif %}
{{- m.content or '' }}
{%- for call in m.tool_calls or [] %}{{ '[' + call.function.name + call.function.arguments|tojson + ']' }}{% endfor %}
{{- '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% if quiet %}{{ '()' }}{% endif %}{% endif %}"""
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}
RESULT = {"role": "tool", "content": "2"}
YO = {"role": "assistant", "content": "Yo"}
SCHEMA = {"type": "function", "function": {"name": "f"}}


def scored(tokenizer, answer):
    """The text of an answer, with what is scored in braces."""
    groups = itertools.groupby(zip(*answer, strict=True), key=lambda pair: pair[1])
    texts = [(on, tokenizer.decode([i for i, _ in pairs], False)) for on, pairs in groups]
    return "".join(f"{{{text}}}" if on else text for on, text in texts)


def test_messages_are_rendered_whole():
    tokenizer = Tokenizer(backend(template=TOOLS, vocab_size=300))
    prompt, (answer, other) = tokenizer.encode_answers(
        Conversation(HELLO, {"tools": [SCHEMA]}), [[CALL | {"reasoning_content": "hm"}], "Yo"]
    )
    assert tokenizer.decode(prompt, False) == (
        f"<|im_start|>tools\n{json.dumps([SCHEMA])}<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert scored(tokenizer, answer) == '{(hm)[f{"x": 1}]<|im_end|>}'
    assert scored(tokenizer, other) == "{Yo<|im_end|>}"
    quiet = Conversation(HELLO, {"quiet": True})
    assert tokenizer.decode(tokenizer.encode_prompt(quiet)).endswith("assistant\n()")


@pytest.mark.parametrize(
    ("prompt", "answer", "name"),
    [
        (HELLO, [CALL], "tool_calls"),
        (HELLO, [YO | {"reasoning_content": "hm"}], "reasoning_content"),
        (HELLO, [YO | {"thinking": "hm"}], "thinking"),
        ([*HELLO, YO | {"thinking": "hm"}, *HELLO], "Yo", "thinking"),
        (Conversation(HELLO, {"tools": [SCHEMA]}), "Yo", "tools"),
        (Conversation(HELLO, {"enable_thinking": True}), "Yo", "enable_thinking"),
    ],
)
def test_what_a_template_ignores_is_refused_by_name(prompt, answer, name):
    template = CHATML.replace("m['content']", "(m['content'] or '')") + "{# tools, .enable_thinking #}"
    with pytest.raises(RecordError, match=f"{name} ignored by the chat template"):
        encode_pair(Tokenizer(backend(template=template)), prompt, answer)
    with pytest.raises(RecordError, match=f"{name} (ignored by|unknown to) the chat template"):
        encode_pair(Tokenizer(backend(template=CHATML)), prompt, answer)  # fails at a content of None


def test_what_a_template_drops_on_purpose_is_no_error():
    tokenizer = Tokenizer(backend(template=TOOLS, vocab_size=300))
    earlier = [*HELLO, YO | {"reasoning_content": "hm"}, *HELLO]
    assert encode_pair(tokenizer, earlier, "Yo") == encode_pair(tokenizer, [*HELLO, YO, *HELLO], "Yo")
    without = Conversation(HELLO, {"enable_thinking": False, "documents": []})  # nothing that could be lost
    assert tokenizer.encode_prompt(without) == tokenizer.encode_prompt(HELLO)


@pytest.mark.parametrize("end", ["<|im_end|>\n", "<|im_end|>", "\n"])
@pytest.mark.parametrize("vocab_size", [0, 400])
def test_every_turn_of_the_assistant_is_scored_and_nothing_else(end, vocab_size):
    tokenizer = Tokenizer(backend(template=TOOLS.replace("<|im_end|>\n", end), vocab_size=vocab_size))
    _, (answer,) = tokenizer.encode_answers(HELLO, [[CALL, RESULT, YO, *HELLO, YO]])
    stop, rest = (end[:10], end[10:]) if end.startswith("<") else (end, "")
    last = stop if end.startswith("<") else f"{end}<|im_end|>"
    text = (
        f'{{[f{{"x": 1}}]{stop}}}{rest}<|im_start|>tool\n2{end}<|im_start|>assistant\n{{Yo{stop}}}{rest}'
        f"<|im_start|>user\nHi{end}<|im_start|>assistant\n{{Yo{last}}}"
    )
    assert scored(tokenizer, answer) == text


def test_turns_that_a_template_rewrites_are_rows_of_their_own():
    tokenizer = Tokenizer(backend(template=TOOLS, vocab_size=300))
    thought = YO | {"reasoning_content": "hm"}
    turns = [thought, *HELLO, thought]
    example = Example(prompt=Conversation(HELLO, {"tools": [SCHEMA]}), completion=turns, where="here")
    table = tokenize([example], "completion", tokenizer, Lengths(prompt=200, completion=50))
    assert [tokenizer.decode(row["completion"]) for row in table] == ["(hm)Yo", "(hm)Yo"]
    assert [row["completion_mask"] for row in table] == [None, None]
    for row, before in zip(table, (HELLO, [*HELLO, YO, *HELLO]), strict=True):
        assert row["prompt"].tolist() == tokenizer.encode_prompt(Conversation(before, {"tools": [SCHEMA]}))
    # Two answers to one prompt cannot be.
    pair = Example(prompt=HELLO, chosen=turns, rejected="Yo", where="here")
    with pytest.raises(UserError, match="chat template rewrites earlier turns"):
        tokenize([pair], "preference", tokenizer, ROOMY)


def test_masks_of_a_table_and_what_was_cut(caplog):
    tokenizer = Tokenizer(backend(template=TOOLS))
    turns = [YO, *HELLO, YO]
    whole = tokenizer.encode_answers(HELLO, [turns])[1][0]
    examples = [Example(prompt=HELLO, completion=answer, where=f"line {i}") for i, answer in enumerate((turns, "Yo"))]
    lengths = Lengths(prompt=20, completion=len(whole.ids) - 1, long_prompt="truncate_left", long_completion="truncate")
    with caplog.at_level(logging.INFO, logger="absl"):
        table = tokenize(examples, "completion", tokenizer, lengths)
    assert table[0]["completion_mask"].tolist() == whole.scored[:-1] and table[1]["completion_mask"] is None
    assert table.select([1, 0])[1]["completion_mask"].tolist() == whole.scored[:-1]
    assert table.cut == {"prompt": 2, "completion": 1}
    assert "cut to the length limits (prompt 20, completion" in caplog.text
    assert "2 prompts, 1 completions of 2 rows" in caplog.text
    assert tokenize(examples, "prompt", tokenizer, lengths).cut == {"prompt": 2}
    late = [Example(prompt=HELLO, completion=[CALL | {"content": "x"}, RESULT, YO], where="here")]
    kept = tokenize(late, "completion", tokenizer, dataclasses.replace(lengths, completion=3))
    assert kept[0]["completion_mask"] is None  # nothing of the tool's is left


def test_load_and_save(tmp_path):
    first = Tokenizer(backend(bos=True, template=CHATML, vocab_size=300))
    first.save(tmp_path / "whole")
    again = load_tokenizer(tmp_path / "whole")
    assert encode_pair(again, HELLO, CORPUS) == encode_pair(first, HELLO, CORPUS)
    assert encode_pair(again, "the", "cat") == encode_pair(first, "the", "cat")

    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "tokenizer.json").write_bytes((tmp_path / "whole" / "tokenizer.json").read_bytes())
    with pytest.raises(UserError, match="eos_token"):
        load_tokenizer(tmp_path / "bare")
    bare = load_tokenizer(tmp_path / "bare", eos_token="<|im_end|>")
    assert (bare.bos_id, encode_pair(bare, "the", "cat")[1][-1]) == (None, END)
    with pytest.raises(UserError, match="no such folder"):
        load_tokenizer(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path / "empty")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [("<|im_end|>", "answer without tokens"), ("a<|im_end|>b", "end-of-sequence inside an answer")],
)
def test_answers_without_tokens_or_that_end_twice(answer, reason):
    tokenizer = Tokenizer(backend(template=CHATML))
    for prompt in ("Hi", HELLO):
        with pytest.raises(RecordError) as error:
            encode_pair(tokenizer, prompt, answer)
        assert error.value.reason == reason


def test_template_that_refuses_is_a_bad_record():
    tokenizer = Tokenizer(backend(template="{{ raise_exception('no system turn, please') }}"))
    with pytest.raises(RecordError, match=r"refused by the chat template \(no system turn, please\)"):
        tokenizer.encode_prompt(HELLO)


def test_template_with_a_longer_generation_prompt_than_it_writes(caplog):
    tokenizer = Tokenizer(backend(template=CHATML.replace("assistant\n' }}{% endif", "assistant\n<think>' }}{% endif")))
    with caplog.at_level(logging.WARNING, logger="absl"):
        prompt, completion = encode_pair(tokenizer, HELLO, "Yo")
    assert (tokenizer.decode(prompt), completion) == ("user\nHi\nassistant\n", [*codes("Yo"), END])
    assert "omits its generation prompt" in caplog.text


def pair(prompt, chosen="yes", rejected="no", **columns):
    return Example(prompt=prompt, chosen=chosen, rejected=rejected, where=f"t.jsonl line {len(prompt)}", **columns)


def test_table_rows():
    tokenizer = Tokenizer(backend())
    examples = [
        pair("abc", user_id="u", objective="o", margin=0.5, preference=0.75, extra={"n": 1}),
        pair("de", chosen="maybe"),
    ]
    table = tokenize(examples, "preference", tokenizer, ROOMY)
    assert len(table) == 2 and not table.bad.items
    row = table[0]
    assert row["chosen"].dtype == np.int32 and row["chosen"].tolist() == [*codes("yes"), END]
    assert (row["prompt"].tolist(), row["rejected"].tolist()) == (codes("abc"), [*codes("no"), END])
    assert {name: row[name] for name in ("index", "user_id", "objective", "margin", "preference", "where")} == {
        "index": 0,
        "user_id": "u",
        "objective": "o",
        "margin": 0.5,
        "preference": 0.75,
        "where": "t.jsonl line 3",
    }
    assert table.examples[0].extra == {"n": 1}
    second = table.select([1])
    assert (len(second), second[0]["index"], second[0]["prompt"].tolist()) == (1, 0, codes("de"))
    prompts = tokenize(examples, "prompt", tokenizer, ROOMY)
    assert prompts[-1]["prompt"].tolist() == codes("de") and prompts[-1]["index"] == 1 and "chosen" not in prompts[0]


def test_long_prompts_are_dropped_shortened_or_refused():
    tokenizer = Tokenizer(backend(bos=True))
    examples = [pair("abcdefgh"), pair("abc")]
    dropped = tokenize(examples, "preference", tokenizer, Lengths(prompt=5, completion=9), max_bad_fraction=0.5)
    assert [row["prompt"].tolist() for row in dropped] == [[BOS, *codes("abc")]]
    assert dropped.bad.items[0][:2] == ("t.jsonl line 8", "prompt too long")
    with pytest.raises(
        UserError, match=r"t.jsonl line 8: prompt too long \(9 tokens, the limit is 5; raise .*max_bad_fraction"
    ):
        tokenize(examples, "preference", tokenizer, Lengths(prompt=5, completion=9))
    cut = tokenize(examples, "prompt", tokenizer, Lengths(prompt=5, completion=9, long_prompt="truncate_left"))
    assert cut[0]["prompt"].tolist() == [BOS, *codes("efgh")]
    with pytest.raises(UserError, match=r"t.jsonl line 8: prompt too long \(9 tokens, the limit is 5\)"):
        tokenize(examples, "prompt", tokenizer, Lengths(prompt=5, completion=9, long_prompt="error"))


def test_long_completions_are_dropped_or_cut_but_never_empty():
    tokenizer = Tokenizer(backend())
    examples = [pair("a", "yesterday", "no"), pair("a", "yes", "no")]
    dropped = tokenize(examples, "preference", tokenizer, Lengths(prompt=5, completion=4), max_bad_fraction=0.5)
    assert len(dropped) == 1 and dropped.bad.counts == {"chosen too long": 1}
    cut = tokenize(examples, "preference", tokenizer, Lengths(prompt=5, completion=1, long_completion="truncate"))
    assert cut[0]["chosen"].tolist() == codes("y") and cut[0]["rejected"].tolist() == codes("n")
    same = [*examples, pair("a", "yes, it is", "yes, it was")]
    table = tokenize(
        same, "preference", tokenizer, Lengths(prompt=5, completion=5, long_completion="truncate"), max_bad_fraction=0.5
    )
    assert len(table) == 2 and table.bad.counts == {"chosen equals rejected": 1}
    assert table[0]["chosen"].tolist() == codes("yeste") and table[1]["chosen"].tolist() == [*codes("yes"), END]


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ({"prompt": 6, "completion": 5, "context": 10}, "prompt 6 .* completion 5 .* context of 10"),
        ({"prompt": 0, "completion": 5}, "at least 1"),
        ({"prompt": 1, "completion": 5, "long_prompt": "cut"}, "long_prompt 'cut': not one of"),
        ({"prompt": 1, "completion": 5, "long_completion": "error"}, "long_completion 'error': not one of"),
    ],
)
def test_lengths_that_cannot_be(lengths, message):
    with pytest.raises(UserError, match=message):
        Lengths(**lengths)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no\nsystem') }}",
        "{{ messages[9]['content'] }}",
        "{{ messages | map(attribute='x') | join(3) + 1 }}",
        "{{ 1 / 0 }}",
        "{{ messages.items() }}",
    ],
)
def test_whatever_a_template_raises_is_a_bad_record_in_one_line(template):
    made = backend(bos=True)
    made.chat_template = template
    with pytest.raises(RecordError) as error:
        Tokenizer(made).encode_prompt([{"role": "user", "content": "a"}])
    assert error.value.reason == "refused by the chat template" and "\n" not in str(error.value)
