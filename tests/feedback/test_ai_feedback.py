"""Comparisons labelled by a language model behind a server on this machine."""

import collections
import json
import math
import re
import threading
import types

import pytest
from support import tiny
from support.chat_server import ChatServer

from pjrlhf.algorithms import reward
from pjrlhf.data.messages import Conversation
from pjrlhf.errors import UserError
from pjrlhf.feedback import comparisons
from pjrlhf.feedback.samplers import sampler
from pjrlhf.pipeline import stages

pytest.importorskip("openai")
LABELLED = dict.fromkeys(tiny.REWARDS, "longer")


def longer(body):
    text = body["messages"][-1]["content"]
    first, second = re.search(r"Response A:\n(.*?)\n\nResponse B:\n(.*?)\n\nWhich", text, re.S).groups()
    return "T" if len(first) == len(second) else "A" if len(first) > len(second) else "B"


def settings(judge="score", sampler="base", **changes):
    """The tiny config, whose pairs are sampled by `sampler` and labelled by `judge`."""
    config = tiny.settings(comparisons__pairs=16, **changes)
    with config.ignore_type():
        config.judge, config.comparisons.judge, config.comparisons.sampler = LABELLED, judge, sampler
    return config


def label(folder, judge="score", sampler="base", **changes):
    """(records, what the stage reports) of a run that labels its pairs again."""
    run = tiny.start(folder, settings(judge, sampler, **changes))
    with tiny.one_device():
        found = comparisons.run(run)
    return [json.loads(line) for line in (folder / "comparisons" / comparisons.FILE).read_text().splitlines()], found


def test_a_language_model_labels_as_its_rule_says_and_is_never_asked_twice(copied, caplog):
    by_rule, counts = label(copied)
    server = ChatServer(longer, ["busy", "half", "cut"])
    with server.running() as url:
        judge = {"kind": "chat", "model": "m", "base_url": url}
        with pytest.raises(UserError, match="max_requests=20 is reached"):
            label(copied, {**judge, "max_requests": 20})
        with caplog.at_level("INFO", logger="absl"):
            found, report = label(copied, judge)
    most = re.search(r"comparisons: at most (\d+) requests to model 'm'", caplog.text)
    assert len(server.bodies) <= int(most[1]) == 2 * 16 * len(tiny.REWARDS)
    assert [{**record, "judge": "chat m"} for record in by_rule] == found
    assert report["ties"] == counts["ties"] and not any(report["unjudged"].values())
    assert report["judge"]["consistency"] == 1 and report["judge"]["failures"] == 0
    sent = [json.dumps(body, sort_keys=True) for body in server.bodies]
    assert len(sent) == len(set(sent)) == report["judge"]["requests"]
    # The server is gone.
    again, replayed = label(copied, {**judge, "replay": True})
    assert again == found and replayed["judge"]["sent"] == 0
    sentences = {body["messages"][-1]["content"].split("\n\n")[0] for body in server.bodies}
    assert len(sentences) == len(tiny.REWARDS), "each preference has its own words"


def test_pairs_without_a_verdict_are_counted_and_no_records(copied):
    def silent_on_friendly(body):
        return "?" if "friendly" in body["messages"][-1]["content"].split("\n\n")[0] else longer(body)

    config = {"kind": "chat", "model": "n"}
    with ChatServer(silent_on_friendly).running() as url:
        criteria = dict.fromkeys(tiny.REWARDS[:-1], "The response is long.") | {"P2B": "The response is friendly."}
        with pytest.raises(UserError, match=r"no verdict by 'P2B' on (\d+) of \1 pairs of answers.*check what it rep"):
            label(copied, {**config, "base_url": url, "criteria": criteria})


@pytest.mark.parametrize(
    ("stage", "judge", "message"),
    [
        ("comparisons", {}, "comparisons.judge: criterion 'P2A' has no text; add it to criteria"),
        ("evaluate", {}, "evaluate.judge: criterion 'P2A' has no text; add it to criteria"),
        ("comparisons", {"criteria": {"P2A": "x", "P2C": "y"}}, "criteria has 'P2C', which is no criterion of the run"),
        ("evaluate", {"prompt": "alpaca_eval"}, "does not show the criterion 'P2B'; choose one that does"),
        ("comparisons", {"criteria": {"P2A": "It is short."}}, None),
    ],
)
def test_criteria_without_words_are_found_before_anything_runs(stage, judge, message):
    """No judge takes a preference without a sentence for helpfulness."""
    config = tiny.settings(objectives=("P2A", "P2B"), stages=("sft", stage))
    with config.ignore_type():
        config.preferences = {
            "P2A": {"dimension": "length", "sentence": ""},
            "P2B": {"dimension": "length", "sentence": "Be long."},
        }
        config.judge = {name: "short" for name in ("P2A", "P2B", "helpful")}
        config[stage].judge = {"kind": "chat", "model": "m", "base_url": "http://127.0.0.1:9/v1", **judge}
    if message is None:
        stages.read(config)
        return
    with pytest.raises(UserError) as error:
        stages.read(config)
    assert message in str(error.value)


