"""Judges, samplers and scorers of other people's code: what they may return, and errors that name them."""

import math
import sys
import types

import numpy as np
import pytest

from pjrlhf.errors import UserError
from pjrlhf.feedback.samplers import sampler
from pjrlhf.judges.judge import BothOrders, JudgeContext, ScoreJudge, ask, check_judge, judge_from
from pjrlhf.rewards.scorers import checked, scorer

CONTEXT = JudgeContext(ScoreJudge(lambda *_: 0.0))
PROMPTS, A, B = ["p", "q"], ["aa", "b"], ["b", "cc"]


def longer(prompts, first, second, criterion):
    return [float(np.sign(len(x) - len(y))) for x, y in zip(first, second, strict=True)]


async def patient(prompts, first, second, criterion):
    return longer(prompts, first, second, criterion)


def one_by_one(prompts, first, second, criterion):
    yield from longer(prompts, first, second, criterion)


def by_position(*given):
    return longer(*given)


class Longer:
    order_invariant = True

    def __call__(self, prompts, first, second, criterion):
        first.reverse(), first.reverse()  # its own lists
        return longer(prompts, first, second, criterion)

    def again(self):
        return Longer()

    def report(self):
        return {"size": np.int64(3), "share": math.nan}


def hesitant(prompts, first, second, criterion):
    return [None, np.float32(0.5)]


def raising(prompts, first, second, criterion):
    return 1 / 0


def leaving(prompts, first, second, criterion):
    sys.exit(0)


def few(prompts):
    return [0.0]


@pytest.fixture
def named(monkeypatch):
    """A module of makers."""
    module = types.ModuleType("mine")
    for judge in (longer, patient, one_by_one, by_position, Longer(), hesitant, raising, leaving, few):
        name = getattr(judge, "__name__", "Longer")
        setattr(module, name, lambda context, judge=judge: judge)
    module.nothing = lambda context: None
    module.fragile = lambda context: context.missing
    module.Leaver = lambda context: sys.exit(3)
    module.pi, module.itself = math.pi, longer
    module.Maker = Longer
    monkeypatch.setitem(sys.modules, "mine", module)
    return module


@pytest.mark.parametrize("name", ["longer", "patient", "one_by_one", "by_position", "Longer"])
def test_a_judge_may_have_any_form_of_a_function(named, name):
    judge = judge_from(f"mine:{name}", CONTEXT)
    assert ask(judge, PROMPTS, A, B, "long").tolist() == [1, -1]
    assert BothOrders(judge)(PROMPTS, A, B, "long").tolist() == [1, -1]


def test_optional_parts_of_a_judge_are_kept(named):
    both = BothOrders(judge_from("mine:Longer", CONTEXT))
    both(PROMPTS, A, B, "long")
    assert both.report() == {"asked": 2, "judged": 2, "size": 3, "share": None} and both.again() is not None
    plain = BothOrders(judge_from("mine:longer", CONTEXT))
    assert plain.again() is None and plain.report() == {"asked": 0, "judged": 0}


def test_none_is_no_verdict(named):
    np.testing.assert_array_equal(ask(judge_from("mine:hesitant", CONTEXT), PROMPTS, A, B, "long"), [math.nan, 0.5])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "json:dumps",
            "judge 'json:dumps': raised TypeError: Object of type JudgeContext is not JSON serializ",
        ),
        ("mine:nothing", "judge 'mine:nothing': made a NoneType; it must make a judge"),
        (
            "mine:fragile",
            "judge 'mine:fragile': raised AttributeError: 'JudgeContext' object has no attribute",
        ),
        ("mine:Leaver", "judge 'mine:Leaver': raised SystemExit: 3 when it was made; correct it"),
        ("mine:pi", "judge 'mine:pi': is not a function from a JudgeContext to a Judge"),
        ("mine:itself", "judge 'mine:itself': does not take these settings (missing a required argument: 'first')"),
        ("mine:Maker", "judge 'mine:Maker': does not take these settings (too many positional arguments)"),
        (
            "mine:few",
            "made a judge that cannot be called with prompts, first, second and criterion (too many",
        ),
        ("builtins:repr", "judge 'builtins:repr': made a str; it must make a judge"),
    ],
)
def test_makers_that_fail_are_named_before_a_run(named, spec, message):
    with pytest.raises(UserError) as error:
        check_judge(spec)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0], "returned [1.0]; it must return 2 verdicts from -1 to +1, or None for none"),
        ([1.0, 2.0], "returned [1.0, 2.0]; it must return 2 verdicts"),
        ([True, False], "returned [True, False]; it must"),
        (["A", None], "returned ['A', None]; it must"),
        ([[1.0], [1.0, 0.0]], "it must return 2 verdicts"),
        ([1 + 1j, 0], "it must return 2 verdicts"),
        (None, "returned None; it must return 2 verdicts"),
        ({0: 1.0, 1: 0.0}, "returned {0: 1.0, 1: 0.0}; it must"),
    ],
)
def test_a_judge_that_returns_something_else_is_named(named, returned, message):
    named.wrong = lambda context: lambda *_: returned
    with pytest.raises(UserError) as error:
        ask(judge_from("mine:wrong", CONTEXT), PROMPTS, A, B, "long")
    assert str(error.value).startswith("criterion 'long': judge 'mine:wrong' returned") and message in str(error.value)


def test_a_judge_that_raises_is_named(named):
    with pytest.raises(UserError) as error:
        ask(judge_from("mine:raising", CONTEXT), PROMPTS, A, B, "long")
    assert str(error.value) == (
        "judge 'mine:raising': raised ZeroDivisionError: division by zero for the criterion 'long'; correct the judge"
    )
    with pytest.raises(UserError, match="judge 'mine:leaving': raised SystemExit: 0 for the criterion 'long'"):
        ask(judge_from("mine:leaving", CONTEXT), PROMPTS, A, B, "long")


# ---- samplers and scorers


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (["a"], "sampler 'mine:sampler': returned ['a'] for 2 requests; return a list with one text each"),
        (["a", None], "returned ['a', None] for 2 requests"),
        ("ab", "returned 'ab' for 2 requests"),
        (ZeroDivisionError("no"), "sampler 'mine:sampler': raised ZeroDivisionError: no; correct it"),
        (SystemExit(0), "sampler 'mine:sampler': raised SystemExit: 0; correct it"),
    ],
)
def test_a_sampler_that_returns_something_else_is_named(named, returned, message):
    def answer(requests, words, name):
        if isinstance(returned, BaseException):
            raise returned
        return returned

    named.sampler = lambda run: answer
    with pytest.raises(UserError) as error:
        sampler(None, "mine:sampler")(PROMPTS, ["", ""], "test")
    assert message in str(error.value)
    named.sampler = lambda run: lambda requests, words, name: (text.upper() for text in requests)
    assert sampler(None, "mine:sampler")(PROMPTS, ["", ""], "test") == ["P", "Q"]
    named.sampler = lambda run: None
    with pytest.raises(UserError, match="sampler 'mine:sampler': made a NoneType; it must make a sampler"):
        sampler(None, "mine:sampler")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("json:dumps", "raised TypeError: dumps() takes 1 positional argument but 2 were given for the answer 'a'"),
        ("operator:add", "returned 'pa' for the answer 'a'; return a finite number"),
    ],
)
def test_a_scorer_that_returns_something_else_is_named(spec, message):
    with pytest.raises(UserError) as error:
        checked(f"judge.P1A: scorer {spec!r}", scorer(spec))("p", "a")
    assert str(error.value).startswith(f"judge.P1A: scorer {spec!r}: ") and message in str(error.value)
