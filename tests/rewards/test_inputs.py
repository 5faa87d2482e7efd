"""What a classifier reads: templates, special tokens, and cutting."""

import json

import pytest
from support.tiny_classifiers import gpt2_folder
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from pjrlhf.errors import UserError
from pjrlhf.rewards.inputs import FORMATS, Inputs

SPECIAL = ("<s>", "</s>", "<pad>", "[CLS]", "[SEP]")
CHAT = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def folder(path, pair=False, **settings):
    """A tokenizer of single characters, for a pair as that of BERT."""
    path.mkdir(exist_ok=True)
    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *map(chr, range(10, 127))))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    if pair:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 3), ("[SEP]", 4)],
        )
        settings["model_input_names"] = ["input_ids", "token_type_ids"]
    tokenizer.save(str(path / "tokenizer.json"))
    given = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", **settings}
    (path / "tokenizer_config.json").write_text(json.dumps(given))
    return path


def inputs(path, template="", limit=0, positions=512, truncate="", rows=200, **settings):
    return Inputs("rewards.P2A", folder(path, **settings), template, limit, positions, rows, truncate)


def read(found, prompt, answer):
    """The text of the tokens."""
    (row,) = found([prompt], [answer])
    return found.backend.decode(row["input_ids"])


TURNS = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi?"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Why?"},
]
TALK = "\n\nHuman: Be kind.\nHi?\n\nAssistant: Hello.\n\nHuman: Why? \n\nAssistant:Because."


@pytest.mark.parametrize(
    ("template", "prompt", "answer", "want"),
    [
        ("", "Why?", " Because.", "Why?Because."),
        ("pair", "Why?", " Because. ", "Why?Because."),
        ("answer", "Why?", " Because.", "Because."),
        ("summary", "A post.", "Short.", "Short. <s> A post."),
        ("faithful", "A post.", "Short.", "Short.A post."),
        ("transcript", "Why?", " Because.", "\n\nHuman: Why? \n\nAssistant:Because."),
        ("transcript", TURNS, "Because.", TALK),
        (
            "transcript",
            "\n\nHuman: A?\n\nAssistant: B\n\nHuman: C?\n\nAssistant:",
            "D",
            "\n\nHuman: A?\n\nAssistant: B\n\nHuman: C? \n\nAssistant:D",
        ),
        ("Q: {prompt} A: {answer}", "Why?", " Because.", "Q: Why? A: Because."),
        ("{text}{eos}", "Why?", " Because.", "Why? Because.</s>"),
        ("{{{prompt}}} {answer}", "{x}", "y", "{{x}} y"),
        (("{prompt}", "A: {answer}"), "Why?", "So.", "Why?A: So."),
        ("{prompt}|{answer}", TURNS[1:2], "So.", "Hi?|So."),
    ],
)
def test_templates(template, prompt, answer, want, tmp_path):
    assert read(inputs(tmp_path, template), prompt, answer) == want


def test_a_conversation_is_rendered_by_the_chat_template_with_one_bos(tmp_path):
    found = inputs(tmp_path, chat_template=CHAT)
    assert read(found, "Why?", " So. ") == "<s><user>Why?<assistant>So."
    assert read(found, TURNS[1:], "So.") == "<s><user>Hi?<assistant>Hello.<user>Why?<assistant>So."
    assert read(inputs(tmp_path, "chat", chat_template=CHAT, add_bos_token=True), "a", "b") == "<s><user>a<assistant>b"


def test_special_tokens_are_those_of_the_tokenizer(tmp_path):
    assert read(inputs(tmp_path, "answer", pair=True), "", "a") == "[CLS]a[SEP]"
    (row,) = inputs(tmp_path, "pair", pair=True)(["ab"], ["c"])
    assert row["token_type_ids"] == [0, 0, 0, 0, 1, 1]
    both = inputs(tmp_path, "pair", add_bos_token=True, add_eos_token=True)
    assert read(both, "a", "b") == "<s>ab</s>" and read(both, "", "") == "<s></s>"
    assert read(inputs(tmp_path, "{bos}{prompt}{answer}", add_bos_token=True), "a", "b") == "<s>ab"
    assert read(inputs(tmp_path, "{bos}{prompt}{answer}", add_bos_token=False), "a", "b") == "<s>ab"


