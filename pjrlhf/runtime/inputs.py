"""What a run reads from outside its run directory: hashes by which a later run notices other contents."""

import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import xxhash

from pjrlhf.data.schema import Example
from pjrlhf.models.folders import weight_files
from pjrlhf.models.huggingface import TOKENIZER_FILES, fingerprint
from pjrlhf.paths import content_hash, expand, local
from pjrlhf.terminal import masked
from pjrlhf.types import Json

# Settings that name a file or folder.
READ = (
    *("model.path", "reward.path", "preference.bank", "merge.base", "merge.ingredients"),
    *("comparisons.sampler", "comparisons.sampler.path"),
    *("comparisons.judge.path", "evaluate.judge.path", "evaluate.judges.path"),
)
# Settings of sources, of records or rewards: mappings that may name files. Judges are none; they write their caches.
SOURCES = ("data", "prompts", "rewards")


def fingerprints(config: Mapping[str, Json], workdir: pathlib.Path) -> dict[str, dict[str, str]]:
    """Dotted setting -> {"path", "hash" of the contents} of what a config reads, but for what is not there, not a local
    file or folder, or inside the run directory.

    Raises:
      UserError: a model folder without weights, or a bucket that cannot be reached.
    """
    found = {}
    for name, path in _named(config):
        classifier = name.startswith("rewards.") and name.endswith(".path")
        here = local(path) if name in READ or classifier else pathlib.Path(expand(path))
        inside = pathlib.Path(os.path.abspath(here)).is_relative_to(workdir)
        if os.path.exists(here) and not inside:  # a text that is no path may be too long for one
            found[name] = {"path": masked(path), "hash": _hash(here, classifier)}
    return found


def _hash(path: pathlib.Path, classifier: bool) -> str:
    if not (path / "config.json").is_file():
        return content_hash(path)
    files = [path / name for name in (*TOKENIZER_FILES, "generation_config.json")]
    if classifier:
        files = [path / "config.json", *weight_files(path), *files]
    first = [] if classifier else [fingerprint(path)]
    return "-".join([*first, *(content_hash(file) for file in files if file.is_file())])


def _named(value: Any, name: str = "", source: bool = False) -> Iterator[tuple[str, str]]:
    """(dotted setting, path) of everything in a config that may be a path to read."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            inside = source or (key in SOURCES and isinstance(inner, Mapping) and (key == "rewards" or "kind" in inner))
            yield from _named(inner, f"{name}.{key}" if name else str(key), inside)
    elif isinstance(value, list | tuple) and (source or name in READ):
        for inner in value:
            yield from _named(inner, name, source)
    elif isinstance(value, str) and value and (name in READ or (source and _looks_like_a_path(name, value))):
        yield name, value


def _looks_like_a_path(name: str, value: str) -> bool:
    """Not the name of a split or column that is also a file in the working directory, nor a file that grows."""
    if name.endswith(".cache"):
        return False
    return name.rpartition(".")[2] in ("path", "votes") or "/" in value or bool(pathlib.PurePath(value).suffix)


def is_local(spec: Mapping[str, Any]) -> bool:
    """Whether a source of records names local files, which `fingerprints` finds."""
    return any("://" not in path and pathlib.Path(expand(path)).exists() for _, path in _named(spec, source=True))


def hash_of(examples: Sequence[Example]) -> str:
    """16 hex digits that identify validated records."""
    digest = xxhash.xxh3_64()
    for example in examples:
        digest.update(repr(example).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
