"""Features of answers by the frozen base, computed once and kept in the run directory by the content of the answers."""

import functools
import hashlib
import pathlib
from collections.abc import Sequence

import jax
import numpy as np
from absl import logging

from pjrlhf.data.messages import Prompt
from pjrlhf.data.token_table import TokenRow, cut_left
from pjrlhf.errors import UserError
from pjrlhf.models.storage import load_tree, save_tree
from pjrlhf.parallel.processes import broadcast_from_zero
from pjrlhf.rollout.features import KEY_BYTES, STATES, answer_key, answer_states, prompt_states
from pjrlhf.rollout.reference import computation
from pjrlhf.runtime.run import Run
from pjrlhf.training.workdir import disk_errors

FOLDER = "features"  # in the run directory
_VERSION = 1  # of the computation; raise it where the same answer would have other features
BLOCK = 4096  # answers between two saves


def features_of(run: Run, answers: Sequence[TokenRow]) -> np.ndarray:
    """Features of N answers {"prompt", "completion"}, float32 [N, 2, D] in the order of `STATES`.

    The file <workdir>/features/<base and computation>.safetensors keeps them. Answers that it has are not computed
    again, whichever stage, split or seed asks for them.

    Raises:
      UserError: the base gives numbers that are not finite, or the file cannot be written.
    """
    backbone = run.workspace.backbone
    path = run.workdir.path / FOLDER / f"{_name(run)}.safetensors"
    keys = [answer_key(row) for row in answers]
    known, found = _kept(path, backbone.model.config.hidden_size)
    place = {key: i for i, key in enumerate(known)}
    missing = list({key: row for key, row in zip(keys, answers, strict=True) if key not in place}.items())
    score = functools.partial(jax.jit(answer_states), backbone)
    for start in range(0, len(missing), BLOCK):
        block = missing[start : start + BLOCK]
        rows = [row for _, row in block]
        lengths = [len(row["prompt"]) + len(row["completion"]) for row in rows]
        name = f"features of answers {start + 1} to {start + len(block)} of {len(missing)}"
        new = run.scorer()(name, rows, run.text.pad_completions, score, lengths)
        if bad := int((~np.isfinite(new)).any((1, 2)).sum()):
            raise UserError(
                f"features: the base gives states that are not finite for {bad} of {len(new)} answers; check its "
                "weights and --config.model.dtype"
            )
        known, found = [*known, *(key for key, _ in block)], np.concatenate([found, new])
        with disk_errors(path):
            path.parent.mkdir(exist_ok=True)
            bits = np.frombuffer(b"".join(known), np.uint8).reshape(-1, KEY_BYTES)
            save_tree(path, {"keys": bits, "features": found})
    place = {key: i for i, key in enumerate(known)}
    return found[[place[key] for key in keys]]


def prompt_features(run: Run, prompts: Sequence[Prompt]) -> np.ndarray:
    """The mean of the base's states over each of N prompts, float32 [N, D]; of a long prompt its end counts."""
    backbone, limit, tokenizer = run.workspace.backbone, run.text.lengths.prompt, run.workspace.tokenizer
    ids = [cut_left(run.text.prompt_ids(prompt), limit, tokenizer.bos_id) for prompt in prompts]
    score = functools.partial(jax.jit(prompt_states), backbone)
    return run.scorer()(f"features of {len(ids)} prompts", ids, run.text.pad_prompts, score, list(map(len, ids)))


def _name(run: Run) -> str:
    """Hex digest of all that the features of an answer depend on beside its token ids."""
    workspace = run.workspace
    dtype = jax.tree.leaves(workspace.backbone.base)[0].dtype
    text = computation(_VERSION, workspace.base_hash, dtype, workspace.backbone.model)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _kept(path: pathlib.Path, width: int) -> tuple[list[bytes], np.ndarray]:
    """The keys and features of a file; none where there is no such file, or a damaged one."""
    bits, found = np.zeros((0, KEY_BYTES), np.uint8), np.zeros((0, len(STATES), width), np.float32)
    if path.is_file():
        try:
            tree, _ = load_tree(path)
            bits, found = np.asarray(tree["keys"]), np.asarray(tree["features"])
        except (UserError, KeyError) as error:
            logging.warning("%s: not a whole file of features (%s); computing them again", path, error)
    # Every process computes the same rows, whatever its own disk holds.
    count = int(broadcast_from_zero(np.array(len(bits))))
    if count != len(bits):
        bits, found = np.zeros((count, KEY_BYTES), np.uint8), np.zeros((count, len(STATES), width), np.float32)
    bits, found = broadcast_from_zero(bits), broadcast_from_zero(found)
    return [row.tobytes() for row in bits], found
