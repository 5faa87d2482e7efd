"""Answers of the base that others are compared with: the same for a prompt whenever they are asked for."""

import pytest
from support import tiny
from support.chat_server import ChatServer

from pjrlhf.data.messages import Conversation
from pjrlhf.runtime.baselines import FILE, BaseAnswers

TALK = Conversation([{"role": "user", "content": "a"}], {"style": "brief"})


def counting(calls):
    def sample(prompts, how, number):
        calls.append((list(prompts), how, number))
        return [f"{how} {number} {i}" for i in range(len(prompts))]

    return sample


def test_each_prompt_is_answered_once_also_after_a_restart(tmp_path):
    calls = []
    answers = BaseAnswers(tmp_path, "base", counting(calls))
    first = answers(["a", "b", "a", TALK], "greedy")
    assert first == ["greedy 0 0", "greedy 0 1", "greedy 0 0", "greedy 0 2"]
    assert answers([TALK, "c", "b"], "greedy") == ["greedy 0 2", "greedy 3 0", "greedy 0 1"]
    assert answers(["a"], "sampled") == ["sampled 4 0"]
    assert calls == [(["a", "b", TALK], "greedy", 0), (["c"], "greedy", 3), (["a"], "sampled", 4)]
    with (tmp_path / FILE).open("a") as file:
        file.write('{"how": "greedy", "prompt"')  # cut short by a crash
    again = BaseAnswers(tmp_path, "base", counting(calls))
    assert again(["a", "b", "a", TALK], "greedy") == first and len(calls) == 3
    # Another base has other answers.
    BaseAnswers(tmp_path, "other", counting(calls))(["a"], "greedy")
    assert calls[-1] == (["a"], "greedy", 0)
    # What was answered after the crash is kept too.
    BaseAnswers(tmp_path, "other", counting(calls))(["a"], "greedy")
    assert len(calls) == 4


def test_damaged_lines_are_left_out(tmp_path):
    calls = []
    first = BaseAnswers(tmp_path, "base", counting(calls))(["a"], "greedy")
    kept = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(b"\n".join([b"\xff\xfe", b"[" * 200_000, b"[]", b"7", b'{"key": 1}', kept]))
    assert BaseAnswers(tmp_path, "base", counting(calls))(["a"], "greedy") == first and len(calls) == 1


@pytest.mark.parametrize("how", ["greedy", "sampled"])
def test_a_policy_is_rewarded_by_comparison_with_the_base(copied, how):
    pytest.importorskip("openai")

    def shorter(body):
        text = body["messages"][-1]["content"]
        first, second = (text.split(f"Response {letter}:\n")[1].split("\n\n")[0] for letter in "AB")
        return "T" if len(first) == len(second) else "A" if len(first) < len(second) else "B"

    with ChatServer(shorter).running() as url, tiny.one_device():
        spec = {"kind": "judge", "criterion": "It is short.", "model": "m", "base_url": url, "baseline": how}
        config = tiny.settings()
        with config.ignore_type():
            config.rewards = {"P2A": spec}
        run = tiny.start(copied, config)
        requests = run.records.requests[0][:3]
        base = run.base_answers(requests, how)
        longest = [f"{text} and more" for text in base]
        k = run.audience.rewards.index("P2A")
        for answers, want in ((base, 0.5), (longest, 0.0), (["."] * 3, 1.0)):
            assert run.audience.host_rewards(requests, answers)[:, k].tolist() == [want] * 3
        assert tiny.start(copied, config).base_answers(requests, how) == base
