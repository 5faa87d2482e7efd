"""Uploads of exported folders to the Hugging Face hub, with their cards."""

import io
import json
import pathlib
import re
from typing import Any

import huggingface_hub
from huggingface_hub import constants, errors

from pjrlhf.errors import UserError, reason_of
from pjrlhf.export.card import card_of
from pjrlhf.models.folders import read_json
from pjrlhf.models.hub import CARD
from pjrlhf.models.peft import CONFIG as ADAPTER_CONFIG
from pjrlhf.models.peft import MANIFEST

_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
# Keys of a manifest, and of the config of an adapter, that hold paths of this machine.
_PLACES = ("folder", "output", "tokenizer", "base_model_name_or_path")


def check_push(repo: str) -> None:
    """Checks, before the work is done, that it can be uploaded.

    Raises:
      UserError: `repo` is no name, there is no network or no token, or the token may not write there.
    """
    if not _NAME.fullmatch(repo):
        raise UserError(f"{repo}: cannot be pushed to, it is no name on the hub; write USER/NAME")
    if constants.is_offline_mode():
        raise UserError(f"{repo}: cannot be pushed to while HF_HUB_OFFLINE is set; unset it, or do not push")
    if not huggingface_hub.get_token():
        raise UserError(f"{repo}: cannot be pushed to without a token; log in with `hf auth login`, or set HF_TOKEN")
    try:
        found = huggingface_hub.HfApi().whoami()
    except Exception as error:  # clients raise their own kinds for network and rights
        raise _refused(repo, error) from error
    owner = repo.partition("/")[0]
    owners = [found["name"], *(one["name"] for one in found.get("orgs") or ())]
    if owner not in owners:
        raise UserError(f"{repo}: the token may not write to {owner}; choose one of {', '.join(owners)}")


def push(folder: pathlib.Path, repo: str, private: bool = False) -> str:
    """Uploads an exported folder, with a card made for `repo`; returns its address.

    Paths of this machine are left out of the manifest and of the config of an adapter. What the repository has already
    is replaced file by file.

    Args:
      repo: USER/NAME; made where there is none.
      private: of a new repository.

    Raises:
      UserError: the folder is no export, or has a damaged file; or it cannot be uploaded.
    """
    if not any((folder / name).is_file() for name in ("config.json", ADAPTER_CONFIG)) and not any(
        folder.glob("*.gguf")
    ):
        raise UserError(f"{folder}: holds neither config.json nor {ADAPTER_CONFIG}; name an exported folder")
    files: dict[str, Any] = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }
    files[CARD] = card_of(folder, repo).encode()
    for name in (MANIFEST, ADAPTER_CONFIG):
        if name in files:
            files[name] = json.dumps(_public(read_json(folder / name)), indent=2).encode()
    additions = [
        huggingface_hub.CommitOperationAdd(name, io.BytesIO(content) if isinstance(content, bytes) else content)
        for name, content in files.items()
    ]
    api = huggingface_hub.HfApi(library_name="pjrlhf")
    try:
        api.create_repo(repo, private=private or None, exist_ok=True)
        done = api.create_commit(repo, additions, commit_message=f"Upload {folder.absolute().name} with pjrlhf")
    except Exception as error:  # clients raise their own kinds for network, rights and disks
        raise _refused(repo, error, folder) from error
    return done.commit_url.partition("/commit/")[0]


def _public(value: Any, key: str = "") -> Any:
    """A JSON value without paths of this machine: their last parts remain."""
    if isinstance(value, dict):
        return {name: _public(one, name) for name, one in value.items()}
    if isinstance(value, list):
        return [_public(one, key) for one in value]
    return pathlib.PurePath(value).name if key in _PLACES and str(value).startswith("/") else value


def _refused(repo: str, error: Exception, folder: pathlib.Path | None = None) -> UserError:
    again = f"; then `pjrlhf push {folder} {repo}`" if folder else ""
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    reason = reason_of(error, 200)
    if status == 401:
        return UserError(
            f"{repo}: the hub does not accept the token; log in again with `hf auth login`, or set HF_TOKEN{again}"
        )
    if status == 403:
        return UserError(
            f"{repo}: the token has no right to write there ({reason}); use a token with the role write, or "
            f"another name{again}"
        )
    if status:
        return UserError(f"{repo}: the hub refuses it ({reason}); correct that, or choose another name{again}")
    return UserError(f"{repo}: cannot be uploaded ({reason}); check the network{again}")
