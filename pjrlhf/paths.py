"""Paths in a config, local or in a bucket (gs://, s3://) for inputs and checkpoints; and atomic writing of files.

Files in a bucket cannot be appended to or renamed, so run directories and exports must be on file systems.
"""

import contextlib
import errno
import hashlib
import importlib.metadata
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import TypeAlias

import xxhash
from etils import epath

from pjrlhf.errors import UserError, reason_of

# Called with (bytes done, all bytes) during a long pass.
Report: TypeAlias = Callable[[int, int], None]

EXTRAS = {"gs": "gcs", "s3": "s3"}  # scheme -> the optional dependency that reads it
# Weights in formats that are never read; model folders often have several formats.
_UNUSED = (".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
_CHUNK = 2**24  # bytes in memory while a file is copied
_DISK = {
    errno.ENOSPC: "the disk is full; free some space",
    errno.EDQUOT: "the disk quota is used up; free some space",
    errno.EACCES: "no permission to write there; mend it or choose another --workdir or output folder",
    errno.EPERM: "no permission to write there; mend it or choose another --workdir or output folder",
    errno.EROFS: "the file system is read-only; choose another --workdir or output folder",
    errno.ENOTDIR: "a file stands where a folder is needed; choose another --workdir or output folder",
    errno.EEXIST: "a file stands where a folder is needed; choose another --workdir or output folder",
    errno.EISDIR: "a folder stands where a file is needed; move it away",
    errno.ELOOP: "a link there leads nowhere; delete it",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
    errno.EIO: "the disk reports an error; choose another one",
    errno.EFBIG: "the limit on the size of a file is reached; raise it (ulimit -f)",
    errno.ENOENT: "no folder can be made there, or it was deleted while the run used it; start the run again, or "
    "choose another --workdir or output folder",
    errno.ESTALE: "its folder was deleted while the run used it; start the run again",
}


def user_cache() -> pathlib.Path:
    """The user's cache folder: its files can be computed or downloaded again."""
    root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(root) / "pjrlhf"


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """A temporary sibling of `path` to write to: it replaces `path` if the block succeeds, and is deleted if it fails.

    So a reader sees the old file or the new one, never a part, even after a crash.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with shown_as(temporary, path):
            yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def shown_as(temporary: pathlib.Path, path: pathlib.Path) -> Iterator[None]:
    """Messages of UserErrors name `path`, which is what a temporary file or folder will become."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace(str(temporary), str(path))) from error


@contextlib.contextmanager
def disk_errors(path: str | os.PathLike) -> Iterator[None]:
    """Turns errors of a full or unwritable disk while writing `path` into a UserError; other errors pass through."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        for code, remedy in _DISK.items():
            # Checkpoint libraries wrap the system's message in errors of their own types.
            if (isinstance(error, OSError) and error.errno == code) or os.strerror(code) in str(error):
                raise UserError(f"{path}: cannot be written, {remedy}") from error
        raise


def visible_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """All files in a folder and its subfolders, in order, but for hidden ones: caches, locks and half-written files."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return sorted(x for x in found if not any(part.startswith(".") for part in x.relative_to(folder).parts))


def content_hash(path: str | os.PathLike) -> str:
    """16 hex digits that identify the contents of a file, or the names and contents of the visible files of a folder.

    XXH3 is as fast as reading the files, but not cryptographic.
    """
    path = pathlib.Path(path)
    if not path.is_dir():
        with path.open("rb") as file:
            return hashlib.file_digest(file, xxhash.xxh3_64).hexdigest()
    digest = xxhash.xxh3_64()
    for file in visible_files(path):
        digest.update(f"{file.relative_to(path).as_posix()}\0{content_hash(file)}\0".encode())
    return digest.hexdigest()


def is_remote(path: str | os.PathLike) -> bool:
    return "://" in os.fspath(path)


def refuse_remote(path: str | os.PathLike, what: str, remedy: str) -> None:
    """Raises UserError for a path in a bucket; the message says that `what` needs a file system."""
    if is_remote(path):
        raise UserError(f"{path}: {what} must be on a file system; {remedy}")


@contextlib.contextmanager
def bucket_errors(path: str | os.PathLike) -> Iterator[None]:
    """Turns errors of a path in a bucket into one UserError; errors of local paths pass through."""
    if not is_remote(path):
        yield
        return
    scheme, _, rest = os.fspath(path).partition("://")
    if scheme == "file":
        raise UserError(f"{path}: a path stands without file://; write {rest}")
    if scheme not in EXTRAS:
        raise UserError(
            f"{path}: {scheme}:// cannot be read; download it and name the local file or folder, or use "
            f"{' or '.join(f'{x}://' for x in EXTRAS)}"
        )
    try:
        yield
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f"{path}: {error}; {install(EXTRAS[scheme])}") from error
    except Exception as error:  # clients raise their own kinds for network, credentials and store
        reason = reason_of(error, 200)
        raise UserError(f"{path}: cannot be reached ({reason}); check the name and the credentials") from error


