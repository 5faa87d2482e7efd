"""The client of OpenAI-compatible servers: what it sends again, under which names, and when it gives up."""

import dataclasses
import datetime
import email.utils
import re
import threading
import time

import pytest
from support.chat_server import ChatServer

from pjrlhf.errors import UserError
from pjrlhf.judges.chat import Chat, ChatSettings
from pjrlhf.judges.client import Away, Waits
from pjrlhf.judges.judge import JudgeContext, ScoreJudge, judge_from
from pjrlhf.rewards.sources import NoReply

pytest.importorskip("openai")
BODY = {
    "messages": [{"role": "user", "content": "Hi"}],
    "max_tokens": 5,
    "logprobs": True,
    "top_logprobs": 3,
    "seed": 1,
}
MAX_TOKENS = (
    "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
)


def chat(url, folder, **settings):
    return Chat(ChatSettings(model="m", base_url=url, **settings), folder / "chat.jsonl")


def ask(chat, *numbers):
    return chat("test", [{"model": "m", **BODY, "temperature": number / 100} for number in numbers])


@pytest.mark.parametrize("fault", [500, 502, 520, 522, 524, 529, 530, 408, 409, 429, "cut", "reset", "early", "half"])
def test_what_another_try_may_mend_is_tried_again(tmp_path, fault):
    server = ChatServer(lambda body: "Hello", [fault, ""])
    with server.running() as url:
        (reply,) = ask(chat(url, tmp_path, concurrency=1), 1)
    assert reply["choices"][0]["message"]["content"] == "Hello" and server.seen == 2


@pytest.mark.parametrize("fault", [503, 520, 529, 429, "reset", "early"])
def test_after_all_tries_there_is_no_reply(tmp_path, fault):
    message = r"model 'm' at http://127\.0\.0\.1:\d+/v1/: (answers [45]|cannot be reached)"
    server = ChatServer(lambda body: "Hello", [fault] * 9)
    with server.running() as url, pytest.raises(NoReply, match=message):
        ask(chat(url, tmp_path, retries=1), 1)


def test_a_server_that_does_not_answer_is_told_once_for_all_who_wait(tmp_path, caplog):
    with ChatServer(lambda body: "Hello").running() as url:
        pass  # and nobody listens any more
    with pytest.raises(NoReply):
        ask(chat(url, tmp_path, retries=2, concurrency=4), 1, 2, 3, 4)
    told = [line for line in caplog.messages if "trying again" in line]
    pattern = (
        re.escape(f"model 'm' at {url}/: does not answer (") + r".*refused.*\); trying again in [\d.]+ s \(\d of 2\)"
    )
    assert all(re.fullmatch(pattern, line) for line in told)
    # Not one for each of the eight waits.
    assert told[0].endswith("(1 of 2)") and told[-1].endswith("(2 of 2)") and len(told) < 8


def test_waits_at_the_same_time_are_one_line(caplog):
    waits = Waits("model 'm' at URL", 5)
    for attempt in (1, 1, 2):
        waits.tell(ConnectionError("refused"), 30.0, attempt)
    assert caplog.messages == ["model 'm' at URL: does not answer (refused); trying again in 30 s (1 of 5)"]


def test_what_waits_is_silent_after_the_last_try_until_there_is_an_answer(caplog):
    waits = Waits("model 'm' at URL", 1)
    caplog.set_level("INFO")
    for _ in range(3):
        waits.tell(ConnectionError("refused"), 0.0, 1)
    waits.answered()
    waits.answered()
    waits.tell(ConnectionError("refused"), 0.0, 1)
    line = "model 'm' at URL: does not answer (refused); trying again in 0 s (1 of 1)"
    assert caplog.messages == [line, "model 'm' at URL: answers again", line]


def test_a_busy_server_answers(tmp_path, caplog):
    with ChatServer(lambda body: "Hello", ["busy", 503]).running() as url:
        ask(chat(url, tmp_path), 1)
    assert "does not answer" not in caplog.text


def test_a_date_says_when_to_come_back(tmp_path):
    then = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=2.5)
    server = ChatServer(lambda body: "Hello", ["busy"], retry_after=email.utils.format_datetime(then, usegmt=True))
    started = time.monotonic()
    with server.running() as url:
        ask(chat(url, tmp_path), 1)
    # The date has whole seconds; without it the second try follows after half a second.
    assert 1 < time.monotonic() - started < 5 and server.seen == 2


# ---- parameters that servers refuse


def test_the_other_name_of_a_limit_is_sent_once_it_is_known(tmp_path):
    server = ChatServer(lambda body: "Hello", refused={"max_tokens": MAX_TOKENS})
    with server.running() as url:
        asked = chat(url, tmp_path, concurrency=1)
        ask(asked, 1, 2, 3)
        assert server.seen == 4, "refused once"
        assert [body["max_completion_tokens"] for body in server.bodies] == [5, 5, 5]
        # A cache holds requests under one name, whatever the server takes.
        assert all(body["max_tokens"] == 5 for body in asked.cache._bodies.values())
        ask(asked, 1, 2, 3)
        assert server.seen == 4
        # The other way: what answers at this address has changed.
        server.refused = {"max_completion_tokens": "Extra inputs are not permitted: body.max_completion_tokens"}
        ask(asked, 4, 5)
        assert server.seen == 7 and [body["max_tokens"] for body in server.bodies[3:]] == [5, 5]


def test_a_server_without_log_probs_or_seeds_is_asked_without(tmp_path):
    refused = {"logprobs": "logprobs are not supported with this model", "seed": "Unknown parameter: 'seed'."}
    server = ChatServer(lambda body: "Hello", refused=refused)
    with server.running() as url:
        ask(chat(url, tmp_path, concurrency=1), 1, 2)
    assert server.seen == 4 and all(not {"logprobs", "top_logprobs", "seed"} & set(body) for body in server.bodies)


