"""Classifiers as reward sources: labels, activations, the mesh, torch, and mistakes."""

import importlib.util
import json

import numpy as np
import pytest
from support.tiny_classifiers import gpt2_folder, words
from support.tiny_llamas import edit, needs_torch, torch

from pjrlhf.data import synthetic
from pjrlhf.errors import UserError
from pjrlhf.judges.judge import JudgeContext, ScoreJudge, judge_from
from pjrlhf.models.classifier import class_logits, load_classifier, read_classifier
from pjrlhf.models.decoder import Decoder
from pjrlhf.rewards import torch_worker
from pjrlhf.rewards.sources import SourceContext, reward_source
from pjrlhf.runtime.classifiers import activated
from pjrlhf.runtime.devices import Devices, MeshSettings
from pjrlhf.runtime.inputs import fingerprints

PROMPTS = ["what is rain ?", "what is a bird ?", "what is air ?"]
ANSWERS = ["it holds air .", "so happy to help ! it can fly .", ""]


@pytest.fixture(scope="module")
def context():
    devices = Devices(MeshSettings(data=2, fsdp=2, tensor=2), 1)
    return SourceContext(lambda: devices, 16)


def source(context, path, **settings):
    return reward_source("P2A", {"kind": "classifier", "path": str(path), **settings}, context)


def expected(folder, rows):
    """Logits of single rows by the decoder on one device."""
    config, params = load_classifier(read_classifier(folder))
    pad = read_classifier(folder).last_token
    return np.concatenate(
        [
            class_logits(Decoder(config), params, np.array([row]), np.ones((1, len(row)), bool), np.array([pad(row)]))
            for row in rows
        ]
    )


def test_rewards_are_the_scores_of_a_label_on_the_mesh(tmp_path, context):
    folder = gpt2_folder(tmp_path / "c", ("bad", "good"))
    found = source(context, folder, label="good")
    assert found.on_all_processes
    rows = found.function.inputs(PROMPTS, ANSWERS)
    logits = expected(folder, [row["input_ids"] for row in rows])
    want = np.exp(logits[:, 1]) / np.exp(logits).sum(1)
    np.testing.assert_allclose(found(PROMPTS, ANSWERS), want, rtol=1e-5)
    for label, column in ((1, 1), ("0", 0)):
        raw = source(context, folder, label=label, activation="raw")(PROMPTS, ANSWERS)
        np.testing.assert_allclose(raw, logits[:, column], rtol=0, atol=1e-5)
    assert len(context.shared) == 1  # one model for all three
    many = source(context, folder, label=1, activation="raw")(PROMPTS * 11, ANSWERS * 11)
    np.testing.assert_allclose(many, np.tile(logits[:, 1], 11), rtol=0, atol=1e-5)
    other = source(context, folder, label=1, activation="raw", batch_size=1, dtype="bfloat16")(PROMPTS, ANSWERS)
    np.testing.assert_allclose(other, logits[:, 1], rtol=0, atol=0.3)


def test_an_input_without_a_token_gets_no_reward(tmp_path, context):
    folder = gpt2_folder(tmp_path / "c")
    found = source(context, folder, template="answer")(PROMPTS, ANSWERS)
    assert np.isfinite(found[:2]).all() and np.isnan(found[2])
    assert np.isnan(source(context, folder, template="answer")(["p"], [""]))


def test_one_label_is_raw_by_default(tmp_path, context, caplog):
    folder = gpt2_folder(tmp_path / "c")
    with caplog.at_level("INFO"):
        found = source(context, folder)
        assert "rewards.P2A: raw of the label 'label 0'" in caplog.text
        assert "the default where the problem is regression; its input is 'chat'" in caplog.text
    raw = found(PROMPTS, ANSWERS)
    squashed = source(context, folder, activation="sigmoid")(PROMPTS, ANSWERS)
    np.testing.assert_allclose(squashed, 1 / (1 + np.exp(-raw)), rtol=1e-5)


def test_a_classifier_judges_on_the_mesh(tmp_path, context):
    spec = {"kind": "classifier", "path": str(gpt2_folder(tmp_path / "c"))}
    judge = judge_from({"kind": "reward", "source": spec}, JudgeContext(ScoreJudge(lambda *_: 0.0), sources=context))
    assert judge.on_all_processes
    scores = reward_source("P2A", spec, context)(PROMPTS, ANSWERS)
    other = reward_source("P2A", spec, context)(PROMPTS, ANSWERS[::-1])
    np.testing.assert_array_equal(judge(PROMPTS, ANSWERS, ANSWERS[::-1], "any"), np.sign(scores - other))


