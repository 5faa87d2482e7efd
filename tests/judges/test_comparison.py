"""Rewards by comparison with a baseline, and prompts that show columns of the records."""

import json
import math
import re

import numpy as np
import pytest
from support.chat_server import ChatServer

from pjrlhf.errors import UserError
from pjrlhf.judges.judge import BothOrders, JudgeContext, ScoreJudge, judge_from
from pjrlhf.rewards.sources import RecordColumns, RewardSource, SourceContext, column_text, reward_source
from pjrlhf.runtime import judges

pytest.importorskip("openai")
assert judges.BASELINES  # registers the source
PROMPTS = [f"request {i}" for i in range(5)]
ANSWERS = ["aaaa", "b", "cc", "", "five"]
BASELINES = ["aa", "bb", "cc", "d", None]
RECORDS = RecordColumns({"gold": BASELINES, "level": [1, 2.5, None, "high", [1, 2]]}, ["a line 1", "", "", "", ""])


def sides(body):
    text = body["messages"][-1]["content"]
    return re.search(r"Response A:\n(.*?)\n\nResponse B:\n(.*?)\n\n(?:Which|Give|Write)", text, re.S).groups()


def longer(body):
    """The letter of the longer response; T for equal lengths."""
    first, second = sides(body)
    return "T" if len(first) == len(second) else "A" if len(first) > len(second) else "B"


def soft(body):
    """Log-probabilities: p(A) is the share of A in the length of both."""
    first, second = sides(body)
    share = (1 + len(first)) / (2 + len(first) + len(second))
    top = [{"token": token, "logprob": math.log(p)} for token, p in (("A", share), ("B", 1 - share))]
    return {
        "message": {"role": "assistant", "content": "A"},
        "logprobs": {"content": [{"token": "A", "logprob": -1.0, "bytes": None, "top_logprobs": one} for one in [top]]},
    }


def spec(url, **settings):
    return {"kind": "judge", "model": "m", "base_url": url, "criterion": "It is long.", **settings}


def source(url, folder, base_answers=None, **settings):
    return reward_source("P1A", spec(url, **settings), SourceContext(folder=folder, base_answers=base_answers))


def as_float(values):
    return np.array([math.nan if value is None else value for value in values], np.float32)


@pytest.mark.parametrize(
    ("rule", "score", "want"),
    [
        (longer, "", [1, 0, 0.5, 0, None]),
        (longer, "outcome", [1, 0, 0.5, 0, None]),
        (soft, "probability", [5 / 8, 2 / 5, 0.5, 1 / 3, None]),
        (soft, "outcome", [1, 0, 0.5, 0, None]),
        (lambda body: "A", "probability", [0.5, 0.5, 0.5, 0.5, None]),  # a judge that likes what stands first
        (lambda body: "I like both.", "outcome", [None, None, 0.5, None, None]),
    ],
)
def test_the_reward_is_what_the_rule_says_of_both_orders(tmp_path, rule, score, want):
    server = ChatServer(rule)
    with server.running() as url:
        found = source(url, tmp_path, baseline_column="gold", score=score)
        found.check_columns(RECORDS.columns)
        np.testing.assert_allclose(found(PROMPTS, ANSWERS, RECORDS), as_float(want), rtol=1e-6)
    asked = {sides(body) for body in server.bodies}
    assert asked == {
        pair for a, b in zip(ANSWERS[:4], BASELINES[:4], strict=True) for pair in [(a, b), (b, a)] if a != b
    }
    assert (found.function.asked, found.function.failures) == (5, want.count(None))
    assert found.waits and not found.on_all_processes
    assert all("It is long." in str(body["messages"]) for body in server.bodies)


def test_replies_are_kept_and_replayed(tmp_path):
    server = ChatServer(longer)
    with server.running() as url:
        first = source(url, tmp_path, baseline_column="gold")(PROMPTS, ANSWERS, RECORDS)
    again = source(url, tmp_path, baseline_column="gold", replay=True)(PROMPTS, ANSWERS, RECORDS)
    np.testing.assert_array_equal(first, again)
    assert len((tmp_path / "ratings.jsonl").read_text().splitlines()) == len(server.bodies) == 6


