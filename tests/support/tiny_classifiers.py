"""Folders of tiny sequence classifiers with random weights, of every family of the decoder and of others."""

import functools
import json
import pathlib

import numpy as np

from pjrlhf.data import synthetic
from pjrlhf.models.families import FAMILIES
from support.drawn_models import draw, golden_families, weights_of
from support.tiny_llamas import write

PAD = 1


def config_of(model_type, labels=3, **changes):
    """config.json of a classifier of a family, the size of its golden."""
    config = {key: x for key, x in golden_families()[model_type]["config"].items() if key != "architectures"}
    names = {str(i): f"label {i}" for i in range(labels)} if isinstance(labels, int) else dict(enumerate(labels))
    architecture = FAMILIES[model_type].architecture
    for ending in ("ForCausalLM", "LMHeadModel"):
        architecture = architecture.removesuffix(ending)
    architecture = "Gemma3Text" if model_type == "gemma3_text" else architecture
    return {
        **config,
        "architectures": [f"{architecture}ForSequenceClassification"],
        "id2label": names,
        "label2id": {name: i for i, name in names.items()},
        "pad_token_id": PAD,
        **changes,
    }


def family_folder(folder, model_type, labels=3, **changes):
    """A classifier of a family with the weights of its golden and a drawn head."""
    config = config_of(model_type, labels, **changes)
    head = FAMILIES[model_type].modules["head"]
    weights = {name: x for name, x in weights_of(model_type).items() if not name.startswith(f"{head}.")}
    width = config.get("hidden_size", config.get("n_embd"))
    weights["score.weight"] = draw("score.weight", (len(config["id2label"]), width))
    return write(folder, config, weights)


@functools.cache
def words():
    return len(synthetic.vocabulary(synthetic.PREFERENCES))


def gpt2_folder(folder, labels=1, seed=0, chat=True, **changes):
    """A classifier of GPT-2 shape that reads the words of the synthetic environment, with its tokenizer."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = config_of("gpt2", labels, vocab_size=words(), **changes)
    rng = np.random.default_rng(seed)
    shapes = golden_families()["gpt2"]["shapes"]
    weights = {name: rng.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items() if name[:2] != "lm"}
    weights["transformer.wte.weight"] = rng.normal(0, 0.3, (words(), 24)).astype(np.float32)
    weights["score.weight"] = rng.normal(0, 1, (len(config["id2label"]), 24)).astype(np.float32)
    synthetic.write_tokenizer(folder)
    if not chat:
        file = folder / "tokenizer_config.json"
        settings = json.loads(file.read_text())
        settings.pop("chat_template")
        file.write_text(json.dumps(settings))
    return write(folder, config, weights)
