"""The check of live servers: our own, and a small one that speaks as others do."""

import contextlib
import http.server
import json
import socket
import threading
import time

import jax
import numpy as np
import pytest
import uvicorn
from support import persons, tiny_serving, tiny_users
from support.drawn_models import save_family

from pjrlhf import cli
from pjrlhf.errors import UserError
from pjrlhf.export.check import Server, _Ours, check
from pjrlhf.export.soup import Source
from pjrlhf.models.peft import save_peft
from pjrlhf.serving import http as serving
from pjrlhf.serving.catalogue import Catalogue
from pjrlhf.serving.engine import Engine
from pjrlhf.serving.opening import open_folders
from pjrlhf.serving.settings import ServerSettings

NAMES = ("P1A", "P2B", "P3A")
MIX = {"P1A": 0.7, "P3A": -0.4}


@contextlib.contextmanager
def served(catalogue):
    """URL of our server in a thread."""
    model = catalogue.model
    settings = tiny_serving.SETTINGS.replace(slots=2)
    engine = Engine(model.backbone, model.tokenizer, catalogue.bank, catalogue.user_tokens, settings)
    engine.start()
    server = serving.Server(catalogue, engine, ServerSettings(port=0), "")
    running = uvicorn.Server(uvicorn.Config(server.app, log_config=None, port=0, timeout_graceful_shutdown=5))
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    while not running.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{running.servers[0].sockets[0].getsockname()[1]}"
    finally:
        running.should_exit = True
        thread.join(30)
        engine.close(30)


@pytest.fixture(scope="module")
def soups(tmp_path_factory):
    model = tiny_serving.model(tmp_path_factory.mktemp("base"))
    return Catalogue(model, NAMES, tiny_serving.bank(model))


def test_our_server_agrees_on_a_soup_and_not_on_another(soups):
    source = Source(soups, {})
    with served(soups) as url:
        for mix in (None, MIX):
            lines, good = check(Server.at(url), source, mix, None, tolerance=1e-3)
            assert good and "within the tolerance" in lines[-1] and "tokens of the prompt" in lines[0]
        _, good = check(Server.at(url), source, None, None, served_as="P2B", tolerance=1e-3)  # the base here
        assert not good
        lines, good = check(Server.at(url), source, MIX, None, served_as="soup:P1A=0.7,P3A=-0.4", tolerance=1e-3)
        assert good and lines[-1].startswith("soup:")
        _, good = check(Server.at(url), source, MIX, None, served_as="P2B", tolerance=1e-3)
        assert not good
        with pytest.raises(UserError, match="serves no 'P9'; name one with --served-as: base, P1A"):
            check(Server.at(url), source, None, None, served_as="P9")


def test_our_server_agrees_on_a_person(tmp_path):
    catalogue = persons.catalogue(save_family(tmp_path / "base", "llama"))
    with served(catalogue) as url:
        for user in (None, "ana", "unknown"):
            _, good = check(Server.at(url), Source(catalogue, {}), None, user, tolerance=1e-3)
            assert good


def test_the_command_ends_with_1_where_a_server_differs(tmp_path, capsys):
    base = tiny_users.save_base(tmp_path)
    model = tiny_serving.model(tmp_path / "sharp")
    folder, bank = tmp_path / "sharp" / "model", tiny_serving.bank(model)
    arguments = []
    for k, name in enumerate(NAMES):
        one = jax.tree.map(lambda x, k=k: np.asarray(x[k]), bank)
        save_peft(tmp_path / name, one, 2, 4.0, str(base), "llama", 8)
        arguments.append(f"{name}={tmp_path / name}")
    catalogue = open_folders(str(folder), dict(part.split("=") for part in arguments))
    common = ["export", "--model", str(folder), "--ingredients", *arguments]
    with served(catalogue) as url:
        cli.main([*common, "--mix=P1A=0.7,P3A=-0.4", "--check", url])
        said = capsys.readouterr().out
        assert "with the mix P1A=0.7,P3A=-0.4: " in said and "within the tolerance of 0.05" in said
        with pytest.raises(SystemExit) as stopped:
            cli.main([*common, "--mix=P1A=0.7", "--check", url, "--tolerance=0"])
        assert stopped.value.code == 1 and "beyond" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        cli.main([*common, "--check", url])
    assert stopped.value.code == 2 and "start the server, or correct the address" in capsys.readouterr().err


