"""What a run reads from outside its run directory: hashes by which a later run notices other contents."""

import logging
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import xxhash

from pjrlhf.data.schema import Example
from pjrlhf.models.folders import weight_files
from pjrlhf.models.hub import commit_of, hub_name, model_folder, newest, pin
from pjrlhf.models.huggingface import TOKENIZER_FILES, fingerprint
from pjrlhf.parallel.processes import broadcast_from_zero, is_process_zero
from pjrlhf.paths import Report, content_hash, expand
from pjrlhf.terminal import masked
from pjrlhf.training.progress import megabytes
from pjrlhf.training.workdir import Workdir, read_object
from pjrlhf.types import Json

log = logging.getLogger(__name__)

# Settings that name a model, or a file of weights.
READ = (
    *("model.path", "reward.path", "preference.bank", "merge.base", "merge.ingredients"),
    *("comparisons.judge.path", "evaluate.judge.path", "evaluate.judges.path"),
)
# What settings of these names mean without a path, also where a folder of that name exists.
WORDS = {"sampler": "base", "bank": "policy"}
# Settings of sources, of records or rewards: mappings that may name files. Judges are none; they write their caches.
SOURCES = ("data", "heldout_data", "prompts", "heldout_prompts", "rewards")
# Settings of rewards, judges and samplers that name a model.
_MODEL = re.compile(r"(rewards|judge)\.[^.]+\.path|(.+\.)?judges?(\.source)?\.path|.+\.sampler(\.path)?")
_SCORES = re.compile(r"(rewards|judge)\..+|.+\.source\.path")  # settings of classifiers, whose base and head are read


def fetch_models(config: Mapping[str, Json], workdir: Workdir) -> None:
    """Downloads the models that a config names on the hub. All processes must call it.

    A run stays at the commits at which it started, which inputs.json records.

    Raises:
      UserError: a model cannot be fetched.
    """
    started = {
        one["path"]: one["commit"]
        for one in read_object(workdir.path / "inputs.json").values()
        if isinstance(one, dict) and {"path", "commit"} <= one.keys()
    }
    for path in dict.fromkeys(path for name, path in _named(config) if _on_hub(name, path, workdir.path)):
        # Process 0 fills the cache, which the others may share, and says which commit they all read.
        commit = _fetch(path, started.get(path)) if is_process_zero() else ""
        commit = bytes(broadcast_from_zero(np.frombuffer(commit.encode().ljust(40), np.uint8))).decode()
        if not is_process_zero():
            _fetch(path, commit)


def _fetch(path: str, commit: str | None) -> str:
    """Downloads a model from the hub; returns its commit, by default the newest."""
    if commit:
        pin({path: commit})
        if is_process_zero() and (now := newest(path)) not in (None, commit):
            log.warning("%s: is commit %s on the hub now; this run stays at %s, where it started", path, now, commit)
    with megabytes(f"downloading {path}") as report:
        folder = model_folder(path, report)
    pin({path: folder.name})
    return folder.name


def _on_hub(name: str, path: str, workdir: pathlib.Path) -> bool:
    """Whether a setting names a model on the hub, and not a folder that the run will write before it reads it."""
    later = name != "model.path" and pathlib.Path(os.path.abspath(expand(path))).is_relative_to(workdir)
    return _is_model(name) and not later and hub_name(path) is not None


def _is_model(name: str) -> bool:
    return name in READ or bool(_MODEL.fullmatch(name))


def fingerprints(config: Mapping[str, Json], workdir: pathlib.Path) -> dict[str, dict[str, str]]:
    """Dotted setting -> {"path", "hash" of the contents, "commit" of a model on the hub} of what a config reads, but
    for what is not there, not a local file or folder, or inside the run directory.

    Raises:
      UserError: a model folder without weights, or a bucket that cannot be reached.
    """
    found = {}
    for name, path in _named(config):
        here = pathlib.Path(expand(path))
        on_hub = _on_hub(name, path, workdir)
        if not on_hub and pathlib.Path(os.path.abspath(here)).is_relative_to(workdir):
            continue
        if on_hub or (_is_model(name) and hub_name(path) is None):
            with megabytes(f"copying {path}") as report:
                here = model_folder(path, report)
        if os.path.exists(here):  # a text that is no path may be too long for one
            commit = commit_of(path, here) if on_hub else None
            with megabytes(f"hashing {path}") as report:
                value = _hash(here, bool(_SCORES.fullmatch(name)), report) if _is_model(name) else content_hash(here)
            if name in found:  # several of a list, such as ingredients; the last one has the plain name
                number = sum(re.fullmatch(rf"{re.escape(name)}( \d+)?", other) is not None for other in found)
                found[f"{name} {number}"] = found.pop(name)
            found[name] = {"path": masked(path), "hash": value, **({"commit": commit} if commit else {})}
    return found


def _hash(path: pathlib.Path, classifier: bool, report: Report) -> str:
    if not (path / "config.json").is_file():
        return content_hash(path)
    files = [path / name for name in (*TOKENIZER_FILES, "generation_config.json")]
    if classifier:
        files = [path / "config.json", *weight_files(path), *files]
    first = [] if classifier else [fingerprint(path, report)]
    return "-".join([*first, *(content_hash(file) for file in files if file.is_file())])


def _named(value: Any, name: str = "", source: bool = False) -> Iterator[tuple[str, str]]:
    """(dotted setting, path) of everything in a config that may be a path to read."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            inside = source or (key in SOURCES and isinstance(inner, Mapping) and (key == "rewards" or "kind" in inner))
            yield from _named(inner, f"{name}.{key}" if name else str(key), inside)
    elif isinstance(value, list | tuple):
        for inner in value:
            if source or _is_model(name) or isinstance(inner, Mapping):
                yield from _named(inner, name, source)
    elif (
        isinstance(value, str)
        and value not in ("", WORDS.get(name.rpartition(".")[2]))
        and (_is_model(name) or (source and _looks_like_a_path(name, value)))
    ):
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