@pytest.mark.parametrize(
    ("template", "settings", "limit", "truncate", "want"),
    [
        ("pair", {}, 6, "", "efgxyz"),
        ("pair", {}, 6, "right", "abcxyz"),
        ("pair", {"pair": True}, 8, "", "[CLS]fg[SEP]xyz[SEP]"),
        ("pair", {"pair": True}, 5, "", "[CLS]g[SEP]z[SEP]"),
        ("faithful", {"pair": True}, 8, "", "[CLS]xyz[SEP]fg[SEP]"),
        ("pair", {"add_bos_token": True}, 6, "", "<s>fgxyz"),
        ("pair", {"add_bos_token": True, "add_eos_token": True}, 6, "", "<s>gxyz</s>"),
        ("{prompt}{answer}", {"pair": True}, 6, "", "[CLS]gxyz[SEP]"),
        ("{answer}{prompt}", {}, 6, "", "xyzabc"),
        ("{answer}{prompt}", {}, 6, "left", "bcdefg"),
        ("chat", {"chat_template": CHAT}, 8, "", "<s>ant>xyz"),
        ("chat", {"chat_template": CHAT}, 8, "right", "<s><user>a"),
    ],
)
def test_long_inputs_are_cut_away_from_the_answer_and_counted(
    template, settings, limit, truncate, want, tmp_path, caplog
):
    found = inputs(tmp_path, template, limit, truncate=truncate, **settings)
    with caplog.at_level("INFO"):
        assert read(found, "abcdefg", "xyz") == want
        read(found, "abcdefg", "xyz")
        read(found, "", "x")
    assert (found.asked, found.cut) == (3, 2 if template != "chat" else 3)
    assert caplog.text.count("are cut on the") == 1 and f"longer than {limit} tokens" in caplog.text


def test_the_limit_is_that_of_model_and_tokenizer(tmp_path):
    assert inputs(tmp_path).limit == 512
    assert inputs(tmp_path, model_max_length=300).limit == 300
    assert inputs(tmp_path, positions=None).limit is None
    assert inputs(tmp_path, limit=64, model_max_length=300).limit == 64


@pytest.mark.parametrize(
    ("template", "settings", "message"),
    [
        (
            "Q: {question[0]} A: {answer}",
            {},
            "rewards.P2A.template: {question[0]} is no field; choose from {prompt}, {answer}",
        ),
        ("{prompt.x}", {}, "{prompt.x} is no field"),
        ("{prompt", {}, "'{prompt' cannot be read"),
        ("transscript", {}, "'transscript' has no field and is no name; write a text with fields"),
        ("chat", {}, "rewards.P2A.template: chat, but the tokenizer in"),
        ("{bos}{answer}", {"bos_token": None}, "{bos}, but the tokenizer in"),
    ],
)
def test_wrong_templates_are_refused_by_name(template, settings, message, tmp_path):
    with pytest.raises(UserError) as error:
        inputs(tmp_path, template, **settings)
    assert message in str(error.value) and "; " in str(error.value) and "\n" not in str(error.value)


def test_further_mistakes_are_named(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer .*: the chat template is no template \("):
        inputs(tmp_path, chat_template="{% if %}")
    with pytest.raises(UserError, match=r"rewards.P2A.max_length: 600 is more than the 512 positions"):
        inputs(tmp_path, limit=600)
    with pytest.raises(UserError, match=r"rewards.P2A: the tokenizer in .* gives the id \d+, and the model has 50 emb"):
        inputs(tmp_path, rows=50)(["p"], ["z"])
    with pytest.raises(UserError, match=r"chat template in .* refuses the prompt 'p' \(no\); set another template"):
        inputs(tmp_path, chat_template="{{ raise_exception('no') }}")(["p"], ["z"])


def test_the_tokenizer_of_a_folder_without_chat_template_reads_pairs(tmp_path):
    found = Inputs("r", gpt2_folder(tmp_path, chat=False), "", 0, 512, 10**6, "")
    assert found.parts == FORMATS["pair"]


def test_templates_show_columns_of_the_records(tmp_path):
    found = inputs(tmp_path, ["{level}: {prompt}", "{answer}|{reference}"], pair=True)
    found.check_columns(("reference", "level", "other"))
    values = {"level": [1, None, 2], "reference": ["r", "s", [{"role": "user", "content": "Hi"}]], "other": [0, 0, 0]}
    rows = found(["p", "q", "p"], ["a", "b", "c"], values)
    texts = [found.backend.decode(row["input_ids"]) for row in rows]
    assert texts == ["[CLS]1: p[SEP]a|r[SEP]", "", "[CLS]2: p[SEP]c|Hi[SEP]"]
    with pytest.raises(UserError) as error:
        found.check_columns(("level",))
    assert str(error.value) == (
        "rewards.P2A.template: {reference} is no field, and no column of the records; choose from {prompt}, {answer}, "
        "{text}, {transcript}, {bos}, {eos}, or a column (data.prompts has the columns level), and write other "
        "braces twice"
    )
