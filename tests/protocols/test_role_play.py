"""A judge in the place of each person: who it is told they are, what it is asked, and intervals over people."""

import json
import re
import shutil

import numpy as np
import pytest
from support import tiny, tiny_users
from support.chat_server import ChatServer
from support.pages import Page, printed

from pjrlhf.data.schema import Example
from pjrlhf.errors import UserError
from pjrlhf.evaluation import report
from pjrlhf.pipeline import stages
from pjrlhf.protocols.role_play import PersonColumns, RolePlay, check_role_play, descriptions
from pjrlhf.protocols.users import UsersSettings

pytest.importorskip("openai")
PRISM = PersonColumns(about=("user_text", "age", "location"), stated=("stated_prefs",), said=("conversation",))
STATED = {"values": 10, "creativity": 90, "fluency": 71, "factuality": 100, "safety": 70, "other": None, "note": "none"}


def example(user, **extra):
    return Example(prompt="p", chosen="a", rejected="b", user_id=user, user_text=extra.pop("text", None), extra=extra)


def test_people_are_described_by_their_records():
    """The three largest stated preferences, whatever order they were shown in; a remark beside numbers is none."""
    examples = [
        example("ana", age="25-34", stated_prefs=STATED),
        example("ana", text="I teach.", age="65", conversation=["Hello?", "Why?"]),
        example("ben", text="I sail.", location={"country": "NO"}),
        example("eve", other="x"),
    ]
    assert descriptions(examples, PRISM) == {
        "ana": (
            "I teach.\nage: 25-34\n\nWhat matters most to this person, in this order: factuality, creativity, fluency."
            "\n\nThis person said:\n- Hello?\n- Why?"
        ),
        "ben": 'I sail.\nlocation: {"country": "NO"}',
    }
    numbers = PersonColumns(about=(), stated=("brevity", "wit"))
    assert descriptions([example("ana", brevity=2, wit=3.5)], numbers) == {
        "ana": "What matters most to this person, in this order: wit, brevity."
    }
    with pytest.raises(UserError, match=r"evaluate_users\.person_columns: no record has brevity, wit, so people"):
        descriptions(examples, numbers)
    # A column that is misspelled, beside one that is not; nobody has to say something of themselves.
    with pytest.raises(UserError, match="no record has agge, so people"):
        descriptions(examples, PersonColumns(about=("user_text", "agge")))
    assert descriptions(examples[:1], PersonColumns(about=("user_text", "age"))) == {"ana": "age: 25-34"}
    with pytest.raises(UserError, match=r"stated preferences .* are no numbers"):
        descriptions([example("ana", brevity=True)], PersonColumns(stated=("brevity",)))
    with pytest.raises(UserError, match=r"person: the stated preferences .* are no numbers; rate each of them"):
        descriptions([example("ana", brevity="much", wit=1)], numbers)


def test_columns_that_describe_nobody_are_found_before_the_first_stage(tmp_path):
    lines = [
        {
            "prompt": f"what is {word} ?",
            "chosen": "it can shine .",
            "rejected": "it can grow .",
            "user_id": who,
            "age": 30,
        }
        for word in ("rain", "sun", "snow")
        for who in ("ana", "ben")
    ]
    path = tiny_users.write_records(tmp_path / "records.jsonl", lines)
    base = str(tiny_users.save_base(tmp_path))
    config = tiny_users.settings("records", model__path=base, preference__data__path=path)
    config.evaluate_users.update({"cold_start": (), "generate_for": 1})
    config.evaluate_users.person_columns.about = ("age", "town")
    with config.ignore_type():
        config.evaluate_users.judge = {"kind": "chat", "model": "m", "base_url": "http://127.0.0.1:9/v1"}
    with pytest.raises(UserError, match=r"evaluate_users\.person_columns: no record has town, so people"):
        tiny.run(tmp_path / "run", config)
    assert not (tmp_path / "run" / "preference").exists()


def wishes(body):
    """The response that has what the person wants; T where both or none have."""
    system, user = (message["content"] for message in body["messages"])
    wanted = re.search(r"I want (\w+)", system)[1]
    first, second = (wanted in re.search(rf"Response {x}:\n(.*?)\n\n", user, re.S)[1] for x in "AB")
    return json.dumps({"reason": "", "verdict": "T" if first == second else "A" if first else "B"})


