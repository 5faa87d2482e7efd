"""Log-probabilities of the frozen reference, computed once per data set and kept on disk.

One cache serves every user, alpha and beta: user tokens never enter the reference pass, so its numbers belong to the
text alone.
"""

import contextlib
import hashlib
import itertools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import xxhash
from absl import logging

from pjrlhf.data.comparisons import SIDES
from pjrlhf.data.packing import PackedRows
from pjrlhf.data.token_table import TokenRow, TokenTable
from pjrlhf.errors import UserError
from pjrlhf.models.adapters import Backbone
from pjrlhf.models.decoder import Decoder
from pjrlhf.parallel.processes import broadcast_from_zero, on_process_zero
from pjrlhf.paths import atomic_write
from pjrlhf.rollout import scoring

NOTHING = np.zeros(0, np.int32)  # the ids of no text
_VERSION = 2  # of the computation; raise it where the same key would give other numbers


def computation(version: int, base_hash: str, param_dtype: object, model: Decoder) -> str:
    """All that the numbers which a frozen base gives for token ids depend on, as text.

    Args:
      version: of the code that computes them.
      base_hash, param_dtype: of the base's files, and the dtype they are read as.
    """
    decoder = (str(np.dtype(model.dtype)), model.attention, jax.default_backend(), model.config)
    return repr((version, base_hash, str(param_dtype), *decoder))


def cache_key(table: TokenTable, base_hash: str, param_dtype: object, model: Decoder) -> str:
    """Hex digest of everything the numbers of `reference_logps` depend on.

    The token ids of every row stand for the data, its columns, the chat template, the tokenizer and the length
    limits; the base by the hash of its files and the dtype they are read as; the computation by its dtype, attention
    and device. Log-probs are stored as sums, so that no loss normalisation is part of them.
    """
    digest = hashlib.sha256(computation(_VERSION, base_hash, param_dtype, model).encode())
    for name in ("prompt", *SIDES):
        for ids in table.tokens[name]:
            digest.update(len(ids).to_bytes(8, "little"))
            digest.update(np.asarray(ids, "<i4").tobytes())
    for name in SIDES:
        for i in range(len(table)):
            if (mask := table.mask(name, i)) is not None:
                digest.update(f"{name} {i}".encode() + mask.tobytes())
    return digest.hexdigest()[:32]


