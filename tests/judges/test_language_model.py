"""Judges behind an OpenAI-compatible server: what they ask, what they read, and what they never ask twice."""

import contextlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from support.chat_server import ChatServer

from pjrlhf.errors import UserError
from pjrlhf.feedback.samplers import answer_of
from pjrlhf.judges import chat, language_model
from pjrlhf.judges.chat import Cache, Chat, ChatSettings
from pjrlhf.judges.judge import BothOrders, JudgeContext, ScoreJudge, judge_from
from pjrlhf.judges.language_model import PARSE_RETRIES, PROBE, JudgeSettings, LanguageModelJudge
from pjrlhf.judges.templates import FOLDER, read_pair, read_rating, read_template

pytest.importorskip("openai")
PROMPTS = [f"request {i}" for i in range(12)]
A = ["x" * (i % 5) + f" {i}" for i in range(12)]
B = ["y" * (i % 3) + f"-{i}" for i in range(12)]


def longer(body):
    """The letter of the longer response; T for equal lengths."""
    text = body["messages"][-1]["content"]
    first, second = re.search(r"Response A:\n(.*?)\n\nResponse B:\n(.*?)\n\n(?:Which|Give|Write)", text, re.S).groups()
    return "T" if len(first) == len(second) else "A" if len(first) > len(second) else "B"


def want(a, b):
    return np.sign([len(x) - len(y) for x, y in zip(a, b, strict=True)])


def context(folder):
    return JudgeContext(ScoreJudge(print), {"long": "The response is long."}, folder)


def judge(url, folder, **settings):
    return judge_from({"kind": "chat", "model": "m", "base_url": url, **settings}, context(folder))


# ---- verdicts


def test_verdicts_are_those_of_the_rule_whatever_the_server_does(tmp_path):
    faults = ["busy", "cut", "half", "", "broken", "other", "slow", "busy", "half"]
    server = ChatServer(longer, faults)
    with server.running() as url:
        counted = BothOrders(judge(url, tmp_path))
        assert counted(PROMPTS, A, B, "long").tolist() == want(A, B).tolist()
    assert counted.consistency == 1 and counted.position_bias == 0 and counted.judge.failures == 0
    assert len(server.bodies) == 24 and server.seen == 24 + 7, "every answer once, every fault tried again"
    assert {body["messages"][1]["content"].count("The response is long.") for body in server.bodies} == {1}


def test_one_order_is_drawn_for_each_pair(tmp_path):
    """Half of the requests, the same verdicts from either side, and a bias that averages out."""
    server = ChatServer(lambda body: longer(body) if "request 1" in str(body["messages"]) else "A")
    with server.running() as url:
        one = BothOrders(judge(url, tmp_path, orders=1))
        prompts = [f"request {i}" for i in range(100)]
        a, b = [f"a {'x' * (i % 3)}" for i in range(100)], [f"b {'x' * (i % 2)}" for i in range(100)]
        found = one(prompts, a, b, "long")
        assert len(server.bodies) == 100
        np.testing.assert_array_equal(one(prompts, b, a, "long"), -found)
        assert len(server.bodies) == 100, "the same requests, whichever answer is given first"
    ruled = [i for i, prompt in enumerate(prompts) if "request 1" in prompt]
    assert found[ruled].tolist() == np.array(want(a, b))[ruled].tolist()
    assert abs(np.delete(found, ruled).mean()) < 0.25
    assert "consistency" not in one.report(), "nothing is known of the other order"


@pytest.mark.parametrize(
    ("settings", "unlike"),
    [
        ({"prompt": "self_reference"}, math.nan),
        ({"prompt": "self_reference", "inconsistent": "tie"}, 0),
        ({}, 0),
        ({"inconsistent": "none"}, math.nan),
    ],
)
def test_answers_that_the_orders_judge_differently_are_a_tie_or_none(tmp_path, settings, unlike):
    """Self-reference feedback keeps what both orders agree on (arXiv 2406.11190)."""

    def first_unless_ruled(body):
        found = longer(body) if "request 1" in str(body["messages"]) else "A"
        return json.dumps({"reason": "", "verdict": found}) if "response_format" in body else found

    with ChatServer(first_unless_ruled).running() as url:
        found = BothOrders(judge(url, tmp_path, **settings))(PROMPTS, A, B, "long")
    ruled = np.array(["request 1" in prompt for prompt in PROMPTS])
    np.testing.assert_array_equal(found, np.where(ruled, want(A, B), unlike))


