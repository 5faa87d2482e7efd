"""CardinalPrefs: what people would pay for one answer instead of the other."""

from collections.abc import Iterator

from pjrlhf.data.readers.literals import literal
from pjrlhf.data.readers.raw import Raw, Row
from pjrlhf.data.readers.reader import DataReader, ReaderSettings, Record, converted, field, number, text
from pjrlhf.data.records import RecordError, name_of
from pjrlhf.data.schema import ASSISTANT_MARKER


def convert(row: Row, raw: Raw) -> Iterator[Record]:
    """The record of a raw row: `prompt`, `response1`, `response2` (whole transcripts), `net_utility` and `labeler`.

    Raises:
      RecordError: a column is missing, null or of another type.
    """
    answers, utility = [transcript(row, name) for name in ("response1", "response2")], number(row, "net_utility")
    if utility == 0 or answers[0] == answers[1]:
        raw.drop("ties" if utility == 0 else "identical answers")
        return
    chosen, rejected = answers if utility > 0 else answers[::-1]
    # Transcripts and conversations share their prompt, which is more than the first turn, the column prompt.
    whole = isinstance(chosen, list) or ASSISTANT_MARKER in chosen
    prompt = {} if whole else {"prompt": text(row, "prompt")}
    user = name_of(field(row, "labeler"), "labeler")
    yield {**prompt, "chosen": chosen, "rejected": rejected, "user_id": user, "margin": abs(utility)}


def transcript(row: Row, name: str) -> str | list[dict[str, str]]:
    """A transcript: text, or messages, also as text of a list."""
    value = field(row, name)
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        value = literal(value, name)
    return value if isinstance(value, list) else text(row, name)


def read(_: ReaderSettings, raw: Raw) -> Iterator[Row | RecordError]:
    """The records of the set."""
    yield from converted(raw(), lambda row: convert(row, raw))


READER = DataReader(
    kind="cardinal_prefs",
    settings=ReaderSettings,
    read=read,
    title="CardinalPrefs (2025): 25,000 pairs with the dollars that one of four people would pay for the better answer",
    home="https://huggingface.co/datasets/cardinal-prefs/CardinalPrefs",
    licence="not stated",
    mapping={
        "prompt": "what both transcripts begin with, up to the last answer; prompt where they are answers alone",
        "chosen": "response1 where net_utility is above 0, else response2",
        "rejected": "the other one",
        "user_id": "labeler",
        "margin": "size of net_utility, in dollars",
    },
    traps=(
        "net_utility is that of response1 over response2: below 0 the second one is better",
        "responses are whole transcripts, which differ in the last answer alone; their notation is not verified: "
        "transcripts of HH-RLHF and lists of messages are read",
        "two of the four people gave most of the data",
        "ties (net_utility 0) and identical answers are left out and counted",
    ),
)
