"""PKU-SafeRLHF (arXiv 2406.15513): pairs of answers with a verdict on helpfulness and one on harmlessness."""

import dataclasses
from collections.abc import Iterator

from pjrlhf.data.readers.raw import Raw, Row
from pjrlhf.data.readers.reader import DataReader, ReaderSettings, Record, converted, number, text
from pjrlhf.data.records import RecordError
from pjrlhf.settings import setting

# Objective -> the column with the number of the answer that is better in it.
VERDICTS = {"helpful": "better_response_id", "harmless": "safer_response_id"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SafeRlhfSettings(ReaderSettings):
    """What a config may say about PKU-SafeRLHF."""

    objectives: tuple[str, ...] = setting(
        tuple(VERDICTS), "verdicts to read, each a record of its own", choices=tuple(VERDICTS)
    )
    objective_as_user: bool = setting(
        False, "name the objective as user_id, too, so that the two objectives are people who disagree"
    )


def convert(row: Row, settings: SafeRlhfSettings, raw: Raw) -> Iterator[Record]:
    """The records of a raw row: `prompt`, `response_0`, `response_1` and the columns of `VERDICTS`.

    Raises:
      RecordError: a column is missing, null or of another type, or names no answer.
    """
    prompt, answers = text(row, "prompt"), (text(row, "response_0"), text(row, "response_1"))
    chosen = {objective: number(row, VERDICTS[objective]) for objective in settings.objectives}
    for objective, number_of in chosen.items():
        if number_of not in (0, 1):
            raise RecordError(f"bad {VERDICTS[objective]}", f"{number_of:g} is neither 0 nor 1")
    if answers[0] == answers[1]:
        raw.drop("identical answers")
        return
    for objective, number_of in chosen.items():
        better, worse = answers if number_of == 0 else answers[::-1]
        user = {"user_id": objective} if settings.objective_as_user else {}
        yield {"prompt": prompt, "chosen": better, "rejected": worse, "objective": objective, **user}


def read(settings: SafeRlhfSettings, raw: Raw) -> Iterator[Row | RecordError]:
    """The records of the set."""
    yield from converted(raw(), lambda row: convert(row, settings, raw))


READER = DataReader(
    kind="pku_saferlhf",
    settings=SafeRlhfSettings,
    read=read,
    title="PKU-SafeRLHF (arXiv 2406.15513), also -30K and -10K: which answer is more helpful, and which is safer",
    home="https://huggingface.co/datasets/PKU-Alignment/PKU-SafeRLHF",
    licence="CC BY-NC 4.0",
    mapping={
        "prompt": "prompt",
        "chosen": "response_<i>, i = better_response_id for helpful, safer_response_id for harmless",
        "rejected": "the other response",
        "objective": "helpful or harmless",
        "user_id": "with objective_as_user: the objective",
    },
    traps=(
        "every row is two records with the same answers, often in the other order: split by prompt, or both sides of a "
        "split hold the pair",
        "better_response_id judges helpfulness alone: a helpful answer may be the harmful one",
        "identical answers are left out and counted",
    ),
)
