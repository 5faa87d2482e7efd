"""Models of all families, drawn from the names of their tensors: what golden/families.json does not have to hold.

Nothing here is code under test, nor needs torch.
"""

import functools
import json
import pathlib
import zlib

import numpy as np

LENGTH = 320


def draw(name, shape):
    """The tensor of that name: float32, evenly in [-1, 1], matrices in [-0.5, 0.5]."""
    spread = 0.5 if len(shape) > 1 else 1.0
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return (spread * (2 * rng.random(shape) - 1)).astype(np.float32)


def inputs(vocab_size):
    """Tokens and valid [2, 320], the second row left-padded by 41, and the positions that are compared."""
    tokens = np.random.default_rng(0).integers(0, vocab_size, (2, LENGTH))
    return tokens, np.arange(LENGTH) >= np.array([[0], [41]]), np.array([41, 100, 229, LENGTH - 1])


@functools.cache
def golden_families():
    """model_type -> {"config", "shapes" of the tensors, "logits" [2, 4, V] at the positions of `inputs`}."""
    return json.loads((pathlib.Path(__file__).parents[1] / "golden" / "families.json").read_text())


def weights_of(model_type):
    return {name: draw(name, shape) for name, shape in golden_families()[model_type]["shapes"].items()}


def save_family(folder, model_type, spread=0.3, **changes):
    """A model of a family with the tokenizer of the synthetic environment, as a Hugging Face folder; weights are those
    of `draw` times `spread`, norms excepted.
    """
    from pjrlhf.data import synthetic
    from pjrlhf.models.folders import write_tensors
    from pjrlhf.models.huggingface import copy_tokenizer

    entry, size = golden_families()[model_type], len(synthetic.vocabulary())
    config = entry["config"] | {"vocab_size": size, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0} | changes
    tensors = []
    for name, shape in entry["shapes"].items():
        words = any(part in name for part in ("embed_tokens", "wte", "embed_in", "embed_out", "lm_head"))
        shape = [size, *shape[1:]] if words else shape
        tensors.append((name, draw(name, shape) * (1.0 if len(shape) == 1 else spread)))
    folder.mkdir(parents=True)
    write_tensors(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(config))
    synthetic.write_tokenizer(folder.parent / "tokenizer")
    copy_tokenizer(folder.parent / "tokenizer", folder)
    return folder
