"""generation_config.json: what may be copied from it into a model that is derived from another one."""

import math
import pathlib
import sys
from collections.abc import Callable

from absl import logging

from pjrlhf.errors import UserError
from pjrlhf.models.folders import Folder, read_json
from pjrlhf.settings import shown
from pjrlhf.types import Json

GENERATION = "generation_config.json"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Keys that are no settings of generation.
NOTES = ("_from_model_config", "transformers_version")


def _is_number(low: float, high: float = math.inf, above: bool = False) -> Callable[[Json], bool]:
    def check(value: Json) -> bool:
        if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
            return False
        return low <= value <= high and not (above and value == low)

    return check


def _is_whole(low: int) -> Callable[[Json], bool]:
    return lambda value: type(value) is int and value >= low


def _is_ids(value: Json) -> bool:
    return type(value) is int or (isinstance(value, list) and all(type(i) is int for i in value))


def _is_rows_of_ids(value: Json) -> bool:
    return isinstance(value, list) and all(isinstance(row, list) and _is_ids(row) for row in value)


def _is_texts(value: Json) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(one, str) for one in value))


_KINDS: tuple[tuple[str, Callable[[Json], bool], tuple[str, ...]], ...] = (
    ("true or false", lambda value: isinstance(value, bool), ("do_sample", "use_cache", "renormalize_logits")),
    ("true or false", lambda value: isinstance(value, bool), ("remove_invalid_values", "token_healing", "low_memory")),
    ('true, false or "never"', lambda value: isinstance(value, bool) or value == "never", ("early_stopping",)),
    ("a number of 0 or more", _is_number(0), ("temperature", "penalty_alpha", "diversity_penalty", "guidance_scale")),
    ("a number from 0 to 1", _is_number(0, 1), ("min_p", "top_h", "epsilon_cutoff", "eta_cutoff")),
    ("a number above 0, up to 1", _is_number(0, 1, above=True), ("top_p", "typical_p")),
    ("a number above 0", _is_number(0, above=True), ("repetition_penalty", "encoder_repetition_penalty", "max_time")),
    ("a number", _is_number(-math.inf), ("length_penalty",)),
    ("a whole number of 1 or more", _is_whole(1), ("max_length", "max_new_tokens", "num_beams", "num_beam_groups")),
    ("a whole number of 1 or more", _is_whole(1), ("num_return_sequences", "max_cache_len", "prefill_chunk_size")),
    ("a whole number of 0 or more", _is_whole(0), ("min_length", "min_new_tokens", "no_repeat_ngram_size")),
    ("a whole number of 0 or more", _is_whole(0), ("encoder_no_repeat_ngram_size",)),
    ("a whole number of -1 or more", _is_whole(-1), ("top_k",)),
    ("an id or a list of ids", _is_ids, (*TOKEN_IDS, "decoder_start_token_id", "forced_bos_token_id")),
    ("an id or a list of ids", _is_ids, ("forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens")),
    ("a list of lists of ids", _is_rows_of_ids, ("bad_words_ids",)),
    ("text or a list of texts", _is_texts, ("stop_strings",)),
    ("text", lambda value: isinstance(value, str), ("cache_implementation",)),
)
CHECKS = {name: (what, check) for what, check, names in _KINDS for name in names}


def read_generation(folder: Folder, rows: int | None = None) -> dict[str, Json]:
    """The settings of generation_config.json in a folder; {} where there is none. Settings that transformers does not
    know as settings of every model, and ids that the model does not have, are left out with a warning.

    Args:
      rows: ids that the model knows; None does not check them.

    Raises:
      UserError: the file cannot be read, or a setting is of a wrong type or out of range.
    """
    file = pathlib.Path(folder) / GENERATION
    return checked(read_json(file), file, rows) if file.is_file() else {}


def checked(settings: dict[str, Json], file: pathlib.Path, rows: int | None = None) -> dict[str, Json]:
    """The settings of generation, or of special tokens, that may be copied; see `read_generation`."""
    found: dict[str, Json] = {}
    for name, value in settings.items():
        if value is None or name in NOTES:
            continue
        if name not in CHECKS:
            logging.warning("%s: %s is no setting that is known here; it is left out", file, shown(name))
            continue
        what, check = CHECKS[name]
        if not check(value):
            raise UserError(f"{file}: {name}={shown(value)} is not {what}; correct it or leave it out")
        if check is _is_ids:
            value = _known_ids(value, name, file, rows)
        elif check is _is_rows_of_ids:
            value = [row for row in value if _known_ids(row, name, file, rows) == row]
        if value is not None:
            found[name] = value
    return found


def _known_ids(value: Json, name: str, file: pathlib.Path, rows: int | None) -> Json:
    """An id, or those of a list, that the model has; None without any. -1 stands for a token that it does not have."""
    ids = value if isinstance(value, list) else [value]
    known = [i for i in ids if i >= 0 and (rows is None or i < rows)]
    if wrong := [i for i in ids if i not in known and i != -1]:
        logging.warning("%s: %s has the id %s, and the model has %s; it is left out", file, name, wrong[0], rows)
    if not known:
        return None
    return known if isinstance(value, list) else known[0]
