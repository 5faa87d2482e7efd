"""A server in a thread or as a process, and requests to it."""

import contextlib
import http.client
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import threading
import time

import jax
import uvicorn

from pjrlhf.serving.http import Server
from pjrlhf.serving.settings import ServerSettings

ROOT = pathlib.Path(__file__).parents[2]


@contextlib.contextmanager
def compilations():
    """A list of what this process compiles meanwhile, or loads from the cache of compiled programs."""
    found = []

    def listen(event, _, **__):
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@contextlib.contextmanager
def served(catalogue, engine, key="", **settings):
    """(host, port) of a server in a thread."""
    server = Server(catalogue, engine, ServerSettings(port=0, **settings), key)
    config = uvicorn.Config(server.app, log_config=None, access_log=False, port=0, timeout_graceful_shutdown=5)
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    while not running.started:
        time.sleep(0.01)
    try:
        yield "127.0.0.1", running.servers[0].sockets[0].getsockname()[1]
    finally:
        running.should_exit = True
        thread.join(30)


@contextlib.contextmanager
def answering(catalogue, engine, key="", **settings):
    """The same, with an engine that works for as long."""
    engine.start()
    with served(catalogue, engine, key, **settings) as place:
        yield place
    engine.close(30)


def send(place, body, path="/v1/chat/completions", method="POST", **headers):
    """(status, JSON or text, headers) of a raw request."""
    connection = http.client.HTTPConnection(*place, timeout=60)
    headers = {"Content-Type": "application/json"} | {key.replace("_", "-"): value for key, value in headers.items()}
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    connection.request(method, path, data, headers)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    try:
        return answer.status, json.loads(text), answer.headers
    except ValueError:
        return answer.status, text, answer.headers


def start(*arguments, devices=1):
    """The process of `pjrlhf serve`, and the address it tells."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
    env["JAX_NUM_CPU_DEVICES"] = str(devices)
    env["JAX_COMPILATION_CACHE_DIR"] = str(jax.config.jax_compilation_cache_dir)  # and not the user's
    command = [
        sys.executable,
        "-c",
        "from pjrlhf.cli import main; main()",
        "serve",
        "--port",
        "0",
        *map(str, arguments),
    ]
    # A file and no pipe: a pipe that nobody reads stops the server once it is full.
    with tempfile.NamedTemporaryFile("w") as output:
        process = subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT)
        process.stdout = open(output.name, encoding="utf-8", errors="replace")  # noqa: SIM115
    written = ""
    while True:
        ended = process.poll() is not None
        written += process.stdout.read()
        if found := re.search(r"at http://127\.0\.0\.1:(\d+)", written):
            return process, ("127.0.0.1", int(found[1]))
        if ended:
            raise AssertionError(written)
        time.sleep(0.05)
