"""What a merge takes over besides weights: tokenizer, chat template, special tokens and settings of generation.

They come from the ingredient that has them. A base knows no chat template, and its EOS is not what ends an answer of a
chat model that was trained from it.
"""

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pjrlhf.errors import UserError
from pjrlhf.models.folders import read_json, reading
from pjrlhf.models.generation import GENERATION, TOKEN_IDS, checked
from pjrlhf.models.huggingface import TOKENIZER_FILES
from pjrlhf.models.peft import CONFIG as ADAPTER
from pjrlhf.types import Json


@dataclasses.dataclass(frozen=True)
class Inherited:
    """What a merged folder gets from the folders it is made of.

    Attributes:
      tokenizer: the folder whose tokenizer files are copied; None where no folder has any.
      token_ids: bos_token_id, eos_token_id and pad_token_id; an id, a list of ids, or None.
      generation: the other settings of generation_config.json.
    """

    tokenizer: pathlib.Path | None
    token_ids: dict[str, Json]
    generation: dict[str, Json]


def inherit(
    base: pathlib.Path | None, ingredients: Sequence[pathlib.Path], chosen: pathlib.Path | None = None
) -> Inherited:
    """Finds the folder that decides, for the chat template, the special tokens and the settings of generation each.

    Folders with a chat template decide, if there are any that say something, else all. Among them, those that differ
    from the base: what an ingredient was trained to do counts, not what it started from.

    Args:
      chosen: decides instead, as far as it has something to say.

    Raises:
      UserError: two folders decide differently, or a file cannot be read.
    """
    parents = [*([base] if base else []), *ingredients]
    folders = list(dict.fromkeys(parents))
    speakers = [folder for folder in folders if _chat_template(folder) is not None] or folders
    # An adapter answers by the template of its base, and may end answers with other tokens than that.
    adapters = [folder for folder in folders if (folder / ADAPTER).is_file() and (folder / GENERATION).is_file()]

    def decide(what: str, name: str, read: Callable[[pathlib.Path], Json]) -> tuple[pathlib.Path | None, Json]:
        """(the folder that decides about something in a file, what it says), None where all are silent."""
        found = {folder: read(folder) for folder in folders}
        heard = [folder for folder in folders if folder in speakers or (name == GENERATION and folder in adapters)]
        for some in ([chosen] if chosen else [], heard, folders):
            having = [folder for folder in some if found[folder] is not None]
            new = [folder for folder in having if base is None or found[folder] != found[base]] or having
            for other in new[1:]:
                if found[other] != found[new[0]]:
                    raise UserError(
                        f"{other}: has another {what} than {new[0]}; set merge.tokenizer to the folder to take it from"
                    )
            if new:
                return new[0], found[new[0]]
        return None, None

    def read_file(name: str) -> dict[str, Json]:
        """The settings of generation in a JSON file, each from the folder that decides about it."""
        contents = {folder: _with_lists(_settings(folder / name, rows)) for folder in folders}
        keys = dict.fromkeys(key for content in contents.values() for key in content)
        return {
            key: decide(f"{key} in {name}", name, lambda folder, key=key: contents[folder].get(key))[1] for key in keys
        }

    # Adapters have no config.json; all models of a merge have the same vocabulary.
    sizes = (_optional(folder / "config.json").get("vocab_size") for folder in folders)
    rows = next((size for size in sizes if type(size) is int), None)
    generation, config = read_file(GENERATION), read_file("config.json")
    ids = {}
    for name in TOKEN_IDS:
        stated = [x[name] for x in (generation, config) if x.get(name) is not None]
        every = list(dict.fromkeys(i for ids_of_file in stated for i in ids_of_file))
        # EOS may be several; the model stops at any of them.
        ids[name] = every if name == "eos_token_id" and len(every) > 1 else next(iter(every), None)
    tokenizer, _ = decide("chat template or EOS token", "tokenizer_config.json", _voice)
    return Inherited(
        tokenizer,
        ids,
        {key: value for key, value in generation.items() if key not in TOKEN_IDS and value is not None},
    )


def _with_lists(content: dict[str, Json]) -> dict[str, Json]:
    """`content` with every id of a special token as a sorted list: 3 and [3] say the same."""
    ids = {name: content[name] for name in TOKEN_IDS if content.get(name) is not None}
    return content | {name: sorted(x, key=str) if isinstance(x, list) else [x] for name, x in ids.items()}


