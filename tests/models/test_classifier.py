"""Sequence classifiers: parity with `transformers`, on one device and on several, and folders that are none."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.tiny_classifiers import PAD, family_folder
from support.tiny_llamas import change_weights, edit, needs_torch, torch, write

from pjrlhf.data.batching import pad_right
from pjrlhf.errors import UserError
from pjrlhf.models.classifier import class_logits, load_classifier, read_classifier
from pjrlhf.models.decoder import Decoder
from pjrlhf.models.families import FAMILIES
from pjrlhf.parallel.mesh import batch_sharding, leaf_sharding, make_mesh, shard_batch

# One ends with the padding token, one with several, one holds it in the middle, and one is nothing else.
ENDINGS = ([], [PAD], [PAD, PAD], [PAD, 7])


def texts():
    rng = np.random.default_rng(0)
    rows = [rng.integers(3, 40, n).tolist() for n in (30, 7, 19, 4, 1, 26)]
    return [*(row + end for row, end in zip(rows, [*ENDINGS, [], []], strict=True)), [PAD, PAD], [5]]


def logits(folder, rows, mesh=None):
    """Logits [B, labels] of right-padded rows by our decoder."""
    found = read_classifier(folder)
    place = None if mesh is None else functools.partial(leaf_sharding, mesh)
    config, params = load_classifier(found, place=place)
    model = Decoder(config, batch_sharding=batch_sharding(mesh) if mesh else None)
    tokens, valid = pad_right(rows, max(map(len, rows)), 0)
    batch = tokens, valid, np.array([found.last_token(row) for row in rows], np.int32)
    batch = batch if mesh is None else shard_batch(mesh, batch)
    return np.asarray(class_logits(model, params, *map(jnp.asarray, batch)))


def torch_logits(folder, rows):
    import transformers

    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    tokens, valid = pad_right(rows, max(map(len, rows)), PAD)
    with torch.no_grad():
        return model(torch.tensor(tokens).long(), attention_mask=torch.tensor(valid).long()).logits.numpy()


@needs_torch
@pytest.mark.parametrize("model_type", FAMILIES)
def test_logits_equal_transformers(model_type, tmp_path):
    """A padded batch; windows of 24 are shorter than the longest text."""
    folder = family_folder(tmp_path / "in", model_type)
    got, want = logits(folder, texts()), torch_logits(folder, texts())
    assert got.shape == (len(texts()), 3) and np.abs(want).max() > 0.1
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "model_type", [pytest.param(x, marks=() if x == "gpt2" else pytest.mark.slow) for x in FAMILIES]
)
def test_logits_are_the_same_on_eight_devices_and_in_any_batch(model_type, tmp_path):
    folder, rows = family_folder(tmp_path / "in", model_type), texts()
    want = logits(folder, rows)
    split = logits(folder, rows, make_mesh({"data": 2, "fsdp": 2, "tensor": 2}))
    np.testing.assert_allclose(split, want, rtol=0, atol=1e-5)
    for i in (1, 6):
        np.testing.assert_allclose(logits(folder, rows[i : i + 1])[0], want[i], rtol=0, atol=1e-5)


def test_the_last_token_is_the_rightmost_that_is_not_padding(tmp_path):
    found = read_classifier(family_folder(tmp_path / "in", "gpt2"))
    assert [found.last_token(row) for row in texts()] == [29, 6, 18, 5, 0, 25, 0, 0]
    without = read_classifier(family_folder(tmp_path / "none", "gpt2", pad_token_id=None))
    assert without.pad_id is None and without.last_token([5, PAD, PAD]) == 2


def test_a_head_of_a_language_model_that_was_kept_is_not_read(tmp_path):
    folder = family_folder(tmp_path / "in", "llama")
    want = logits(folder, texts())
    change_weights(lambda weights: weights.update({"lm_head.weight": np.full((40, 16), np.nan, np.float32)}))(folder)
    np.testing.assert_array_equal(logits(folder, texts()), want)


@pytest.mark.parametrize(
    ("changes", "labels", "problem"),
    [
        ({"id2label": {"0": "good"}}, ("good",), "regression"),
        ({}, ("label 0", "label 1", "label 2"), "single_label_classification"),
        (
            {"problem_type": "multi_label_classification"},
            ("label 0", "label 1", "label 2"),
            "multi_label_classification",
        ),
        ({"id2label": None, "num_labels": 2}, ("LABEL_0", "LABEL_1"), "single_label_classification"),
        ({"id2label": {"1": "b", "0": "a"}, "problem_type": "regression"}, ("a", "b"), "regression"),
    ],
)
def test_labels_and_what_they_are(changes, labels, problem, tmp_path):
    folder = family_folder(tmp_path / "in", "gpt2")
    edit(folder, label2id=None, **changes)
    weights = load_file(folder / "model.safetensors")
    weights["score.weight"] = np.zeros((len(labels), 24), np.float32)
    save_file(weights, folder / "model.safetensors")
    found = read_classifier(folder)
    assert (found.labels, found.problem) == (labels, problem)


def test_positions_that_start_after_the_padding_token(tmp_path):
    config = {"model_type": "roberta", "architectures": ["RobertaForSequenceClassification"], "pad_token_id": 1}
    write(tmp_path / "c", {**config, "max_position_embeddings": 514}, {"x": np.zeros(1, np.float32)})
    assert read_classifier(tmp_path / "c").max_length == 512


def no_head(folder):
    change_weights(lambda weights: weights.pop("score.weight"))(folder)


def causal(folder):
    no_head(folder)
    edit(folder, architectures=["GPT2LMHeadModel"])


def other_head(folder):
    change_weights(lambda weights: weights.update({"score.weight": np.zeros((2, 24), np.float32)}))(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (causal, "has no score head, its class is GPT2LMHeadModel; name the folder of a *ForSequenceClassification"),
        (no_head, "has no score head, its class is GPT2ForSequenceClassification"),
        (
            other_head,
            "its head has 2 outputs and config.json 3 labels (label 0, label 1, label 2); use the config.json",
        ),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors: no such file; name a folder in"),
        (lambda folder: (folder / "config.json").unlink(), "config.json: no such file"),
        (lambda folder: edit(folder, model_type="own"), "is no classifier that transformers can read"),
        (lambda folder: edit(folder, model_type="own", auto_map={"AutoConfig": "a.B"}), "whose code it has itself"),
        (lambda folder: edit(folder, id2label={"0": "a", "2": "b"}), "id2label has the ids [0, 2]; number the labels"),
        (lambda folder: edit(folder, id2label=["a"]), "is no classifier that transformers can read"),
        (lambda folder: edit(folder, quantization_config={"bits": 4}), "quantization_config is not supported"),
        (
            lambda folder: edit(folder, model_type="bert", architectures=["BertForMaskedLM"], id2label=None),
            "has no score head, its class is BertForMaskedLM",
        ),
    ],
)
def test_a_folder_that_is_no_classifier_is_refused_by_name(damage, message, tmp_path):
    folder = family_folder(tmp_path / "in", "gpt2")
    damage(folder)
    with pytest.raises(UserError) as error:
        read_classifier(folder)
    assert message in str(error.value) and str(folder) in str(error.value) and "\n" not in str(error.value)


def test_no_such_folder(tmp_path):
    with pytest.raises(UserError, match=r"classifier .*away: no such folder; name one with config.json"):
        read_classifier(tmp_path / "away")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("score.bias", np.zeros(3, np.float32), "score.bias in the weights does not belong to the model"),
        ("score.weight", np.full((3, 24), np.nan, np.float32), "score.weight of shape (3, 24) holds no finite weights"),
        ("score.weight", np.zeros((3, 8), np.float32), "score.weight of shape (3, 8) holds no finite weights of 3"),
    ],
)
def test_wrong_weights_are_refused_by_name(name, value, message, tmp_path):
    folder = family_folder(tmp_path / "in", "gpt2")
    change_weights(lambda weights: weights.update({name: value}))(folder)
    with pytest.raises(UserError) as error:
        load_classifier(read_classifier(folder))
    assert message in str(error.value)


def test_parameters_are_split_like_those_of_every_model(tmp_path):
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    _, params = load_classifier(
        read_classifier(family_folder(tmp_path / "in", "llama")), jnp.bfloat16, functools.partial(leaf_sharding, mesh)
    )
    kernel = params["decoder"]["layers"]["mlp"]["up"]["kernel"]
    assert kernel.dtype == jnp.bfloat16 and kernel.addressable_shards[0].data.size == kernel.size // 8
    assert "head" not in params["decoder"] and len(params["score"].sharding.device_set) == jax.device_count()
