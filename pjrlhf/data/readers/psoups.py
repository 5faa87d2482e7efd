"""The feedback of Personalized Soups (arXiv 2310.11564): pairs of answers per preference, P1A to P3B."""

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping

from pjrlhf.data.preferences import PAPER
from pjrlhf.data.readers.raw import Raw, Row
from pjrlhf.data.readers.reader import DataReader, ReaderSettings, Record, converted, field, text
from pjrlhf.data.records import RecordError
from pjrlhf.settings import setting, shown

PROFILES = tuple(PAPER)  # P1A, P1B, P2A, P2B, P3A, P3B; `uid` counts them from 1
_TURN = re.compile(r"^\s*<\|user\|>\s*|\s*<\|assistant\|>\s*$")


def _sentence(profile: str) -> re.Pattern[str]:
    """The sentence of a preference with any punctuation, white space and case: the files lack commas of the paper."""
    words = re.findall(r"\w+", PAPER[profile].sentence)
    return re.compile(r"\s*" + r"\W+".join(words) + r"\W*", re.IGNORECASE)


_SENTENCES = {profile: _sentence(profile) for profile in PROFILES}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PsoupsSettings(ReaderSettings):
    """Pairs per preference."""

    profiles: tuple[str, ...] = setting(PROFILES, "the preferences whose pairs are read", choices=PROFILES)
    stated: bool = setting(False, "leave the sentence of the preference in the prompt")


def profile_of(row: Row) -> str:
    """The preference of a row: by its column `uid`, from 1, or by the name of its file.

    Raises:
      RecordError: neither tells one.
    """
    if "uid" in row:
        uid = row["uid"]
        try:
            number = int(uid)
        except (TypeError, ValueError) as error:
            raise RecordError("bad uid", f"{shown(uid)} is not a number from 1 to 6") from error
        if number not in range(1, 1 + len(PROFILES)) or isinstance(uid, bool):
            raise RecordError("bad uid", f"{shown(uid)} is not a number from 1 to 6")
        return PROFILES[number - 1]
    found = re.search(r"(?<![A-Za-z0-9])(P[123][AB])(?![A-Za-z0-9])", row.where)
    if not found:
        raise RecordError("no preference", "no column uid, and the file is not called P1A.json to P3B.json")
    return found[1]


def without_sentence(prompt: str, profile: str) -> str:
    """A prompt without the sentence of its preference, wherever it stands."""
    return _SENTENCES[profile].sub(" ", prompt).strip()


def pair(row: Mapping[str, object], profile: str, stated: bool = False) -> Record:
    """The record of a row of `rm_training` (`user_input`, `completion_a`, `completion_b`) or of its copy on the hub
    (`prompt`, `chosen`, `rejected`).

    Raises:
      RecordError: something is missing, or nothing but the sentence is in the prompt.
    """
    names = ("user_input", "completion_a", "completion_b") if "user_input" in row else ("prompt", "chosen", "rejected")
    prompt = _TURN.sub("", text(row, names[0]))
    if not stated:
        prompt = without_sentence(prompt, profile)
    if not prompt:
        raise RecordError("empty prompt", "it is the sentence of the preference alone")
    record = {"prompt": prompt, "chosen": text(row, names[1]), "rejected": text(row, names[2])}
    return {**record, "user_id": profile, "objective": profile, "user_text": PAPER[profile].sentence}


def _read(settings: PsoupsSettings, raw: Raw) -> Iterator[Row | RecordError]:
    seen: set[tuple[str, ...]] = set()
    convert = functools.partial(_distinct, settings=settings, raw=raw, seen=seen)
    yield from converted(_rows(settings, raw), convert)


def _rows(settings: PsoupsSettings, raw: Raw) -> Iterator[Row | RecordError]:
    """The rows of rm_training/P1A.json to P3B.json where the folder has them, else those of the split."""
    if raw.is_folder and raw.holds("rm_training/P[123][AB]"):
        for profile in settings.profiles:
            yield from raw(f"rm_training/{profile}", split=None)
    else:
        yield from raw(split=None if raw.is_folder and raw.holds("P[123][AB]") else "")


def _distinct(row: Row, settings: PsoupsSettings, raw: Raw, seen: set[tuple[str, ...]]) -> list[Record]:
    profile = profile_of(row)
    if profile not in settings.profiles:
        return []
    columns = (
        ("user_input", "completion_a", "completion_b") if "user_input" in row else ("prompt", "chosen", "rejected")
    )
    values = [field(row, name) for name in columns]
    if values[1] == values[2]:
        raw.drop("equal answers")
        return []
    key = (profile, *map(str, values))
    if key in seen:
        raw.drop("repeated pairs")
        return []
    record = pair(row, profile, settings.stated)
    seen.add(key)
    return [record]


READER = DataReader(
    kind="psoups",
    settings=PsoupsSettings,
    read=_read,
    title="Personalized Soups (arXiv 2310.11564), feedback per preference: data.zip, rm_training; or RiverDong/psoups",
    home="https://github.com/joeljang/RLPHF",
    licence="none stated; instructions of GPT4-Alpaca are CC BY-NC 4.0",
    mapping={
        "prompt": "user_input (prompt) without the sentence of the preference, and without the turns of Tulu",
        "chosen": "completion_a (chosen)",
        "rejected": "completion_b (rejected)",
        "user_id": "the preference, by the name of the file or uid, 1 to 6",
        "objective": "the same",
        "user_text": "the sentence of the preference, as in the paper",
    },
    traps=(
        "every pair stands about 5.4 times: 291,415 rows are 53,471 pairs; repeated ones are dropped, so that no split "
        "has one on both sides",
        "sentences in the files lack commas of those in the paper: they are found whatever the punctuation",
        "equal answers are dropped",
        "one prompt stands under several preferences: split by prompt (preference.split=prompt), not by row",
        "what uid means, 1 = P1A to 6 = P3B, is inferred from its order",
    ),
)
