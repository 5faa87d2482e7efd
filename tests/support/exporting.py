"""A base with two adapters as folders, and the command that exports them."""

import jax
import numpy as np

from pjrlhf import cli
from pjrlhf.models.adapters import AdapterConfig, init_bank
from pjrlhf.models.huggingface import load_params, read_config, save_params
from pjrlhf.models.peft import save_peft
from pjrlhf.serving.opening import open_folders
from support import tiny_users
from support.small_policies import noise

NAMES = ("P1A", "P2B")
QUESTION, ANSWER = "what is rain ?", "it is wet ."
MIX = {"P1A": 0.7, "P2B": -0.4}


def write_models(root):
    """A base and two adapters of unlike rank, as folders; arguments of the command."""
    base = tiny_users.save_base(root / "base")
    config = read_config(base)
    save_params(root / "sharp", config, noise(load_params(base), 5, 0.3), tokenizer_folder=base,
                token_ids={"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})  # fmt: skip
    base = root / "sharp"
    folders = {}
    for i, (name, rank) in enumerate(zip(NAMES, (2, 3), strict=True)):
        bank = noise(init_bank(load_params(base), AdapterConfig(rank=rank), 1, jax.random.key(i)), i, 0.3)
        folders[name] = root / name
        save_peft(folders[name], jax.tree.map(lambda x: np.asarray(x[0]), bank), rank, 4.0, str(base), "llama", 8)
    return base, folders


def arguments(models):
    base, folders = models
    return ["--model", str(base), "--ingredients", *(f"{name}={folder}" for name, folder in folders.items())]


def export(models, output, kind, *flags):
    cli.main(["export", *arguments(models), "--for", kind, "--output", str(output), *flags])
    return output


def mix_flag(mix):
    return "--mix=" + ",".join(f"{name}={weight}" for name, weight in mix.items())


def ours(models, mix, prompts=(QUESTION,), answers=(ANSWER,)):
    catalogue = open_folders(str(models[0]), {name: str(folder) for name, folder in models[1].items()})
    return catalogue.model.score(prompts, answers, catalogue.bank, [mix.get(name, 0.0) for name in NAMES])
