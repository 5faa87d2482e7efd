"""The Python of the pages on rewards and judges is what a config takes."""

import dataclasses
import pathlib
import re
import sys

import pytest
from support import tiny, tiny_classifiers, tiny_judge, tiny_users

from pjrlhf.judges.judge import JudgeContext, ScoreJudge, ask, judge_from
from pjrlhf.pipeline import stages
from pjrlhf.rewards.sources import RecordColumns, RewardSource, reward_source

pytest.importorskip("openai")
DOCS = pathlib.Path(__file__).parents[2] / "docs"
PROMPTS, ANSWERS = ["say a", "say b"], ["a short one", "b"]


def blocks(page):
    found = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    assert found
    return found


def test_examples_of_rewards(tmp_path, monkeypatch):
    """Every block runs, and what it sets is read without an error."""
    monkeypatch.chdir(tmp_path)
    for name, labels in (("helpful", ["good"]), ("humor", ["PLAIN", "HUMOROUS"])):
        tiny_classifiers.gpt2_folder(tmp_path / "models" / name, labels)
    (function,), configs = ([code for code in blocks("rewards.md") if code.startswith("def ") == own] for own in (1, 0))
    (tmp_path / "my_rewards.py").write_text(f"def grade(text):\n    return len(text)\n\n\n{function}")
    found = reward_source("P1A", "my_rewards.py:readability")
    found.check_columns(("level",))
    assert found(PROMPTS, ANSWERS, RecordColumns({"level": [11, 3]})).tolist() == [0, -2]
    for code in configs:
        config = tiny.settings()
        exec(code, {"config": config})
        for name, spec in config.rewards.items():
            assert isinstance(reward_source(name, spec if isinstance(spec, str) else spec.to_dict()), RewardSource)
        if config.policy.reward_weights:
            config.objectives = ("P1A", "P2B", "P3A")
            assert len(stages.read(config).settings.policy.schedules) == 3


def test_examples_of_judges(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_judge.make(tmp_path / "models").rename(tmp_path / "models" / "judge")
    seen = set()
    for code in blocks("judges.md"):
        if code.startswith("def "):
            (tmp_path / "my_judges.py").write_text(code)
            context = JudgeContext(ScoreJudge(lambda *_: 0.0))
            judge = judge_from(re.search(r'judge = "(.*?)"', code)[1], context)
            assert ask(judge, PROMPTS, ANSWERS, ANSWERS[::-1], "any").tolist() == [1, -1]
            continue
        config = tiny_users.settings() if "evaluate_users" in code else tiny.settings()
        config.general = "helpful" if "rewards" in code else config.get("general", "")
        exec(code, {"config": config})
        if "rewards" in config and config.rewards:
            for name, spec in config.rewards.items():
                reward_source(name, spec.to_dict())
                seen.add("rewards")
        elif "evaluate_users" in code:
            config.evaluate_users.generate_for = 2
            plan = stages.read(config)
            assert dataclasses.asdict(plan.settings.evaluate_users)["person_columns"]["stated"] == ("stated_prefs",)
            seen.add("people")
        else:
            assert len(stages.read(config).settings.evaluate.judges) == 2
            seen.add("judges")
    assert seen == {"rewards", "people", "judges"} and "my_judges" not in sys.modules
