"""The server as clients use it: the official client, malformed bodies, limits, metrics, and SIGTERM."""

import asyncio
import http.client
import json
import pathlib
import re
import signal
import socket
import time

import numpy as np
import openai
import pytest
from support import tiny_serving, tiny_users
from support.serving import answering, send, served, start
from support.tiny_serving import K

from pjrlhf import cli
from pjrlhf.data.messages import ROLES
from pjrlhf.errors import UserError
from pjrlhf.models.registry import UserRegistry
from pjrlhf.models.users import UserModel
from pjrlhf.serving.answers import _check_roles
from pjrlhf.serving.bodies import ChatBody, CompletionBody
from pjrlhf.serving.catalogue import Catalogue, People
from pjrlhf.serving.protocol import Refused
from pjrlhf.serving.running import _listen
from pjrlhf.serving.settings import ServerSettings

ROOT = pathlib.Path(__file__).parents[2]
NAMES = ("P1A", "P2B", "P3A")
SOUP = {"P1A": 0.7, "P3A": -0.4}
QUESTION = [{"role": "user", "content": "what is rain ?"}]
IMAGE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://a/b.png"}}]}]
E = 2


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_serving.model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def soups(model):
    """Soups, on 127.0.0.1."""
    engine = tiny_serving.engine(model)
    with answering(Catalogue(model, NAMES, tiny_serving.bank(model)), engine, max_body=20_000) as place:
        yield place


@pytest.fixture(scope="module")
def persons(model):
    """A policy that knows ana and bo."""
    width = model.backbone.model.config.hidden_size
    users = UserModel(kind="individualized", num_users=2, tokens=E, width=width)
    rng = np.random.default_rng(0)
    params = {
        "shared": {"generic": rng.normal(size=(E, width)).astype(np.float32)},
        "table": {"offset": rng.normal(size=(3, E, width)).astype(np.float32)},
    }
    catalogue = Catalogue(
        model, NAMES, tiny_serving.bank(model), People(users, UserRegistry((None, "ana", "bo")), params)
    )
    engine = tiny_serving.engine(model, E)
    with answering(catalogue, engine, key="secret") as place:
        yield place