class Other(http.server.BaseHTTPRequestHandler):
    """A server of another kind; class attributes say which."""

    answers = None  # (body -> (status, reply))

    def _send(self, status, value):
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        self._send(200, {"data": [{"id": "one", "owned_by": "somebody"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self._send(*self.answers(body))

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def other(answers):
    kind = type("Kind", (Other,), {"answers": staticmethod(answers)})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()


def test_a_server_that_wants_a_token_and_one_without_echo(soups):
    source = Source(soups, {})
    ours = _Ours(source, source.voice(MIX, None))
    seen = []

    def completion(values):
        return 200, {"choices": [{"logprobs": {"token_logprobs": values}}]}

    def one_token(body):
        seen.append(body["max_tokens"])
        if body["max_tokens"] == 0:
            return 400, {"error": "max_tokens must be at least 1"}
        return completion([*ours.prompt(body["prompt"]), -1.0])

    def no_echo(body):
        assert "mix" not in body and body["model"] == "one"
        if body.get("echo"):
            return 400, {"error": "echo"}
        return completion([value for _, value in ours.greedy(body["prompt"], body["max_tokens"])])

    def chat_form(body):
        values = ours.greedy(body["prompt"], max(body["max_tokens"], 1))
        found = [{"token": text, "logprob": value + 0.5} for text, value in values]
        return 200, {"choices": [{"logprobs": {"content": found}}]}

    def tie(body):  # the first token is another one, about as likely
        if body.get("echo"):
            return 400, {"error": "echo"}
        (_, first), *_ = ours.greedy(body["prompt"], 1)
        return 200, {"choices": [{"logprobs": {"tokens": ["#", "#"], "token_logprobs": [first - 1e-5, -30.0]}}]}

    def broken(body):
        return completion([float("nan")] * len(body["prompt"]))

    for answers, good, word in (
        (one_token, True, "of the prompt"),
        (no_echo, True, "greedy"),
        (tie, True, "1 greedy"),
        (broken, False, "of the prompt"),
        (chat_form, False, "greedy"),
    ):
        with other(answers) as url:
            lines, found = check(Server.at(url), source, MIX, None, tolerance=1e-3)
            assert found == good and word in lines[0]
    assert 0 in seen and 1 in seen


def test_servers_without_what_is_needed_are_named(soups):
    source = Source(soups, {})
    for answers, message in (
        (lambda body: (200, {"choices": [{}]}), "gives no log-probs"),
        (lambda body: (400, {"error": "no"}), "refuses prompts for log-probs"),
        (lambda body: (401, {}), "wants an API key; set PJRLHF_API_KEY or OPENAI_API_KEY"),
        (lambda body: (500, {}), "status 500"),
        (lambda body: (200, {"choices": [{"logprobs": {"token_logprobs": ["a"] * 99}}]}), "gives no log-probs"),
        (lambda body: (200, {"choices": [{"logprobs": {"content": [{"logprob": []}]}}]}), "gives no log-probs"),
        (lambda body: (200, "x"), "gives no log-probs"),
    ):
        with other(answers) as url, pytest.raises(UserError, match=message):
            check(Server.at(url), source, MIX, None)
    wrong = "http://[::1/v1", "http://h:abc/v1", "http://h:99999/v1", "http://h/a b", "http://h/ü", "http://h/\n"
    for address in ("localhost:8000", "ftp://x", "http://", *wrong):
        with pytest.raises(UserError, match="is no address of a server; write one such as"):
            Server.at(address)


@pytest.mark.parametrize("reply", [b"SSH-2.0-OpenSSH_9.6\r\n", b"", b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n{"])
def test_what_is_no_server_of_http_is_named(reply):
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer():
            with listener.accept()[0] as connection:
                connection.recv(10_000)
                connection.sendall(reply)

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(UserError, match=r"gives no answer .*; start the server, or correct the address"):
            Server.at(f"http://127.0.0.1:{listener.getsockname()[1]}/v1").ask("/models")


def test_a_key_that_cannot_be_sent_is_told_without_it(monkeypatch):
    monkeypatch.setenv("PJRLHF_API_KEY", "sk-secret\n")
    with pytest.raises(UserError, match="PJRLHF_API_KEY: holds a line break") as caught:
        Server.at("http://127.0.0.1:1/v1").ask("/models")
    assert "secret" not in str(caught.value)
