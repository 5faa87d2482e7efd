"""The run directory: its config, the manifest of finished stages, and atomic writing of files."""

import json
import os
import pathlib
from collections.abc import Collection, Iterable, Mapping

import jax

from pjrlhf.errors import UserError
from pjrlhf.parallel.processes import on_process_zero
from pjrlhf.paths import atomic_write, disk_errors, refuse_remote
from pjrlhf.types import Json


def write_json(path: pathlib.Path, value: Json) -> None:
    """Writes `value` to `path` atomically.

    Raises:
      UserError: the disk is full or unwritable.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def write_lines(path: pathlib.Path, records: Iterable[Json]) -> None:
    """Writes one JSON value per line, atomically."""
    with atomic_write(path) as file:
        file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def _read_json(path: pathlib.Path) -> Json:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{path}: not readable as JSON ({error}); delete it, or choose another --workdir") from error


def _flat(config: Json, prefix: str = "") -> dict[str, Json]:
    """Nested mappings -> dotted keys."""
    if not isinstance(config, Mapping) or (prefix and not config):
        return {prefix: config}
    flat = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


class Workdir:
    """The folder of one run, shared by all its processes. Create it after `processes.initialize`.

    Raises:
      UserError: the folder cannot be created, or is in a bucket, which supports neither appending nor renaming.
    """

    def __init__(self, path: str | os.PathLike):
        remedy = "mount the bucket, or keep the run here and its checkpoints there with --config.checkpoints"
        refuse_remote(path, "a run directory", remedy)
        self.path = pathlib.Path(path).absolute()
        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)

    def stage(self, name: str) -> pathlib.Path:
        """The folder of stage `name`, created if absent."""
        folder = self.path / name
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    def write_config(self, config: Mapping[str, Json], ignore: Collection[str] = ()) -> None:
        """Checks that the config continues the run already in the folder, and stores it as config.json.

        Args:
          config: nested mapping of JSON values.
          ignore: dotted keys (or sections) that may change between restarts, such as the logging interval.

        Raises:
          UserError: any other key differs from the stored config; the message lists old and new values.
        """
        path = self.path / "config.json"
        config = json.loads(json.dumps(config))  # tuples become lists, as in the stored file
        stored = _read_json(path)
        if stored is not None:
            old, new = _flat(stored), _flat(config)
            changed = [
                f"{key}: {json.dumps(old[key]) if key in old else '(absent)'} -> "
                f"{json.dumps(new[key]) if key in new else '(absent)'}"
                for key in sorted(old.keys() | new.keys())
                if (key not in old or key not in new or old[key] != new[key])
                and not any(key == name or key.startswith(f"{name}.") for name in ignore)
            ]
            if changed:
                raise UserError(
                    f"{self.path}: holds a run with another config ({'; '.join(changed)}); "
                    "undo the change, choose another --workdir, or delete the folder to start over"
                )
        on_process_zero(write_json)(path, config)
        if not path.is_file():
            raise UserError(
                f"{self.path}: process {jax.process_index()} does not see what process 0 writes there; choose a "
                "--workdir that all processes share"
            )

    def finished(self, stage: str) -> dict[str, Json] | None:
        """The record of `mark_finished` for `stage`, None while it is unfinished."""
        return (_read_json(self.path / "manifest.json") or {}).get("stages", {}).get(stage)

    def mark_finished(self, stage: str, seconds: float, **info: Json) -> None:
        """Records in manifest.json that `stage` finished after `seconds`, with JSON values `info`."""
        manifest = _read_json(self.path / "manifest.json") or {"stages": {}}
        manifest["stages"][stage] = {"seconds": seconds, **info}
        on_process_zero(write_json)(self.path / "manifest.json", manifest)