def client_of(place, key="none"):
    return openai.OpenAI(base_url=f"http://{place[0]}:{place[1]}/v1", api_key=key, max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def client(soups):
    return client_of(soups)


# ---- the official client


def test_models_are_listed_with_their_base(client):
    found = {model.id: model for model in client.models.list()}
    assert list(found) == ["base", *NAMES]
    assert found["base"].parent is None and {found[name].parent for name in NAMES} == {"base"}
    assert client.models.retrieve("P2B").id == "P2B"
    assert client.models.retrieve("soup:P1A=0.5,P2B=0.5").parent == "base"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("P9")


def test_chat_answers_are_those_of_generate(model, client):
    soup = [SOUP.get(name, 0.0) for name in NAMES]
    for mix, options in (
        (np.zeros(K), {"model": "base"}),
        (np.eye(K)[1], {"model": "P2B"}),
        (soup, {"model": "base", "extra_body": {"mix": SOUP}}),
        (soup, {"model": "soup:P1A=0.7,P3A=-0.4"}),
    ):
        (want,) = model.generate([QUESTION], tiny_serving.bank(model), mix, max_new_tokens=8)
        answer = client.chat.completions.create(messages=QUESTION, temperature=0, max_tokens=8, **options)
        assert answer.choices[0].message.content == want
        assert answer.object == "chat.completion" and answer.model == options["model"]
        weights = {name: float(weight) for name, weight in zip(NAMES, mix, strict=True) if weight}
        assert answer.pjrlhf["mix"] == pytest.approx(weights)
        usage = answer.usage
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
        assert usage.prompt_tokens == len(model.tokenizer.encode_prompt(QUESTION))
        assert 0 < usage.completion_tokens <= 8
    by_other_name = client.chat.completions.create(
        messages=QUESTION, temperature=0, max_completion_tokens=8, model="soup:P1A=0.7,P3A=-0.4"
    )
    assert by_other_name.choices == answer.choices


def test_a_stream_is_the_answer_in_pieces(client):
    options = dict(model="P1A", messages=QUESTION, temperature=0.9, seed=5, n=2, max_tokens=12, logprobs=True)
    whole = client.chat.completions.create(**options, top_logprobs=2)
    chunks = list(
        client.chat.completions.create(**options, top_logprobs=2, stream=True, stream_options={"include_usage": True})
    )
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"} and len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].choices == [] and chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert chunks[0].pjrlhf == whole.pjrlhf and all(chunk.usage is None for chunk in chunks[:-1])
    for choice in whole.choices:
        own = [part for chunk in chunks for part in chunk.choices if part.index == choice.index]
        assert own[0].delta.role == "assistant"
        assert "".join(part.delta.content or "" for part in own) == choice.message.content
        assert [part.finish_reason for part in own if part.finish_reason] == [choice.finish_reason]
        logps = [token for part in own if part.logprobs for token in part.logprobs.content]
        assert logps == choice.logprobs.content
        assert all(len(token.top_logprobs) == 2 and token.logprob <= 0 for token in logps)
    assert len(whole.choices) == 2 and whole.choices[0].message.content != whole.choices[1].message.content


def test_seeds_and_stops(client):
    options = dict(model="P1A", messages=QUESTION, max_tokens=16, temperature=1.3)
    first, again, other = (client.chat.completions.create(**options, seed=seed) for seed in (1, 1, 2))
    assert first.choices == again.choices != other.choices
    text = first.choices[0].message.content
    stop = text.split()[1]
    cut = client.chat.completions.create(**options, seed=1, stop=stop)
    assert cut.choices[0].finish_reason == "stop" and cut.choices[0].message.content == text.split(stop)[0].strip()


def test_completions_score_prompts(model, client):
    """As lm-evaluation-harness asks: echo, log-probs, no new tokens, token ids."""
    tokens = model.tokenizer.encode_prompt("what is rain ? it is near shores .")
    (found,) = client.completions.create(
        model="P1A", prompt=[tokens], echo=True, logprobs=1, max_tokens=0, temperature=0
    ).choices
    logps = found.logprobs.token_logprobs
    assert len(logps) == len(found.logprobs.tokens) == len(tokens) and logps[0] is None
    assert "".join(found.logprobs.tokens) == found.text == "what is rain ? it is near shores ."
    assert [found.text[i:].lstrip()[:2] for i in found.logprobs.text_offset[:3]] == ["wh", "is", "ra"]
    assert found.logprobs.top_logprobs[0] is None and all(len(x) == 1 for x in found.logprobs.top_logprobs[1:])
    split = 6
    prompt = model.tokenizer.decode(tokens[:split])
    (want,) = model.score(
        [prompt], [model.tokenizer.decode(tokens)[len(prompt) :]], tiny_serving.bank(model), np.eye(K)[0]
    )
    sent = client.completions.create(model="P1A", prompt=tokens, echo=True, logprobs=0, max_tokens=1, temperature=0)
    again = sent.choices[0].logprobs.token_logprobs
    np.testing.assert_allclose(again[: len(tokens)][1:], logps[1:], rtol=1e-5)
    assert want < sum(logps[split:])  # which have no end-of-sequence
    assert sent.object == "text_completion" and sent.usage.completion_tokens == 1


def test_completions_take_several_prompts_and_stream(model, client):
    prompts = ["what is rain ?", "what is snow ?"]
    options = dict(model="base", prompt=prompts, n=2, temperature=0.8, seed=3, max_tokens=6, echo=True)
    whole = client.completions.create(**options)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    assert [choice.text.startswith(prompts[i // 2]) for i, choice in enumerate(whole.choices)] == [True] * 4
    parts = [part for chunk in client.completions.create(**options, stream=True) for part in chunk.choices]
    for choice in whole.choices:
        assert "".join(part.text for part in parts if part.index == choice.index) == choice.text
    assert client.completions.create(model="base", prompt="what").usage.completion_tokens <= 16


def test_what_is_wrong_is_named(client):
    good = dict(model="base", messages=QUESTION, max_tokens=4)
    for param, change in {
        "temperature": {"temperature": 3},
        "n": {"n": 0},
        "stop": {"stop": ["a"] * 17},
        "max_tokens": {"max_tokens": 1000},
        "max_completion_tokens": {"max_tokens": 2, "extra_body": {"max_completion_tokens": 3}},
        "messages": {"messages": []},
        "mix": {"extra_body": {"mix": {"P9": 1}}},
        "model": {"model": "soup:P9=1"},
        "top_logprobs": {"top_logprobs": 2},
        "frequency_penalty": {"frequency_penalty": 2.1},
        "logit_bias": {"logit_bias": {"100000": 1}},
        "mixs": {"extra_body": {"mixs": {"P1A": 1}}},
        "stream_options": {"stream_options": {"include_usage": True}},
    }.items():
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(**{**good, **change})
        assert caught.value.param == param and caught.value.message
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(**{**good, "model": "gpt-5"})
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="one adapter already"):
        client.chat.completions.create(**{**good, "model": "P1A"}, extra_body={"mix": {"P1A": 1}})


# ---- people


def test_people_get_their_own_answers(model, persons):
    client = client_of(persons, "secret")
    assert [one.id for one in client.models.list()] == ["base", *NAMES]
    options = dict(model="P1A", messages=QUESTION, temperature=0, max_tokens=10)
    ana = client.chat.completions.create(**options, user="ana")
    bo = client.chat.completions.create(**options, safety_identifier="bo")
    nobody, stranger = (client.chat.completions.create(**options, **who) for who in ({}, {"user": "zoe"}))
    by_header = client.chat.completions.create(**options, extra_headers={"X-OpenWebUI-User-Id": "ana"})
    assert ana.choices == by_header.choices and ana.pjrlhf["user"] == {"id": "ana", "known": True}
    assert len({one.choices[0].message.content for one in (ana, bo, nobody)}) == 3
    assert stranger.choices == nobody.choices
    assert not stranger.pjrlhf["user"]["known"] and "generic" in stranger.pjrlhf["user"]["answered_as"]
    assert "user" not in nobody.pjrlhf


def test_the_base_alone_is_served_beside_people(model, persons):
    """Nobody's user tokens are in it, so it is the same for everybody."""
    client = client_of(persons, "secret")
    options = dict(model="base", messages=QUESTION, temperature=0, max_tokens=10)
    ana, nobody = (client.chat.completions.create(**options, **who) for who in ({"user": "ana"}, {}))
    assert ana.choices == nobody.choices and ana.pjrlhf == nobody.pjrlhf == {"mix": {}}
    assert ana.choices[0].message.content == model.generate([QUESTION], max_new_tokens=10)[0]
    soup = client.chat.completions.create(**options, user="ana", extra_body={"mix": {"P1A": 0.5}})
    assert soup.pjrlhf == {"mix": {"P1A": 0.5}, "user": {"id": "ana", "known": True}}
    with pytest.raises(openai.BadRequestError, match="leave no room"):
        client.chat.completions.create(**options | {"messages": [{"role": "user", "content": "rain " * 60}]})


def test_a_key_is_asked_for(persons):
    for key in ("none", "", "secret2", "\u00e9"):
        status, body, _ = send(persons, {}, Authorization=f"Bearer {key}".encode().decode("latin-1"))
        assert status == 401 and body["error"]["code"] == "invalid_api_key"
    assert send(persons, None, "/health", "GET")[0] == 200
    with pytest.raises(openai.AuthenticationError):
        client_of(persons, "wrong").models.list()


# ---- limits


STRANGE = (
    *(b"", b"{", b"[]", b"\xff\xfe", b"[" * 10_000, b'{"n": 1e999}'),
    b'{"model": "base", "model": "base"}',  # readers differ in which one counts
    b'{"temperature": NaN}',
    b'{"temperature": -Infinity}',
    b'{"user": "\\ud800"}',
    b'{"seed": ' + b"9" * 5000 + b"}",
    b'{"mix": ' + b'{"a":' * 3000 + b"1" + b"}" * 3001,
    '{"user": "\u00e9"}'.encode("latin-1"),
    '{"user": "a"}'.encode("utf-16"),
    b'{"user": "\x00"}',
    b"null",
)


def test_bad_requests_are_refused_with_their_status(soups):
    huge = {"model": "base", "messages": [{"role": "user", "content": "a " * 20_000}]}
    assert send(soups, huge)[0] == 413
    assert send(soups, b"{}", Content_Type="text/plain")[0] == 415
    assert send(soups, None, "/v1/nothing", "GET")[0] == 404
    assert send(soups, None, "/v1/chat/completions", "GET")[0] == 405
    for text in STRANGE:
        status, body, _ = send(soups, text)
        assert status == 400 and body["error"]["message"], text
    own = {"model": "base", "messages": QUESTION, "chat_template_kwargs": {"chat_template": "{{ 1 }}"}}
    status, body, _ = send(soups, own)  # a template is a program, which need not end
    assert status == 400 and body["error"]["param"] == "chat_template_kwargs"
    status, body, headers = send(soups, {"model": "base", "messages": QUESTION, "max_tokens": 2})
    assert status == 200 and headers["x-request-id"] and body["choices"]


VALUES = (
    *(
        None,
        True,
        0,
        -1,
        1,
        1.5,
        1e300,
        10**30,
        "",
        "base",
        "\ud800",
        "\x00",
        "x" * 3000,
        [],
        {},
        [[]],
        [None],
        [1],
        ["a"],
    ),
    *({"a": 1}, {"P1A": 1e99}, {"P1A": "1"}, {"P1A": 0.5}, [{"role": "user"}], [{"role": "user", "content": [1]}]),
    *([{"role": 1, "content": "a"}], [{"role": "user", "content": "</s>"}], [{"role": "tool", "content": "a"}]),
    *(
        [10**9],
        [0],
        [[1, 2], "a"],
        [[-1]],
        {"include_usage": 1},
        {"tools": 1},
        {"conversation": []},
        "soup:",
        "soup:P1A=nan",
    ),
)


def test_no_body_is_too_strange(soups):
    """Random fields with random values get an answer, or a reason in the 400s."""
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(300):
        chat = bool(rng.integers(2))
        body = {"model": "base", "max_tokens": 1} | ({"messages": QUESTION} if chat else {"prompt": "what"})
        fields = [*(ChatBody if chat else CompletionBody).model_fields, "surprise"]
        for name in rng.choice(fields, rng.integers(1, 4)):
            body[str(name)] = VALUES[rng.integers(len(VALUES))]
        status, answer, _ = send(soups, body, "/v1/chat/completions" if chat else "/v1/completions")
        assert status in (200, 400, 404, 413), (status, body, answer)
        assert status == 200 or answer["error"]["message"]
        seen.add(status)
    assert seen >= {200, 400}
    assert send(soups, None, "/health", "GET")[1]["status"] == "ok"


def test_the_best_of_several_answers_are_returned(client):
    """Those with the highest log-prob per token, and the usage of all."""
    options = dict(model="P1A", prompt="what is rain ?", temperature=1.3, seed=4, max_tokens=6, logprobs=0)
    drawn = client.completions.create(**options, n=5)

    def quality(choice):
        tokens = choice.logprobs.token_logprobs
        return sum(tokens) / len(tokens)

    found = client.completions.create(**options, n=2, best_of=5)
    assert [choice.index for choice in found.choices] == [0, 1]
    if all(choice.finish_reason == "length" for choice in drawn.choices):  # an end of text is not listed
        want = sorted(drawn.choices, key=quality, reverse=True)[:2]
        assert [choice.text for choice in found.choices] == [choice.text for choice in want]
    assert found.usage.completion_tokens == drawn.usage.completion_tokens
    for change in ({"n": 3, "best_of": 2}, {"best_of": 2, "stream": True}, {"n": 2, "best_of": 129}):
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(**{**options, **change})
        assert caught.value.param == "best_of"


NEUTRAL = {
    "frequency_penalty": 0,
    "presence_penalty": 0.0,
    "repetition_penalty": 1,
    "logit_bias": {},
    "min_p": 0,
    "response_format": {"type": "text"},
    "tools": [],
    "tool_choice": "auto",
    "functions": [],
    "function_call": "none",
    "modalities": ["text"],
    "reasoning_effort": "none",
    "min_tokens": 0,
    "ignore_eos": False,
    "skip_special_tokens": True,
    "metadata": {"a": "b"},
    "store": True,
    "service_tier": "auto",
    "parallel_tool_calls": True,
    "prompt_cache_key": "x",
    "safety_identifier": "someone",
    "user": None,
    "stop": None,
    "stream_options": {},
    "n": 1.0,
}


@pytest.mark.parametrize("chat", [True, False])
def test_what_asks_for_nothing_is_taken(soups, chat):
    body = {"model": "P1A", "temperature": 0, "max_tokens": 3}
    body |= {"messages": QUESTION} if chat else {"prompt": "what is rain ?"}
    path = "/v1/chat/completions" if chat else "/v1/completions"
    status, answer, _ = send(soups, body | NEUTRAL, path)
    assert status == 200 and answer["choices"] == send(soups, body, path)[1]["choices"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("response_format", {"type": "json_object"}),
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("tool_choice", "required"),
        ("modalities", ["audio"]),
        ("reasoning_effort", "high"),
        ("ignore_eos", True),
        ("skip_special_tokens", False),
    ],
)
def test_what_is_not_supported_is_refused_by_name(soups, name, value):
    status, answer, _ = send(soups, {"model": "base", "messages": QUESTION, name: value})
    assert status == 400 and answer["error"]["param"] == name and answer["error"]["code"] == "unsupported_parameter"
    assert answer["error"]["message"] == f"{name}: is not supported; leave it out"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": "1"}, "temperature: should be a valid number; correct it"),
        ({"temperature": 2.5}, "temperature: should be less than or equal to 2; correct it"),
        ({"top_p": 0}, "top_p: should be greater than 0; correct it"),
        ({"n": 1.5}, "n: should be a valid integer; correct it"),
        ({"stop": ["a"] * 17}, "stop: list should have at most 16 items, not 17; correct it"),
        ({"stop": ["a", ""]}, "stop[1]: string should have at least 1 character; correct it"),
        ({"mix": {"P1A": "1"}}, "mix.P1A: should be a valid number; correct it"),
        ({"mix": "P1A=1"}, 'mix: should be an object; give weights by name, such as {"P1A": 0.7, "P3A": 0.3}'),
        ({"messages": None}, 'messages: is missing; give messages, such as [{"role": "user", "content": '),
        ({"messages": "hi"}, 'messages: should be a list; give messages, such as [{"role": "user", "content": '),
        ({"messages": ["hi"]}, "messages[0]: should be an object; correct it"),
        ({"messages": [*QUESTION, {"role": "user"}]}, "messages[1]: has no content; give it one: text, or a list of p"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0]: has no content; give it one: text, or a li"),
        (
            {"messages": [{"role": "user", "content": 1}]},
            "messages: is not a conversation (the content of a message is",
        ),
        (
            {"messages": [*QUESTION, {"role": "robot", "content": "beep"}]},
            "messages[1]: 'robot' is no role of a message; choose from system, developer, user, assistant, tool",
        ),
        ({"messages": []}, "messages: empty; correct it"),
        ({"messages": [{"content": "a"}]}, "messages: is not a conversation (every message needs a role, as text); c"),
        ({"messages": [{"role": "user", "content": " "}]}, "messages: empty user message; correct it"),
        ({"messages": IMAGE}, "messages: has a content part of type 'image_url' (only text can be read); correct it"),
        ({"chat_template_kwargs": {"tools": 1}}, "chat_template_kwargs: tools cannot be set there; leave it out; c"),
        ({"stream_options": {"include_usages": True}, "stream": True}, "stream_options.include_usages: extra inputs"),
        ({"temprature": 1}, "temprature: unknown field; did you mean temperature?"),
    ],
)
def test_messages_name_the_thing_the_reason_and_the_way_out(soups, change, message):
    status, answer, _ = send(soups, {"model": "base", "messages": QUESTION} | change)
    assert status == 400 and answer["error"]["message"].startswith(message)
    assert answer["error"]["param"] == next(iter(change))