def install(extra: str) -> str:
    """The command that installs the packages of an extra of this package. pip takes the package itself as it is
    installed, so that it need not be on a package index.
    """
    try:
        known = importlib.metadata.metadata("pjrlhf").get_all("Provides-Extra") or []
    except importlib.metadata.PackageNotFoundError:  # a clone that is not installed
        known = []
    if extra not in known:  # or the clone has changed since it was installed
        return f"pip install '.[{extra}]' in the folder of the clone"
    return f"pip install 'pjrlhf[{extra}]'"


@contextlib.contextmanager
def read_errors(path: str | os.PathLike) -> Iterator[None]:
    """Turns errors of the operating system while a local `path` is read into a UserError."""
    try:
        yield
    except OSError as error:
        if is_remote(path):
            raise
        reason = error.strerror or str(error)
        raise UserError(f"{path}: cannot be read ({reason}); check its permissions and the disk") from error


def expand(path: str | os.PathLike) -> str:
    """A path with ~ as the home folder; addresses of buckets stay.

    Raises:
      UserError: a null character, which no file system takes.
    """
    path = os.fspath(path)
    if "\0" in path:
        raise UserError(f"{path!r}: a path cannot hold a null character; leave it out")
    return path if is_remote(path) else os.path.expanduser(path)


def local(path: str | os.PathLike, report: Report | None = None) -> pathlib.Path:
    """The local path of a file or folder: `path` itself, with ~ expanded, or a copy of what is in a bucket.

    The copy stays in the user's cache and is used again while names, sizes and times in the bucket are unchanged.
    `report` is told how much is copied.

    Raises:
      UserError: no such file or folder in the bucket, or the bucket cannot be reached.
    """
    if not is_remote(path):
        return pathlib.Path(expand(path))
    with bucket_errors(path):
        source = epath.Path(path)
        if source.is_dir():
            files = sorted(x for x in _files(source) if x.suffix not in _UNUSED)
        elif source.is_file():
            files = [source]
        else:
            raise UserError(f"{path}: no such file or folder; check the name")
        stats = [(x, x.stat()) for x in files]
        listing = repr([(str(x), stat.length, stat.mtime) for x, stat in stats])
        folder = user_cache() / "fetched" / hashlib.sha256(listing.encode()).hexdigest()[:16]
        target = folder / source.name
        if not target.exists():
            _fetch(source, {file: stat.length for file, stat in stats}, folder, report)
    return target


def _files(folder: epath.Path) -> Iterator[epath.Path]:
    """All files in a folder and its subfolders."""
    for path in folder.iterdir():
        if path.is_dir():
            yield from _files(path)
        else:
            yield path


def _fetch(
    source: epath.Path, files: Mapping[epath.Path, int], folder: pathlib.Path, report: Report | None = None
) -> None:
    """Copies `files`, with their sizes in bytes, into `folder`, which appears only when it is complete."""
    half, done = folder.with_name(f".{folder.name}.{os.getpid()}"), 0
    try:
        for file in files:
            copy = half / source.name / file.relative_to(source) if file != source else half / source.name
            copy.parent.mkdir(parents=True, exist_ok=True)
            with file.open("rb") as there, copy.open("wb") as here:
                shutil.copyfileobj(there, here, _CHUNK)
            done += files[file]
            if report:
                report(done, sum(files.values()))
        with contextlib.suppress(OSError):  # another process has renamed its copy first
            half.rename(folder)
    finally:
        shutil.rmtree(half, ignore_errors=True)