def test_each_comparison_is_judged_by_its_person(finished):
    """Intervals are over people: more answers of the same people make none narrower."""
    people = {"ana": "I want tea.", "ben": "I want rum.", "eve": "I want tea."}
    server = ChatServer(wishes)
    with server.running() as url:
        config = tiny.settings()
        role = RolePlay(tiny.start(finished, config), {"kind": "chat", "model": "m", "base_url": url}, people, 200)
        users = ["ana", "ben", "eve", "who"]
        own, base = ["tea", "tea", "tea", "tea"], ["rum"] * 4
        found = role(users, ["p"] * 4, own, base)
    assert (found["wins"], found["losses"], found["n"], found["people"]) == (2, 1, 3, 3)
    assert found["users"] == {"ana": 1.0, "ben": 0.0, "eve": 1.0}
    assert found["person_mean"]["mean"] == pytest.approx(2 / 3)
    assert found["low"] < 2 / 3 < found["high"]
    with server.running() as url:
        role = RolePlay(tiny.start(finished, config), {"kind": "chat", "model": "m", "base_url": url}, people, 200)
        often = role(np.repeat(users, 5).tolist(), [f"p{i}" for i in range(20)], own * 5, base * 5)
    assert often["n"] == 15 and often["rate"] == found["rate"]
    assert (often["low"], often["high"]) == pytest.approx((found["low"], found["high"]), abs=0.1)
    assert role.report()["consistency"] == 1.0 and role.report()["name"] == "chat m"
    told = {body["messages"][0]["content"].rpartition("\n")[2] for body in server.bodies}
    assert told == {"I want tea.", "I want rum."}, "nobody is asked for a person without a description"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("score", "judge.kind: 'score' cannot take the place of a person; choose chat or model, a language model"),
        ({"kind": "reward", "source": "x:y"}, "judge.kind: 'reward' cannot take the place of a person"),
        ({"kind": "chat", "model": "m", "person": "Ana"}, "judge.person: is that of each comparison; leave it out"),
        (
            {"kind": "chat", "model": "m", "base_url": "http://h/v1", "prompt": "criterion"},
            "judge prompt 'criterion': does not show the person; choose one that does, such as role_play",
        ),
    ],
)
def test_wrong_judges_are_refused_by_name(spec, message):
    with pytest.raises(UserError) as error:
        check_role_play(spec)
    assert message in str(error.value)


def test_a_judge_needs_answers():
    with pytest.raises(UserError, match="generate_for: is 0, and the judge compares these answers; set it to 1 or"):
        UsersSettings(generate_for=0, judge={"kind": "chat", "model": "m", "base_url": "http://h/v1"})


@pytest.mark.slow
def test_the_report_of_a_run_tells_what_people_prefer(people, tmp_path, caplog):
    """On trained models: the judge prefers what the persona asks for, by the length of the answers."""

    def rule(body):
        system, user = (message["content"] for message in body["messages"])
        first, second = (len(re.search(rf"Response {x}:\n(.*?)\n\n", user, re.S)[1]) for x in "AB")
        short = "short" in system
        verdict = "T" if first == second else "A" if (first < second) == short else "B"
        return json.dumps({"reason": "", "verdict": verdict})

    with ChatServer(rule).running() as url:
        judge = {"kind": "chat", "model": "m", "base_url": url, "cache": str(tmp_path / "judge.jsonl")}
        config = tiny_users.settings(evaluate_users__generate_for=2, evaluate_users__cold_start=())
        with config.ignore_type():
            config.evaluate_users.judge = judge
        folder = shutil.copytree(people, tmp_path / "run")
        with tiny.one_device(), caplog.at_level("INFO", logger="absl"):
            stages.stage_of("evaluate_users").run(tiny.start(folder, config))
    summary = json.loads((folder / "report" / "summary.json").read_text())
    page = Page((folder / "report" / "index.html").read_text())
    one = summary["role_play"]["individualized"]
    assert one["n"] == 2 * len(one["users"]) == 2 * one["people"] == 2 * 4
    assert one["low"] is None or one["low"] <= one["rate"] <= one["high"]
    assert summary["judges"][0]["name"] == "chat m" and summary["judges"][0]["requests"] > 0
    most = re.search(r"evaluate_users: at most (\d+) requests to model 'm'", caplog.text)
    assert summary["judges"][0]["requests"] <= int(most[1]) == 2 * sum(x["n"] for x in summary["role_play"].values())
    rates = summary["people_win_rate"]
    assert set(rates) == set(summary["gain"]) == set(summary["role_play"]) - {"pooled"}
    for found in rates.values():
        assert found["against"] == "pooled" and list(found["users"]) == list(one["users"]) and found["n"] == 2 * 4
        assert {persona: len(own["users"]) for persona, own in found["groups"].items()} == {"P2A": 3, "P2B": 1}
        assert found["low"] <= found["mean"] <= found["high"] and 0 <= found["ties"] <= 1
    assert "Win rate of the answers to each person" in "".join(page.text)
    assert "As each person would judge" in "".join(page.text)
    assert "by a judge in the place of each person" in printed({"role_play": summary["role_play"]}, width=250)


def test_the_tables_of_the_page(tmp_path):
    rate = {"rate": 0.6543, "low": 0.5, "high": 0.8, "n": 40, "ties": 3, "unjudged": 1, "people": 10}
    summary = {"role_play": {"<b>m": {**rate, "person_mean": {"mean": 0.6111, "low": 0.51, "high": 0.71}}}}
    page = Page(report.write_report(tmp_path, summary).read_text())
    text = "".join(page.text)
    for expected in ("<b>m", "65.4", "50.0 to 80.0", "61.1", "51.0 to 71.0", "40", "10"):
        assert expected in text, expected
