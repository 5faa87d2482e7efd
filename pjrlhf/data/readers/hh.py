"""HH-RLHF (arXiv 2204.05862), and its copy with two conflicting objectives that VPL uses (arXiv 2408.10075)."""

import dataclasses
import functools
from collections.abc import Iterator

from pjrlhf.data.readers.raw import Raw, Row
from pjrlhf.data.readers.reader import DataReader, ReaderSettings, Record, converted, text
from pjrlhf.data.records import RecordError
from pjrlhf.data.schema import ASSISTANT_MARKER
from pjrlhf.settings import setting, shown

SUBSETS = ("helpful-base", "harmless-base", "helpful-online", "helpful-rejection-sampled")
OBJECTIVES = ("helpful", "harmless")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HhSettings(ReaderSettings):
    """Pairs of transcripts."""

    name: str = setting("", "one of the folders of the set; all of them if empty", choices=("", *SUBSETS))
    objective_as_user: bool = setting(False, "make the objective of a pair its user_id, a person who wants it alone")


@dataclasses.dataclass(frozen=True, kw_only=True)
class VplSettings(ReaderSettings):
    """Pairs of the relabelled set."""

    name: str = setting("both", "the folder", choices=("both", *OBJECTIVES))
    objective_as_user: bool = setting(True, "make the objective of a pair its user_id, a person who wants it alone")


def split_transcript(whole: str) -> tuple[str, str]:
    """(the prompt up to its last turn mark, the answer) of a transcript, with the blanks that the set has.

    Raises:
      RecordError: no turn of the assistant, or none of a person before it.
    """
    start = whole.rfind(ASSISTANT_MARKER)
    prompt, answer = whole[: start + len(ASSISTANT_MARKER)], whole[start + len(ASSISTANT_MARKER) :]
    if start < 0 or "Human:" not in prompt:
        raise RecordError("no transcript", 'it does not end in a turn "\\n\\nAssistant:" after one of "Human:"')
    # A copy of the set without the leading line feeds has the same prompts.
    return (prompt if prompt.startswith("\n\n") else f"\n\n{prompt.lstrip()}"), answer


def pair(row: Row, objective: str, as_user: bool) -> Record:
    """The record of two transcripts.

    Raises:
      RecordError: something is missing, an answer is empty, both are equal, or the transcripts answer different
        prompts.
    """
    (prompt, chosen), (other, rejected) = (split_transcript(text(row, name)) for name in ("chosen", "rejected"))
    if prompt.strip() != other.strip():
        raise RecordError("the prompts differ", "chosen and rejected part before the last turn of the assistant")
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if not answer.strip():
            raise RecordError(f"empty {name}")
    if chosen.strip() == rejected.strip():
        raise RecordError("chosen equals rejected")
    found = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "objective": objective}
    return {**found, "user_id": objective} if as_user else found


def _one(row: Row, objective: str, as_user: bool) -> list[Record]:
    return [pair(row, objective, as_user)]


def _read(settings: HhSettings, raw: Raw) -> Iterator[Row | RecordError]:
    if raw.is_file:
        objective = (settings.name or raw.path.split("/")[-2:][0]).split("-")[0]
        if objective not in OBJECTIVES:
            raise raw.error("name", f"a file alone does not say its folder; set it to one of {', '.join(SUBSETS)}")
        yield from converted(raw(), functools.partial(_one, objective=objective, as_user=settings.objective_as_user))
        return
    wanted = [settings.name] if settings.name else [name for name in SUBSETS if not raw.is_folder or _has(raw, name)]
    for name in wanted or SUBSETS[:1]:  # without any, opening the first one says what is missing
        rows = raw(f"{name}/*", hub={"name": None, "data_dir": name})
        yield from converted(
            rows, functools.partial(_one, objective=name.split("-")[0], as_user=settings.objective_as_user)
        )


def _has(raw: Raw, name: str) -> bool:
    return raw.holds(f"{name}/*")


def relabelled(row: Row, as_user: bool) -> Record:
    """The record of a row of VPL's copy.

    Raises:
      RecordError: see `pair`; also an objective that is neither helpful nor harmless.
    """
    objective = text(row, "objective")
    if objective not in OBJECTIVES:
        raise RecordError("bad objective", f"{shown(objective)} is neither helpful nor harmless")
    return pair(row, objective, as_user)


def _read_vpl(settings: VplSettings, raw: Raw) -> Iterator[Row | RecordError]:
    def convert(row: Row) -> list[Record]:
        return [relabelled(row, settings.objective_as_user)]

    yield from converted(raw(f"{settings.name}/*", hub={"name": None, "data_dir": settings.name}), convert)


_MAPPING = {
    "prompt": 'the transcript up to its last "\\n\\nAssistant:"; turns of the chat template where requests are chats',
    "chosen": "what follows it in chosen",
    "rejected": "what follows it in rejected",
}

READERS = {
    "hh_rlhf": DataReader(
        kind="hh_rlhf",
        settings=HhSettings,
        read=_read,
        title="HH-RLHF (arXiv 2204.05862): helpful and harmless pairs of transcripts; name: one folder",
        home="https://huggingface.co/datasets/Anthropic/hh-rlhf",
        licence="MIT",
        mapping={
            **_MAPPING,
            "objective": "helpful or harmless, by the folder",
            "user_id": "with objective_as_user, the objective",
        },
        traps=(
            "the prompts of the two sides differ in a few rows: bad records, and never answers of several turns",
            "some answers are empty, or equal but for blanks: bad records",
            "red-team-attempts has another format and is never read",
            "there are no ids of annotators: objective_as_user makes two people of the two objectives",
        ),
    ),
    "vpl_hh": DataReader(
        kind="vpl_hh",
        settings=VplSettings,
        read=_read_vpl,
        title="HH-RLHF relabelled by two objectives (VPL, arXiv 2408.10075), data/relabeled_hh_rlhf; name: one folder",
        home="https://github.com/WEIRDLabUW/vpl_llm",
        licence="MIT of HH-RLHF",
        mapping={**_MAPPING, "objective": "objective", "user_id": "with objective_as_user, the objective"},
        traps=(
            "transcripts lack the leading line feeds of the original: they are put back, so that prompts are equal",
            "`both` has each prompt under both objectives: split by prompt, not by row",
            "`chosen` is by the new label; the original one stays in the column original_label of the raw file",
        ),
    ),
}