def test_none_needs_two_orders_to_compare(tmp_path):
    with pytest.raises(UserError, match="inconsistent: none compares two orders, and orders is 1; leave one of them"):
        judge("http://127.0.0.1:9/v1", tmp_path, inconsistent="none", orders=1)


def test_a_replay_gives_the_same_verdicts_with_the_server_gone(tmp_path):
    server = ChatServer(longer)
    with server.running() as url:
        first = judge(url, tmp_path)(PROMPTS, A, B, "long")
    again = judge(url, tmp_path, replay=True)
    np.testing.assert_array_equal(again(PROMPTS, A, B, "long"), first)
    assert again.backend.chat.sent == 0 and again.backend.chat.usage.requests == 12
    with pytest.raises(
        UserError, match=r"judge\.jsonl: has no reply to 12 of 12 requests of judge: long; set replay to"
    ):
        again(PROMPTS, B, A, "long")


def test_equal_answers_and_equal_requests_cost_nothing(tmp_path):
    server = ChatServer(longer)
    with server.running() as url:
        found = judge(url, tmp_path)(["q"] * 4, ["aa", "aa", "same", ""], ["b", "b", "same", ""], "long")
    assert found.tolist() == [1, 1, 0, 0] and len(server.bodies) == 1


def test_replies_that_cannot_be_read_are_asked_again_and_then_counted(tmp_path):
    def moody(body):
        first = "request 3" in body["messages"][1]["content"] and "seed" not in body
        never = "request 5" in body["messages"][1]["content"]
        return "I think A" if first or never else longer(body)

    server = ChatServer(moody)
    with server.running() as url:
        asked = judge(url, tmp_path)
        found = asked(PROMPTS, A, B, "long")
        wanted = want(A, B).astype(float)
        wanted[5] = math.nan
        np.testing.assert_array_equal(found, wanted)
        assert (asked.asked, asked.failures, len(server.bodies)) == (12, 1, 12 + 1 + 2)
        # The failures are kept too.
        np.testing.assert_array_equal(judge(url, tmp_path, replay=True)(PROMPTS, A, B, "long"), wanted)


def test_a_judge_whose_replies_cannot_be_read_is_asked_about_a_few_items_only(tmp_path, caplog):
    """Also where these are spread over calls; a reply is shown, and what the prompt wants."""
    many = [f"request {i}" for i in range(200)]
    pattern = (
        r"judge: long: model 'm' was asked about \d+ items \(\d+ requests\), and none of its replies can be read, "
    )
    pattern += (
        r"such as 'Answer: B'; prompt 'criterion' wants one of A, B, T and nothing else; set another .*judge\.jsonl"
    )
    for i, parts in enumerate(([many], [many[:5], many[5:6], many[6:]])):
        server = ChatServer(lambda body: "Answer: B")
        with server.running() as url, pytest.raises(UserError, match=pattern):
            asked = judge(url, tmp_path / str(i))
            for part in parts:
                asked(part, ["xx"] * len(part), ["y"] * len(part), "long")
        assert len(server.bodies) < 2 * PROBE * (1 + PARSE_RETRIES)
    assert "about 5 of 5 items cannot be read, also when asked again, such as 'Answer: B'" in caplog.text


def test_a_judge_is_asked_in_both_orders_at_the_same_time(tmp_path, monkeypatch):
    """So that the progress of a criterion is one; each pass has a name of its own."""
    passes = []
    send = Chat._send_all

    def spy(self, name, missing):
        passes.append((name, len(missing)))
        send(self, name, missing)

    monkeypatch.setattr(Chat, "_send_all", spy)
    with ChatServer(lambda body: "?" if "request 9" in str(body) else longer(body)).running() as url:
        both = BothOrders(judge(url, tmp_path))
        found = both(PROMPTS, A, B, "long")
        both.again()(PROMPTS[:2], A[:2], B[:2], "long")
    again = "judge: long (again: unreadable replies)"
    first, rest = ("judge: long", PROBE), ("judge: long", 2 * len(PROMPTS) - PROBE)
    assert passes == [first, rest, (again, 2), (again, 2), ("judge, asked twice: long", 4)]
    assert np.isnan(found).tolist() == [i == 9 for i in range(len(PROMPTS))]
    known = ~np.isnan(found)
    assert found[known].tolist() == want(A, B)[known].tolist()