@pytest.mark.parametrize("problem", ["single_label_classification", "multi_label_classification", "regression"])
def test_activations(problem):
    logits = np.random.default_rng(0).normal(0, 3, (5, 3)).astype(np.float32)
    own = logits[:, 1].astype(np.float64)
    softmax = (np.exp(logits) / np.exp(logits).sum(1, keepdims=True))[:, 1]
    sigmoid = 1 / (1 + np.exp(-own))
    p = softmax if problem == "single_label_classification" else sigmoid
    want = {
        "raw": own,
        "sigmoid": sigmoid,
        "softmax": softmax,
        "log_probability": np.log(p),
        "log_odds": np.log(p) - np.log1p(-p),
    }
    for activation, values in want.items():
        np.testing.assert_allclose(activated(logits, 1, activation, problem), values, rtol=1e-5, err_msg=activation)
    two = logits[:, :2]
    np.testing.assert_allclose(
        activated(two, 1, "log_odds", "single_label_classification"), two[:, 1] - two[:, 0], rtol=1e-5
    )
    extreme = np.array([[800.0, -800.0]], np.float32)
    for activation in want:
        assert np.isfinite(activated(extreme, 1, activation, problem)).all()


LABELS = "'bad' (0), 'so-so' (1), 'good' (2)"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, f"has 3 labels; choose one of {LABELS}"),
        ({"label": "great"}, f"has no label 'great'; choose one of {LABELS}"),
        ({"label": 3}, f"has no label 3; choose one of {LABELS}"),
        ({"label": -1}, "has no label -1"),
        ({"label": 1.5}, "rewards.P2A.label: 1.5 is not text or a whole number"),
        ({"label": 1, "activation": "tanh"}, "rewards.P2A.activation: 'tanh' is unknown; choose one of"),
        ({"label": 1, "template": "{question[0]}"}, "rewards.P2A.template: {question[0]} is no field; choose from"),
        (
            {"label": 1, "template": ["{prompt}"] * 3},
            "rewards.P2A.template: is 3 texts; give one text, or the two of a",
        ),
        ({"label": 1, "max_length": 4096}, "rewards.P2A.max_length: 4096 is more than the 512 positions"),
        ({"label": 1, "dtype": "int8"}, "rewards.P2A.dtype: 'int8' is unknown"),
        ({"lable": 1}, "rewards.P2A.lable: no such setting; did you mean rewards.P2A.label?"),
    ],
)
def test_wrong_settings_are_refused_by_name_before_a_run(settings, message, tmp_path):
    folder = gpt2_folder(tmp_path / "c", ("bad", "so-so", "good"))
    with pytest.raises(UserError) as error:
        reward_source("P2A", {"kind": "classifier", "path": str(folder), **settings})
    assert message in str(error.value) and "P2A" in str(error.value) and "\n" not in str(error.value)


def without_tokenizer(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()


@pytest.mark.parametrize(
    ("damage", "settings", "message"),
    [
        (without_tokenizer, {}, "has no vocabulary; copy the tokenizer.json that came with the model"),
        (lambda folder: (folder / "model.safetensors").unlink(), {}, "model.safetensors: no such file"),
        (lambda folder: (folder / "config.json").unlink(), {}, "config.json: no such file"),
        (lambda folder: None, {"activation": "softmax"}, "softmax of the only label"),
        (lambda folder: None, {"path": ""}, "rewards.P2A.path: names no classifier; set it to a Hugging Face folder"),
        (lambda folder: None, {"path": "/away"}, "classifier /away: no such folder"),
    ],
)
def test_folders_that_lack_something_are_refused_by_name(damage, settings, message, tmp_path):
    folder = gpt2_folder(tmp_path / "c")
    damage(folder)
    with pytest.raises(UserError) as error:
        reward_source("P2A", {"kind": "classifier", "path": str(folder), **settings})
    assert message in str(error.value) and "\n" not in str(error.value)


# ---- torch


def bert_like(folder, model_type="distilbert", architecture="DistilBertForSequenceClassification", **sizes):
    """The folder of a model that our decoder does not compute; weights are random where torch is installed."""
    folder.mkdir()
    synthetic.write_tokenizer(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("chat_template")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    config = {"model_type": model_type, "vocab_size": words(), "num_labels": 2, "pad_token_id": 0, **sizes}
    if torch is None:
        (folder / "model.safetensors").write_bytes(b"")
        (folder / "config.json").write_text(json.dumps({**config, "architectures": [architecture]}))
    else:
        import transformers

        torch.manual_seed(0)
        kind = transformers.AutoConfig.for_model(model_type, **{k: x for k, x in config.items() if k != "model_type"})
        transformers.AutoModelForSequenceClassification.from_config(kind).save_pretrained(folder)
    return folder


DISTILBERT = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "max_position_embeddings": 64}
OTHERS = {
    "distilbert": DISTILBERT,
    "deberta-v2": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 64,
    },
    "opt": {
        "hidden_size": 16,
        "word_embed_proj_dim": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "ffn_dim": 24,
        "max_position_embeddings": 64,
    },
}
BART = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 64,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "decoder_start_token_id": 2,
    "num_labels": 3,  # its default, which transformers does not write
}


