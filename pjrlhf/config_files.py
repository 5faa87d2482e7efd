"""Config files: those that come with the package, and those of its users."""

import difflib
import importlib.machinery
import importlib.util
import inspect
import os
import pathlib
import re
import traceback
from typing import Any, cast

from ml_collections import ConfigDict, FrozenConfigDict

from pjrlhf.errors import UserError, described
from pjrlhf.paths import expand


def shipped_configs() -> dict[str, str]:
    """Name -> path of the configs that come with the package, such as "soups" and "papers/prlhf"."""
    package = pathlib.Path(__file__).parent
    # Installed, they are a part of the package; in the source tree they stand beside it.
    folder = next((path for path in (package / "configs", package.parent / "configs") if path.is_dir()), package)
    files = sorted(folder.rglob("*.py")) if folder != package else []
    return {file.relative_to(folder).with_suffix("").as_posix(): str(file) for file in files}


def load_config(spec: str) -> ConfigDict:
    """The config of a file: what its function `get_config` returns. Change it and give it to `run`, or return it from
    the `get_config` of a file of your own.

    Args:
      spec: path of the file, or the name of one that comes with the package, such as "soups" and "papers/prlhf";
        optionally with :variant, the argument of `get_config`.

    Raises:
      UserError: no such file, an error in the file, or a result that is not a ConfigDict.
    """
    path, _, variant = spec.partition(":")
    path = expand(path)
    if not os.path.exists(path):
        path = shipped_configs().get(path, path)
    if os.path.isdir(path):
        raise UserError(f"--config: {path!r} is a folder; name a file in it, for example --config=soups")
    if not os.path.isfile(path):
        raise UserError(f"--config: no file {path!r}; {_other_config(path, variant)}")
    loader = importlib.machinery.SourceFileLoader("config_file", path)
    module_spec = importlib.util.spec_from_file_location("config_file", path, loader=loader)
    assert module_spec, path  # always present with a loader
    module = importlib.util.module_from_spec(module_spec)
    try:
        loader.exec_module(module)
        get_config = getattr(module, "get_config", None)
        if not callable(get_config):
            raise UserError(f"{path}: has no function get_config; define one that returns a ConfigDict")
        arguments = [variant] if variant else []
        try:
            inspect.signature(get_config).bind(*arguments)
        except TypeError:
            remedy = f"leave out :{variant}" if variant else f"name one as {path}:VARIANT"
            raise UserError(f"{path}: get_config {'has no' if variant else 'needs a'} variant; {remedy}") from None
        config = get_config(*arguments)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        reason = described(error).removesuffix(":")
        raise UserError(f"{_place(error, path)}: {reason}; correct the config file") from error
    if not isinstance(config, ConfigDict):
        what = "nothing" if config is None else f"a {type(config).__name__}"
        raise UserError(f"{path}: get_config returns {what}; return an ml_collections.ConfigDict")
    return ConfigDict(cast(Any, config)) if isinstance(config, FrozenConfigDict) else config


def _other_config(path: str, variant: str) -> str:
    """What to name in place of a config that is not there."""
    shipped = shipped_configs()
    # configs/soups.py is the path in a clone of what is "soups" elsewhere.
    name = re.sub(r"^(.*/)?configs/|\.py$", "", path)
    near = difflib.get_close_matches(name, shipped, 1)
    if near:
        found = f"{near[0]}:{variant}" if variant else near[0]
        return f"did you mean {found}, which comes with the package?"
    return f"name one that exists, for example --config=soups, or one that comes with the package: {', '.join(shipped)}"


def _place(error: BaseException, path: str) -> str:
    """The config file, with the line of the error where it is known."""
    if isinstance(error, SyntaxError):
        return path  # the message names the line
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    return f"{path} line {lines[-1]}" if lines else path
