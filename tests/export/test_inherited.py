"""A merge takes tokenizer, chat template, EOS and settings of generation from the folder that has them."""

import json
import shutil

import pytest
from support.tiny_llamas import SMALL, edit, random_params
from tokenizers import AddedToken, Tokenizer, pre_tokenizers
from tokenizers.models import BPE

from pjrlhf.errors import UserError
from pjrlhf.export import merge
from pjrlhf.export.merge import MergeSettings
from pjrlhf.models.huggingface import save_params
from pjrlhf.models.peft import save_peft

CHAT = "{% for m in messages %}{{ m.content }}<end>{% endfor %}"


def write_tokenizer(folder, **settings):
    tokenizer = Tokenizer(BPE({"a": 0, "b": 1, "ab": 2, "</s>": 3}, [("a", "b")], unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.add_special_tokens(["</s>", "<end>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", **settings}))


def write_json(file, **content):
    file.write_text(json.dumps(content))


@pytest.fixture
def models(tmp_path):
    """A base without a chat template; chat and twin, trained from it to answer; plain, trained to go on; and an adapter
    of the base, saved with its tokenizer.
    """
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("base", "chat", "twin", "plain"):
        save_params(folder / name, SMALL, random_params(SMALL), token_ids={"bos_token_id": 0, "eos_token_id": 3})
        write_tokenizer(folder / name)
    for name in ("chat", "twin"):
        write_tokenizer(folder / name, chat_template=CHAT, eos_token="<end>")
        write_json(folder / name / "generation_config.json", eos_token_id=[3, 4], temperature=0.6, do_sample=True)
    save_peft(folder / "lora", adapter(), 3, 6.0, "base")
    write_tokenizer(folder / "lora", eos_token="<end>")
    (folder / "lora" / "chat_template.jinja").write_text(CHAT)
    return folder


def adapter():
    import numpy as np

    pair = {"a": np.ones((2, 8, 3), np.float32), "b": np.ones((2, 3, 12), np.float32)}
    return {"layers": {"attention": {"query": pair}}}


def merged(models, names, base="base", **settings):
    """(tokenizer_config.json, config.json, generation_config.json) of a merge."""
    output = models.parent / "out"
    shutil.rmtree(output, ignore_errors=True)
    weights = (1 / len(names),) * len(names)
    folders = {"ingredients": tuple(str(models / name) for name in names), "base": str(models / base) if base else None}
    merge.merge(MergeSettings(**folders, weights=weights, output=str(output), **settings))
    files = ("tokenizer_config.json", "config.json", "generation_config.json")
    return tuple(json.loads((output / name).read_text()) for name in files)


@pytest.mark.parametrize(
    "names, base", [(("chat",), "base"), (("plain", "chat", "twin"), "base"), (("chat", "plain"), None)]
)
def test_a_chat_model_merged_with_its_base_stays_one(models, names, base):
    tokenizer, config, generation = merged(models, names, base)
    assert (tokenizer["chat_template"], tokenizer["eos_token"]) == (CHAT, "<end>")
    assert (config["bos_token_id"], config["eos_token_id"]) == (0, [3, 4])
    assert generation == {"bos_token_id": 0, "eos_token_id": [3, 4], "temperature": 0.6, "do_sample": True}


def test_an_adapter_brings_its_template_and_the_base_its_settings(models):
    write_json(models / "base" / "generation_config.json", top_p=0.9, eos_token_id=3, transformers_version="4.0")
    tokenizer, config, generation = merged(models, ("lora",))
    assert tokenizer["eos_token"] == "<end>"
    assert (models.parent / "out" / "chat_template.jinja").read_text() == CHAT
    assert config["eos_token_id"] == 3
    assert generation == {"bos_token_id": 0, "eos_token_id": 3, "top_p": 0.9}


def test_one_adapter_of_several_keeps_the_tokenizer(models):
    settings = {"ingredients": (str(models / "lora"),) * 2, "weights": (0.5, 0.5), "space": "concat"}
    merge.merge(MergeSettings(**settings, base=str(models / "base"), output=str(models.parent / "adapter")))
    assert (models.parent / "adapter" / "chat_template.jinja").read_text() == CHAT
    assert (models.parent / "adapter" / "tokenizer.json").is_file()


def test_what_an_ingredient_changed_counts_and_not_what_it_lacks(models):
    """Of a chat base: one ingredient came without a tokenizer, the other with another temperature."""
    for name in ("plain", "twin"):
        for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            (models / name / file).unlink()
    write_tokenizer(models / "twin", chat_template=CHAT, eos_token="<end>")
    write_json(models / "twin" / "generation_config.json", temperature=0.9)
    tokenizer, config, generation = merged(models, ("plain", "twin"), "chat")
    assert tokenizer["chat_template"] == CHAT and config["eos_token_id"] == [3, 4]
    assert generation["temperature"] == 0.9 and generation["do_sample"] is True


CONFLICTS = {
    "chat template or EOS token": lambda f: write_tokenizer(f, chat_template="{{ messages }}", eos_token="<end>"),
    "chat template or EOS token ": lambda f: write_tokenizer(f, chat_template=CHAT, eos_token="b"),
    "temperature in generation_config.json": lambda f: write_json(f / "generation_config.json", temperature=0.1),
    "eos_token_id in generation_config.json": lambda f: write_json(f / "generation_config.json", eos_token_id=2),
    "eos_token_id in config.json": lambda f: edit(f, eos_token_id=2),
}


@pytest.mark.parametrize("what", CONFLICTS)
def test_conflicts_are_refused_and_a_setting_decides(models, what):
    CONFLICTS[what](models / "twin")
    if what == "eos_token_id in config.json":
        edit(models / "chat", eos_token_id=4)
    with pytest.raises(
        UserError, match=f"twin: has another {what.strip()} than .*chat; set merge.tokenizer to the folder"
    ):
        merged(models, ("chat", "twin"))
    assert not (models.parent / "out").exists()
    for name in ("chat", "twin"):
        tokenizer, _, _ = merged(models, ("chat", "twin"), tokenizer=str(models / name))
        assert tokenizer == json.loads((models / name / "tokenizer_config.json").read_text())
    with pytest.raises(UserError, match=r"merge\.tokenizer: .*lora is neither the base nor an ingredient"):
        merged(models, ("chat", "twin"), tokenizer=str(models / "lora"))


def test_one_id_and_a_list_of_it_are_no_conflict(models):
    write_json(models / "twin" / "generation_config.json", eos_token_id=[4, 3], temperature=0.6, do_sample=True)
    edit(models / "twin", eos_token_id=[3])
    assert merged(models, ("chat", "twin"))[2]["eos_token_id"] == [3, 4]


@pytest.mark.parametrize(("base", "ids"), [("base", [2, 3]), ("chat", [2])])
def test_an_adapter_ends_answers_with_its_own_tokens(models, base, ids):
    """What its generation_config.json says counts, whatever its base says."""
    write_json(models / "lora" / "generation_config.json", eos_token_id=ids)
    for ingredients in (("lora",), ("lora", "lora")):
        _, config, generation = merged(models, ingredients, base)
        found = generation["eos_token_id"]
        assert set(ids) <= set(found if isinstance(found, list) else [found])
        assert config["eos_token_id"] == found


def test_an_eos_token_of_an_ingredient_without_a_template_counts(models):
    write_tokenizer(models / "plain", eos_token={"content": "<end>", "special": True})
    assert merged(models, ("plain",))[0]["eos_token"]["content"] == "<end>"


# ---- tokenizers


def change_tokenizer(change):
    def apply(folder):
        content = json.loads((folder / "tokenizer.json").read_text())
        change(content)
        (folder / "tokenizer.json").write_text(json.dumps(content))

    return apply


def pad(folder):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["<pad>"])
    tokenizer.save(str(folder / "tokenizer.json"))