@pytest.mark.parametrize("prompt", sorted(file.stem for file in FOLDER.glob("*.toml")))
def test_every_prompt_shows_what_is_judged_once(prompt):
    template = read_template(prompt)
    values = {name: f"<{name}>" for name in ("prompt", "first", "second", "criterion", "person")}
    text = "".join(message["content"] for message in template.messages(values))
    shown = {name for name in values if values[name] in text}
    assert {"prompt", "first"} <= shown and ("second" in shown) == (template.kind == "pair")
    assert all(text.count(values[name]) == 1 for name in shown)
    # What people write is never read as a field.
    assert "{criterion}" in template.messages(values | {"first": "{criterion}"})[1]["content"]
    body = language_model.request(template, JudgeSettings(model="m"), values)
    assert ("response_format" in body) == (template.answer == "json")


# ---- reading replies


def reply(text="", finish="stop", tokens=None):
    choice = {"message": {"content": text}, "finish_reason": finish}
    if tokens is not None:
        top = [{"token": token, "logprob": math.log(p)} for token, p in tokens.items()]
        choice["logprobs"] = {"content": [{"token": "A", "logprob": 0.0, "top_logprobs": top}]}
    return {"choices": [choice]}


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        (reply(tokens={"A": 0.6, "B": 0.2, "T": 0.2}), 0.4),
        (reply(tokens={" A": 0.3, "A": 0.3, "B": 0.2, "the": 0.2}), 0.5),  # the label with and without a blank
        (reply(tokens={"B": 0.9}), -1.0),  # the other label is not among the tokens
        (reply(tokens={"the": 0.9}), math.nan),
        (reply("A", tokens={"the": 0.9}), 1.0),
        (reply("A"), 1.0),
        (reply(" B\n"), -1.0),
        (reply("T"), 0.0),
        (reply("a"), math.nan),
        (reply("A or B"), math.nan),
        (reply(""), math.nan),
        ({"choices": []}, math.nan),
        ({}, math.nan),
        ({"choices": [{"message": {"content": None}}]}, math.nan),
    ],
)
def test_letters_are_read_from_log_probabilities_or_strictly(found, verdict):
    np.testing.assert_allclose(read_pair(read_template("criterion"), found), verdict)


@pytest.mark.parametrize(
    "logprobs",
    [
        "A",
        [1],
        {"content": "A"},
        {"content": [None]},
        {"content": [{"token": "A"}]},
        {"content": [{"token": "A", "logprob": None}]},
        {"content": [{"token": "A", "logprob": "-1"}]},
        {"content": [{"token": "A", "logprob": math.nan}]},
        {"content": [{"token": "A", "logprob": 1e9}]},
        {"content": [{"token": "A", "logprob": math.inf}]},
        {"content": [{"token": "A", "logprob": 10**400}]},
        {"content": [{"token": "A", "logprob": -1.0, "top_logprobs": [1]}]},
    ],
)
def test_log_probabilities_of_another_form_leave_the_text(logprobs):
    choice = {"message": {"content": "B"}, "logprobs": logprobs}
    assert read_pair(read_template("criterion"), {"choices": [choice]}) == -1


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (" B ", "B"),
        ([{"type": "thinking", "thinking": "A?"}, {"type": "text", "text": "B"}], "B"),
        ([{"type": "text", "text": "B"}, {"type": "text", "text": ""}], "B"),
        ([{"type": "text", "text": 3}, {"type": "text"}, "B", None], ""),
        ([], ""),
        (None, ""),
        ({"text": "B"}, ""),
    ],
)
def test_the_content_of_a_reply_is_a_text_or_has_parts(content, text):
    """Servers of models that reason give parts, of which the text is the answer."""
    verdict = read_pair(read_template("criterion"), reply(content))
    assert answer_of(reply(content)) == text and (verdict == -1 if text else math.isnan(verdict))


@pytest.mark.parametrize("choices", [None, 3, "A", {}, {"0": 1}, {"a": []}, [], [None], ["A"], [{}]])
def test_a_reply_of_another_form_has_no_verdict(choices):
    assert math.isnan(read_pair(read_template("helpful"), {"choices": choices}))
    assert math.isnan(read_rating(read_template("rating"), {"choices": choices}))