def _cached(path: pathlib.Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """The numbers in `path`; None where there is no such file, or one that is not as `_write` left it."""
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file:
            found, checksum = np.load(file, allow_pickle=False), file.read()
        if (found.shape, found.dtype) != (shape, np.float32):
            reason = f"it holds {found.dtype} {list(found.shape)}"
        elif checksum != _checksum(found):
            reason = "its contents are not what was saved"
        elif not np.isfinite(found).all():
            reason = "it holds numbers that are not finite"
        else:
            return found
    except (OSError, ValueError, EOFError) as error:
        reason = str(error)
    logging.warning("%s: not a whole cache of reference log-probs (%s); computing them again", path, reason)
    return None


@contextlib.contextmanager
def _written(folder: pathlib.Path) -> Iterator[None]:
    """Turns a full or unwritable disk into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{folder}: reference log-probs cannot be kept there ({error.strerror}); make room, or choose another "
            "cache folder with the environment variable XDG_CACHE_HOME"
        ) from error


def summed_logps(backbone: Backbone, rows: PackedRows) -> jax.Array:
    """Float32 [E, A]: log-probabilities of A answers to each of E prompts under the base, nats."""
    return scoring.packed_logps(backbone.policies(), rows).reshape(rows.owners, -1)


def reference_logps(
    table: TokenTable, key: str, folder: pathlib.Path, score: Callable[[list[TokenRow]], np.ndarray]
) -> np.ndarray:
    """float32 [N, 2]: summed log-probs of the chosen and rejected answer of every row of a preference table.

    Args:
      key: see `cache_key`.
      folder: where the cache lies; a file there is used if and only if it has this key.
      score: rows of `unique_answers` -> the log-prob of each, float32 [M].

    Raises:
      UserError: the cache cannot be written, or a log-prob is NaN or infinite.
    """
    path, shape = folder / f"{key}.npy", (len(table), len(SIDES))
    cached = _cached(path, shape)
    if broadcast_from_zero(np.array(cached is not None)):  # every process has a cache folder of its own
        return broadcast_from_zero(np.zeros(shape, np.float32) if cached is None else cached)
    with _written(folder):  # a folder that cannot be made is found out before the work, not after it
        folder.mkdir(parents=True, exist_ok=True)
    answers, numbers = unique_answers(table)
    found = score(answers)[numbers]
    if bad := int((~np.isfinite(found)).any(1).sum()):
        raise UserError(
            f"reference: the base gives log-probs that are not finite for {bad} of {len(found)} pairs; check its "
            "weights and --config.model.dtype"
        )
    with _written(folder):
        on_process_zero(_write)(path, found)
    return found


def unique_answers(table: TokenTable) -> tuple[list[TokenRow], np.ndarray]:
    """(M different answers {"prompt", "completion", "completion_mask"} of a preference table of N rows, int [N, 2] the
    number of each chosen and rejected answer among them): many people may have compared the same two answers.
    """
    numbers: dict[tuple[bytes, ...], int] = {}
    answers, found = [], np.zeros((len(table), len(SIDES)), np.int64)
    for i, prompt in enumerate(table.tokens["prompt"]):
        for column, side in enumerate(SIDES):
            answer, mask = table.tokens[side][i], table.mask(side, i)
            key = (prompt.tobytes(), answer.tobytes(), b"" if mask is None else mask.tobytes())
            if key not in numbers:
                numbers[key] = len(answers)
                answers.append({"prompt": prompt, "completion": answer, "completion_mask": mask})
            found[i, column] = numbers[key]
    return answers, found


def shared_prompts(answers: Sequence[TokenRow], most: int, worth: float = 0.05) -> list[list[int]]:
    """Groups of answers to one prompt, so that it is read once for all of them: numbers of `answers`.

    No group is larger than A, the least size up to `most` that reads at most `worth` more tokens than `most` would: in
    a long row attention costs more.
    """
    by_prompt: dict[bytes, list[int]] = {}
    for i, answer in enumerate(answers):
        by_prompt.setdefault(answer["prompt"].tobytes(), []).append(i)
    sizes = np.array([len(numbers) for numbers in by_prompt.values()])
    prompts = np.array([len(answers[numbers[0]]["prompt"]) for numbers in by_prompt.values()])
    answered = sum(len(answer["completion"]) for answer in answers)
    tokens = np.array([(np.ceil(sizes / A) * prompts).sum() + answered for A in range(1, most + 1)])
    A = 1 + int(np.argmax(tokens <= (1 + worth) * tokens[-1]))
    return [numbers[i : i + A] for numbers in by_prompt.values() for i in range(0, len(numbers), A)]


def with_answers(answers: Sequence[TokenRow], names: Sequence[str]) -> TokenRow:
    """One row with a prompt and its answers by name, as `Text.pack` takes it; names beyond the answers have none."""
    row: dict[str, Any] = {"prompt": answers[0]["prompt"] if answers else NOTHING}
    for name, answer in itertools.zip_longest(names, answers):
        found = answer or {"completion": NOTHING, "completion_mask": None}
        row |= {name: found["completion"], f"{name}_mask": found.get("completion_mask")}
    return row


def _write(path: pathlib.Path, values: np.ndarray) -> None:
    """An .npy file with a checksum behind the numbers, which np.load ignores."""
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.save(file, values)
        file.write(_checksum(values))


def _checksum(values: np.ndarray) -> bytes:
    return xxhash.xxh3_128_digest(np.ascontiguousarray(values).tobytes())
