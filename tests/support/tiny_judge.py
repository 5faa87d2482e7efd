"""A tiny model folder as a judge: a random Llama with a byte-level tokenizer; and a run whose comparisons it labels."""

import dataclasses
import json

import jax

from pjrlhf.data import bpe
from pjrlhf.models.huggingface import save_params
from support import tiny, tiny_llamas

CONFIG = dataclasses.replace(tiny_llamas.SMALL, vocab_size=300, max_length=1024)


def make(folder, chat=True):
    """Writes the model into `folder`/model, and returns this path.

    Args:
      chat: whether its tokenizer has a chat template.
    """
    bpe.write_tokenizer(folder, ["Answer: A or B", "the response", "request"], CONFIG.vocab_size)
    params = jax.tree.map(lambda x: 0.5 * x, tiny_llamas.random_params(CONFIG))
    save_params(folder / "model", CONFIG, params, tokenizer_folder=folder)
    if not chat:
        file = folder / "model" / "tokenizer_config.json"
        raw = {key: value for key, value in json.loads(file.read_text()).items() if key != "chat_template"}
        file.write_text(json.dumps(raw))
    return folder / "model"


def settings(path, base_url, **changes):
    """The tiny config with pairs of a chat model at `base_url`, labelled by the model folder `path`."""
    config = tiny.settings(stages=("sft", "comparisons"), comparisons__pairs=12, **changes)
    with config.ignore_type():
        config.comparisons.judge = {"kind": "model", "path": path, "criteria": {"helpful": "It helps."}}
        config.comparisons.sampler = {"kind": "chat", "model": "strong", "base_url": base_url}
    return config
