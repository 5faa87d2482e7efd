"""What a source of records holds: counts, people, lengths, duplicates, and what two sources have in common."""

import collections
import dataclasses
import random
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

import numpy as np

from pjrlhf.data.messages import Prompt, said, text_of
from pjrlhf.data.records import BadRecords
from pjrlhf.data.schema import Example, is_tie

QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.95, 1.0)
ANSWERS = ("chosen", "rejected", "completion")


@dataclasses.dataclass(frozen=True)
class Overview:
    """Counts of validated records.

    Attributes:
      records: good ones.
      bad: reason -> records that cannot be used.
      dropped: reason -> what a reader left out on purpose.
      prompts: distinct ones.
      dialogues: records whose prompt has more than one turn.
      repeated: records that stand before with the same prompt, answers, person and objective.
      contradicted: pairs of answers that one person compared both ways for one objective.
      disputed: pairs of answers that were compared both ways by different people or for different objectives.
      ties: pairs of which neither answer is better.
      longer: of the pairs, the share whose chosen answer has more characters; None without pairs.
      users: distinct `user_id`.
      anonymous: records without one.
      per_user: quantiles of the records of a person, at `QUANTILES`; None without people.
      described: records with `user_text`.
      groups: distinct values of the column `group`.
      objectives: objective -> records.
      rewards: name -> (how many records have it, mean, standard deviation).
      margins: quantiles of `margin`; None without it.
    """

    records: int
    bad: Mapping[str, int]
    dropped: Mapping[str, int]
    prompts: int
    dialogues: int
    repeated: int
    contradicted: int
    disputed: int
    ties: int
    longer: float | None
    users: int
    anonymous: int
    per_user: tuple[float, ...] | None
    described: int
    groups: int
    objectives: Mapping[str, int]
    rewards: Mapping[str, tuple[int, float, float]]
    margins: tuple[float, ...] | None


def overview(examples: Sequence[Example], bad: BadRecords, dropped: Mapping[str, int] | None = None) -> Overview:
    """The counts of validated records."""
    people = collections.Counter(e.user_id for e in examples if e.user_id is not None)
    pairs = [e for e in examples if e.chosen is not None]
    identities = collections.Counter((_prompt(e), _answers(e), e.user_id, e.objective) for e in examples)
    contradicted, disputed = _both_ways(pairs)
    rewards: dict[str, list[float]] = collections.defaultdict(list)
    for example in examples:
        for name, value in (example.rewards or {}).items():
            rewards[name].append(value)
    margins = [e.margin for e in examples if e.margin is not None]
    longer = [len(written(e.chosen)) > len(written(e.rejected)) for e in pairs]
    return Overview(
        records=len(examples),
        bad=bad.counts,
        dropped=dict(dropped or {}),
        prompts=len({_prompt(e) for e in examples}),
        dialogues=sum(isinstance(e.prompt, list) and len(e.prompt) > 1 for e in examples),
        repeated=sum(count - 1 for count in identities.values()),
        contradicted=contradicted,
        disputed=disputed,
        ties=sum(map(is_tie, examples)),
        longer=float(np.mean(longer)) if longer else None,
        users=len(people),
        anonymous=len(examples) - people.total(),
        per_user=quantiles(people.values()) if people else None,
        described=sum(e.user_text is not None for e in examples),
        groups=len({repr(e.extra["group"]) for e in examples if "group" in e.extra}),
        objectives=dict(collections.Counter(e.objective for e in examples if e.objective is not None).most_common()),
        rewards={name: (len(x), float(np.mean(x)), float(np.std(x))) for name, x in sorted(rewards.items())},
        margins=quantiles(margins) if margins else None,
    )


def written(value: Prompt | None) -> str:
    """All that a prompt or an answer says, as one text."""
    if value is None or isinstance(value, str):
        return value or ""
    return (
        text_of(value) if all(message.keys() <= {"role", "content"} for message in value) else "".join(map(said, value))
    )


def quantiles(values: Iterable[float]) -> tuple[float, ...]:
    """The values at `QUANTILES`."""
    return tuple(float(x) for x in np.quantile(list(values), QUANTILES))


def _prompt(example: Example) -> Hashable:
    return example.prompt if isinstance(example.prompt, str) else repr(example.prompt)


def _answers(example: Example) -> tuple[str, ...]:
    return tuple(written(answer) for name in ANSWERS if (answer := getattr(example, name)) is not None)


def _pair(example: Example) -> Hashable:
    return (_prompt(example), *sorted(_answers(example)))


def _both_ways(pairs: Sequence[Example]) -> tuple[int, int]:
    """(pairs that one person compared both ways for one objective, pairs that several did)."""
    ways: dict[Hashable, dict[Hashable, set[str]]] = collections.defaultdict(lambda: collections.defaultdict(set))
    for example in pairs:
        if not is_tie(example):
            ways[_pair(example)][example.user_id, example.objective].add(written(example.chosen))
    contradicted = sum(any(len(chosen) > 1 for chosen in by.values()) for by in ways.values())
    disputed = sum(len(by) > 1 and len(set().union(*by.values())) > 1 for by in ways.values())
    return contradicted, disputed


@dataclasses.dataclass(frozen=True)
class Shared:
    """What stands in two sources, as (distinct ones in both, distinct ones in the second).

    Attributes:
      prompts, pairs, users, groups: `pairs` are prompts with both answers, whichever was chosen.
    """

    prompts: tuple[int, int]
    pairs: tuple[int, int]
    users: tuple[int, int]
    groups: tuple[int, int]


def shared(first: Sequence[Example], second: Sequence[Example]) -> Shared:
    """What two sources have in common: a test whose prompts were trained on measures memory."""

    def common(of: Callable[[Example], Hashable | None]) -> tuple[int, int]:
        ours, theirs = ({key for example in side if (key := of(example)) is not None} for side in (first, second))
        return len(ours & theirs), len(theirs)

    return Shared(
        prompts=common(_prompt),
        pairs=common(lambda example: None if example.chosen is None else _pair(example)),
        users=common(lambda example: example.user_id),
        groups=common(lambda example: repr(example.extra["group"]) if "group" in example.extra else None),
    )


def sample(count: int, size: int, seed: int = 0) -> list[int]:
    """Numbers of `size` of `count` records, drawn without replacement, in order; all of them where `size` is 0."""
    if not size or size >= count:
        return list(range(count))
    return sorted(random.Random(seed).sample(range(count), size))