def test_roles_of_the_protocol_and_of_the_chat_template_are_taken():
    """Templates may have roles of their own, such as ipython and model."""
    named = [{"role": role, "content": "a"} for role in ("ipython", "model")]
    _check_roles(
        [*named, *({"role": role, "content": "a"} for role in ROLES)], "{% if role == 'model' or \"ipython\" %}"
    )
    with pytest.raises(Refused, match=r"messages\[0\]: 'ipython' is no role of a message"):
        _check_roles(named, "{{ messages }} ipython")


def test_a_result_of_a_tool_needs_a_call_before_it(soups):
    """As OpenAI has it: results follow the call, without another message between."""
    call = {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": {"name": "add"}}]}
    result = {"role": "tool", "tool_call_id": "1", "content": "2"}
    lone = ([result], [*QUESTION, result], [*QUESTION, call, result, *QUESTION, result])
    for messages in lone:
        status, answer, _ = send(soups, {"model": "base", "messages": messages})
        message = answer["error"]["message"]
        assert status == 400 and answer["error"]["param"] == "messages"
        assert message.startswith(f"messages[{len(messages) - 1}]: has the role tool, and no message of the assistant")
    for messages in ([*QUESTION, call, result], [*QUESTION, call, result, result]):
        _, answer, _ = send(soups, {"model": "base", "messages": messages, "max_tokens": 1})
        assert "has the role tool" not in json.dumps(answer)


def test_a_full_queue_is_429_and_clients_that_leave_free_their_slots(model):
    engine = tiny_serving.engine(model, queue=1, slots=1)
    with served(Catalogue(model, NAMES, tiny_serving.bank(model)), engine) as place:
        body = {"model": "base", "messages": QUESTION, "max_tokens": 4}
        connections = [http.client.HTTPConnection(*place, timeout=60) for _ in range(2)]
        connections[0].request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        while not engine.waiting:
            time.sleep(0.01)
        status, answer, headers = send(place, body)  # nothing runs yet, and one waits
        assert status == 429 and headers["Retry-After"] == "1" and answer["error"]["type"] == "rate_limit_error"
        with pytest.raises(openai.RateLimitError):
            client_of(place).chat.completions.create(**body)
        connections[0].close()
        deadline = time.monotonic() + 30
        while not any(ticket.cancelled for ticket in engine._queue):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        engine.start()
        while engine.busy:
            time.sleep(0.01)
        assert send(place, body)[0] == 200
    engine.close(30)


def test_metrics_count_tokens_and_ingredients(model, soups, client):
    def value(name):
        text = send(soups, None, "/metrics", "GET")[1]
        found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    names = {
        name: f"pjrlhf_{name}"
        for name in (
            "generated_tokens_total",
            "prompt_tokens_total",
            'ingredient_requests_total{ingredient="P2B"}',
            "time_to_first_token_seconds_count",
            'requests_total{path="/v1/chat/completions",status="200"}',
        )
    }
    before = {name: value(full) for name, full in names.items()}
    answer = client.chat.completions.create(model="P2B", messages=QUESTION, max_tokens=5)
    after = {name: value(full) - before[name] for name, full in names.items()}
    assert list(after.values()) == [answer.usage.completion_tokens, answer.usage.prompt_tokens, 1, 1, 1]
    assert value("pjrlhf_requests_waiting") == value("pjrlhf_answers_running") == 0


def test_many_clients_at_once_get_their_own_answers(model, soups):
    """Each equals the same request alone; some leave in the middle."""
    client = client_of(soups)
    bodies = [
        dict(
            model=f"soup:P1A={i / 7:.3f},P2B={-i / 9:.3f}",
            messages=QUESTION,
            seed=i,
            temperature=1,
            max_tokens=3 + i % 9,
        )
        for i in range(12)
    ]
    alone = [client.chat.completions.create(**body).choices for body in bodies]

    async def everything():
        many = openai.AsyncOpenAI(base_url=str(client.base_url), api_key="none", max_retries=0, timeout=60)

        async def leave(body):
            stream = await many.chat.completions.create(**body, stream=True)
            async for _ in stream:
                break
            await stream.close()

        whole = [many.chat.completions.create(**body) for body in bodies]
        found = await asyncio.gather(*whole, *(leave(body) for body in bodies[::2]))
        return [one.choices for one in found[: len(bodies)]]

    assert asyncio.run(everything()) == alone


# ---- the command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--port", "99999"), "error: --port: 99999 is out of range"),
        (("--prefix-mb", "-1"), "error: --prefix-mb: -1"),
    ],
)
def test_settings_of_a_server_are_named_as_flags(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["serve", "--model", "nowhere", *arguments])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_a_context_that_the_model_does_not_have_names_the_flag(tmp_path, capsys):
    folder, before = tiny_users.save_base(tmp_path), signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as stopped:
            cli.main(["serve", "--model", str(folder), "--context", "1000000"])
    finally:
        signal.signal(signal.SIGTERM, before)
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and line.startswith("error: --context: 1000000 is more than the ")


