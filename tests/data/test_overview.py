"""Counts of records by hand: people, duplicates, pairs compared both ways, and what two sources share."""

import pytest

from pjrlhf.data.overview import overview, sample, shared
from pjrlhf.data.schema import validate

TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
RECORDS = [
    {"prompt": "p", "chosen": "long", "rejected": "x", "user_id": "ann", "margin": 0.5, "group": 1},
    {"prompt": "p", "chosen": "long", "rejected": "x", "user_id": "ann", "group": 1},
    {"prompt": "p", "chosen": "x", "rejected": "long", "user_id": "bob", "user_text": "I am Bob"},
    {"prompt": "q", "chosen": "y", "rejected": "z", "user_id": "bob", "preference": 0.5},
    {"prompt": "q", "chosen": "v", "rejected": "w", "user_id": "bob", "objective": "short"},
    {"prompt": "q", "chosen": "w", "rejected": "v", "user_id": "bob", "objective": "short"},
    {"prompt": "r", "chosen": "v", "rejected": "w", "user_id": "bob", "objective": "short"},
    {"prompt": "r", "chosen": "w", "rejected": "v", "user_id": "bob", "objective": "long"},
    {"prompt": TURNS, "chosen": "v", "rejected": "w"},
    {"prompt": "q", "chosen": "", "rejected": "v"},
]


def read(records, kind="preference"):
    return validate(records, kind, max_bad_fraction=1.0)


def test_counts():
    found = overview(*read(RECORDS), {"equal scores": 3})
    assert (found.records, found.bad, found.dropped) == (9, {"empty chosen": 1}, {"equal scores": 3})
    assert (found.prompts, found.dialogues, found.repeated, found.ties) == (4, 1, 1, 1)
    # Ann and Bob disagree about "p", and Bob's two objectives about "r"; under one objective he contradicts himself.
    assert (found.contradicted, found.disputed) == (1, 2)
    assert (found.users, found.anonymous, found.described, found.groups) == (2, 1, 1, 1)
    assert found.per_user == (2.0, 3.0, 4.0, 5.0, pytest.approx(5.8), 6.0)
    assert found.objectives == {"short": 3, "long": 1}
    assert found.longer == pytest.approx(2 / 9) and found.margins == (0.5,) * 6


def test_rewards_of_single_answers():
    rows = [{"prompt": "p", "completion": "a", "rewards": {"kind": x, "short": None if x else 1.0}} for x in (0.0, 2.0)]
    found = overview(*read(rows, "completion"))
    assert found.rewards == {"kind": (2, 1.0, 1.0), "short": (1, 1.0, 0.0)} and found.longer is None
    assert overview(*read(rows * 2, "completion")).repeated == 3  # one answer, whatever its rewards
    assert overview(*read([{"prompt": "p"}] * 3, "prompt")).prompts == 1


def test_what_two_sources_share():
    first, second = read(RECORDS[:4])[0], read(RECORDS[2:])[0]
    found = shared(first, second)
    # The pair of "p" is in both, whichever answer was chosen.
    assert (found.prompts, found.pairs, found.users, found.groups) == ((2, 4), (2, 5), (1, 1), (0, 0))
    assert shared(first, first).groups == (1, 1)


def test_a_sample_is_drawn_once_and_in_order():
    assert sample(5, 0) == sample(5, 9) == [0, 1, 2, 3, 4]
    drawn = sample(100, 10)
    assert drawn == sorted(set(drawn)) == sample(100, 10) != sample(100, 10, seed=1) and len(drawn) == 10
