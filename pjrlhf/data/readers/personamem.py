"""PersonaMem v1 (arXiv 2504.14225) and v2 (arXiv 2512.06688): multiple choice about a user whom long chats reveal."""

import dataclasses
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from pjrlhf.data.readers.literals import literal
from pjrlhf.data.readers.raw import Raw, Row
from pjrlhf.data.readers.reader import DataReader, ReaderSettings, Record, converted, field, number, objects, text
from pjrlhf.data.records import RecordError, name_of
from pjrlhf.errors import UserError
from pjrlhf.settings import setting, shown

_LETTER = re.compile(r"^\s*\(([a-z])\)\s*")
SIZES = ("32k", "128k", "1M")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PersonaMemSettings(ReaderSettings):
    """What a config may say about PersonaMem."""

    version: str = setting("v2", "of the benchmark", choices=("v1", "v2"))
    split: str = setting("benchmark", "of v2: benchmark, train or val; v1 has one part; also a slice")
    size: str = setting("32k", "tokens of history; v2 has no 1M", choices=SIZES)
    last_messages: int = setting(0, "messages at the end of the history that user_text keeps; 0 for all", low=0)
    keep_persona: bool = setting(False, "keep system messages of the history, which describe the person in words")

    def check(self) -> None:
        super().check()
        if self.version == "v2" and self.size == "1M":
            raise UserError("size: v2 has no 1M; choose 32k or 128k, or version v1")


def history(found: Mapping[str, Any], name: str, settings: PersonaMemSettings, end: int | None = None) -> str:
    """One of the histories as text, each message after its role.

    Args:
      end: number of messages before the question; all where None.

    Raises:
      RecordError: no list of messages, or none is left.
    """
    said = []
    for message in objects(found, name)[:end]:
        role, content = text(message, "role"), str(field(message, "content"))
        if role != "system" or settings.keep_persona:
            # Messages of v1 begin with the name of their role.
            said.append({"role": role, "content": content.removeprefix(f"{role.capitalize()}: ")})
    if not said:
        raise RecordError("empty history")
    return "\n\n".join(f"{one['role'].capitalize()}: {one['content']}" for one in said[-settings.last_messages :])


def convert_v1(row: Row, settings: PersonaMemSettings, raw: Raw, contexts: Mapping[str, Any]) -> Iterator[Record]:
    """The correct option of a row of questions_<size>.csv over each other one.

    Args:
      contexts: shared_context_id -> messages.

    Raises:
      RecordError: a column is missing, null or of another type, or names what is not there.
    """
    context, end = text(row, "shared_context_id"), number(row, "end_index_in_shared_context")
    if end < 0:
        raise RecordError("bad end_index_in_shared_context", f"{end:g} is below 0")
    if context not in contexts:
        raise RecordError("unknown shared_context_id", f"{context} is not in shared_contexts_{settings.size}.jsonl")
    options = {}
    for option in _texts(row, "all_options"):
        letter = _LETTER.match(option)
        if not letter:
            raise RecordError("bad all_options", f"{shown(option)} begins with no (a), (b), ...")
        options[letter[1]] = option[letter.end() :]
    letter = _LETTER.match(text(row, "correct_answer"))
    if not letter or letter[1] not in options:
        raise RecordError("bad correct_answer", f"{shown(row['correct_answer'])} is none of {', '.join(options)}")
    told = history(contexts, context, settings, int(end))
    asked = text(row, "question_id"), text(row, "user_question_or_message"), text(row, "question_type")
    correct = options.pop(letter[1])
    yield from _pairs(row, asked, correct, list(options.values()), told, raw)


def convert_v2(row: Row, settings: PersonaMemSettings, raw: Raw, histories: Mapping[str, Any]) -> Iterator[Record]:
    """The correct answer of a row of v2 over each incorrect one.

    Args:
      histories: name of a file of histories -> messages.

    Raises:
      RecordError: a column is missing, null or of another type, or names what is not there.
    """
    link = pathlib.PurePosixPath(text(row, f"chat_history_{settings.size}_link")).name
    if link not in histories:
        raise RecordError("unknown history", f"{link} is not in chat_history_{settings.size}")
    query = text({"user_query": literal(text(row, "user_query"), "user_query")}, "user_query", "content")
    asked = row.where, query, text(row, "pref_type")
    wrong, told = _texts(row, "incorrect_answers"), history(histories, link, settings)
    yield from _pairs(row, asked, text(row, "correct_answer"), wrong, told, raw)


def _texts(row: Row, name: str) -> list[str]:
    found = literal(text(row, name), name)
    if not isinstance(found, list) or not found or not all(isinstance(one, str) and one.strip() for one in found):
        raise RecordError(f"bad {name}", f"{shown(found)} is no list of texts")
    return found


def _pairs(
    row: Row, asked: tuple[str, str, str], correct: str, wrong: list[str], told: str, raw: Raw
) -> Iterator[Record]:
    question, prompt, kind = asked
    user = name_of(field(row, "persona_id"), "persona_id")
    shared = {"prompt": prompt, "user_id": user, "user_text": told, "question": question, "question_type": kind}
    for option in wrong:
        if option == correct:
            raw.drop("identical answers")
        else:
            yield {**shared, "chosen": correct, "rejected": option}


def read(settings: PersonaMemSettings, raw: Raw) -> Iterator[Row | RecordError]:
    """The records of the set."""
    if not raw.is_folder:
        raise raw.error("path", "questions and histories are several files; download the set, and name its folder")
    found: dict[str, Any] = {}
    files = f"shared_contexts_{settings.size}" if settings.version == "v1" else f"chat_history_{settings.size}/*"
    for row in raw(files, split=None):
        if isinstance(row, RecordError):
            yield row
        elif settings.version == "v1":
            found |= row
        else:
            found[pathlib.PurePosixPath(row.where.rpartition(".json")[0]).name + ".json"] = row.get("chat_history")
    if settings.version == "v1":
        rows = raw(f"questions_{settings.size}", split=None)
        yield from converted(rows, lambda row: convert_v1(row, settings, raw, found))
    else:
        rows = raw(f"text/{settings.split}", split=None)
        yield from converted(rows, lambda row: convert_v2(row, settings, raw, found))


READER = DataReader(
    kind="personamem",
    settings=PersonaMemSettings,
    read=read,
    title="PersonaMem v1 (arXiv 2504.14225) and v2 (2512.06688): multiple choice about a user whom long chats reveal",
    home="https://huggingface.co/datasets/bowen-upenn/PersonaMem-v2",
    licence="v1 MIT, v2 CC BY 4.0",
    mapping={
        "prompt": "v1 user_question_or_message, v2 content of user_query",
        "chosen": "v1 the option that correct_answer names, v2 correct_answer",
        "rejected": "each other option, each of incorrect_answers",
        "user_id": "persona_id",
        "user_text": "v1 the shared context up to end_index_in_shared_context, v2 the file of chat_history_<size>_link",
    },
    traps=(
        "v1: what stands behind end_index_in_shared_context is the user's future, and is cut off",
        "system messages of histories describe the person: they are left out, unless keep_persona",
        "v2: several files of histories are of the same persona_id: the file is found by its name in the link",
        "options and queries are Python lists and dicts as text; (a), (b), ... are cut off the options",
        "every question is several pairs: they have the same column question, and its kind as question_type",
        "histories have 32k tokens and more: last_messages keeps their end",
        "the names of the parts train and val of v2 are not verified",
    ),
)