def test_a_wrong_judge_is_refused_before_anything_runs():
    with pytest.raises(UserError, match=r"comparisons.*judge prompt 'poem': there is no such file"):
        stages.read(settings({"kind": "chat", "model": "m", "prompt": "poem"}))


def test_records_name_their_judge_and_sampler_and_no_pair_comes_twice(copied):
    records, report = label(copied)
    assert {(record["judge"], record["sampler"]) for record in records} == {("score", "base")}
    pairs = [(r["objective"], r["request"], *sorted(str(r[side]) for side in ("chosen", "rejected"))) for r in records]
    assert len(pairs) == len(set(pairs))
    assert all(str(record["chosen"]) != str(record["rejected"]) for record in records)
    usable = report["pairs"] - report["empty_answers"] - report["repeated_pairs"]
    counts = collections.Counter(record["objective"] for record in records)
    assert all(counts[name] + report["ties"][name] == usable for name in tiny.REWARDS)


def test_pairs_are_labelled_by_what_learns_from_labels(copied):
    """Reward models, and beside them objectives with a source that MODPO needs labels of."""
    by_all, _ = label(copied)
    sources = {"P2A": "support.toy_extensions:brevity"}
    by_models, _ = label(copied, rewards=sources)
    assert by_models == [record for record in by_all if record["objective"] != "P2A"]
    assert label(copied, rewards=sources, comparisons__objectives=tiny.REWARDS)[0] == by_all
    models = reward.method_of(tiny.start(copied, settings(rewards=sources)))
    assert models.ingredients == tuple(name for name in tiny.REWARDS if name != "P2A")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rewards": dict.fromkeys(tiny.REWARDS, "support.toy_extensions:brevity")},
            "comparisons: the rewards of all objectives have a source, .*; leave the stage out, or name in",
        ),
        ({"comparisons__objectives": ("P9",)}, "comparisons.objectives: 'P9' is unknown; choose from P1A, "),
        ({"comparisons__objectives": ("P2A",)}, "comparisons.objectives: 'P1A' has a reward model, which learns from"),
    ],
)
def test_labels_for_nobody_are_refused_before_anything_runs(changes, message):
    with pytest.raises(UserError, match=message):
        stages.read(settings(**changes))


def test_answers_that_both_orders_do_not_agree_on_are_no_records(copied):
    """With soft verdicts a mean is left of them, which the prompt of self-reference feedback leaves out."""

    def alike(first, second):
        return (len(first) + len(second)) % 2 == 0

    def rule(body):
        text = body["messages"][-1]["content"]
        first, second = re.search(r"Response A:\n(.*?)\n\nResponse B:\n(.*?)\n\nWhich", text, re.S).groups()
        leaning = 0.9 if len(first) > len(second) else 0.1
        if alike(first, second):  # the first one, in both orders
            leaning = 0.7 if first > second else 0.55
        top = [{"token": "A", "logprob": math.log(leaning)}, {"token": "B", "logprob": math.log(1 - leaning)}]
        content = [{"token": "A", "logprob": 0.0, "top_logprobs": top}]
        return {"message": {"role": "assistant", "content": "A"}, "logprobs": {"content": content}}

    with ChatServer(rule).running() as url:
        judge = {"kind": "chat", "model": "soft", "base_url": url}
        every, _ = label(copied, judge)
        found, report = label(copied, {**judge, "inconsistent": "none"})
    texts = [[record[side][0]["content"] for side in ("chosen", "rejected")] for record in every]
    assert found == [record for record, pair in zip(every, texts, strict=True) if not alike(*pair)] != []
    assert sum(report["unjudged"].values()) == report["judge"]["asked"] - report["judge"]["judged"] > 0


def test_ties_are_kept_where_they_are_wanted(copied):
    dropped, counts = label(copied)
    kept, _ = label(copied, comparisons__ties="keep")
    ties = [record for record in kept if record.get("preference") == 0.5]
    assert [record for record in kept if record not in ties] == dropped
    asked = {name: count - counts["equal_answers"] for name, count in counts["ties"].items()}
    assert collections.Counter(record["objective"] for record in ties) == collections.Counter(asked)


