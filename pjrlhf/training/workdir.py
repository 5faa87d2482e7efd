"""The run directory: its config and inputs, the manifest of finished stages, its lock, and atomic writing of files."""

import contextlib
import datetime
import fcntl
import functools
import itertools
import json
import logging
import os
import pathlib
import re
import socket
import threading
import time
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import jax

from pjrlhf import strict_json
from pjrlhf.errors import UserError
from pjrlhf.parallel.processes import barrier, is_process_zero, on_process_zero
from pjrlhf.paths import atomic_write, content_hash, disk_errors, refuse_remote, visible_files
from pjrlhf.training.progress import watched
from pjrlhf.types import Json

log = logging.getLogger(__name__)

BEAT = 5.0  # seconds between two signs of life in a lock
SHOWN = 8  # differences that a message lists
_WORKING = ("checkpoints",)  # folders of a stage that are not results


def write_json(path: pathlib.Path, value: Json) -> None:
    """Writes `value` to `path` atomically; the folder above its own must exist.

    Raises:
      UserError: the disk is full or unwritable.
    """
    with disk_errors(path):
        path.parent.mkdir(exist_ok=True)
        with atomic_write(path) as file:
            file.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def write_lines(path: pathlib.Path, records: Iterable[Json]) -> None:
    """Writes one JSON value per line, atomically."""
    with atomic_write(path) as file:
        file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """The JSON objects in the lines of a file that a run adds to; none where there is no such file. A line that was cut
    short by a crash, or damaged otherwise, is left out.

    Raises:
      OSError: the file cannot be read.
    """
    found = []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def end_line(path: pathlib.Path) -> None:
    """Ends a last line that a crash cut short, so that it does not spoil the next one."""
    if path.is_file() and path.stat().st_size:
        with path.open("rb+") as file:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")


def read_object(path: pathlib.Path, remedy: str = "delete it, or choose another --workdir") -> dict[str, Any]:
    """The JSON object in a file of a run directory; {} where there is no such file.

    Raises:
      UserError: the file cannot be read or holds no JSON object; the message ends with `remedy`.
    """
    try:
        value = strict_json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError(f"a {type(value).__name__}, not an object")
        return value
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); mend it, or choose another --workdir") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); {remedy}") from error


def _flat(config: Json, prefix: str = "") -> dict[str, Json]:
    """Nested mappings -> dotted keys."""
    if not isinstance(config, Mapping) or (prefix and not config):
        return {prefix: config}
    flat = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def listed(differences: list[str]) -> str:
    """Differences on one line, at most `SHOWN` of them."""
    more = len(differences) - SHOWN
    return "; ".join(differences[:SHOWN]) + (f"; and {more} more" if more > 0 else "")


