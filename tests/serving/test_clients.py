"""Clients that people use, against a server process on loopback. Extra `clients`."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import openai
import pytest
from support import tiny_serving, tiny_users
from support.serving import start

from pjrlhf.language_model import load_model
from pjrlhf.models.peft import save_peft
from pjrlhf.serving.engine import Engine
from pjrlhf.serving.opening import open_folders
from pjrlhf.serving.tickets import Request

pytestmark = pytest.mark.slow

NAMES = ("P1A", "P2B", "P3A")
QUESTION = "what is rain ?"
MESSAGES = [{"role": "user", "content": QUESTION}]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folder of a base, and ingredients by name."""
    base = tiny_users.save_base(tmp_path_factory.mktemp("base"))
    shape = tiny_serving.ADAPTER
    bank = tiny_serving.bank(load_model(base, adapter=shape))
    found = {}
    for k, name in enumerate(NAMES):
        found[name] = tmp_path_factory.mktemp(name) / "adapter"
        one = jax.tree.map(lambda x, k=k: np.asarray(x[k]), bank)
        save_peft(found[name], one, shape.rank, shape.alpha, str(base), "llama", 8)
    return base, found


def process(folders, *flags):
    base, found = folders
    ingredients = [f"{name}={path}" for name, path in found.items()]
    return start("--model", base, "--ingredients", *ingredients, "--soups", "calm=P1A=0.7,P3A=-0.4", *flags)


@pytest.fixture(scope="module")
def url(folders):
    running, (host, port) = process(folders)
    yield f"http://{host}:{port}"
    running.kill()


@pytest.fixture(scope="module")
def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def expected(client):
    """What every client must get from `calm`."""
    answer = client.chat.completions.create(model="calm", messages=MESSAGES, temperature=0, max_tokens=8)
    assert answer.pjrlhf["mix"] == pytest.approx({"P1A": 0.7, "P3A": -0.4})
    return answer.choices[0].message.content


def test_openai(client, expected):
    assert [one.id for one in client.models.list()] == ["base", "personal", *NAMES, "calm"]
    card = client.models.retrieve("calm")
    assert card.parent == "base" and card.mix == {"P1A": 0.7, "P3A": -0.4}
    options = dict(model="calm", messages=MESSAGES, temperature=0, max_tokens=8)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert "".join(part.delta.content or "" for chunk in chunks for part in chunk.choices) == expected
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens > 0
    warm = {**options, "temperature": 1.2, "seed": 7}
    two = client.chat.completions.create(**warm, n=2, logprobs=True, top_logprobs=3)
    assert two.choices == client.chat.completions.create(**warm, n=2, logprobs=True, top_logprobs=3).choices
    assert len(two.choices) == 2 and all(len(x.top_logprobs) == 3 for x in two.choices[0].logprobs.content)
    stop = expected.split()[1]
    cut = client.chat.completions.create(**options, stop=[stop]).choices[0]
    assert cut.finish_reason == "stop" and stop not in cut.message.content
    text = client.completions.create(model="calm", prompt=QUESTION, temperature=0, max_tokens=4, best_of=2, logprobs=1)
    assert len(text.choices) == 1 and text.choices[0].logprobs.token_logprobs
    penalties = dict(frequency_penalty=1.5, presence_penalty=-0.5, logit_bias={"5": -100}, user="ana", store=False)
    assert client.chat.completions.create(**options, **penalties, metadata={"a": "b"}).choices
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{**options, "temperature": 3})
    assert caught.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(**{**options, "model": "gpt-5"})
    assert caught.value.code == "model_not_found"


def test_openai_is_told_to_wait_and_does(folders, monkeypatch):
    """401, and 429 with Retry-After, which the client obeys."""
    monkeypatch.setenv("PJRLHF_API_KEY", "secret")
    running, (host, port) = process(folders, "--slots", "1", "--queue", "1")
    address = f"http://{host}:{port}/v1"
    try:
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=address, api_key="wrong", max_retries=0).models.list()
        client = openai.OpenAI(base_url=address, api_key="secret", max_retries=0, timeout=120)
        long = dict(model="base", prompt=QUESTION, max_tokens=30, n=128)
        done = threading.Event()

        def keep_busy():
            while not done.is_set():
                with contextlib.suppress(openai.RateLimitError):
                    client.completions.create(**long)

        threads = [threading.Thread(target=keep_busy, daemon=True) for _ in range(3)]
        for thread in threads:
            thread.start()
        refused, deadline = None, time.monotonic() + 60
        while refused is None and time.monotonic() < deadline:
            try:
                client.completions.create(model="base", prompt=QUESTION, max_tokens=1)
            except openai.RateLimitError as error:
                refused = error
        assert refused is not None and refused.response.headers["retry-after"] == "1" and refused.code == "queue_full"
        done.set()
        patient = client.with_options(max_retries=60)
        assert patient.completions.create(model="base", prompt=QUESTION, max_tokens=1).choices
        for thread in threads:
            thread.join(120)
    finally:
        running.kill()


