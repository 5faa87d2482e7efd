"""Exports loaded by the libraries they are made for; skipped where those are not installed."""

import re

import jax
import numpy as np
import pytest
from support import persons
from support.drawn_models import golden_families, save_family
from support.exporting import MIX, NAMES, export, mix_flag
from support.small_policies import noise

from pjrlhf.export.card import CARD
from pjrlhf.export.command import Wish
from pjrlhf.export.command import export as write
from pjrlhf.export.soup import Source
from pjrlhf.models.adapters import AdapterConfig, init_bank
from pjrlhf.models.huggingface import load_params, read_config
from pjrlhf.models.peft import save_peft
from pjrlhf.serving.opening import open_folders

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

QUESTION, ANSWER = "what is rain ?", " it is wet ."
FUSED = ("gpt2", "gpt_neox")


def some(*quick):
    return [x if x in quick else pytest.param(x, marks=pytest.mark.slow) for x in golden_families()]


def write_models(root, model_type):
    """A base of a family and two adapters of it, as folders."""
    base = save_family(root / "base", model_type)
    folders = {}
    for i, name in enumerate(NAMES):
        bank = noise(init_bank(load_params(base), AdapterConfig(rank=3), 1, jax.random.key(i)), i, 0.2)
        one = jax.tree.map(lambda x: np.asarray(x[0]), bank)
        folders[name] = root / name
        save_peft(folders[name], one, 3, 6.0, str(base), model_type, read_config(base).head_dim)
    return base, folders


def ours(models, mix):
    """Log-prob of the answer, and the ids of prompt and answer."""
    catalogue = open_folders(str(models[0]), {name: str(folder) for name, folder in models[1].items()})
    tokenizer = catalogue.model.tokenizer
    prompt, (answer,) = tokenizer.encode_answers(QUESTION, [ANSWER])
    score = catalogue.model.score([QUESTION], [ANSWER], catalogue.bank, [mix.get(name, 0.0) for name in NAMES])
    return float(score[0]), prompt, answer.ids


def theirs(model, prompt, answer):
    """The log-prob of an answer by a torch model."""
    with torch.no_grad():
        logps = model.eval()(torch.tensor([[*prompt, *answer]])).logits[0].log_softmax(-1)
    return sum(float(logps[len(prompt) + i - 1, token]) for i, token in enumerate(answer))


def tokenizer_of_card(folder):
    """The tokenizer of an exported folder, loaded as its card says."""
    (name,) = re.findall(r"tokenizer = (\w+)\.from_pretrained", (folder / CARD).read_text())
    return getattr(transformers, name).from_pretrained(folder)


@pytest.mark.parametrize("model_type", some("llama", *FUSED))
def test_peft_loads_a_soup(model_type, tmp_path):
    peft = pytest.importorskip("peft")
    models = write_models(tmp_path, model_type)
    want, prompt, answer = ours(models, MIX)
    base = {"dtype": torch.float32}
    plain = theirs(transformers.AutoModelForCausalLM.from_pretrained(models[0], **base), prompt, answer)
    assert abs(plain - want) > 1e-3  # the soup matters
    folder = export(models, tmp_path / "soup", "peft", mix_flag(MIX))
    got = theirs(peft.AutoPeftModelForCausalLM.from_pretrained(folder, **base), prompt, answer)
    np.testing.assert_allclose(got, want, atol=1e-4)
    whole = export(models, tmp_path / "all", "peft")
    one = theirs(peft.AutoPeftModelForCausalLM.from_pretrained(whole / "P2B", **base), prompt, answer)
    np.testing.assert_allclose(one, ours(models, {"P2B": 1.0})[0], atol=1e-4)
    if model_type in FUSED:  # a fused projection has one rank of the whole
        short = export(models, tmp_path / "short", "peft", mix_flag(MIX), "--rank=500")
        got = theirs(peft.AutoPeftModelForCausalLM.from_pretrained(short, **base), prompt, answer)
        np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize("model_type", some("llama", "gpt2"))
def test_transformers_loads_a_merged_soup(model_type, tmp_path):
    models = write_models(tmp_path, model_type)
    want, prompt, answer = ours(models, MIX)
    folder = export(models, tmp_path / "merged", "merged", mix_flag(MIX))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    np.testing.assert_allclose(theirs(model, prompt, answer), want, atol=1e-4)
    tokenizer = tokenizer_of_card(folder)
    assert tokenizer(QUESTION)["input_ids"] == prompt


@pytest.mark.parametrize("model_type", some("llama", "gpt2"))
def test_transformers_answers_every_person(model_type, tmp_path):
    capped = golden_families()[model_type]["config"].get("final_logit_softcapping")
    base = save_family(tmp_path / "base", model_type, **({"final_logit_softcapping": 30.0} if capped else {}))
    catalogue = persons.catalogue(base)
    source = Source(catalogue, {name: f"run/{name}" for name in catalogue.names}, persons.NAMES)
    write(source, Wish(kind="vocabulary", output=tmp_path / "people"))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "people", dtype=torch.float32)
    tokenizer = tokenizer_of_card(tmp_path / "people")
    message = [{"role": "user", "content": QUESTION}]
    answer = [*tokenizer(ANSWER, add_special_tokens=False)["input_ids"], 2]
    for name in (None, "unknown", *persons.NAMES):
        options = {} if name is None else {"user": name}
        ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False, **options)
        want = persons.score(catalogue, name, message, ANSWER.strip())
        np.testing.assert_allclose(theirs(model, ids, answer), want, atol=1e-4)
        with torch.no_grad():
            chances = model(torch.tensor([ids])).logits[0].softmax(-1)
        assert float(chances[:, catalogue.model.tokenizer.rows :].sum(-1).max()) < (1e-10 if capped else 1e-20)
    drawn = model.generate(
        torch.tensor([ids] * 4), do_sample=True, max_new_tokens=20, temperature=1.0 if capped else 5.0
    )
    assert int(drawn[:, len(ids) :].max()) < catalogue.model.tokenizer.rows