@needs_torch
@pytest.mark.parametrize("model_type", [*OTHERS, "bart"])
def test_other_architectures_run_in_torch(model_type, tmp_path):
    """The logits of every row by itself, whatever the batches; the process ends with the context."""
    import transformers

    folder = bert_like(tmp_path / "c", model_type, **OTHERS.get(model_type, BART))
    template = "{prompt} {answer} {eos}" if model_type == "bart" else ""
    with_torch = SourceContext(rows=2)
    found = source(with_torch, folder, label=1, activation="raw", template=template)
    assert not found.on_all_processes
    got = found(PROMPTS, ANSWERS)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        rows = found.function.inputs(PROMPTS, ANSWERS)
        want = [model(torch.tensor([row["input_ids"]])).logits[0, 1].item() for row in rows]
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)
    (worker,) = with_torch.shared.values()
    process = worker._process
    assert process.poll() is None
    np.testing.assert_array_equal(found(PROMPTS, ANSWERS), got)
    assert worker._process is process  # started once
    with_torch.close()
    assert process.poll() is not None


@needs_torch
def test_a_crash_of_the_process_is_one_line_that_names_the_model(tmp_path):
    folder = bert_like(tmp_path / "c", **DISTILBERT)
    with_torch = SourceContext(rows=2)
    found = source(with_torch, folder, label=1)
    found(PROMPTS, ANSWERS)
    (worker,) = with_torch.shared.values()
    worker._process.kill()
    with pytest.raises(UserError) as error:
        found(PROMPTS, ANSWERS)
    assert f"classifier {folder}: its torch process ended with status -9" in str(error.value)
    assert "\n" not in str(error.value) and np.isfinite(found(PROMPTS, ANSWERS)).all()  # it starts again
    with_torch.close()


@needs_torch
def test_weights_that_transformers_would_make_up_are_refused(tmp_path):
    from safetensors.numpy import load_file, save_file

    folder = bert_like(tmp_path / "c", **DISTILBERT)
    weights = load_file(folder / "model.safetensors")
    del weights["classifier.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"fails in torch \(ValueError: the weights lack classifier.weight\)"):
        source(SourceContext(), folder, label=1)(PROMPTS, ANSWERS)


def test_a_process_that_does_not_start_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_worker.sys, "executable", "/bin/false")
    worker = torch_worker.TorchWorker(tmp_path, "float32", "cpu", 8, "classifier")
    with pytest.raises(UserError, match=r"its torch process ended with status 1 \(without a word\); it may need more"):
        worker([{"input_ids": [1]}])
    worker.close()


def test_without_torch_the_message_names_the_extra(tmp_path, monkeypatch):
    folder = bert_like(tmp_path / "c", **DISTILBERT)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as error:
        reward_source("P2A", {"kind": "classifier", "path": str(folder), "label": 1})
    assert "DistilBertForSequenceClassification runs in torch, which is not installed; pip install" in str(error.value)
    assert "extra torch" in str(error.value)
    causal = json.loads((folder / "config.json").read_text()) | {"architectures": ["DistilBertForMaskedLM"]}
    (folder / "config.json").write_text(json.dumps(causal))
    with pytest.raises(UserError, match="has no score head, its class is DistilBertForMaskedLM"):
        reward_source("P2A", {"kind": "classifier", "path": str(folder), "label": 1})


def test_the_padding_of_a_family_is_not_that_of_the_policy(tmp_path, context):
    """Ids come from the classifier's own tokenizer: the padding token of its config may be any word."""
    folder = gpt2_folder(tmp_path / "c")
    before = source(context, folder)(PROMPTS, ANSWERS)
    word = source(context, folder).function.inputs(PROMPTS[:1], ANSWERS[:1])[0]["input_ids"][-1]
    context.shared.clear()
    edit(folder, pad_token_id=word)
    after = source(context, folder)(PROMPTS, ANSWERS)
    assert abs(before[0] - after[0]) > 1e-3


def test_the_files_of_a_classifier_are_inputs_of_the_run(tmp_path):
    folder, workdir = gpt2_folder(tmp_path / "c"), tmp_path / "run"
    config = {
        "rewards": {"P2A": {"kind": "classifier", "path": str(folder), "template": "/" + "{prompt} {answer}" * 40}}
    }

    def found():
        return fingerprints(config, workdir)

    before = found()
    assert list(before) == ["rewards.P2A.path"] and before == found()
    for name in ("model.safetensors", "tokenizer_config.json", "config.json"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content + b" ")
        assert found() != before, name
        (folder / name).write_bytes(content)
    (folder / "README.md").write_text("new")
    assert found() == before