def test_curl(url, expected):
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")

    def curl(path, body, *flags):
        command = ["curl", "-sS", *flags, "-H", "Content-Type: application/json", "-d", json.dumps(body), url + path]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout

    body = {"model": "calm", "messages": MESSAGES, "temperature": 0, "max_tokens": 8}
    assert json.loads(curl("/v1/chat/completions", body))["choices"][0]["message"]["content"] == expected
    events = curl("/v1/chat/completions", {**body, "stream": True}, "-N").split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == expected
    chunked = json.loads(curl("/v1/chat/completions", body, "-H", "Transfer-Encoding: chunked"))
    assert chunked["choices"][0]["message"]["content"] == expected


def test_langchain(url, expected):
    chat = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
    model = chat.ChatOpenAI(model="calm", base_url=f"{url}/v1", api_key="none", temperature=0, max_tokens=8, seed=1)
    answer = model.invoke(QUESTION)
    assert answer.content == expected and answer.usage_metadata["output_tokens"] > 0
    assert "".join(chunk.content for chunk in model.stream(QUESTION)) == expected
    others = [one.content for one in model.batch([QUESTION, "what is snow ?", QUESTION])]
    assert others[0] == others[2] == expected and len(set(others)) == 2
    mixed = model.bind(model="base", extra_body={"mix": {"P1A": 0.7, "P3A": -0.4}})
    assert mixed.invoke([("user", QUESTION)]).content == expected
    logprobs = model.bind(logprobs=True, top_logprobs=2).invoke(QUESTION).response_metadata["logprobs"]
    assert len(logprobs["content"][0]["top_logprobs"]) == 2
    text = chat.OpenAI(model="calm", base_url=f"{url}/v1", api_key="none", temperature=0, max_tokens=4)
    assert text.invoke(QUESTION)


def test_llm(url, expected, tmp_path):
    pytest.importorskip("llm", reason="llm is not installed")
    models = [
        {"model_id": name, "model_name": name, "api_base": f"{url}/v1"} | extra
        for name, extra in (("calm", {}), ("soup:P1A=0.7,P3A=-0.4", {}), ("P1A", {"completion": True}))
    ]
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps(models))  # JSON is YAML
    env = {**os.environ, "LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "none"}

    def ask(name, *flags):
        command = [sys.executable, "-m", "llm", "-m", name, QUESTION, "-o", "temperature", "0", "-o", "max_tokens", "8"]
        done = subprocess.run([*command, *flags], env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout.rstrip("\n")

    assert ask("calm") == ask("calm", "--no-stream") == ask("soup:P1A=0.7,P3A=-0.4") == expected
    assert ask("P1A", "--no-stream")


def test_lm_evaluation_harness(url, folders, tmp_path, monkeypatch):
    """Its log-likelihoods of ten items are those of the engine."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    from lm_eval.tasks import TaskManager

    subjects = ["rain", "snow", "bread", "tea", "wood", "gold", "salt", "fish", "birds", "books"]
    items = [{"question": f"what is {x} ?", "choices": ["it is wet .", "it is near shores ."]} for x in subjects]
    (tmp_path / "items.jsonl").write_text("\n".join(json.dumps(item | {"label": 0}) for item in items))
    task = {
        "task": "items",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "items.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "items.yaml").write_text(json.dumps(task))
    base, ingredients = folders
    found = lm_eval.simple_evaluate(
        model="local-completions",
        model_args={
            "model": "P2B",
            "base_url": f"{url}/v1/completions",
            "tokenizer_backend": "huggingface",
            "tokenizer": str(base),
            "max_length": 40,
        },
        tasks=["items"],
        task_manager=TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
        bootstrap_iters=0,
    )
    samples = found["samples"]["items"]
    assert len(samples) == 10

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    catalogue = open_folders(str(base), {name: str(path) for name, path in ingredients.items()})
    engine = Engine(catalogue.model.backbone, catalogue.model.tokenizer, catalogue.bank)
    mix = catalogue.voice("P2B").mix
    for sample in samples:
        for (context, continuation), (got, _) in zip(sample["arguments"], sample["filtered_resps"], strict=True):
            start = len(tokenizer.encode(context, add_special_tokens=False))
            tokens = tokenizer.encode(context + continuation, add_special_tokens=False)
            ticket = engine.submit(
                Request(tokens=tokens, max_new_tokens=0, mix=mix, prompt_logps=True), lambda *_: None
            )
            while not ticket.done.is_set():
                engine.step()
            np.testing.assert_allclose(got, sum(token.logp for token in ticket.prompt[start - 1 :]), rtol=1e-4)


def test_schemathesis(url, tmp_path):
    """Requests that its generators make from the schema: no 500, and answers of the form that the schema gives."""
    pytest.importorskip("schemathesis", reason="schemathesis is not installed")
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", "--checks", checks]
    flags = ["--max-examples", "20", "--seed", "1", "--request-timeout", "60", "--no-color"]
    done = subprocess.run(
        [*command, *flags, "--phases", "examples,coverage,fuzzing"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    generated = re.search(r"(\d+) generated", done.stdout)
    assert generated and int(generated[1]) > 500
