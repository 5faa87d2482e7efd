"""Features of answers and prompts by the frozen base, computed once and kept in the run directory by their content."""

import functools
import hashlib
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from pjrlhf.data.messages import Prompt
from pjrlhf.data.token_table import TokenRow, cut_left
from pjrlhf.errors import UserError, described
from pjrlhf.models.storage import load_tree, save_tree
from pjrlhf.parallel.processes import broadcast_from_zero
from pjrlhf.registry import load
from pjrlhf.rewards.calls import GIVEN, call, missing_parameter
from pjrlhf.rollout.features import KEY_BYTES, STATES, answer_key, answer_states, prompt_states
from pjrlhf.rollout.reference import computation
from pjrlhf.runtime.run import Run
from pjrlhf.training.workdir import disk_errors

FOLDER = "features"  # in the run directory
_VERSION = 1  # of the computation; raise it where the same answer would have other features
BLOCK = 4096  # rows between two saves


def features_of(run: Run, answers: Sequence[TokenRow]) -> np.ndarray:
    """Features of N answers {"prompt", "completion"}, float32 [N, 2, D] in the order of `STATES`.

    The file <workdir>/features/<base and computation>.safetensors keeps them. Answers that it has are not computed
    again, whichever stage, split or seed asks for them.

    Raises:
      UserError: the base gives numbers that are not finite, or the file cannot be written.
    """
    lengths = [len(row["prompt"]) + len(row["completion"]) for row in answers]
    shape = (len(STATES), run.workspace.backbone.model.config.hidden_size)
    keys = [answer_key(row) for row in answers]
    return _features(run, "answers", keys, answers, lengths, run.text.pad_completions, answer_states, shape)


def prompt_features(run: Run, prompts: Sequence[Prompt]) -> np.ndarray:
    """The mean of the base's states over each of N prompts, float32 [N, D]; of a long prompt its end counts.

    Kept as those of answers are, in <workdir>/features/prompts-<base and computation>.safetensors.

    Raises:
      UserError: as `features_of`.
    """
    limit, tokenizer = run.text.lengths.prompt, run.workspace.tokenizer
    ids = [cut_left(run.text.prompt_ids(prompt), limit, tokenizer.bos_id) for prompt in prompts]
    keys = [answer_key({"prompt": one, "completion": ()}) for one in ids]
    shape = (run.workspace.backbone.model.config.hidden_size,)
    return _features(run, "prompts", keys, ids, list(map(len, ids)), run.text.pad_prompts, prompt_states, shape)


def encoder(spec: str) -> Callable[..., Any]:
    """The function "package.module:name" or "path/to/file.py:name" of prompts and completions.

    Raises:
      UserError: it cannot be loaded, is no function, or wants other arguments.
    """
    found = load(spec, "encoder")
    if not callable(found):
        raise UserError(f"encoder {spec!r}: is not a function of prompts and completions; name one")
    if name := missing_parameter(found, GIVEN):
        raise UserError(f"encoder {spec!r}: wants {name!r}; an encoder gets prompts and completions alone")
    return found


def encoded(spec: str, prompts: Sequence[Prompt], completions: Sequence[str]) -> np.ndarray:
    """The vectors that an encoder gives N answers, float32 [N, D]. All texts are given at once, and nothing is kept.

    Raises:
      UserError: see `encoder`; the function fails, or gives no finite array [N, D].
    """
    function = encoder(spec)
    try:
        found = np.asarray(
            call(function, dict(zip(GIVEN, (list(prompts), list(completions)), strict=True))), np.float32
        )
    except Exception as error:  # other people's code raises anything
        raise UserError(f"encoder {spec!r}: failed ({described(error)}); correct it") from error
    if found.ndim != 2 or len(found) != len(prompts) or not found.shape[1]:
        raise UserError(
            f"encoder {spec!r}: gives an array of shape {found.shape} for {len(prompts)} answers; return one vector "
            "each"
        )
    if bad := int((~np.isfinite(found)).any(1).sum()):
        raise UserError(f"encoder {spec!r}: gives vectors that are not finite for {bad} of {len(found)} answers")
    return broadcast_from_zero(found)


def _features(
    run: Run,
    what: str,
    keys: Sequence[bytes],
    rows: Sequence[Any],
    lengths: Sequence[int],
    collate: Callable[[list[Any]], Any],
    states: Callable[..., jax.Array],
    shape: tuple[int, ...],
) -> np.ndarray:
    """Features [N, *shape] of N rows by their keys, from the file of `what` where it has them.

    Args:
      lengths, collate: of the rows, see `runtime.scorer.Scorer`.
      states: (base, batch) -> features of its rows.
    """
    path = run.workdir.path / FOLDER / f"{'' if what == 'answers' else f'{what}-'}{_name(run)}.safetensors"
    known, found = _kept(path, shape)
    place = {key: i for i, key in enumerate(known)}
    missing = list({key: i for i, key in enumerate(keys) if key not in place}.items())
    score = functools.partial(jax.jit(states), run.workspace.backbone)
    for start in range(0, len(missing), BLOCK):
        block = missing[start : start + BLOCK]
        own = [i for _, i in block]
        name = f"features of {what} {start + 1} to {start + len(block)} of {len(missing)}"
        new = run.scorer()(name, [rows[i] for i in own], collate, score, [lengths[i] for i in own])
        if bad := int((~np.isfinite(new.reshape(len(new), -1))).any(1).sum()):
            raise UserError(
                f"features: the base gives states that are not finite for {bad} of {len(new)} {what}; check its "
                "weights and --config.model.dtype"
            )
        known, found = [*known, *(key for key, _ in block)], np.concatenate([found, new])
        with disk_errors(path):
            path.parent.mkdir(exist_ok=True)
            bits = np.frombuffer(b"".join(known), np.uint8).reshape(-1, KEY_BYTES)
            save_tree(path, {"keys": bits, "features": found})
    place = {key: i for i, key in enumerate(known)}
    return found[[place[key] for key in keys]]


def _name(run: Run) -> str:
    """Hex digest of all that features depend on beside token ids."""
    workspace = run.workspace
    dtype = jax.tree.leaves(workspace.backbone.base)[0].dtype
    text = computation(_VERSION, workspace.base_hash, dtype, workspace.backbone.model)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _kept(path: pathlib.Path, shape: tuple[int, ...]) -> tuple[list[bytes], np.ndarray]:
    """The keys and features of a file; none where there is no such file, or a damaged one."""
    bits, found = np.zeros((0, KEY_BYTES), np.uint8), np.zeros((0, *shape), np.float32)
    if path.is_file():
        try:
            tree, _ = load_tree(path)
            bits, found = np.asarray(tree["keys"]), np.asarray(tree["features"])
        except (UserError, KeyError) as error:
            logging.warning("%s: not a whole file of features (%s); computing them again", path, error)
    # Every process computes the same rows, whatever its own disk holds.
    count = int(broadcast_from_zero(np.array(len(bits))))
    if count != len(bits):
        bits, found = np.zeros((count, KEY_BYTES), np.uint8), np.zeros((count, *shape), np.float32)
    bits, found = broadcast_from_zero(bits), broadcast_from_zero(found)
    return [row.tobytes() for row in bits], found