@pytest.mark.parametrize("host", ["a..b", "a" * 70, "", "ü" * 70, "192.0.2.1"])
def test_what_cannot_be_listened_on_is_named(host):
    with pytest.raises(UserError, match=r"port 0: .*; choose another --host or --port"):
        _listen(ServerSettings(host=host, port=0))


def test_a_port_in_use_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"'127.0.0.1', port {port}: Address already in use; choose another"):
            _listen(ServerSettings(port=port))


def test_sigterm_drains(tmp_path):
    """An answer that has begun is finished, the exit code is 0, and the log has no text of a request."""
    folder = tiny_users.save_base(tmp_path)
    process, place = start("--model", folder, "--steps", "1", "--slots", "1")
    try:
        body = {"model": "base", "prompt": "please rain", "max_tokens": 30, "n": 40, "stream": True, "temperature": 1}
        connection = http.client.HTTPConnection(*place, timeout=120)
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        first = answer.readline()
        process.send_signal(signal.SIGTERM)
        while send(place, None, "/health", "GET")[0] == 200:
            time.sleep(0.01)
        assert send(place, None, "/health", "GET")[1]["status"] == "draining"
        assert send(place, None, "/health/live", "GET")[0] == 200
        status, refused, headers = send(place, {**body, "n": 1, "stream": False}, "/v1/completions")
        assert status == 503 and headers["Retry-After"] and "later" in refused["error"]["message"]
        rest = answer.read().decode()
        assert first.startswith(b"data: ") and rest.rstrip().endswith("data: [DONE]")
        assert rest.count('"finish_reason":"length"') + rest.count('"finish_reason":"stop"') == 40
        assert process.wait(60) == 0
        log = process.stdout.read()
        assert "POST /v1/completions: 200" in log and "rain" not in log
        assert log.count("stopping: answers that have begun are finished first\n") == 1
        with pytest.raises(ConnectionError):
            send(place, None, "/health", "GET")
    finally:
        process.kill()


@pytest.mark.slow
def test_the_command_serves_from_several_devices(tmp_path):
    folder, found = tiny_users.save_base(tmp_path), []
    for devices, mesh in ((1, ""), (8, "data=2,fsdp=2,tensor=2")):
        process, place = start("--model", folder, "--mesh", mesh, "--slots", "3", devices=devices)
        try:
            bodies = [{"model": "base", "prompt": "please rain " * i, "max_tokens": 12, "seed": i} for i in range(1, 5)]
            found.append([send(place, body, "/v1/completions")[1]["choices"] for body in bodies])
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()
    assert found[0] == found[1]
