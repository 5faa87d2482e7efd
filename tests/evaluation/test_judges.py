"""Verdicts: what swapping the answers may and may not change, and the scorers of plain text."""

import math
import sys
import types

import numpy as np
import pytest

from pjrlhf.errors import UserError
from pjrlhf.evaluation.judges import (
    JUDGES,
    BothOrders,
    ScoreJudge,
    ask,
    both_orders,
)
from pjrlhf.rewards.scorers import dialogue_fraction, scorer, words


def score_by_name(prompt, text, criterion):
    return scorer(criterion)(prompt, text)


PROMPTS = ["p", "q", "r"]
A, B = ["one two", "one", "one two three"], ["one", "one two", "a b c"]


def first_always(prompts, first, second, criterion):
    return np.ones(len(prompts), np.int8)


def first_unless_shorter(prompts, first, second, criterion):
    """Leans to the first answer where the lengths are equal."""
    return np.array([1 if len(words(x)) >= len(words(y)) else -1 for x, y in zip(first, second, strict=True)])


def test_swapping_the_answers_changes_the_sign_and_keeps_ties():
    judge = ScoreJudge(score_by_name)
    forward, backward = judge(PROMPTS, A, B, "long"), judge(PROMPTS, B, A, "long")
    assert forward.tolist() == [1, -1, 0] and forward.dtype == np.int8
    # A tie once became a loss when the pair had been swapped (3 - 3 = 0 in a 1/2/3 coding).
    assert backward.tolist() == [-1, 1, 0]
    assert judge(PROMPTS, A, B, "short").tolist() == [-1, 1, 0]


@pytest.mark.parametrize(("tolerance", "expected"), [(0.0, [1, -1, 0]), (0.99, [1, -1, 0]), (1.0, [0, 0, 0])])
def test_differences_up_to_the_tolerance_are_ties(tolerance, expected):
    assert ScoreJudge(score_by_name, tolerance)(PROMPTS, A, B, "long").tolist() == expected


def test_each_answer_is_scored_once_per_criterion():
    calls = []

    def score(prompt, text, criterion):
        calls.append((prompt, text, criterion))
        return float(len(text)) if criterion == "long" else -float(len(text))

    judge = ScoreJudge(score)
    for criterion in ("long", "short"):
        for _ in range(2):
            both_orders(judge, PROMPTS, A, B, criterion)
    assert len(calls) == len(set(calls)) == 2 * (len(A) + len(B))
    assert (judge(PROMPTS, A, B, "long") == -judge(PROMPTS, A, B, "short")).all()


def test_both_orders_of_a_symmetric_judge_agree():
    judge = ScoreJudge(score_by_name)
    verdict, consistent = both_orders(judge, PROMPTS, A, B, "long")
    assert verdict.tolist() == judge(PROMPTS, A, B, "long").tolist()
    assert consistent.all()


def test_a_judge_that_always_takes_the_first_answer_decides_nothing():
    judge = BothOrders(first_always)
    assert judge(PROMPTS, A, B, "any").tolist() == [0, 0, 0]
    assert (judge.asked, judge.consistent, judge.consistency) == (3, 0, 0.0)


def test_position_bias_is_removed_where_it_matters_only_and_counted():
    judge = BothOrders(first_unless_shorter)
    assert math.isnan(judge.consistency)
    assert judge(PROMPTS, A, B, "long").tolist() == [1, -1, 0]
    assert judge(PROMPTS, B, A, "long").tolist() == [-1, 1, 0]
    assert (judge.asked, judge.consistent) == (6, 4)
    assert judge.consistency == pytest.approx(2 / 3)


def test_the_consistency_of_a_judge_that_cannot_differ_is_no_finding():
    judge = BothOrders(ScoreJudge(score_by_name))
    assert judge(PROMPTS, A, B, "long").tolist() == [1, -1, 0]
    assert math.isnan(judge.consistency)


@pytest.mark.parametrize("answer", [[1, 0], [1, 0, 3], [[1], [0], [0]], [0.5, 0, 0]])
def test_a_judge_with_other_verdicts_is_refused(answer):
    with pytest.raises(UserError, match="verdicts"):
        ask(lambda *_: answer, PROMPTS, A, B, "long")


def test_unequal_lists_and_bad_scores_are_refused():
    with pytest.raises(UserError, match="3 prompts, 3 first and 2 second"):
        ask(first_always, PROMPTS, A, B[:2], "long")
    with pytest.raises(UserError, match="'long': score nan"):
        ScoreJudge(lambda *_: math.nan)(PROMPTS, A, B, "long")


def test_judges_by_name_and_from_outside(monkeypatch):
    scores = ScoreJudge(score_by_name)
    assert JUDGES.get("score")(scores) is scores
    module = types.ModuleType("judges_from_outside")
    module.biased = lambda scores: first_always
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert JUDGES.get("judges_from_outside:biased")(scores)(PROMPTS, A, B, "any").tolist() == [1, 1, 1]
    with pytest.raises(UserError, match="judge 'math:pi': is not a function from a ScoreJudge to a Judge"):
        JUDGES.get("math:pi")


def test_words():
    assert words("Don\N{RIGHT SINGLE QUOTATION MARK}t stop -- it's 3 o'clock, 'friend'!") == [
        "don't",
        "stop",
        "it's",
        "3",
        "o'clock",
        "friend",
    ]


@pytest.mark.parametrize(
    ("text", "fraction"),
    [
        ("", 0.0),
        ("No one spoke.", 0.0),
        ('"Hello there," she said.', 0.5),
        ("“Hello there,” she said.", 0.5),
        ('He said, "Come in', 0.5),
        ('"Yes." "No."', 1.0),
    ],
)
def test_dialogue_fraction(text, fraction):
    assert dialogue_fraction(text) == pytest.approx(fraction)
    assert score_by_name("", text, "plain") == pytest.approx(-fraction)


def test_scorers_by_name():
    assert score_by_name("", "A happy, happy dog", "words:happy,glad") == 0.5
    assert score_by_name("", "", "words:happy") == 0.0
    assert scorer("long")("", "a b c") == 3 == -scorer("short")("", "a b c")
    assert scorer("string:capwords").__name__ == "capwords"
    for name, message in (
        ("longst", "scorer 'longst': unknown; did you mean"),
        ("words:", "has no words"),
        ("words: , ", "has no words"),
        ("math:pi", "scorer 'math:pi': is not a function"),
    ):
        with pytest.raises(UserError, match=message):
            scorer(name)
