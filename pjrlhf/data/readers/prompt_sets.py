"""Prompts that papers evaluate on: 50 of Koala, as Personalized Soups has them, and AlpacaEval."""

import dataclasses
from collections.abc import Iterator

from pjrlhf.data.readers.raw import Raw, Row
from pjrlhf.data.readers.reader import DataReader, ReaderSettings, Record, converted, text
from pjrlhf.data.records import RecordError
from pjrlhf.settings import setting

SUBSETS = ("helpful_base", "koala", "oasst", "selfinstruct", "vicuna")


@dataclasses.dataclass(frozen=True, kw_only=True)
class KoalaSettings(ReaderSettings):
    """What a config may say about the prompts of Koala."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlpacaEvalSettings(ReaderSettings):
    """What a config may say about AlpacaEval."""

    split: str = setting("eval", "the part of the set; also a slice: eval[:100]")
    gives: str = setting(
        "prompts",
        "prompts alone, or completions, with the answers of the reference model",
        choices=("prompts", "completions"),
    )
    subsets: tuple[str, ...] = setting(SUBSETS, "the sets that the prompts come from", choices=SUBSETS)


def koala(row: Row) -> Iterator[Record]:
    """The record of a raw row: `id` and `prompt`, in which a line feed is a backslash and an n.

    Raises:
      RecordError: `prompt` is missing, null, empty or no text.
    """
    yield {"prompt": text(row, "prompt").replace("\\n", "\n")}


def alpaca_eval(row: Row, settings: AlpacaEvalSettings, raw: Raw) -> Iterator[Record]:
    """The record of a raw row: `instruction`, `output`, `generator` and `dataset`.

    Raises:
      RecordError: a column is missing, null, empty or no text.
    """
    subset = text(row, "dataset")
    if subset not in settings.subsets:
        raw.drop("other subsets")
        return
    record = {"prompt": text(row, "instruction"), "subset": subset}
    if settings.gives == "completions":
        record |= {"completion": text(row, "output"), "generator": text(row, "generator")}
    yield record


def _koala(_: KoalaSettings, raw: Raw) -> Iterator[Row | RecordError]:
    yield from converted(raw(), koala)


def _alpaca_eval(settings: AlpacaEvalSettings, raw: Raw) -> Iterator[Row | RecordError]:
    yield from converted(raw(), lambda row: alpaca_eval(row, settings, raw))


READERS = {
    "koala": DataReader(
        kind="koala",
        settings=KoalaSettings,
        read=_koala,
        title="50 prompts of Koala, on which Personalized Soups (arXiv 2310.11564) evaluates: koala_eval_50.json",
        home="https://storage.googleapis.com/personalized-soups/data.zip",
        licence="not stated",
        mapping={"prompt": "prompt"},
        traps=(
            "line feeds stand as a backslash and an n in the file: they become line feeds",
            "15 of the 50 prompts are also in AlpacaEval: do not train on one and test on the other",
        ),
    ),
    "alpaca_eval": DataReader(
        kind="alpaca_eval",
        settings=AlpacaEvalSettings,
        read=_alpaca_eval,
        title="AlpacaEval: 805 prompts of five sets, with answers of a reference model",
        home="https://huggingface.co/datasets/tatsu-lab/alpaca_eval/resolve/main/alpaca_eval.json",
        licence="CC BY-NC 4.0",
        mapping={"prompt": "instruction", "completion": "with gives=completions: output"},
        traps=(
            "the name on the hub needs a loading script, which no longer runs: download the file",
            "its subset koala overlaps with the 50 prompts of Koala",
        ),
    ),
}