def test_the_base_of_the_run_is_a_baseline(tmp_path):
    asked = []

    def base_answers(prompts, how):
        asked.append((list(prompts), how))
        return ["xx"] * len(prompts)

    with ChatServer(longer).running() as url:
        for how in ("greedy", "sampled"):
            found = source(url, tmp_path, base_answers, baseline=how)
            assert found.on_all_processes
            found.check_columns(())
            assert found(PROMPTS, ANSWERS).tolist() == [1, 0, 0.5, 0, 1]
    assert asked == [(PROMPTS, "greedy"), (PROMPTS, "sampled")]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"baseline": "best"},
            "rewards.P1A.baseline: 'best' is unknown; choose one of greedy, sampled, or set",
        ),
        ({"baseline": "greedy", "baseline_column": "gold"}, "rewards.P1A: has a baseline and a baseline_column; leave"),
        (
            {"score": "outcome"},
            "rewards.P1A.score: is of comparisons; set baseline or baseline_column, or leave",
        ),
        ({"baseline_column": "gold", "score": "elo"}, "rewards.P1A.score: 'elo' is unknown; choose one of probability"),
        ({"baseline_column": "gold", "prompt": "rating"}, "judge prompt 'rating': is one of kind rating, not pair"),
        ({"inconsistent": "none"}, "rewards.P1A.inconsistent: is of comparisons, and a rating is of one answer"),
        ({"orders": 1}, "rewards.P1A.orders: is of comparisons, and a rating is of one answer; leave it out"),
        ({"baseline": "greedy", "criterion": " "}, "rewards.P1A.criterion: is empty; say what is judged"),
        ({"baseline": "greedy", "criteria": {"P1A": "x"}}, "rewards.P1A: has criteria; leave them out"),
        ({"baseline": "greedy", "prompt": "alpaca_eval"}, "judge prompt 'alpaca_eval': does not show the criterion"),
    ],
)
def test_wrong_settings_are_refused_by_name(tmp_path, settings, message):
    with pytest.raises(UserError) as error:
        source("http://h/v1", tmp_path, **settings)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("columns", "listed"), [((), "have no columns"), (("level", "answer"), "have the columns answer, level")]
)
def test_a_baseline_that_is_no_column_is_refused_at_the_start(tmp_path, columns, listed):
    with pytest.raises(UserError) as error:
        source("http://h/v1", tmp_path, baseline_column="gold").check_columns(columns)
    assert str(error.value) == (
        f"rewards.P1A.baseline_column: 'gold' is no column, and the records of data.prompts {listed} beside the "
        "prompt; name one of these, or add it to the data"
    )


# ---- columns in prompts


@pytest.fixture
def template(tmp_path):
    def write(kind, user):
        path = tmp_path / f"{kind}.toml"
        path.write_text(f'kind = "{kind}"\nanswer = "text"\nlow = 1\nhigh = 9\nsystem = ""\nuser = """{user}"""')
        return str(path)

    return write


def test_a_rating_may_show_columns_of_the_records(tmp_path, template):
    """A record without the column has no rating, and nobody is asked about it."""
    server = ChatServer(lambda body: f"Verdict: {len(body['messages'][0]['content']) % 9 + 1}")
    path = template("rating", "{criterion} {prompt}|{first}|{level}|{{x}}")
    with server.running() as url:
        found = source(url, tmp_path, prompt=path)
        found.check_columns(RECORDS.columns)
        rewards = found(PROMPTS, ANSWERS, RECORDS)
    texts = {body["messages"][0]["content"] for body in server.bodies}
    shown = ["1", "2.5", None, "high", "[1, 2]"]
    want = {f"It is long. {p}|{a}|{level}|{{x}}" for p, a, level in zip(PROMPTS, ANSWERS, shown, strict=True) if level}
    assert texts == want and np.isnan(rewards).tolist() == [False, False, True, False, False]
    with pytest.raises(UserError) as error:
        found.check_columns(("gold",))
    assert str(error.value) == (
        f"judge prompt {path!r}: {{level}} is no field, and no column of the records; choose from prompt, first, "
        "second, criterion, person, low, high, or a column (data.prompts has the columns gold), and write other "
        "braces twice"
    )


def test_a_judge_may_show_columns_of_the_records(tmp_path, template):
    values = dict(zip(PROMPTS, ["A", "B", "A", None, "T"], strict=True))

    def columns(requests):
        return RecordColumns({"level": [values[request] for request in requests]})

    def obedient(body):
        return f"Verdict: {body['messages'][0]['content'].rpartition('|')[2]}"

    path = template("pair", "{prompt}|{first}|{second}|{level}").replace("'", "")
    with open(path, "a") as file:
        file.write('\ntie = "T"')
    with ChatServer(obedient).running() as url:
        context = JudgeContext(ScoreJudge(print), folder=tmp_path, columns=columns)
        judge = judge_from({"kind": "chat", "model": "m", "base_url": url, "prompt": path}, context)
        first, second = ["x"] * 5, ["y", "y", "x", "y", "y"]
        np.testing.assert_array_equal(judge(PROMPTS, first, second, "any"), [1, -1, 0, math.nan, 0])
        both = BothOrders(judge)
        both(PROMPTS, first, second, "any")
        assert (both.asked, both.judged) == (5, 4)


def test_values_of_columns_in_prompts():
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    assert column_text(turns) == "User: Hi\n\nAssistant: Hello"
    assert column_text({"a": math.nan, "b": "ü"}) == '{"a": null, "b": "ü"}'
    assert json.loads(column_text(True)) is True and column_text("") == ""


def test_the_check_of_a_source_asks_its_function():
    class Function:
        def __call__(self, prompts, completions):
            return [0.0] * len(prompts)

        def check_columns(self, columns):
            raise UserError(f"needs more than {sorted(columns)}; add some")

    with pytest.raises(UserError, match=r"needs more than \['level'\]; add some"):
        RewardSource("P1A", Function()).check_columns(("level",))
