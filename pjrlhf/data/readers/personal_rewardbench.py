"""PersonalRewardBench of SynthesizeMe (arXiv 2506.05598): comparisons of people of Chatbot Arena and of PRISM."""

import dataclasses
from collections.abc import Iterator

from pjrlhf.data.readers.raw import Raw, Row
from pjrlhf.data.readers.reader import DataReader, ReaderSettings, Record, converted, field, number, objects, text
from pjrlhf.data.records import RecordError, name_of
from pjrlhf.settings import setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class PersonalRewardBenchSettings(ReaderSettings):
    """What a config may say about PersonalRewardBench."""

    part: str = setting(
        "all",
        "of each person: comparisons to adapt to the person, to select by, and to test on",
        choices=("all", "train", "val", "test"),
    )


def convert(row: Row, settings: PersonalRewardBenchSettings, raw: Raw) -> Iterator[Record]:
    """The record of a raw row: `user_id`, `context`, `chosen` and `rejected` (one message each), their scores, `split`.

    Raises:
      RecordError: a column is missing, null or of another type; or `chosen` has the smaller score.
    """
    part = text(row, "split")
    if settings.part not in ("all", part):
        raw.drop("other parts of a person")
        return
    chosen, rejected = text(row, "chosen", "content"), text(row, "rejected", "content")
    if chosen == rejected:
        raw.drop("identical answers")
        return
    record: Record = {
        "prompt": messages(row),
        "chosen": chosen,
        "rejected": rejected,
        "user_id": name_of(field(row, "user_id"), "user_id"),
        "part": part,
    }
    if row.get("chosen_score") is not None and row.get("rejected_score") is not None:
        margin = number(row, "chosen_score") - number(row, "rejected_score")
        if margin == 0:
            raw.drop("ties")
            return
        if margin < 0:
            raise RecordError("chosen scores below rejected", f"by {-margin:g}")
        record["margin"] = margin
    yield record


def messages(row: Row) -> list[dict[str, str]]:
    """The conversation `context` with the roles of chat templates: "model" is the assistant.

    Raises:
      RecordError: it is none.
    """
    said = [(text(one, "role"), text(one, "content")) for one in objects(row, "context")]
    return [{"role": "assistant" if role == "model" else role, "content": content} for role, content in said]


def read(settings: PersonalRewardBenchSettings, raw: Raw) -> Iterator[Row | RecordError]:
    """The records of the set."""
    yield from converted(raw(), lambda row: convert(row, settings, raw))


READER = DataReader(
    kind="personal_rewardbench",
    settings=PersonalRewardBenchSettings,
    read=read,
    title="PersonalRewardBench (SynthesizeMe, arXiv 2506.05598): 723 people of PRISM, and 131 of Chatbot Arena "
    "(chatbot_arena_personalized_0125)",
    home="https://huggingface.co/datasets/MichaelR207/prism_personalized_0125",
    licence="code MIT; texts of PRISM and Chatbot Arena: those of people CC BY 4.0, those of models CC BY-NC 4.0",
    mapping={
        "prompt": "context; the role model becomes assistant",
        "chosen": "chosen.content",
        "rejected": "rejected.content",
        "user_id": "user_id",
        "margin": "chosen_score - rejected_score, where both are there",
    },
    traps=(
        "two splits: `split` of the set parts people, the column split parts the comparisons of each person; `part` "
        "chooses by the column, and records keep it as part",
        "columns prediction_*, reasoning_* hold verdicts of judges: they are left out, so that no model reads them",
        "ties and identical answers are left out and counted",
    ),
)
