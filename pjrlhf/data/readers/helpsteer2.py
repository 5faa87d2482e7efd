"""HelpSteer2 (arXiv 2406.08673) and HelpSteer2-Preference (arXiv 2410.01257)."""

import dataclasses
import re
from collections.abc import Iterator

from pjrlhf.data.readers.raw import Raw, Row
from pjrlhf.data.readers.reader import DataReader, ReaderSettings, Record, converted, number, text
from pjrlhf.data.records import RecordError
from pjrlhf.settings import setting

ASPECTS = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
_TURN = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HelpSteer2Settings(ReaderSettings):
    """What a config may say about HelpSteer2."""

    gives: str = setting(
        "preferences",
        "verdicts on pairs, from the folder preference; or, from the main files, pairs by each aspect, or single "
        "answers with their five ratings",
        choices=("preferences", "aspects", "answers"),
    )
    aspects: tuple[str, ...] = setting(ASPECTS, "aspects to compare by, with gives=aspects", choices=ASPECTS)
    aspect_as_user: bool = setting(False, "name the aspect as user_id, too, so that aspects are people who disagree")


def prompt(value: str) -> str | list[dict[str, str]]:
    """A prompt: text, or a conversation where it holds marks of turns.

    Raises:
      RecordError: a turn is blank.
    """
    first, *rest = _TURN.split(value)
    if not rest:
        return value
    turns = [("User", first), *zip(rest[::2], rest[1::2], strict=True)]
    return [{"role": role.lower(), "content": text({"prompt": said}, "prompt")} for role, said in turns]


def verdict(row: Row, settings: HelpSteer2Settings, raw: Raw) -> Iterator[Record]:
    """The record of a row of preference/: `prompt`, `response_1`, `response_2`, `preference_strength`, `split`."""
    wanted = {"train": "train", "validation": "val"}.get(settings.split, settings.split)
    if text(row, "split") != wanted:
        raw.drop("other split")
        return
    strength = number(row, "preference_strength")
    if not -3 <= strength <= 3:
        raise RecordError("bad preference_strength", f"{strength:g} is not between -3 and 3")
    answers = text(row, "response_1"), text(row, "response_2")
    if strength == 0 or answers[0] == answers[1]:
        raw.drop("ties" if strength == 0 else "identical answers")
        return
    rejected, chosen = answers if strength > 0 else answers[::-1]
    yield {"prompt": prompt(text(row, "prompt")), "chosen": chosen, "rejected": rejected, "margin": abs(strength)}


def rated(row: Row) -> Record:
    """The record of a row of the main files: `prompt`, `response` and the five aspects, 0 to 4.

    Raises:
      RecordError: a column is missing, null or of another type, or a rating is out of range.
    """
    rewards = {aspect: number(row, aspect) for aspect in ASPECTS}
    for aspect, rating in rewards.items():
        if not 0 <= rating <= 4:
            raise RecordError(f"bad {aspect}", f"{rating:g} is not between 0 and 4")
    return {"prompt": prompt(text(row, "prompt")), "completion": text(row, "response"), "rewards": rewards}


def by_aspect(first: Row, second: Row, settings: HelpSteer2Settings, raw: Raw) -> Iterator[Row]:
    """Preference records of two rated answers to one prompt, one for each aspect in which they differ."""
    if first["completion"] == second["completion"]:
        raw.drop("identical answers")
        return
    for aspect in settings.aspects:
        margin = first["rewards"][aspect] - second["rewards"][aspect]
        if margin == 0:
            raw.drop(f"ties in {aspect}")
            continue
        better, worse = (first, second) if margin > 0 else (second, first)
        record = {"prompt": first["prompt"], "chosen": better["completion"], "rejected": worse["completion"]}
        user = {"user_id": aspect} if settings.aspect_as_user else {}
        yield Row({**record, "objective": aspect, "margin": abs(margin), **user}, first.where)


def read(settings: HelpSteer2Settings, raw: Raw) -> Iterator[Row | RecordError]:
    """The records of the set."""
    if settings.gives == "preferences":
        rows = raw("preference/*", split="train", hub={"data_dir": "preference"})
        yield from converted(rows, lambda row: verdict(row, settings, raw))
        return
    waiting: Row | None = None
    for row in converted(raw(), lambda row: [rated(row)]):
        if isinstance(row, RecordError) or settings.gives == "answers":
            yield row
        elif waiting is not None and waiting["prompt"] == row["prompt"]:
            yield from by_aspect(waiting, row, settings, raw)
            waiting = None
        else:
            raw.drop("answers without a second one", waiting is not None)
            waiting = row
    raw.drop("answers without a second one", waiting is not None)


READER = DataReader(
    kind="helpsteer2",
    settings=HelpSteer2Settings,
    read=read,
    title="HelpSteer2 (arXiv 2406.08673): 21,362 answers rated in five aspects, 7,118 verdicts on pairs (2410.01257)",
    home="https://huggingface.co/datasets/nvidia/HelpSteer2",
    licence="CC BY 4.0",
    mapping={
        "prompt": "prompt; a conversation where it holds marks of turns",
        "chosen": "response_2 where preference_strength is above 0, else response_1; by aspects: the one rated higher",
        "rejected": "the other response",
        "margin": "size of preference_strength, 1 to 3; by aspects: difference of the ratings",
        "objective": "by aspects: the aspect",
        "user_id": "by aspects, with aspect_as_user: the aspect",
        "completion": "with gives=answers: response",
        "rewards": "with gives=answers: the five ratings, 0 to 4",
    },
    traps=(
        "a positive preference_strength means that the second response is the better one",
        "the file of verdicts is one for both splits: `split` chooses by its column split (train, val)",
        "prompts of several turns mark them by <extra_id_1>User and <extra_id_1>Assistant (not verified): they become "
        "messages",
        "aspects of one prompt are several records: split by prompt",
        "verdicts of single annotators (folder disagreements) have no annotator ids: not read",
        "ties and identical answers are left out and counted",
    ),
)