def _below(key: str, names: Collection[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def refuse_inside_run(path: str | os.PathLike) -> None:
    """Raises UserError for a run directory inside another one, whose stages hash and delete what is in their folders.

    The folder of several seeds is none: it holds runs, and no stages.
    """
    found = pathlib.Path(os.path.realpath(path))
    if run := next((folder for folder in found.parents if _holds_stages(folder)), None):
        raise UserError(
            f"{path}: is inside the run {run}, which hashes and deletes its folders; choose another --workdir"
        )


def _holds_stages(folder: pathlib.Path) -> bool:
    if not os.path.isfile(folder / "config.json"):
        return False
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        return isinstance(manifest, dict) and "stages" in manifest
    except (OSError, ValueError, RecursionError):
        return os.path.isfile(folder / "inputs.json")  # its first stage has not ended


class Workdir:
    """The folder of one run, shared by all its processes. Create it after `processes.initialize`.

    Raises:
      UserError: the folder cannot be created, read or written, or is in a bucket, which supports neither appending nor
        renaming.
    """

    def __init__(self, path: str | os.PathLike):
        remedy = "mount the bucket, or keep the run here and its checkpoints there with --config.checkpoints"
        refuse_remote(path, "a run directory", remedy)
        self.path = pathlib.Path(path).absolute()
        try:
            str(self.path).encode("utf-8")
        except UnicodeEncodeError:  # libraries that write checkpoints refuse it
            raise UserError(f"{self.path}: the name is not UTF-8; choose another --workdir") from None
        self._unwritten: dict[str, Json] = {}  # file -> content, until there is something to keep
        self._config: dict[str, Json] = {}  # by dotted key
        self._ignored: tuple[str, ...] = ()
        self._kept = False
        self._made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        if not os.access(self.path, os.R_OK | os.W_OK | os.X_OK):
            raise UserError(f"{self.path}: no permission to read and write there; mend it or choose another --workdir")

    def stage(self, name: str) -> pathlib.Path:
        """The folder of stage `name`, created if absent."""
        folder = self.path
        with disk_errors(folder / name):
            for part in pathlib.PurePath(name).parts:
                folder = folder / part
                folder.mkdir(exist_ok=True)
        return folder

    @functools.cached_property
    def id(self) -> str:
        """A name of this run that no other run has: letters, digits, - and _. It stays the same when the run goes on.

        It names the run where several share a place: checkpoints outside the run directory, and trackers.
        """
        path = self.path / "run_id"
        if is_process_zero() and not path.is_file():
            name = re.sub(r"[^A-Za-z0-9_-]+", "-", self.path.name)[:40]
            with disk_errors(path), atomic_write(path) as file:
                file.write_text(f"{name}-{uuid.uuid4().hex[:8]}\n", encoding="utf-8")
        barrier("run id")
        try:
            found = path.read_text(encoding="utf-8").strip()
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read ({error}); restore it, or choose another --workdir") from error
        if not re.fullmatch(r"[A-Za-z0-9_-]+", found):
            raise UserError(f"{path}: holds no id of a run; restore it, or choose another --workdir")
        return found

    # ---- what the run in the folder was started with

    def check_config(self, config: Mapping[str, Json], ignore: Collection[str] = ()) -> None:
        """Checks that the config continues the run already in the folder. `keep` stores it as config.json.

        Args:
          config: nested mapping of JSON values.
          ignore: dotted keys (or sections) that may change between restarts, such as the logging interval.

        Raises:
          UserError: any other key differs from the stored config; the message lists old and new values.
        """
        config = json.loads(json.dumps(config))  # tuples become lists, as in the stored file
        self._config, self._ignored = _flat(config), tuple(ignore)
        stored = read_object(self.path / "config.json")
        if stored:
            old, new = _flat(stored), self._config
            changed = [
                f"{key}: {json.dumps(old[key]) if key in old else '(absent)'} -> "
                f"{json.dumps(new[key]) if key in new else '(absent)'}"
                for key in sorted(old.keys() | new.keys())
                if (key not in old or key not in new or old[key] != new[key]) and not _below(key, ignore)
            ]
            if changed:
                raise UserError(
                    f"{self.path}: holds a run with another config ({listed(changed)}); "
                    "undo the change, choose another --workdir, or delete the folder to start over"
                )
        self._unwritten["config.json"] = config

    def check_contents(self, inputs: Mapping[str, Mapping[str, str]]) -> None:
        """Checks that files and folders the run reads are those it started with. `keep` adds them to inputs.json.

        Args:
          inputs: dotted setting -> {"path": what it names, "hash": of the contents}.

        Raises:
          UserError: the contents of an input differ although its setting is the same; the message lists the inputs.
        """
        stored = self._unwritten.get("inputs.json") or read_object(self.path / "inputs.json")
        changed = [
            f"{name}: {found['path']}"
            for name, found in inputs.items()
            if (old := stored.get(name)) and old["path"] == found["path"] and old["hash"] != found["hash"]
        ]
        if changed:
            raise UserError(
                f"{self.path}: what this run reads has changed since it started ({listed(changed)}); put back what was "
                f"there, choose another --workdir, or delete {self.path / 'inputs.json'} to go on with what is there "
                "now (finished stages stay; interrupted training does not go on)"
            )
        self._unwritten["inputs.json"] = {**stored, **{name: dict(found) for name, found in inputs.items()}}
        if self._kept:
            self.keep()

    def keep(self) -> None:
        """Writes config.json and inputs.json. From now on the folder belongs to this config: call it before something
        is written that a later run would go on from.

        Raises:
          UserError: the folder was deleted, or the disk is full or unwritable.
        """
        if not (self.path / "config.json" if self._kept else self.path).exists():
            raise UserError(f"{self.path}: was deleted while the run used it; start the run again")
        for name in tuple(self._unwritten):
            on_process_zero(write_json)(self.path / name, self._unwritten.pop(name))
        self._kept = bool(self._config)

    def origin(self, stage: str) -> dict[str, Json]:
        """What the checkpoints of a stage depend on: settings that may not change, and hashes of inputs, by name."""
        inputs = self._unwritten.get("inputs.json") or read_object(self.path / "inputs.json")
        own = (stage.replace("/", "."),)

        def matters(key: str) -> bool:
            return not _below(key, self._ignored) or _below(key, own)

        found = {key: value for key, value in self._config.items() if matters(key)}
        read = {f"contents of {name}": value["hash"] for name, value in inputs.items() if matters(name)}
        return found | read if self._config else {}

    # ---- finished stages

    def _manifest(self) -> dict[str, dict[str, Any]]:
        path = self.path / "manifest.json"
        remedy = "delete it: stages then go on from their last checkpoints"
        found = read_object(path, remedy)
        for name in ("stages", "outputs"):
            entries = found.setdefault(name, {})
            if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
                raise UserError(f"{path}: is damaged, {name!r} is no list of stages; {remedy}")
        return found

    def finished(self, stage: str) -> dict[str, Json] | None:
        """The record of `mark_finished` for `stage`; None while it is unfinished, or where its folder was deleted."""
        manifest = self._manifest()
        if any(files and not (self.path / name).exists() for name, files in _of(stage, manifest["outputs"])):
            return None
        return manifest["stages"].get(stage)

    def mark_finished(self, stage: str, seconds: float, **info: Json) -> None:
        """Records in manifest.json that `stage` finished after `seconds`, with JSON values `info` and the hashes of the
        files in its folder.
        """
        self.keep()
        manifest = self._manifest()
        manifest["stages"][stage] = {"seconds": seconds, **info}
        others = [name for name in manifest["stages"] if name.startswith(f"{stage}/")]
        on_process_zero(self._write_manifest)(manifest, stage, others)

    def _write_manifest(self, manifest: dict[str, Any], stage: str, others: list[str]) -> None:
        folder = self.path / stage
        files = visible_files(folder) if folder.is_dir() else []
        names = [path.relative_to(self.path).as_posix() for path in files]
        names = [
            name
            for name in names
            if not set(pathlib.PurePosixPath(name).parts) & {*_WORKING}
            and not any(name.startswith(f"{other}/") for other in others)
            and not name.rpartition("/")[2].startswith("nan_batch_")
        ]
        with watched(f"hashing the files of stage {stage}", names) as seen:
            manifest["outputs"][stage] = {name: content_hash(self.path / name) for name in seen}
        write_json(self.path / "manifest.json", manifest)

    def check_outputs(self, stage: str) -> None:
        """Raises UserError where a file of a finished stage is missing or has other contents. Process 0 looks."""
        if not is_process_zero():
            return
        outputs = [(part, *file) for part, files in _of(stage, self._manifest()["outputs"]) for file in files.items()]
        with watched(f"checking the files of stage {stage}", outputs) as seen:
            for part, name, value in seen:
                path = self.path / name
                if not path.is_file() or content_hash(path) != value:
                    state = "has changed since the stage wrote it" if path.is_file() else "is missing"
                    raise UserError(
                        f"{path}: {state}; restore it, or delete {self.path / part} to run the stage {part} again"
                    )

    def mark_rewritten(self, path: pathlib.Path) -> None:
        """Records the new contents of a file of a finished stage that was changed on purpose."""
        manifest, name = self._manifest(), path.absolute().relative_to(self.path).as_posix()
        for files in manifest["outputs"].values():
            if name in files:
                files[name] = content_hash(path)
        write_json(self.path / "manifest.json", manifest)

    # ---- the lock

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other runs out of the folder. A lock whose process has ended is taken over. A run that is refused
        before it has written anything leaves neither a lock nor a folder.

        Raises:
          UserError: another run uses the folder; the message names its process and host.
        """
        path = self.path / "lock"
        with contextlib.ExitStack() as stack:
            if is_process_zero():
                stack.enter_context(_held(path))
            barrier("lock")
            if not path.is_file():
                raise UserError(
                    f"{self.path}: process {jax.process_index()} does not see what process 0 writes there; choose a "
                    "--workdir that all processes share"
                )
            try:
                yield
            except UserError:
                with contextlib.suppress(OSError):  # such as a folder that was deleted
                    if is_process_zero() and os.listdir(self.path) == [path.name]:
                        path.unlink()
                        for folder in self._made:
                            folder.rmdir()
                raise


def _of(stage: str, outputs: Mapping[str, Any]) -> list[tuple[str, dict[str, str]]]:
    """What a stage and its parts wrote."""
    return [(name, files) for name, files in outputs.items() if name == stage or name.startswith(f"{stage}/")]


@contextlib.contextmanager
def _held(path: pathlib.Path) -> Iterator[None]:
    """Holds the lock file `path`, which names its holder and shows signs of life to hosts that share no kernel lock."""
    with disk_errors(path):
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _take(path, file)
        me = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        }
        ended = threading.Event()

        def show(beat: int) -> None:
            text = (json.dumps({**me, "beat": beat}) + "\n").encode()
            os.pwrite(file, text, 0)
            os.ftruncate(file, len(text))

        def live() -> None:
            for beat in itertools.count(1):
                if ended.wait(BEAT):
                    return
                with contextlib.suppress(OSError):
                    show(beat)

        with disk_errors(path):
            show(0)
        thread = threading.Thread(target=live, name="lock", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            with contextlib.suppress(OSError):
                os.ftruncate(file, 0)
    finally:
        os.close(file)


def _take(path: pathlib.Path, file: int) -> None:
    """Locks an open lock file.

    Raises:
      UserError: another process holds it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _in_use(path) from None
    except OSError as error:
        log.warning("%s: the file system has no locks (%s)", path, error.strerror)
    if holder := _holder(path):
        if _is_alive(path, holder):
            raise _in_use(path)
        log.info("%s: process %s on %s ended without a word; going on", path, holder["pid"], holder["host"])


def _holder(path: pathlib.Path) -> dict[str, Any] | None:
    """Who holds a lock; None for nobody."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) and {"pid", "host", "since"} <= found.keys() else None
    except (OSError, ValueError):
        return None


def _is_alive(path: pathlib.Path, holder: Mapping[str, Any]) -> bool:
    """Whether the holder of a lock that the kernel does not refuse still runs: on another host, or on a file system
    without locks. A process that exists may be another one of the same number, so the sign of life counts.
    """
    if holder["host"] == socket.gethostname():
        try:
            os.kill(int(holder["pid"]), 0)
        except (ProcessLookupError, ValueError, TypeError):
            return False
        except PermissionError:
            pass
    log.info("%s: waiting for a sign of life of process %s on %s", path, holder["pid"], holder["host"])
    time.sleep(3 * BEAT)
    now = _holder(path)
    return now is not None and now != holder


def _in_use(path: pathlib.Path) -> UserError:
    holder = _holder(path) or {"pid": "(unknown)", "host": "this file system", "since": "an unknown time"}
    return UserError(
        f"{path.parent}: process {holder['pid']} on {holder['host']} has been running there since {holder['since']}; "
        "wait for it or stop it, or choose another --workdir"
    )