@pytest.mark.parametrize(
    ("text", "finish", "verdict"),
    [
        ('{"reason": "B is bad", "verdict": "A"}', "stop", 1),
        ('{"reason": "", "verdict": "T"}', "stop", 0),
        ('{"reason": "", "verdict": "A"}', "length", math.nan),  # cut off
        ('{"reason": "A is better"', "stop", math.nan),
        ('{"reason": "", "verdict": "both"}', "stop", math.nan),
        ('{"reason": "", "verdict": ["A"]}', "stop", math.nan),
        ('["A"]', "stop", math.nan),
        ("A", "stop", math.nan),
        ("[" * 100_000, "stop", math.nan),
        ('{"verdict": "B", "verdict": "A"}', "stop", math.nan),
    ],
)
def test_objects_are_read_strictly(text, finish, verdict):
    np.testing.assert_equal(read_pair(read_template("helpful"), reply(text, finish)), verdict)


@pytest.mark.parametrize(
    ("verdict", "value"),
    [
        *(("7", 7), ("10", 10), ("11", math.nan), ('"high"', math.nan), ("true", math.nan), ("-0.0", math.nan)),
        *(("1" + "0" * 400, math.nan), ("9" * 5000, math.nan), ("1e999", math.nan), ("Infinity", math.nan)),
        *(('"1e999"', math.nan), ("NaN", math.nan), ("[7]", math.nan)),
    ],
)
def test_ratings_lie_within_their_bounds(verdict, value):
    found = read_rating(read_template("rating"), reply(f'{{"reason": "", "verdict": {verdict}}}'))
    np.testing.assert_equal(found, value)


