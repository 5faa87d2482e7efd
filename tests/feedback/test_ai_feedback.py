"""Comparisons labelled by a language model behind a server on this machine."""

import json
import re

import pytest
from support import tiny
from support.chat_server import ChatServer

from pjrlhf.errors import UserError
from pjrlhf.feedback import comparisons
from pjrlhf.pipeline import stages

pytest.importorskip("openai")
LABELLED = dict.fromkeys(tiny.REWARDS, "longer")


def longer(body):
    text = body["messages"][-1]["content"]
    first, second = re.search(r"Response A:\n(.*?)\n\nResponse B:\n(.*?)\n\nWhich", text, re.S).groups()
    return "T" if len(first) == len(second) else "A" if len(first) > len(second) else "B"


def settings(judge):
    """The tiny config, whose pairs are labelled by `judge`."""
    config = tiny.settings(comparisons__pairs=16)
    with config.ignore_type():
        config.judge, config.comparisons.judge = LABELLED, judge
    return config


def label(folder, judge="score"):
    """(records, what the stage reports) of a run that labels its pairs again."""
    run = tiny.start(folder, settings(judge))
    with tiny.one_device():
        found = comparisons.run(run)
    return [json.loads(line) for line in (folder / "comparisons" / comparisons.FILE).read_text().splitlines()], found


def test_a_language_model_labels_as_its_rule_says_and_is_never_asked_twice(copied):
    by_rule, counts = label(copied)
    server = ChatServer(longer, ["busy", "half", "cut"])
    with server.running() as url:
        judge = {"kind": "chat", "model": "m", "base_url": url}
        with pytest.raises(UserError, match="max_requests=20 is reached"):
            label(copied, {**judge, "max_requests": 20})
        found, report = label(copied, judge)
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
        with pytest.raises(UserError, match="none of 16 pairs of answers differs by 'P2B'"):
            label(copied, {**config, "base_url": url, "criteria": criteria})


def test_a_wrong_judge_is_refused_before_anything_runs():
    with pytest.raises(UserError, match=r"comparisons.*judge prompt 'poem': there is no such file"):
        stages.read(settings({"kind": "chat", "model": "m", "prompt": "poem"}))
