"""Folders of models and adapters with every file missing, cut short, altered or lying: success, or one line."""

import json
import random
import shutil

import jax
import numpy as np
import pytest
from support.tiny_llamas import SMALL, random_params
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE

from pjrlhf.errors import UserError
from pjrlhf.export import merge
from pjrlhf.export.merge import MergeSettings
from pjrlhf.language_model import load_model
from pjrlhf.models.huggingface import fingerprint, save_params
from pjrlhf.models.peft import save_peft

CASES = 1500
VALUES = [
    None,
    True,
    -1,
    0,
    1,
    3.5,
    10**6,
    10**30,
    10**400,
    float("nan"),
    "",
    "x",
    "../..",
    [],
    [1],
    ["x"],
    {},
    {"a": 1},
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model in shards with a tokenizer, and an adapter of it."""
    root = tmp_path_factory.mktemp("fuzz")
    save_params(root / "model", SMALL, random_params(SMALL), token_ids={"eos_token_id": 3}, max_shard_bytes=2000)
    tokenizer = Tokenizer(BPE({"a": 0, "b": 1, "ab": 2, "</s>": 3}, [("a", "b")], unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(root / "model" / "tokenizer.json"))
    (root / "model" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "chat_template": "{{ 1 }}"}))
    pair = {"a": np.ones((2, 8, 3), np.float32), "b": np.ones((2, 3, 12), np.float32)}
    save_peft(root / "lora", {"layers": {"attention": {"query": pair}}}, 3, 6.0, "base")
    return root


def places(value, at=()):
    """All places in a JSON value, as tuples of keys."""
    found = [at]
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, below in items:
            found += places(below, (*at, key))
    return found


def lie(content, rng):
    """A JSON text with one value replaced or removed."""
    value = json.loads(content)
    *above, last = rng.choice(places(value)[1:])
    holder = value
    for key in above:
        holder = holder[key]
    if rng.random() < 0.2:
        del holder[last]
    else:
        holder[last] = rng.choice(VALUES)
    return json.dumps(value).encode()


def damage(file, rng):
    """Changes a file; returns what was done."""
    content = file.read_bytes()
    kinds = ["missing", "empty", "short", "flipped", "folder", "nonsense"] + ["lie"] * 6 * (file.suffix == ".json")
    kind = rng.choice(kinds)
    file.unlink()
    if kind == "folder":
        file.mkdir()
    elif kind != "missing":
        flipped = bytearray(content)
        flipped[rng.randrange(min(400, len(content)))] ^= 1 << rng.randrange(8)
        makers = {
            "empty": lambda: b"",
            "short": lambda: content[: rng.randrange(len(content))],
            "flipped": lambda: bytes(flipped),
            "nonsense": lambda: b'[{"a": ' * 2000,
            "lie": lambda: lie(content, rng),
        }
        file.write_bytes(makers[kind]())
    return kind


@pytest.mark.slow
def test_altered_folders_end_in_success_or_one_line(folders, tmp_path):
    counts = {"refused": 0, "read": 0}
    for case in range(CASES):
        rng = random.Random(case)
        model, lora = (tmp_path / name for name in ("model", "lora"))
        for folder in (model, lora):
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(folders / folder.name, folder)
        file = rng.choice(sorted([*model.iterdir(), *lora.iterdir()]))
        kind = damage(file, rng)
        after = file.read_bytes() if file.is_file() else None
        output = tmp_path / "out"
        settings = {"base": str(model), "ingredients": (str(lora),), "weights": (1.0,), "output": str(output)}
        try:
            fingerprint(model)
            load_model(model)
            merge.merge(MergeSettings(**settings))
            counts["read"] += 1
        except UserError as error:
            assert "\n" not in str(error), error
            assert not output.exists()
            counts["refused"] += 1
        except Exception as error:
            raise AssertionError(f"case {case}: {file.name}, {kind}: {after}") from error
        shutil.rmtree(output, ignore_errors=True)
    jax.clear_caches()  # of as many shapes
    print(counts)
    assert counts["refused"] > CASES / 4
