"""How reward functions of any form are called, and what of a record is sent as JSON."""

import datetime
import decimal
import functools
import json
import math
import uuid

import numpy as np
import pytest

from pjrlhf.data.records import as_json
from pjrlhf.errors import UserError
from pjrlhf.rewards.server import is_busy
from pjrlhf.rewards.sources import RecordColumns, RewardSource, reward_source

PROMPTS, ANSWERS = ["say a", "say b", "say c"], ["aa", "b", "a cat"]
LENGTHS = [2.0, 1.0, 5.0]
LEVELS = RecordColumns({"level": [10, 20, 30]})


def by_position(prompts, completions, /):
    assert prompts == PROMPTS
    return [len(text) for text in completions]


def turned_around(completions, prompts, /):
    return by_position(prompts, completions)


def by_name(*, prompts, completions):
    return by_position(prompts, completions)


def anything(*args):
    return by_position(*args)


def first_and_rest(prompts, *rest):
    return by_position(prompts, *rest)


def both(*args, **columns):
    assert not args and columns["level"] == [10, 20, 30]
    return by_position(columns["prompts"], columns["completions"])


def forwarded(function):
    """A decorator that hides the parameters of the function."""
    return lambda *args, **columns: function(*args, **columns)


@forwarded
def hidden(prompts, completions, level):
    return by_position(prompts, completions)


def with_columns(prompts, completions, /, level, **columns):
    assert level == [10, 20, 30] and not columns
    return by_position(prompts, completions)


def with_default(prompts, weight=1.0, *rest, level):
    assert weight == 1.0 and level == [10, 20, 30]
    return by_position(prompts, *rest)


def weighted(weight, prompts, completions, level=None):
    return [weight * value for value in by_position(prompts, completions)]


def generator(prompts, completions):
    yield from by_position(prompts, completions)


async def asynchronous(prompts, completions, /):
    return by_position(prompts, completions)


async def asynchronous_generator(prompts, completions):
    for value in by_position(prompts, completions):
        yield value


class Reward:
    def __call__(self, prompts, completions):
        return by_position(prompts, completions)

    def method(self, prompts, completions, **columns):
        return by_position(prompts, completions)

    @staticmethod
    async def static(completions, **columns):
        return [len(text) for text in completions]


class Patient:
    async def __call__(self, completions):
        return np.array([len(text) for text in completions])


FORMS = [by_position, turned_around, by_name, anything, first_and_rest, both, hidden, with_columns, with_default]
FORMS += [functools.partial(weighted, 1.0), functools.partial(weighted, weight=1.0), generator, asynchronous]
FORMS += [asynchronous_generator, Reward(), Reward().method, Reward.static, Patient(), functools.partial(Reward())]


@pytest.mark.parametrize("function", FORMS, ids=lambda form: getattr(form, "__name__", str(type(form).__name__)))
def test_the_check_before_a_run_agrees_with_the_call(function):
    """A function of any form gets prompts, completions and the columns that it names."""
    source = RewardSource("P2A", function)
    source.check_columns(LEVELS.columns)
    np.testing.assert_array_equal(source(PROMPTS, ANSWERS, LEVELS), LENGTHS)


def of_texts(texts, answers, /):
    return [0.0] * len(texts)


def of_solutions(completions, *, solution):
    return solution


def of_solutions_by_position(prompts, solution, *rest):
    return solution


@pytest.mark.parametrize(
    ("function", "parameter"),
    [
        (of_texts, "texts"),
        (of_solutions, "solution"),
        (of_solutions_by_position, "solution"),
        (weighted, "weight"),
        (json.dumps, "obj"),
    ],
)
def test_what_the_check_refuses_cannot_be_called(function, parameter):
    source = RewardSource("P2A", function)
    with pytest.raises(UserError, match=f"rewards.P2A: its function takes '{parameter}', and the records of data.prom"):
        source.check_columns(LEVELS.columns)
    with pytest.raises(UserError, match=rf"reward 'P2A': its source raised TypeError: .*'?{parameter}'?"):
        source(PROMPTS, ANSWERS, LEVELS)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (iter([1.0, 2.0]), "returned 2 values for 3 completions"),
        (np.array(3.0), "returned ndarray for 3 completions"),
        ({0: 1.0, 1: 1.0, 2: 1.0}, "returned dict for 3 completions"),
        ({1.0, 2.0, 3.0}, "returned set for 3 completions"),
        (range(9), "returned 9 values for 3 completions"),
        ((i for i in iter(int, 1)), "returned 4 values for 3 completions"),
        ([1.0, 10**400, 2.0], "for the answer 'b'; return a finite number"),
    ],
)
def test_what_is_no_list_of_numbers_is_named(returned, message):
    with pytest.raises(UserError) as error:
        RewardSource("P2A", lambda prompts, completions: returned)(PROMPTS, ANSWERS)
    assert message in str(error.value)


def make_nothing(objective):
    return None


def make_fragile(objective):
    raise KeyError(objective)


async def make_later(objective):
    return by_position


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("test_calls:Reward", "reward function 'test_calls:Reward': is a class; name an object of it"),
        ({"kind": "test_calls:make_nothing"}, "rewards.P2A: kind 'test_calls:make_nothing' made a NoneType; it must"),
        ({"kind": "test_calls:make_later"}, "kind 'test_calls:make_later' made a coroutine; it must make a function"),
        ({"kind": "test_calls:make_fragile"}, "kind 'test_calls:make_fragile' raised KeyError: 'P2A' when it was made"),
        ({"kind": "json:dumps", "obj": 3}, "kind 'json:dumps' made a str; it must make a function"),
    ],
)
def test_a_maker_that_fails_is_named_in_one_line(spec, message, monkeypatch):
    monkeypatch.syspath_prepend(__file__.rpartition("/")[0])
    with pytest.raises(UserError) as error:
        reward_source("P2A", spec)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert reward_source("P2A", {"kind": "test_calls:Reward"})(PROMPTS, ANSWERS).tolist() == LENGTHS


# ---- JSON


@pytest.mark.parametrize(
    ("value", "sent"),
    [
        (math.nan, None),
        (-math.inf, None),
        (np.float32("nan"), None),
        ([1.5, {"a": (math.nan, True)}], [1.5, {"a": [None, True]}]),
        (2**70, 2**70),
        (np.int64(7), 7),
        (np.bool_(True), True),
        (np.float32(0.5), 0.5),
        (np.array([[1, 2]], np.int8), [[1, 2]]),
        (np.datetime64("2026-03-01"), "2026-03-01"),
        (np.datetime64("2026-03-01T10:00:00.123456789"), "2026-03-01T10:00:00.123456789"),
        (np.datetime64("NaT"), None),
        (datetime.datetime(2026, 3, 1, 10, tzinfo=datetime.UTC), "2026-03-01T10:00:00+00:00"),
        (datetime.date(2026, 3, 1), "2026-03-01"),
        (datetime.time(10, 30), "10:30:00"),
        (datetime.timedelta(hours=1), "1:00:00"),
        (decimal.Decimal("1.25"), 1.25),
        (decimal.Decimal("NaN"), None),
        (b"\xff\x00", "/wA="),
        (uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        ({1: {3, 2}}, {"1": [2, 3]}),
    ],
)
def test_values_of_records_are_valid_json(value, sent):
    assert json.loads(json.dumps(as_json(value), allow_nan=False)) == sent


def test_busy_servers():
    """Those in front of servers answer with 520 to 530 where they cannot reach these."""
    assert [code for code in range(200, 600) if is_busy(code)] == [
        408,
        409,
        429,
        500,
        *range(502, 505),
        *range(506, 600),
    ]
