"""Models by name: a local folder, a folder in a bucket, or `owner/name[@revision]` on the Hugging Face hub.

Of a repository only safetensors, configs, tokenizer files and its card are downloaded, into the cache of
`huggingface_hub`: never code, never pickles.
"""

import contextlib
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import huggingface_hub
from huggingface_hub import constants, errors
from huggingface_hub.utils import tqdm

from pjrlhf.errors import UserError, reason_of
from pjrlhf.models.folders import INDEX
from pjrlhf.models.hf_config import GENERATION
from pjrlhf.models.huggingface import TEMPLATES, TOKENIZER_FILES
from pjrlhf.models.peft import CONFIG as ADAPTER_CONFIG
from pjrlhf.models.peft import MANIFEST
from pjrlhf.paths import Report, disk_errors, expand, local

# What is downloaded, as patterns of file names.
WEIGHTS = ("model*.safetensors", "pytorch_model*.safetensors", "adapter_model.safetensors", "bank.safetensors", INDEX)
VOCABULARIES = ("vocab.txt", "spm.model", "spiece.model", "sentencepiece.bpe.model", f"{TEMPLATES}/*.jinja")
CARD = "README.md"
FILES = ("config.json", GENERATION, ADAPTER_CONFIG, MANIFEST, *TOKENIZER_FILES, *VOCABULARIES, *WEIGHTS)

_NAME = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>\S+))?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
# Name on the hub -> commit at which this process reads it, whatever happens to its branch meanwhile.
_pinned: dict[str, str] = {}


class HubName(NamedTuple):
    """A repository on the hub, such as "owner/name", and a branch, tag or commit of it."""

    repo: str
    revision: str

    def __str__(self) -> str:
        return self.repo if self.revision == "main" else f"{self.repo}@{self.revision}"


def hub_name(path: str | os.PathLike) -> HubName | None:
    """The repository that `path` names; None for a path, also for any of that spelling that exists.

    Names of weight files are paths.
    """
    path = os.fspath(path)
    found = _NAME.fullmatch(path)
    if not found or path.endswith(".safetensors") or os.path.lexists(expand(path)):
        return None
    return HubName(found["repo"], found["revision"] or "main")


def public_name(path: str | os.PathLike) -> str:
    """A model in a text for others: its name on the hub, or the last two parts of its path."""
    return os.fspath(path) if hub_name(path) else "/".join(pathlib.PurePath(path).parts[-2:]).lstrip("/")


def model_folder(path: str | os.PathLike, report: Report | None = None) -> pathlib.Path:
    """The local folder of a model.

    Args:
      path: a folder, one in a bucket, or a name on the hub, `owner/name` with an optional `@revision`. A local folder
        of that spelling comes first.
      report: told how far a download is.

    Raises:
      UserError: the hub cannot be reached and its cache does not have the model; no such repository or revision, or no
        right to read it; a repository without safetensors weights; or a bucket that cannot be read.
    """
    name = hub_name(path)
    if name is None:
        return local(path, report)
    folder = _snapshot(name, FILES, report)
    if not (folder / CARD).is_file():
        with contextlib.suppress(UserError):  # a cache may have the model without it
            _snapshot(HubName(name.repo, folder.name), (CARD,))
    if not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{name}: the repository holds no safetensors weights, and no other format is read; name a revision or a "
            "repository that has them"
        )
    return folder


def model_file(path: str | os.PathLike, file: str) -> pathlib.Path:
    """The local path of a file of weights: `path` itself, or `file` in it where that is a folder with such a file; see
    `model_folder`.
    """
    found = model_folder(path)
    return found / file if (found / file).is_file() else found


def config_folder(path: str | os.PathLike) -> pathlib.Path:
    """A local folder with the config.json of a model, which may be without its weights; see `model_folder`."""
    name = hub_name(path)
    if name is not None:
        return _snapshot(name, ("config.json",))
    return local(f"{os.fspath(path)}/config.json").parent


def tokenizer_folder(path: str | os.PathLike) -> pathlib.Path:
    """A local folder with the tokenizer of a model, which may be without its weights; see `model_folder`."""
    name = hub_name(path)
    if name is not None:
        return _snapshot(name, ("config.json", GENERATION, *TOKENIZER_FILES, *VOCABULARIES))
    return model_folder(path)


def commit_of(path: str | os.PathLike, folder: pathlib.Path) -> str | None:
    """The commit of the hub at which `folder` holds the model `path`; None for models from elsewhere."""
    return folder.name if hub_name(path) and _COMMIT.fullmatch(folder.name) else None


def portable(path: str | os.PathLike, folder: pathlib.Path) -> tuple[str, str | None]:
    """(name on the hub, commit) of the model of `folder`, by which others find it; else (absolute path, None)."""
    commit = commit_of(path, folder)
    name = hub_name(path)
    return (name.repo, commit) if name and commit else (os.path.abspath(folder), None)


def pin(commits: Mapping[str, str]) -> None:
    """From now on this process reads these names on the hub at these commits."""
    _pinned.update({str(name): commit for path, commit in commits.items() if (name := hub_name(path))})


def newest(path: str) -> str | None:
    """The commit that a name on the hub stands for now; None where that cannot be told."""
    name = hub_name(path)
    if name is None or _COMMIT.fullmatch(name.revision):
        return name and name.revision
    try:
        return huggingface_hub.HfApi().model_info(name.repo, revision=name.revision, timeout=10).sha
    except Exception:  # clients raise their own kinds for network, rights and names
        return None


def _snapshot(name: HubName, files: tuple[str, ...], report: Report | None = None) -> pathlib.Path:
    """The folder of a repository in the cache of the hub, with those of `files` (patterns) that it has."""
    commit = _pinned.get(str(name), name.revision)
    try:
        with disk_errors(constants.HF_HUB_CACHE):
            found = huggingface_hub.snapshot_download(
                name.repo, revision=commit, allow_patterns=list(files), tqdm_class=_bars(report), library_name="pjrlhf"
            )
    except UserError:
        raise
    except Exception as error:  # clients raise their own kinds for network, rights and names
        raise UserError(f"{name}: {_reason(name, error)}") from error
    return pathlib.Path(found)


def _reason(name: HubName, error: BaseException) -> str:
    """Why a repository cannot be read, and the way out."""
    log_in = "log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(error, errors.GatedRepoError):
        page = f"{constants.ENDPOINT}/{name.repo}"
        return f"its owner grants access on request; ask for it on {page}, and {log_in}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"no such folder, and no model that you may read on the hub; check the name, or {log_in}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the repository has no revision {name.revision!r}; name one of its branches, tags or commits"
    if isinstance(error, errors.HFValidationError):
        return (
            f"no such folder, and no name on the hub ({reason_of(error, 200)}); write owner/name or owner/name@revision"
        )
    if constants.is_offline_mode():
        return (
            "no such folder, and not whole in the cache of the hub while HF_HUB_OFFLINE is set; unset it, or download "
            f"the model with `hf download {name.repo}`"
        )
    cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ else error
    reason = reason_of(cause, 200)
    return f"no such folder, and the hub cannot be reached ({reason}); check the network, or name a local folder"


def _bars(report: Report | None) -> type[tqdm]:
    """The class of progress bars for the hub: they draw nothing and tell `report` how many bytes are there."""

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any):
            self._bytes = kwargs.get("unit") == "B"
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> None:
            self.n += n or 0
            if report and self._bytes and self.total:
                report(int(self.n), int(self.total))

    return Bar