@pytest.mark.parametrize(
    ("refused", "seen"),
    [
        ({"max_tokens": "max_tokens is too large: 5. This model takes at most 4 tokens."}, 1),
        ({"top_logprobs": "top_logprobs: 3 is greater than the max allowed: 1"}, 1),
        ({"logprobs": "requested sample logprobs of 3, which is greater than max allowed: 1"}, 1),
        ({"temperature": "Unsupported value: 'temperature' does not support 0.01 with this model."}, 1),
        ({"max_tokens": MAX_TOKENS, "max_completion_tokens": "Unknown parameter: 'max_completion_tokens'."}, 2),
    ],
)
def test_a_wrong_value_is_an_error(tmp_path, refused, seen):
    server = ChatServer(lambda body: "Hello", refused=refused)
    with server.running() as url, pytest.raises(UserError) as error:
        ask(chat(url, tmp_path), 1)
    first = next(iter(refused.values()))
    assert f"answers 400 ({first}); correct that" in str(error.value)
    assert server.seen == seen and not isinstance(error.value, NoReply)


@pytest.mark.parametrize(
    ("sent", "shown"),
    [
        (
            {"detail": [{"loc": "max_tokens", "msg": "Extra inputs"}]},
            '{"detail": [{"loc": "max_tokens", "msg": "Extra inputs"}]}',
        ),
        ({"error": "max_tokens: unknown field"}, "max_tokens: unknown field"),
        (b"unexpected field max_tokens", "unexpected field max_tokens"),
        (b"", "Error code: 400"),
    ],
)
def test_what_a_server_refuses_is_read_in_any_form(tmp_path, sent, shown):
    server = ChatServer(lambda body: "Hello", refused={"max_tokens": sent})
    with server.running() as url:
        if "max_tokens" in shown:
            ask(chat(url, tmp_path), 1)
            assert "max_completion_tokens" in server.bodies[0]
        server.refused = {"temperature": sent}
        with pytest.raises(UserError, match=rf"answers 400 \({re.escape(shown)}\); correct that"):
            ask(chat(url, tmp_path / "other"), 1)


def test_a_server_that_goes_down_in_the_middle(tmp_path):
    """What came is kept, and the message says where, and how to go on."""
    server = ChatServer(lambda body: "Hello", ["", "", "reset", "reset"])
    with server.running() as url:
        with pytest.raises(NoReply) as error:
            ask(chat(url, tmp_path, concurrency=1, retries=1, patience=0.0), 1, 2, 3)
        end = f"check base_url; 2 replies are kept in {tmp_path / 'chat.jsonl'}; the same command goes on"
        assert str(error.value).startswith(f"model 'm' at {url}/: cannot be reached (") and str(error.value).endswith(
            end
        )
        ask(chat(url, tmp_path), 1, 2, 3)
    assert len(server.bodies) == 3


@pytest.mark.parametrize("fault", ["reset", 503])
def test_a_server_that_starts_again_is_waited_for(tmp_path, monkeypatch, caplog, fault):
    """Longer than the retries last, and it is told once for all that wait."""
    monkeypatch.setattr("pjrlhf.judges.chat.PAUSE", 0.01)
    server = ChatServer(lambda body: "Hello", ["", *[fault] * 9])
    with server.running() as url:
        asked = chat(url, tmp_path, concurrency=3, retries=0)
        ask(asked, 1)
        ask(asked, 2, 3, 4)
    told = [line for line in caplog.messages if "it has answered before, so it is waited for, 600 s at most" in line]
    assert len(server.bodies) == 4 and len(told) == 1 and told[0].startswith("model 'm' at")


def test_a_request_that_a_server_fails_at_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr("pjrlhf.judges.chat.PAUSE", 86400.0)
    with ChatServer(lambda body: "Hello", ["", 500]).running() as url:
        asked = chat(url, tmp_path, retries=0, patience=86400.0)
        ask(asked, 1)
        with pytest.raises(NoReply, match="answers 500"):
            ask(asked, 2)


def test_a_wait_for_a_server_ends_with_its_patience_or_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr("pjrlhf.judges.chat.PAUSE", 0.01)
    settings, replies = ChatSettings(model="m", patience=0.05), iter([{"n": 1}])

    def send(body):
        found = next(replies, None)
        if found is None:
            raise Away("gone")
        return found

    asked, ended = Chat(settings, tmp_path / "c.jsonl", send), threading.Event()
    asked("first", [{"n": 1}])
    with pytest.raises(NoReply, match="gone; 1 replies are kept"):
        asked("second", [{"n": 2}])
    asked.settings = dataclasses.replace(settings, patience=86400.0)
    monkeypatch.setattr("pjrlhf.judges.chat.PAUSE", 86400.0)
    threading.Timer(0.05, ended.set).start()  # an interrupt
    with pytest.raises(NoReply, match="gone"):
        asked._reply({"n": 2}, ended)


def test_a_server_that_ignores_what_it_is_asked(tmp_path):
    """Log-probabilities, their number and the limit are ignored: the letter counts, of several choices the first."""

    def ignorant(body):
        return {"message": {"role": "assistant", "content": " A\n"}, "logprobs": None}

    with ChatServer(ignorant).running() as url:
        context = JudgeContext(ScoreJudge(print), {"long": "It is long."}, tmp_path)
        judge = judge_from({"kind": "chat", "model": "m", "base_url": url}, context)
        assert judge(["p"], ["a"], ["b"], "long").tolist() == [1.0]
