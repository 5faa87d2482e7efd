"""Tokenizers on disk, as `transformers` reads them: their backend and its settings."""

import json
import pathlib
from importlib import metadata
from typing import Any

from absl import logging

from pjrlhf.errors import UserError, described
from pjrlhf.models.folders import read_json
from pjrlhf.terminal import quiet_libraries
from pjrlhf.types import Json


def setting_of(folder: pathlib.Path, name: str) -> Json:
    """A setting in tokenizer_config.json; None where it is absent.

    transformers 5 ignores `add_bos_token` and `add_eos_token` for the classes that it replaces with its own.
    """
    file = folder / "tokenizer_config.json"
    return read_json(file).get(name) if file.is_file() else None


def load_backend(folder: pathlib.Path) -> Any:
    """The `transformers` tokenizer of a folder, whose code does not run.

    Its tokenizer.json decides how text is split. `transformers` reads that of some models as the tokenizer of another:
    5.0 to 5.20 make a Llama tokenizer of DeepSeek-R1's, because tokenizer_config.json names that class, and lose the
    spaces between words; 5.24 makes Qwen2's of every model whose config.json says `qwen2`.

    Raises:
      UserError: `transformers` cannot load a tokenizer from the folder.
    """
    backend, guessed = _read(folder)
    if guessed is not backend:
        logging.warning(
            "tokenizer %s: transformers %s reads it as %s, which splits text otherwise than its tokenizer.json; "
            "tokenizer.json is used",
            folder,
            metadata.version("transformers"),
            type(guessed).__name__,
        )
    if not set(backend.get_vocab()) - set(backend.all_special_tokens):
        # Without files transformers makes one up from config.json.
        raise UserError(f"tokenizer {folder}: has no vocabulary; copy the tokenizer.json that came with the model")
    return backend


def loading_class(folder: pathlib.Path) -> str:
    """The class of `transformers` whose `from_pretrained` splits text as the tokenizer.json of a folder says.

    `AutoTokenizer`, or `PreTrainedTokenizerFast` where the former splits text otherwise (see `load_backend`). A folder
    without a tokenizer that can be read here has the usual class.
    """
    try:
        backend, guessed = _read(folder)
    except UserError:
        return "AutoTokenizer"
    return "AutoTokenizer" if guessed is backend else "PreTrainedTokenizerFast"


def _read(folder: pathlib.Path) -> tuple[Any, Any]:
    """The tokenizer of a folder, and the one that AutoTokenizer reads; one object where both split text alike."""
    quiet_libraries()
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if not folder.is_dir():
        raise UserError(f"tokenizer {folder}: no such folder; give one with a tokenizer.json")
    try:
        guessed = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
        if (folder / "tokenizer.json").is_file() and type(guessed) is not PreTrainedTokenizerFast:
            written = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
            if _probe(guessed) != _probe(written):
                return written, guessed
    except Exception as error:  # the library `tokenizers` raises nothing narrower
        reason = described(error)[:200]
        raise UserError(
            f"tokenizer {folder}: {reason}; give a folder with a tokenizer.json, and a config.json, that transformers "
            f"{metadata.version('transformers')} and tokenizers {metadata.version('tokenizers')} can read"
        ) from error
    return guessed, guessed


def _probe(backend: Any) -> list[int]:
    """Ids of a text with spaces, digits and bytes beyond ASCII."""
    return backend("Hello world,\n  it's 12345 naïve\tpeople. 你好", add_special_tokens=False)["input_ids"]


def write_folder(folder: pathlib.Path, tokenizer: Any, **settings: Json) -> None:
    """Writes tokenizer.json and tokenizer_config.json.

    Args:
      tokenizer: of the library `tokenizers`, with the special tokens <s>, </s> and <pad>.
      settings: further keys of tokenizer_config.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "clean_up_tokenization_spaces": False,
        **settings,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
