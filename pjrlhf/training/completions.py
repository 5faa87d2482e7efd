"""Tables of answers during training: as parquet in the run directory, and on the terminal."""

import pathlib
import re
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from pjrlhf.paths import atomic_write
from pjrlhf.terminal import visible

FOLDER = "completions"
# Columns of text; all others hold numbers, or None where there is no number.
TEXTS = ("policy", "user", "objective", "prompt", "completion", "chosen", "rejected", "weights")
LONG = ("prompt", "completion", "chosen", "rejected")  # they have lines of their own on the terminal
Row: TypeAlias = Mapping[str, str | float | None]


def file_of(workdir: pathlib.Path, stage: str, step: int) -> pathlib.Path:
    """<workdir>/completions/<stage>-<step>.parquet."""
    return workdir / FOLDER / f"{stage}-{step}.parquet"


def write_rows(path: pathlib.Path, step: int, rows: Sequence[Row]) -> None:
    """Writes a table as parquet, with a column `step` before its own; the file appears when it is whole."""
    import pyarrow
    import pyarrow.parquet

    names = list(dict.fromkeys(name for row in rows for name in row))
    types = {name: pyarrow.string() if name in TEXTS else pyarrow.float64() for name in names}
    schema = pyarrow.schema([("step", pyarrow.int64()), *types.items()])
    table = pyarrow.Table.from_pylist([{"step": step, **row} for row in rows], schema)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        pyarrow.parquet.write_table(table, file)


def drop_after(workdir: pathlib.Path, stage: str, step: int) -> None:
    """Deletes the tables of a stage after a step, from which it continues."""
    folder = (workdir / FOLDER / stage).parent
    pattern = re.compile(rf"{re.escape(pathlib.PurePath(stage).name)}-(\d+)\.parquet")
    for file in folder.iterdir() if folder.is_dir() else ():
        if (found := pattern.fullmatch(file.name)) and int(found[1]) > step:
            file.unlink()


def spread(size: int, count: int) -> list[int]:
    """Up to `count` numbers below `size`, evenly spread."""
    count = min(count, size)
    return [i * size // count for i in range(count)]


def print_rows(stage: str, step: int, rows: Sequence[Row], count: int) -> None:
    """Prints up to `count` rows, spread over the table, on stdout; control characters as escapes.

    On a terminal lines break between words; elsewhere a line is as long as its text.
    """
    if not count or not rows:
        return
    shown = [rows[i] for i in spread(len(rows), count)]
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
    print(visible(f"{stage}, step {step}: {len(shown)} of {len(rows)} rows"))
    for row in shown:
        short = [f"{name} {_cell(x)}" for name, x in row.items() if name not in LONG and x not in (None, "")]
        for text in ["  ".join(short), *(f"  {name}: {row[name]}" for name in LONG if name in row)]:
            _print(text, width)
    sys.stdout.flush()


def _cell(value: str | float | None) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


def _print(text: str, width: int) -> None:
    for line in visible(text, keep="\n").split("\n"):
        whole = (
            textwrap.wrap(line, width, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
            if width
            else [line]
        )
        print("\n".join(whole))


def markdown(rows: Sequence[Row]) -> str:
    """The table in Markdown, as TensorBoard shows it."""
    names = list(dict.fromkeys(name for row in rows for name in row))

    def cell(value: str | float | None) -> str:
        text = "" if value is None else _cell(value)
        return visible(text, keep="\n").replace("\\", "\\\\").replace("|", "\\|").replace("\n", "<br>")

    lines = [names, ["---"] * len(names), *([cell(row.get(name)) for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