def test_a_prompt_of_your_own(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(
        'kind = "pair"\nanswer = "text"\nfirst = "one"\nsecond = "two"\nsystem = ""\n'
        'user = "{prompt} {{x}} {first} or {second}"\n'
    )
    template = read_template(str(path))
    assert template.messages({"prompt": "p", "first": "a", "second": "b"}) == [
        {"role": "user", "content": "p {x} a or b"},
    ]
    assert read_pair(template, reply("Both are fine.\nVerdict: two.")) == -1
    # Only the last line counts, and a verdict inside the reasons does not.
    assert math.isnan(read_pair(template, reply("Verdict: one, I first thought. But no.")))
    path.write_text(path.read_text().replace("{prompt}", "{question}"))
    with pytest.raises(UserError, match=r"\{question\} is no field, and no column .* the columns answer, l"):
        read_template(str(path)).check_columns(("level", "answer"))
    read_template(str(path)).check_columns(("question",))
    path.write_text(path.read_text().replace("{question}", "{question[0]}"))
    with pytest.raises(UserError, match=r"mine\.toml': \{question\[0\]\} is no field; choose from prompt, first"):
        read_template(str(path))
    for wrong, message in (
        ("{prompt} {first}", "do not show what is judged; write {second} where it stands"),
        ("{first} {second:>x}", "is no template (Unknown format code"),
        ("{first!z} {second}", "is no template (Unknown conversion specifier"),
    ):
        path.write_text(f'kind = "pair"\nanswer = "text"\nsystem = ""\nuser = "{wrong}"')
        with pytest.raises(UserError) as error:
            read_template(str(path))
        assert message in str(error.value)
    path.write_text("kind = 3")
    with pytest.raises(UserError, match=r"mine\.toml': is no template"):
        read_template(str(path))


@pytest.mark.parametrize(
    ("kind", "lines", "message"),
    [
        ("pair", 'second = "A"', "two of its verdicts ('A', 'A', '') are the same"),
        ("pair", 'tie = "B"', "two of its verdicts ('A', 'B', 'B') are the same"),
        ("pair", 'first = ""', "the verdicts ('', 'B', ''); give texts"),
        ("pair", "first = 1", "the verdicts (1, 'B', ''); give texts"),
        ("rating", "low = 10\nhigh = 1", "low 10 and high 1; give two whole numbers, the lower one first"),
        ("rating", "low = 0.5", "low 0.5 and high 10; give two whole numbers"),
        ("rating", "", "a rating is of one response; leave {second} out"),
    ],
)
def test_verdicts_that_cannot_be_told_apart_are_refused(tmp_path, kind, lines, message):
    path = tmp_path / "mine.toml"
    path.write_text(f'kind = "{kind}"\nanswer = "json"\nsystem = ""\nuser = "{{first}} {{second}}"\n{lines}')
    with pytest.raises(UserError) as error:
        read_template(str(path))
    assert message in str(error.value)


def test_a_prompt_without_criterion_refuses_criteria(tmp_path):
    with ChatServer(longer).running() as url:
        asked = judge(url, tmp_path, prompt="alpaca_eval")
        with pytest.raises(UserError, match="does not show the criterion 'long'; choose one that does"):
            asked(PROMPTS, A, B, "long")


def test_a_person_stands_in_the_prompt(tmp_path):
    server = ChatServer(lambda body: json.dumps({"reason": "", "verdict": longer(body)}))
    with server.running() as url:
        judge(url, tmp_path, prompt="role_play", person="A teacher who likes short texts.")(
            PROMPTS[:1], A[1:2], B[:1], ""
        )
    assert "A teacher who likes short texts." in server.bodies[0]["messages"][0]["content"]


# ---- budgets, crashes, errors


def test_a_budget_stops_cleanly_and_goes_on(tmp_path):
    server = ChatServer(longer)
    with server.running() as url:
        with pytest.raises(
            UserError, match=r"max_requests=5 is reached; raise the limit, and the same command goes on"
        ):
            judge(url, tmp_path, max_requests=5)(PROMPTS, A, B, "long")
        assert len(server.bodies) == 5
        assert judge(url, tmp_path)(PROMPTS, A, B, "long").tolist() == want(A, B).tolist()
        assert len(server.bodies) == 12, "nothing was asked twice"
        prices = {"prices": (10.0, 100.0), "concurrency": 1}  # 0.002 for a request
        with pytest.raises(UserError, match=r"max_cost=0.03 is reached"):
            judge(url, tmp_path, max_cost=0.03, **prices)(PROMPTS, B, A, "long")
        asked = judge(url, tmp_path, **prices)
        assert asked.backend.chat.usage.requests == 15 and asked.backend.chat.cost == pytest.approx(0.03)


def test_a_cost_is_never_exceeded_by_requests_under_way(tmp_path):
    server = ChatServer(longer)
    with server.running() as url:
        prices = {"prices": (10.0, 100.0), "concurrency": 8}  # 0.002 for a request
        with pytest.raises(UserError, match=r"max_cost=0.011 is reached"):
            judge(url, tmp_path, max_cost=0.011, **prices)(PROMPTS, A, B, "long")
    assert 1 <= len(server.bodies) <= 6


@pytest.mark.parametrize(
    "usage",
    [
        None,
        "many",
        [1, 2],
        {},
        {"prompt_tokens": 5},
        {"prompt_tokens": "5", "completion_tokens": 1},
        {"prompt_tokens": 10**400, "completion_tokens": 1},
    ],
)
def test_a_cost_needs_token_counts(tmp_path, usage):
    def without_usage(body):
        return {"choices": [{"message": {"content": "A"}, "finish_reason": "stop"}], "usage": usage}

    settings = ChatSettings(model="m", max_cost=1.0, prices=(1.0, 1.0))
    asked = Chat(settings, tmp_path / "c.jsonl", without_usage)
    with pytest.raises(
        UserError, match=r"model 'm': its server reports no token counts, which max_cost needs; set max_req"
    ):
        asked("all", [{"model": "m", "n": n} for n in range(9)])
    assert asked.usage.requests == asked.usage.unknown == 1


def told_before(caplog, planned):
    """What the log says of requests before they are sent, each as (level, text)."""
    caplog.clear()
    with caplog.at_level("INFO", logger="absl"):
        language_model.announce("evaluate", planned)
    return [(record.levelname, record.getMessage()) for record in caplog.records]


def test_the_most_requests_are_told_before_the_first_with_what_the_budget_says(tmp_path, caplog):
    server = ChatServer(longer)
    with server.running() as url:
        free, few = judge(url, tmp_path), judge(url, tmp_path, max_requests=30)
        ((level, text),) = told_before(caplog, free.planned_requests(12))
        assert level == "INFO" and text.startswith("evaluate: at most 24 requests to model 'm', of which those in its ")
        assert text.endswith("2 more for each reply that cannot be read; neither max_requests nor max_cost limits them")
        ((level, text),) = told_before(caplog, few.planned_requests(12))
        assert level == "INFO" and text.endswith("; max_requests=30 allows 30")
        assert len(server.bodies) == 0, "telling asks nobody"
        BothOrders(few)(PROMPTS, A, B, "long")
        assert len(server.bodies) == 24, "what was told"
        ((level, text),) = told_before(caplog, few.planned_requests(12))
        assert level == "WARNING" and "max_requests=30 allows 6: it may end there, and the same command goes on" in text
        priced = judge(url, tmp_path, max_cost=1.0, prices=(10.0, 100.0))  # 0.002 for a request
        ((level, text),) = told_before(caplog, BothOrders(priced).planned_requests(100))
        assert level == "INFO" and text.endswith("they cost about 0.40, max_cost=1 allows 0.95")
        ((level, text),) = told_before(caplog, priced.planned_requests(1000))
        assert level == "WARNING" and "they cost about 4.00, max_cost=1 allows 0.95: it may end there" in text
        new = judge(url, tmp_path / "new", max_cost=1.0, prices=(10.0, 100.0))
        ((_, text),) = told_before(caplog, new.planned_requests(1))
        assert text.endswith("max_cost=1 is compared with their cost after the first reply")
        assert not told_before(caplog, judge(url, tmp_path, replay=True).planned_requests(12))
        assert not told_before(caplog, free.planned_requests(0))
        # Judges of one model share its budget.
        once = judge(url, tmp_path, max_requests=30, orders=1)
        ((level, text),) = told_before(caplog, [*few.planned_requests(2), *once.planned_requests(3)])
        assert level == "WARNING" and "at most 7 requests" in text


def test_judges_that_share_a_file_share_its_budget_and_replies(tmp_path):
    server = ChatServer(longer)
    with server.running() as url:
        one, other = judge(url, tmp_path, max_requests=20), judge(url, tmp_path, max_requests=20)
        third = judge_from({"kind": "chat", "model": "n", "base_url": url}, context(tmp_path))
        one(PROMPTS, A, B, "long")
        other(PROMPTS, A, B, "long")
        assert len(server.bodies) == 12, "the second judge finds the replies of the first"
        with pytest.raises(UserError, match="max_requests=20 is reached"):
            other(PROMPTS, B, A, "long")
        assert len(server.bodies) == 20
        third(PROMPTS[:2], A[:2], B[:2], "long")
    usage = [each.backend.chat.usage.requests for each in (one, other, third)]
    assert usage == [20, 20, 2], "another model has a budget of its own"
    assert judge(url, tmp_path, replay=True).backend.chat.usage.requests == 20


def test_the_progress_tells_requests_cost_and_unreadable_replies(tmp_path, monkeypatch):
    shown = []

    class Bar(contextlib.nullcontext):
        def __init__(self, name, total, keys):
            super().__init__(self)
            self.keys = keys

        def update(self, step, metrics):
            shown.append({key: metrics[key] for key in self.keys})

    monkeypatch.setattr(chat, "progress", Bar)
    with ChatServer(lambda body: "?" if "request 5" in str(body) else longer(body)).running() as url:
        judge(url, tmp_path, prices=(10.0, 100.0))(PROMPTS, A, B, "long")
        judge(url, tmp_path, prices=(10.0, 100.0))(PROMPTS, B, A, "long")
    assert shown[-1].keys() == {"requests", "cost", "unreadable"}
    assert max(one["requests"] for one in shown) == 2 * (12 + 2) and shown[-1]["cost"] == pytest.approx(0.056)


def test_requests_keep_to_their_rate(tmp_path):
    times = []

    def send(body):
        times.append(time.monotonic())
        return {"n": body["n"]}

    chat = Chat(ChatSettings(model="m", requests_per_minute=1200), tmp_path / "c.jsonl", send)
    started = time.monotonic()
    chat("all", [{"n": n} for n in range(5)])
    # A busy machine may send late, and never early.
    assert all(at - started >= 0.05 * n - 0.005 for n, at in enumerate(sorted(times)))


def test_those_who_ask_at_the_same_time_share_limits(tmp_path):
    """As two rewards of a run do that the same model rates."""
    sent, lock = [], threading.Lock()

    def send(body):
        with lock:
            sent.append(time.monotonic())
        time.sleep(0.05)
        return {"choices": [{"message": {"content": "A"}}], "usage": {"prompt_tokens": 1, "completion_tokens": 1}}

    def both(**limits):
        sent.clear()
        chats = [Chat(ChatSettings(model="m", **limits), tmp_path / f"{len(limits)}.jsonl", send) for _ in range(2)]
        requests = [[{"model": "m", "n": n, "of": k} for n in range(8)] for k in range(2)]
        with ThreadPoolExecutor(2) as pool:
            return [pool.submit(chat, "all", bodies) for chat, bodies in zip(chats, requests, strict=True)]

    assert any(isinstance(one.exception(), UserError) for one in both(max_requests=9)) and len(sent) == 9
    assert not any(one.exception() for one in both(requests_per_minute=1200, concurrency=8))
    assert len(sent) == 16 and max(sent) - min(sent) > 0.05 * 14


def test_a_busy_server_is_asked_again_when_it_says_so(tmp_path):
    server = ChatServer(longer, ["busy"], retry_after=0.7)
    with server.running() as url:
        started = time.monotonic()
        judge(url, tmp_path)(PROMPTS[1:2], A[1:2], B[1:2], "long")
    assert time.monotonic() - started >= 0.7 and server.seen == 2


def test_a_judge_that_is_asked_anew_sends_requests_of_its_own(tmp_path):
    server = ChatServer(longer)
    with server.running() as url:
        first = judge(url, tmp_path)
        again = first.again()
        np.testing.assert_array_equal(first(PROMPTS, A, B, "long"), again(PROMPTS, A, B, "long"))
    assert len(server.bodies) == 24 and len({body.get("seed") for body in server.bodies}) == 2


KILLED = """
import sys
from pjrlhf.judges.judge import JudgeContext, ScoreJudge, judge_from
import pathlib
spec = {"kind": "chat", "model": "m", "base_url": sys.argv[1], "concurrency": 2}
judge = judge_from(spec, JudgeContext(ScoreJudge(print), {"long": "The response is long."}, pathlib.Path(sys.argv[2])))
count = 40
print(judge([f"request {i}" for i in range(count)], ["xx"] * count, ["y"] * count, "long").tolist())
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_without_asking_again(tmp_path):
    """SIGKILL in the middle: only what was under way is asked again."""
    enough = threading.Event()

    def rule(body):
        if len(server.bodies) >= 15:
            enough.set()
        time.sleep(0.02)
        return longer(body)

    server, alone = ChatServer(rule), {**os.environ, "JAX_PLATFORMS": "cpu"}
    with server.running() as url:
        command = [sys.executable, "-c", KILLED, url, str(tmp_path)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=alone)
        assert enough.wait(120)
        process.send_signal(signal.SIGKILL)
        process.wait()
        before = len(server.bodies)
        assert before < 40
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, env=alone)
    assert json.loads(done.stdout) == [1.0] * 40
    assert 40 <= len(server.bodies) <= 42, "two requests were under way"
    with pytest.raises(UserError, match="has no reply to 1 of 1"):
        judge(url, tmp_path, replay=True)(["new"], ["a"], ["b"], "long")


def test_a_line_that_a_crash_cut_short_is_asked_again(tmp_path):
    server = ChatServer(longer)
    with server.running() as url:
        judge(url, tmp_path)(PROMPTS, A, B, "long")
        path = tmp_path / "judge.jsonl"
        others = [b"[]", b"3", b"null", b'{"key": 1}', b'{"key": "k", "request": [], "reply": 3}', b"\xff\xfe"]
        others.append(b"[" * 200_000)
        path.write_bytes(b"\n".join([*others, path.read_bytes()[:-20]]))
        assert judge(url, tmp_path)(PROMPTS, A, B, "long").tolist() == want(A, B).tolist()
    assert len(server.bodies) == 13
    assert len(Cache(path).replies) == 12


def test_what_was_answered_before_an_error_is_kept(tmp_path):
    gate = threading.Event()

    def send(body):
        if body["n"] == 3:
            gate.wait(5)
            raise UserError("the server is gone")
        if body["n"] == 2:
            gate.set()
        return {"n": body["n"]}

    asked = Chat(ChatSettings(model="m", concurrency=2), tmp_path / "c.jsonl", send)
    with pytest.raises(UserError, match="the server is gone"):
        asked("all", [{"n": n} for n in range(40)])
    kept = [reply["n"] for reply in Cache(tmp_path / "c.jsonl").replies.values()]
    assert {0, 1, 2} <= set(kept) and len(kept) < 40


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "missing"}, "has no such model or address; check model and base_url"),
        ({"key_variable": "WRONG_KEY"}, r"refuses the key; check \$WRONG_KEY"),
    ],
)
def test_errors_of_the_server_name_the_way_out(tmp_path, monkeypatch, settings, message):
    monkeypatch.setenv("OPENAI_API_KEY", "right")
    monkeypatch.setenv("WRONG_KEY", "wrong")
    with ChatServer(longer, key="right").running() as url, pytest.raises(UserError, match=message):
        judge(url, tmp_path, **settings)(PROMPTS, A, B, "long")


@pytest.mark.parametrize("key", ["secret\n", " secret", "sécret"])
def test_a_key_that_cannot_be_sent(tmp_path, monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(UserError, match=r"\$OPENAI_API_KEY: holds a line break.*set it to the key alone"):
        judge("http://127.0.0.1:9/v1", tmp_path)


@pytest.mark.parametrize("url", ["localhost:8000/v1", "http://", "ftp://a/v1", "http://a:99999/v1", "/v1"])
def test_a_base_url_that_is_no_address_is_refused_at_the_start(url):
    with pytest.raises(UserError, match=r"base_url: .* is no address; write http://host:port/v1"):
        ChatSettings(model="m", base_url=url).check()


def test_a_login_in_a_base_url_is_refused_and_not_shown():
    with pytest.raises(UserError, match=r"base_url http://\*+@a/v1: has a login in its address, which is not sent"):
        ChatSettings(model="m", base_url="http://me:secret@a/v1").check()


def test_a_criterion_is_text(tmp_path):
    with pytest.raises(UserError, match=r"judge\.criteria\.long: 5 is not text; say what is judged"):
        judge("http://127.0.0.1:9/v1", tmp_path, criteria={"long": 5})


def test_a_server_that_is_not_there_or_talks_nonsense(tmp_path):
    with pytest.raises(UserError, match=r"model 'm' at http://127\.0\.0\.1:9/v1/: cannot be reached .*check base_url"):
        judge("http://127.0.0.1:9/v1", tmp_path, retries=0)(PROMPTS, A, B, "long")
    with ChatServer(longer, ["half"] * 100).running() as url, pytest.raises(UserError, match="replies cannot be read"):
        judge(url, tmp_path, retries=1, concurrency=1)(PROMPTS, A, B, "long")


def test_the_key_is_needed_for_the_servers_of_openai_alone(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(UserError, match=r"model 'm': \$OPENAI_API_KEY is not set; set it to the key of the server"):
        judge("", tmp_path)
    assert isinstance(judge("http://127.0.0.1:9/v1", tmp_path), LanguageModelJudge)


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    asked = Chat(ChatSettings(model="m", cache=str(tmp_path / "file" / "c.jsonl")), tmp_path / "x", lambda body: {})
    with pytest.raises(UserError, match=r"c\.jsonl: cannot be written"):
        asked("all", [{"n": 1}])


def test_the_key_never_reaches_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    with ChatServer(longer, key="secret-key").running() as url:
        judge(url, tmp_path)(PROMPTS, A, B, "long")
    assert "secret-key" not in (tmp_path / "judge.jsonl").read_text()


def test_requests_are_told_apart_by_all_they_hold():
    body = {"model": "m", "messages": [{"role": "user", "content": "a"}]}
    keys = {chat.request_key("u", body), chat.request_key("v", body), chat.request_key("u", {**body, "seed": 1})}
    assert len(keys) == 3 and chat.request_key("u", dict(reversed(body.items()))) in keys


@pytest.mark.parametrize(
    ("person", "text"),
    [
        ("A teacher.", "A teacher."),
        ({}, ""),
        (
            {"about": "A nurse of 40.", "stated": {"fluency": 10, "safety": 90, "facts": 95.5, "fun": 50, "style": 0}},
            "A nurse of 40.\n\nWhat matters most to this person, in this order: facts, safety, fun.",
        ),
        ({"said": ["Be brief.", "Thanks!"]}, "This person said:\n- Be brief.\n- Thanks!"),
    ],
)
def test_a_person_is_described_by_what_matters_most(person, text):
    """The three largest stated preferences, whatever the order in which they were shown."""
    assert language_model.describe(person) == text
    assert language_model.describe({"stated": {"fun": 10**400}}).endswith("fun.")
    numbers = ({"stated": {"fun": "high"}}, {"stated": {"fun": math.nan}}, {"stated": ["fun"]}, {"stated": "fun"})
    for wrong in ({"name": "x"}, *numbers, {"said": "Be brief."}, {"said": 3}):
        with pytest.raises(UserError, match="person: "):
            language_model.describe(wrong)