def test_soft_verdicts_become_soft_labels(copied):
    logprobs = [{"token": "A", "logprob": math.log(0.75)}, {"token": "B", "logprob": math.log(0.25)}]

    def rule(body):
        text = body["messages"][-1]["content"]
        first, second = re.search(r"Response A:\n(.*?)\n\nResponse B:\n(.*?)\n\nWhich", text, re.S).groups()
        top = logprobs if first > second else [{**logprobs[0], "token": "B"}, {**logprobs[1], "token": "A"}]
        content = [{"token": "A", "logprob": 0.0, "top_logprobs": top}]
        return {"message": {"role": "assistant", "content": "A"}, "logprobs": {"content": content}}

    with ChatServer(rule).running() as url:
        found, _ = label(copied, {"kind": "chat", "model": "soft", "base_url": url})
    assert found and all(record["preference"] == pytest.approx(0.75) for record in found)
    assert all(record["chosen"][0]["content"] > record["rejected"][0]["content"] for record in found)


def test_a_stronger_model_behind_a_url_answers_and_is_never_asked_twice(copied):
    lock, seen = threading.Lock(), []

    def rule(body):
        with lock:
            seen.append(json.dumps(body, sort_keys=True))
        return f"it holds air . {'it can burn . ' * (body['seed'] % 3)}"

    server = ChatServer(rule, ["busy", "cut"])
    with server.running() as url:
        sampler = {"kind": "chat", "model": "strong", "base_url": url, "system": "Be brief."}
        with pytest.raises(UserError, match="max_requests=10 is reached"):
            label(copied, sampler={**sampler, "max_requests": 10})
        found, report = label(copied, sampler=sampler)
    assert len(seen) == len(set(seen)) == 2 * report["pairs"], "every answer is a request of its own, sent once"
    assert {record["sampler"] for record in found} == {"chat strong"}
    assert all(json.loads(body)["messages"][0] == {"role": "system", "content": "Be brief."} for body in seen)
    texts = {record[side][0]["content"] for record in found for side in ("chosen", "rejected")}
    assert texts <= {"it holds air ." + " it can burn ." * n for n in range(3)}
    again, _ = label(copied, sampler={**sampler, "replay": True})
    assert again == found


def test_a_chat_sampler_gets_tools_and_variables_of_the_template(tmp_path):
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
    call = {"type": "function", "id": "1", "function": {"name": "add", "arguments": {"a": 1}}}
    turns = [
        {"role": "user", "content": "1 + 1 ?"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "2", "tool_call_id": "1"},
    ]
    request = Conversation(turns, {"tools": tools, "enable_thinking": False})
    run = types.SimpleNamespace(
        records=types.SimpleNamespace(ask=lambda request, words: request),
        settings=types.SimpleNamespace(seed=0, data=types.SimpleNamespace(max_completion=8)),
        workdir=types.SimpleNamespace(path=tmp_path),
    )
    server = ChatServer(lambda body: "two \ud83d")
    with server.running() as url:
        found = sampler(run, {"kind": "chat", "model": "m", "base_url": url})([request], [""], "answers")
    (body,) = server.bodies
    assert found == ["two ?"] and body["chat_template_kwargs"] == {"enable_thinking": False}
    sent = [turns[0], {"role": "assistant", "content": None, "tool_calls": [call]}, turns[2]]
    sent[1]["tool_calls"] = [{**call, "function": {"name": "add", "arguments": '{"a": 1}'}}]
    assert body["messages"] == sent and body["tools"] == tools


def test_another_model_answers_in_the_place_of_the_base(copied):
    """The base itself, named as another folder, gives the answers of the base."""
    by_base, _ = label(copied)
    folder = copied / "sft" / "model"
    found, _ = label(copied, sampler=str(folder))
    assert [{**record, "sampler": "base"} for record in found] == by_base
    assert {record["sampler"] for record in found} == {"model sft/model"}


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        ({"kind": "oracle"}, "sampler: kind 'oracle' is unknown; choose one of base, model, chat"),
        ({"kind": "chat"}, "sampler: names no model; set model"),
        ({"kind": "model"}, "sampler: names no model; set path"),
        ({"kind": "base", "path": "x"}, "sampler 'base': does not take these settings"),
        ({"kind": "chat", "model": "m", "max_cost": 1.0}, "max_cost: needs prices"),
        ({"kind": "chat", "model": "m", "temprature": 1.0}, "temprature"),
    ],
)
def test_a_wrong_sampler_is_refused_before_anything_runs(sampler, message):
    with pytest.raises(UserError, match=message):
        stages.read(settings("score", sampler))