def _settings(file: pathlib.Path, rows: int | None) -> dict[str, Json]:
    """The settings of generation in a JSON file: all of generation_config.json, and the special tokens of another."""
    content = _optional(file)
    if file.name != GENERATION:
        content = {name: value for name, value in content.items() if name in TOKEN_IDS}
    return checked(content, file, rows)


def _voice(folder: pathlib.Path) -> tuple[Json, Json] | None:
    """(chat template, EOS token) of a tokenizer, None where there is none. The rest of all tokenizers is equal."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    places = ("tokenizer_config.json", "special_tokens_map.json")
    eos = next((found for name in places if (found := _optional(folder / name).get("eos_token"))), None)
    return _chat_template(folder), eos.get("content") if isinstance(eos, dict) else eos


def _optional(file: pathlib.Path) -> dict[str, Json]:
    return read_json(file) if file.is_file() else {}


def _chat_template(folder: pathlib.Path) -> Json:
    """The chat template in any of its places, or None."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        with reading(file):
            return file.read_text(encoding="utf-8")
    places = ("tokenizer_config.json", "chat_template.json")
    return next((found for name in places if (found := _optional(folder / name).get("chat_template"))), None)


# ---- tokenizers


@dataclasses.dataclass(frozen=True)
class _Tokenizer:
    """What decides which tokens a text becomes.

    Attributes:
      rules: merges, normaliser, pre-tokeniser and settings of the model, by name.
      tokens: id -> token (of a unigram model, with its score).
      added: id -> how the added token is found in a text.
    """

    rules: Mapping[str, Json]
    tokens: Mapping[int, Json]
    added: Mapping[int, Mapping[str, Json]]


def _read_tokenizer(file: pathlib.Path) -> _Tokenizer:
    """Reads tokenizer.json of any version of `tokenizers` that the installed one knows, which settles its spelling.

    Raises:
      UserError: it cannot be read.
    """
    import tokenizers

    try:
        content = json.loads(tokenizers.Tokenizer.from_file(str(file)).to_str())
    except Exception as error:  # the library raises nothing narrower
        raise UserError(
            f"{file}: tokenizers {tokenizers.__version__} cannot read it ({error}); save it with this version, or "
            "install the version that wrote it"
        ) from error
    model: dict[str, Any] = content["model"]
    vocabulary = model.pop("vocab")
    if isinstance(vocabulary, dict):
        tokens = {i: token for token, i in vocabulary.items()}
    else:
        tokens = dict(enumerate(vocabulary))
    added = {entry.pop("id"): entry for entry in content["added_tokens"]}
    tokens |= {i: entry["content"] for i, entry in added.items()}
    rules = {f"model.{key}": x for key, x in model.items()}
    rules |= {name: content[name] for name in ("normalizer", "pre_tokenizer")}
    return _Tokenizer(rules, tokens, added)


def _difference(one: _Tokenizer, other: _Tokenizer) -> str:
    """In what two tokenizers differ, or "". One may have special tokens that the other lacks, such as padding."""
    for name in one.rules.keys() | other.rules.keys():
        if one.rules.get(name) != other.rules.get(name):
            return name
    for i in sorted(one.tokens.keys() | other.tokens.keys()):
        for here, there in ((one, other), (other, one)):
            if i not in there.tokens and not here.added.get(i, {}).get("special"):
                return f"token {i}, {here.tokens[i]!r}, which only one of them has"
        if (
            i in one.tokens
            and i in other.tokens
            and (one.tokens[i], one.added.get(i))
            != (
                other.tokens[i],
                other.added.get(i),
            )
        ):
            return f"token {i}, {one.tokens[i]!r} and {other.tokens[i]!r}"
    return ""


def check_tokenizers(folders: Sequence[pathlib.Path]) -> None:
    """All folders that have a tokenizer.json must turn text into the same tokens.

    Raises:
      UserError: two differ, or one cannot be read.
    """
    having = [folder for folder in folders if (folder / "tokenizer.json").is_file()]
    distinct: dict[bytes, pathlib.Path] = {}
    for folder in having:
        with reading(folder / "tokenizer.json"):
            distinct.setdefault((folder / "tokenizer.json").read_bytes(), folder)
    if len(distinct) < 2:
        return
    found = {folder: _read_tokenizer(folder / "tokenizer.json") for folder in distinct.values()}
    for one, other in itertools.combinations(found, 2):
        if what := _difference(found[one], found[other]):
            raise UserError(
                f"{other}: tokenizer.json differs from that of {one} in {what}; merge models of one tokenizer"
            )
