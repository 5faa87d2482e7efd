"""Verdicts: what swapping the answers may and may not change, and the scorers of plain text."""

import math
import sys
import types

import numpy as np
import pytest

from pjrlhf.errors import UserError
from pjrlhf.judges.judge import (
    BothOrders,
    JudgeContext,
    ScoreJudge,
    agreement,
    ask,
    both_orders,
    judge_from,
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
    assert forward.tolist() == [1, -1, 0]
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
    verdict, consistent, bias = both_orders(judge, PROMPTS, A, B, "long")
    assert verdict.tolist() == judge(PROMPTS, A, B, "long").tolist()
    assert consistent.all() and not bias.any()


def test_a_judge_that_always_takes_the_first_answer_decides_nothing():
    judge = BothOrders(first_always)
    assert judge(PROMPTS, A, B, "any").tolist() == [0, 0, 0]
    assert (judge.asked, judge.consistent, judge.consistency, judge.position_bias) == (3, 0, 0.0, 1.0)


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


@pytest.mark.parametrize("answer", [[1, 0], [1, 0, 3], [[1], [0], [0]], ["a", "b", "tie"]])
def test_a_judge_with_other_verdicts_is_refused(answer):
    with pytest.raises(UserError, match="verdicts"):
        ask(lambda *_: answer, PROMPTS, A, B, "long")


def test_unequal_lists_and_bad_scores_are_refused():
    with pytest.raises(UserError, match="3 prompts, 3 first and 2 second"):
        ask(first_always, PROMPTS, A, B[:2], "long")
    with pytest.raises(UserError, match="'long': score nan"):
        ScoreJudge(lambda *_: math.nan)(PROMPTS, A, B, "long")


def test_soft_verdicts_are_averaged_and_none_stays_none():
    """A failed judgement once became a win when the pair had been swapped (1 - -1 = 2)."""
    given = {False: [0.5, math.nan, 1, 1, 0], True: [0.1, 0, math.nan, 0, 0]}  # swapped: from the other side

    def judge(prompts, first, second, criterion):
        return given[first[0] == "b"]

    counted = BothOrders(judge)
    np.testing.assert_allclose(counted(list("pqrst"), ["a"] * 5, ["b"] * 5, "any"), [0.2, math.nan, math.nan, 0, 0])
    # A soft win against a soft loss, a win against a tie, a tie against a tie.
    assert (counted.asked, counted.judged, counted.consistent) == (5, 3, 1)
    assert counted.position_bias == pytest.approx((0.3 + 0.5 + 0) / 3)


def test_verdicts_may_count_only_where_both_orders_agree():
    """Wins and ties that agree stay; a soft or hard disagreement is no verdict, and counts in the consistency."""
    given = {False: [1, 0.5, 1, 1, 0, 0.4, math.nan], True: [-1, 0.1, 1, 0, 0, -0.2, 1]}

    def judge(prompts, first, second, criterion):
        return given[first[0] == "b"]

    judge.consistent_only = True
    counted, none = BothOrders(judge), math.nan
    found = counted(list("pqrstuv"), ["a"] * 7, ["b"] * 7, "any")
    np.testing.assert_allclose(found, [1, none, none, none, 0, 0.3, none])
    np.testing.assert_array_equal(counted(list("pqrstuv"), ["b"] * 7, ["a"] * 7, "any"), -found)
    report = counted.report()
    assert (report["asked"], report["judged"], report["consistency"]) == (14, 6, 0.5)


def test_swapping_negates_every_verdict_of_both_orders():
    rng = np.random.default_rng(0)
    table = rng.choice([-1, -0.4, 0, 0.3, 1, math.nan], (2, 40))

    def judge(prompts, first, second, criterion):
        return table[0] if first[0] == "a" else table[1]

    forward = both_orders(judge, ["p"] * 40, ["a"] * 40, ["b"] * 40, "any")[0]
    backward = both_orders(judge, ["p"] * 40, ["b"] * 40, ["a"] * 40, "any")[0]
    np.testing.assert_array_equal(forward, -backward)
    assert np.isnan(forward).any() and (forward == 0).any()


def test_kappa():
    """20 yes-yes, 5 yes-no, 10 no-yes, 15 no-no: agreement 0.7, chance 0.5, kappa 0.4 (Cohen's textbook case)."""
    a = [1] * 25 + [-1] * 25
    b = [1] * 20 + [-1] * 5 + [1] * 10 + [-1] * 15
    assert agreement(a, b) == pytest.approx({"n": 50, "agreement": 0.7, "kappa": 0.4})
    assert agreement([*a, math.nan], [*b, 1]) == agreement(a, b)
    assert agreement([0.2, -0.9], [1, -0.1])["kappa"] == 1
    assert math.isnan(agreement([1, 1], [1, 1])["kappa"]) and agreement([math.nan], [1])["n"] == 0


def test_judges_by_name_and_from_outside(monkeypatch):
    context = JudgeContext(ScoreJudge(score_by_name))
    assert judge_from("score", context) is context.scores
    module = types.ModuleType("judges_from_outside")
    module.biased = lambda context: first_always
    module.constant = lambda context, verdict: lambda prompts, *_: np.full(len(prompts), verdict)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert judge_from("judges_from_outside:biased", context)(PROMPTS, A, B, "any").tolist() == [1, 1, 1]
    always = judge_from({"kind": "judges_from_outside:constant", "verdict": -0.5}, context)
    assert always(PROMPTS, A, B, "any").tolist() == [-0.5] * 3


def test_a_reward_source_judges_where_it_says_something():
    judge = judge_from({"kind": "reward", "source": "support.toy_extensions:brevity"}, JudgeContext(ScoreJudge(print)))
    assert judge(["p"] * 3, ["a", "aa", ""], ["bb", "b", "b"], "any").tolist()[:2] == [1, -1]
    assert math.isnan(judge(["p"], [""], ["b"], "any")[0])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("oracle", "judge 'oracle': unknown; choose one of score, chat, reward"),
        ("math:pi", "judge 'math:pi': is not a function from a JudgeContext to a Judge"),
        ({"model": "m"}, "judge: has no kind; choose one of score, chat, reward"),
        ({"kind": "score", "model": "m"}, "judge 'score': does not take these settings"),
        ({"kind": "chat"}, "judge: names no model; set model to its name on the server"),
        ({"kind": "chat", "model": "m", "modle": "n"}, "judge.modle: no such setting; did you mean judge.model?"),
        ({"kind": "chat", "model": "m", "retries": -1}, "judge.retries: -1 is out of range"),
        ({"kind": "chat", "model": "m", "prompt": "poem"}, "judge prompt 'poem': there is no such file; choose one of"),
        ({"kind": "chat", "model": "m", "prompt": "rating"}, "judge prompt 'rating': is one of kind rating, not pair"),
        ({"kind": "chat", "model": "m", "prompt": "role_play"}, "judge prompt 'role_play': shows a person; set person"),
        ({"kind": "chat", "model": "m", "max_cost": 3.0}, "max_cost: needs prices"),
        ({"kind": "chat", "model": "m", "person": "A nurse."}, "judge prompt 'criterion': does not show the person"),
        ({"kind": "chat", "model": "m", "person": {"said": "Hi"}}, "judge.person: said is 'Hi'; give a list of texts"),
        (None, "judge: None is no judge; name its kind"),
        ({"kind": "reward", "source": "support.toy_extensions:nobody"}, "support.toy_extensions has no nobody"),
        ({"kind": "reward", "source": "adapter"}, "a reward model that is trained in the run cannot judge"),
        ({"kind": "reward", "source": 3}, "judge.source: 3 is not text or a section of settings"),
        ({"kind": "reward", "source": "support.toy_extensions:brevity", "tolerance": -1}, "judge.tolerance: -1"),
    ],
)
def test_wrong_judges_are_refused_by_name(spec, message, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with pytest.raises(UserError) as error:
        judge_from(spec, JudgeContext(ScoreJudge(score_by_name), folder=tmp_path))
    assert message in str(error.value)


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


def test_the_grade_rises_with_long_words_and_long_sentences():
    easy = "The sun is hot. It gives us light."
    assert score_by_name("", easy, "grade") < score_by_name("", easy.replace(". It", " and it"), "grade")
    assert score_by_name("", easy, "grade") < score_by_name("", easy.replace("hot", "incandescent"), "grade")


def test_scorers_by_name():
    assert score_by_name("", "A happy, happy dog", "words:happy,glad") == 0.5
    assert score_by_name("", "", "words:happy") == 0.0
    assert scorer("long")("", "a b c") == 3 == -scorer("short")("", "a b c")
    assert scorer("string:capwords").__name__ == "capwords"
    for name in ("long", "dialogue", "words:happy", "grade", "sentiment"):
        assert scorer(f"-{name}")("", "A happy day") == -scorer(name)("", "A happy day")
    for name, message in (
        ("longst", "scorer 'longst': unknown; did you mean"),
        ("-longst", "scorer 'longst': unknown; did you mean"),
        ("words:", "has no words"),
        ("words: , ", "has no words"),
        ("math:pi", "scorer 'math:pi': is not a function"),
    ):
        with pytest.raises(UserError, match=message):
            scorer(name)


def test_scores_of_many_answers_are_asked_together_once():
    asked = []

    def together(prompts, texts, criterion):
        asked.append(list(texts))
        return np.array([len(text) or math.nan for text in texts])

    judge = ScoreJudge(score_by_name, together=together)
    assert judge.on_all_processes and not ScoreJudge(score_by_name).on_all_processes
    verdicts = judge(["p"] * 4, ["a", "bb", "a", ""], ["bb", "a", "a", "a"], "any")
    assert verdicts[:3].tolist() == [-1, 1, 0] and math.isnan(verdicts[3])
    judge(["p"], ["a"], ["ccc"], "any")
    assert asked == [["a", "bb", ""], ["ccc"]]