SAME = {
    "merges as strings": change_tokenizer(lambda t: t["model"].update(merges=["a b"])),
    "no version": change_tokenizer(lambda t: t.pop("version")),
    "order of added tokens": change_tokenizer(lambda t: t["added_tokens"].reverse()),
    "null keys left out": change_tokenizer(
        lambda t: (t.pop("normalizer"), t["model"].pop("dropout"), t["model"].pop("continuing_subword_prefix"))
    ),
    "keys that an old version does not write": change_tokenizer(
        lambda t: (
            t["model"].pop("byte_fallback"),
            t["model"].pop("ignore_merges"),
            t["pre_tokenizer"].pop("use_regex"),
        )
    ),
    "padding and truncation": change_tokenizer(
        lambda t: t.update(truncation={"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0})
    ),
    "an unused padding token": pad,
    "added tokens left out of the vocabulary": change_tokenizer(lambda t: t["model"]["vocab"].pop("</s>")),
}
OTHER = {
    "model.merges": change_tokenizer(lambda t: t["model"].update(merges=[])),
    "token 0, 'a' and 'b'": change_tokenizer(lambda t: t["model"]["vocab"].update(a=1, b=0)),
    "token 4, '<end>' and '<END>'": change_tokenizer(lambda t: t["added_tokens"][1].update(content="<END>")),
    "token 4, '<end>' and '<end>'": change_tokenizer(lambda t: t["added_tokens"][1].update(lstrip=True)),
    "token 5, 'a b', which only one of them has": lambda f: added(f, AddedToken("a b", special=False)),
    "normalizer": change_tokenizer(lambda t: t.update(normalizer={"type": "Lowercase"})),
    "pre_tokenizer": change_tokenizer(lambda t: t.update(pre_tokenizer=None)),
}


def added(folder, token):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([token])
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("name", SAME)
def test_the_same_tokenizer_in_another_spelling(models, name):
    before = (models / "plain" / "tokenizer.json").read_bytes()
    SAME[name](models / "plain")
    assert (models / "plain" / "tokenizer.json").read_bytes() != before
    merged(models, ("chat", "plain"), None)


@pytest.mark.parametrize("what", OTHER)
def test_another_tokenizer_is_refused_with_the_difference(models, what):
    OTHER[what](models / "plain")
    with pytest.raises(UserError, match=f"plain: tokenizer.json differs from that of .*chat in {what}; merge models"):
        merged(models, ("chat", "plain"), None)


@pytest.mark.parametrize("content", ["{}", "[]", '{"model": {"type": "New"}}', "{"])
def test_a_tokenizer_that_cannot_be_read_is_named(models, content):
    (models / "plain" / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"plain/tokenizer\.json: tokenizers .* cannot read it"):
        merged(models, ("chat", "plain"), None)


WRONG_SETTINGS = {
    "temperature": ("hot", float("nan"), float("inf"), True, -1.0, [0.5]),
    "top_p": (0, 1.5, "1"),
    "top_k": (0.5, -2, "all"),
    "do_sample": (1, "yes"),
    "max_new_tokens": (0, 2.5, {}),
    "eos_token_id": ("</s>", 1.0, True, [1, "a"], {"id": 1}),
    "bad_words_ids": (3, [3], [["a"]]),
    "stop_strings": (3, ["a", 3]),
}


@pytest.mark.parametrize("name", WRONG_SETTINGS)
def test_a_setting_of_generation_of_a_wrong_type_is_refused_by_name(models, name):
    for value in WRONG_SETTINGS[name]:
        write_json(models / "chat" / "generation_config.json", **{name: value})
        told = rf"chat/generation_config.json: {name}=.* is not .*; correct it or leave it out"
        with pytest.raises(UserError, match=told):
            merged(models, ("chat",))
        with pytest.raises(UserError, match=told):
            save_params(models / "copy", SMALL, random_params(SMALL), tokenizer_folder=models / "chat")
        assert not (models.parent / "out").exists() and not (models / "copy").exists()


def test_unknown_settings_and_ids_beyond_the_model_are_left_out_by_name(models, caplog):
    beyond = SMALL.vocab_size
    write_json(
        models / "chat" / "generation_config.json",
        eos_token_id=[3, beyond],
        pad_token_id=beyond,
        bos_token_id=-1,
        suppress_tokens=[1, beyond],
        **{"\x1b[31mmagic": 3, "top_k": 5, "bad_words_ids": [[1], [2, beyond]], "transformers_version": "9"},
    )
    with caplog.at_level("WARNING", logger="absl"):
        _, config, generation = merged(models, ("chat",))
    assert generation == {
        "bos_token_id": 0,
        "eos_token_id": 3,
        "top_k": 5,
        "suppress_tokens": [1],
        "bad_words_ids": [[1]],
    }
    assert (config["eos_token_id"], config["pad_token_id"]) == (3, None)
    for name in ("eos_token_id", "pad_token_id", "suppress_tokens", "bad_words_ids"):
        assert f"{name} has the id {beyond}, and the model has {beyond}; it is left out" in caplog.text
    assert "magic' is no setting that is known here" in caplog.text and "\x1b" not in caplog.text
    assert "version" not in caplog.text and "bos_token_id" not in caplog.text


def test_the_settings_that_are_known_are_those_of_transformers():
    from transformers import GenerationConfig

    from pjrlhf.models.generation import CHECKS, NOTES

    assert set(CHECKS) <= set(vars(GenerationConfig())), "a setting that transformers no longer has"
    sampling = {"temperature", "top_p", "top_k", "do_sample", "max_length", "repetition_penalty", *NOTES}
    assert sampling <= set(CHECKS) | set(NOTES)
