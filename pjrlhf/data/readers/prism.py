"""PRISM (arXiv 2404.16019): dialogues of 1,396 people with several models, whose answers they rated turn by turn."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from pjrlhf.data.readers.raw import Raw, Row
from pjrlhf.data.readers.reader import DataReader, ReaderSettings, Record, converted, field, number, text
from pjrlhf.data.records import RecordError
from pjrlhf.settings import setting, shown

# Part of `user_text` -> how it begins.
ABOUT = {
    "preferences": "What matters most to me in answers",
    "description": "About me",
    "wishes": "How I want a language model to behave",
    "demographics": "My background",
}
DEMOGRAPHICS = ("age", "gender", "education", "employment_status", "marital_status", "english_proficiency")
PARTS = ("all", "train", "heldout", "unseen")
_SEED = 123  # of the split of P-RLHF


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrismSettings(ReaderSettings):
    """Comparisons and ratings of people; the set has no `split`, but `part`."""

    gives: str = setting(
        "pairs",
        "the chosen answer of every turn with each other one; or single answers with their scores as rewards",
        choices=("pairs", "ratings"),
    )
    part: str = setting(
        "all",
        "of the split of P-RLHF: dialogues of seen people for training, held-out ones of theirs, or unseen people",
        choices=PARTS,
    )
    max_characters: int = setting(
        2300, "longest message of a person with an answer, as P-RLHF; longer ones give no pair; 0 keeps all", low=0
    )
    pairs: str = setting(
        "all",
        "of a turn: the chosen answer with all others, or with the one of the lowest score",
        choices=("all", "worst"),
    )
    about: tuple[str, ...] = setting(
        ("preferences", "description", "wishes"), "what user_text says of a person", choices=tuple(ABOUT)
    )
    max_about: int = setting(1000, "characters of each part of user_text, cut between words; 0 keeps all", low=0)


@dataclasses.dataclass(frozen=True)
class Turn:
    """One turn of a dialogue.

    Attributes:
      asked: what the person said; "" where it is missing.
      chosen: the answer that went on; None where there is none.
      others: the other answers.
    """

    asked: str
    chosen: Mapping[str, Any] | None
    others: tuple[Mapping[str, Any], ...]

    def fits(self, limit: int) -> bool:
        """Whether the turn gives pairs, none of them longer than `limit` characters; 0 for any length."""
        if not self.asked or self.chosen is None or not self.others:
            return False
        return not limit or max(len(self.asked) + len(one["content"]) for one in (self.chosen, *self.others)) <= limit


def turns_of(conversation: Mapping[str, Any]) -> list[Turn]:
    """The turns of a conversation, in order.

    Raises:
      RecordError: no history, or an utterance without a turn or a role.
    """
    history = field(conversation, "conversation_history")
    if not isinstance(history, list) or not history:
        raise RecordError("empty conversation_history")
    by_turn: dict[int, list[Mapping[str, Any]]] = {}
    for utterance in history:
        by_turn.setdefault(int(number(utterance, "turn")), []).append(utterance)
    found = []
    for _, said in sorted(by_turn.items()):
        asked = [str(one.get("content") or "") for one in said if field(one, "role") == "user"]
        # A few answers are empty; nobody can prefer one of them to another.
        answers = [one for one in said if one["role"] != "user" and str(one.get("content") or "").strip()]
        chosen = next((one for one in answers if one.get("if_chosen")), None)
        others = tuple(one for one in answers if not one.get("if_chosen"))
        found.append(Turn(asked[0].strip() if asked else "", chosen, others))
    return found


def stated(survey: Mapping[str, Any], count: int = 3) -> list[str]:
    """The names of the `count` largest of the preferences that a person stated on sliders from 0 to 100.

    Not by `order_stated_prefs`: that is the order in which the sliders were shown.
    """
    values = survey.get("stated_prefs") or {}
    given = {name: float(value) for name, value in values.items() if isinstance(value, int | float)}
    largest = sorted(given, key=lambda name: (-given[name], name))[:count]
    other = str(values.get("other_text") or survey.get("other_text") or "").strip()
    return [other if name == "other" and other else name for name in largest]


def about(survey: Mapping[str, Any], parts: Iterable[str], limit: int = 0) -> str:
    """What a person says about themselves, one line per part; parts without an answer are left out."""
    says = {
        "preferences": ", ".join(stated(survey)),
        "description": survey.get("self_description"),
        "wishes": survey.get("system_string"),
        "demographics": "; ".join(str(survey[name]) for name in DEMOGRAPHICS if survey.get(name)),
    }
    lines = {name: _cut(" ".join(str(says[name] or "").split()), limit) for name in parts}
    return "\n".join(f"{ABOUT[name]}: {line}" for name, line in lines.items() if line)


def _cut(line: str, limit: int) -> str:
    """The words of a line that fit into a number of characters; at least the start of the first one."""
    if not limit or len(line) <= limit:
        return line
    words = line[: limit + 1].rpartition(" ")[0]
    return words or line[:limit]


def split_people(dialogues: Mapping[str, Sequence[str]]) -> dict[str, set[str]]:
    """The split of P-RLHF, which has 1,234 seen and 162 unseen people on the published files.

    Nine tenths of the people are seen, and nine tenths of the dialogues of each of them are trained on. People of one
    dialogue, of which none is left for training, are unseen. The draws are those of its notebook, for people and
    dialogues in the order of the files.

    Args:
      dialogues: person -> names of their dialogues.

    Returns:
      "train", "heldout" and "unseen" -> names of dialogues.
    """
    draw = np.random.RandomState(_SEED)  # a legacy generator, for the same draws
    people = np.array(list(dialogues))
    draw.shuffle(people)
    seen = int(len(people) * 0.9)
    found: dict[str, set[str]] = {"train": set(), "heldout": set(), "unseen": set()}
    for person in people[:seen]:
        names = np.array(dialogues[person])
        draw.shuffle(names)
        kept = int(len(names) * 0.9)
        found["train"].update(map(str, names[:kept]))
        found["heldout" if len(names) > 1 else "unseen"].update(map(str, names[kept:]))
    for person in people[seen:]:
        found["unseen"].update(dialogues[person])
    return found


def pairs(conversation: Mapping[str, Any], user_text: str, settings: PrismSettings, raw: Raw) -> Iterator[Record]:
    """The pairs of a conversation: the context of a turn is what was said before, with the chosen answers.

    Raises:
      RecordError: see `turns_of`.
    """
    shared = _shared(conversation, user_text)
    context: list[dict[str, str]] = []
    for turn in turns_of(conversation):
        if not turn.asked or turn.chosen is None:
            raw.drop("dialogues cut at a turn without a message or a chosen answer")
            return
        context = [*context, {"role": "user", "content": turn.asked}]
        chosen = turn.chosen
        others = [one for one in turn.others if _fits(turn.asked, chosen, one, settings.max_characters, raw)]
        rivals = [one for one in others if _is_worse(one, chosen, raw)]
        if settings.pairs == "worst":
            rivals = sorted(rivals, key=lambda one: one["score"])[:1]
        for other in rivals:
            answers = {"chosen": chosen["content"], "rejected": other["content"]}
            margin = (chosen["score"] - other["score"]) / 100
            yield {"prompt": [dict(one) for one in context], **answers, **shared, "margin": margin}
        context = [*context, {"role": "assistant", "content": chosen["content"]}]


def _fits(asked: str, chosen: Mapping[str, Any], other: Mapping[str, Any], limit: int, raw: Raw) -> bool:
    longest = len(asked) + max(len(chosen["content"]), len(other["content"]))
    if limit and longest > limit:
        raw.drop("pairs above max_characters")
        return False
    return True


def _is_worse(other: Mapping[str, Any], chosen: Mapping[str, Any], raw: Raw) -> bool:
    """Whether an answer is another text of a lower score than the chosen one; what is not is counted."""
    if other["content"].strip() == chosen["content"].strip():
        raw.drop("equal answers")
        return False
    a, b = number(chosen, "score"), number(other, "score")
    if a <= b:
        raw.drop("equal scores" if a == b else "pairs whose chosen answer has the lower score")
    return a > b


def ratings(conversation: Mapping[str, Any], user_text: str) -> Iterator[Record]:
    """Every answer of a conversation with its `score`, 0.01 to 1; the chosen one of the first turn also with the
    attributes of performance that the person judged.

    Raises:
      RecordError: see `turns_of`; an answer without a score.
    """
    shared = _shared(conversation, user_text)
    context: list[dict[str, str]] = []
    for i, turn in enumerate(turns_of(conversation)):
        if not turn.asked:
            return
        context = [*context, {"role": "user", "content": turn.asked}]
        for answer in (*([turn.chosen] if turn.chosen else []), *turn.others):
            rewards = {"score": number(answer, "score") / 100}
            if i == 0 and answer is turn.chosen:
                judged = conversation.get("performance_attributes") or {}
                rewards |= {name: value / 100 for name, value in judged.items() if isinstance(value, int | float)}
            yield {"prompt": [dict(x) for x in context], "completion": answer["content"], **shared, "rewards": rewards}
        if turn.chosen is None:
            return
        context = [*context, {"role": "assistant", "content": turn.chosen["content"]}]


def _shared(conversation: Mapping[str, Any], user_text: str) -> Record:
    found = {
        "user_id": text(conversation, "user_id"),
        "group": text(conversation, "conversation_id"),
        "conversation_type": conversation.get("conversation_type"),
    }
    return {**found, "user_text": user_text} if user_text else found


def _read(settings: PrismSettings, raw: Raw) -> Iterator[Row | RecordError]:
    if raw.is_file:
        raise raw.error("path", "is one file; name the folder that holds survey.jsonl and conversations.jsonl")
    people: dict[str, Row] = {}
    for row in raw("survey*", split=None, hub={"name": "survey"}):
        if isinstance(row, RecordError):
            yield row
        elif row.get("num_completed_conversations") == 0:
            raw.drop("people without a completed dialogue")
        else:
            people[str(row.get("user_id"))] = row
    conversations: list[Row] = []
    for row in raw("conversations*", split=None, hub={"name": "conversations"}):
        if isinstance(row, RecordError):
            yield row
        elif str(row.get("user_id")) not in people:
            yield RecordError("unknown person", f"{shown(row.get('user_id'))} is not in the survey").at(row.where)
        else:
            conversations.append(row)
    wanted = _wanted(people, conversations, settings)

    def convert(row: Row) -> list[Record]:
        says = about(people[str(row["user_id"])], settings.about, settings.max_about)
        return list(pairs(row, says, settings, raw) if settings.gives == "pairs" else ratings(row, says))

    kept = [row for row in conversations if wanted is None or str(row.get("conversation_id")) in wanted]
    yield from converted(kept, convert)


def _wanted(people: Iterable[str], conversations: Sequence[Row], settings: PrismSettings) -> set[str] | None:
    """The dialogues of the part that is read; None for all."""
    if settings.part == "all":
        return None
    dialogues: dict[str, list[str]] = {person: [] for person in people}
    emptied: set[str] = set()
    for row in conversations:
        try:
            usable = any(turn.fits(settings.max_characters) for turn in turns_of(row))
        except RecordError:
            usable = False
        if usable:
            dialogues[str(row["user_id"])].append(str(row.get("conversation_id")))
        else:
            emptied.add(str(row["user_id"]))
    # As in the notebook: people are left out who lose all dialogues, and kept who had none in the file.
    return split_people({who: names for who, names in dialogues.items() if names or who not in emptied})[settings.part]


READER = DataReader(
    kind="prism",
    settings=PrismSettings,
    read=_read,
    title="PRISM (arXiv 2404.16019): survey.jsonl and conversations.jsonl",
    home="https://huggingface.co/datasets/HannahRoseKirk/prism-alignment",
    licence="texts of people CC BY 4.0, of models CC BY-NC 4.0; re-identification is forbidden",
    mapping={
        "prompt": "the turns before with the chosen answers, and the message of the person",
        "chosen": "the answer with if_chosen; of several the first",
        "rejected": "each other answer of the turn, or the one of the lowest score",
        "user_id": "user_id",
        "user_text": "the three largest stated_prefs, self_description, system_string; also demographics",
        "margin": "difference of the scores / 100",
        "rewards": "gives=ratings: score / 100; of the chosen opening answer also performance_attributes / 100",
    },
    traps=(
        "order_stated_prefs is the order in which the sliders were shown, no ranking: the three largest stated_prefs "
        "are what matters most",
        "the role of models is `model`: it becomes assistant",
        "people use the scale of scores differently: margins compare within a person alone",
        "equal scores, equal answers, and chosen answers of a lower score are dropped and counted",
        "performance_attributes are about the opening answer alone, and null where they were not judged",
        "system_string has up to 9,530 characters: parts of user_text are cut to max_about",
        "turns of a dialogue share their beginning: split by dialogue with preference.split=group",
        "two dialogues have no turn with two answers that fit into 2,300 characters",
    ),
)
