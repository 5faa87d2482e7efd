"""A server at saturation:  python benchmarks/load.py --seconds 600

Clients without pause send requests that differ in everything: soups, people, limits, numbers of answers, streams, stop
strings, draws. Some clients leave in the middle, some send what is no request. The script fails unless

* every answer equals that of the same request to an idle server, and none is lost;
* a full queue answers 429, what is no request a status of the 400s, and nothing a status of the 500s;
* the memory of the server is flat, the prefix cache stays within its bytes, and all slots are free in the end;
* a server that gets SIGTERM under load finishes what it has begun and ends with exit code 0;
* a server that gets SIGKILL under load can be started again, with the same answers.

The model is small: what is tested is the server around it.
"""

import argparse
import asyncio
import collections
import dataclasses
import json
import os
import pathlib
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import harness

NAMES = ("P1A", "P2B", "P3A")
PEOPLE = tuple(f"person {i}" for i in range(6))
QUEUE, SLOTS, PREFIX_MB, MAX_BODY = 16, 8, 0.3, 20_000
WORDS = (
    *("what", "is", "rain", "snow", "wind", "please", "tell", "me", "more", "about", "the", "sun", "and", "stars"),
    *("why", "do", "we", "sleep"),
)


# ---- the server


def serve(folder: str) -> None:
    """A small random model with three adapters and six people, until SIGTERM."""
    import jax
    import numpy as np

    from pjrlhf.language_model import LanguageModel, load_model
    from pjrlhf.models.adapters import AdapterConfig, init_bank
    from pjrlhf.models.registry import UserRegistry
    from pjrlhf.models.users import UserModel
    from pjrlhf.serving.catalogue import Catalogue, People
    from pjrlhf.serving.running import serve
    from pjrlhf.serving.settings import EngineSettings, ServerSettings

    def noise(tree: Any, seed: int) -> Any:
        keys = jax.random.split(jax.random.key(seed), len(jax.tree.leaves(tree)))
        leaves = [x + 0.3 * jax.random.normal(key, x.shape) for x, key in zip(jax.tree.leaves(tree), keys, strict=True)]
        return jax.tree.unflatten(jax.tree.structure(tree), leaves)

    adapter = AdapterConfig(rank=4, alpha=8.0)
    model = load_model(folder, adapter=adapter)
    model = LanguageModel(model.backbone.replace(base=noise(model.backbone.base, 5)), model.tokenizer)
    bank = noise(init_bank(model.backbone.base, adapter, len(NAMES), jax.random.key(1)), 2)
    rng, width = np.random.default_rng(0), model.backbone.model.config.hidden_size
    users = UserModel(kind="individualized", num_users=len(PEOPLE), tokens=2, width=width)
    offset = rng.normal(size=(len(PEOPLE) + 1, 2, width)).astype(np.float32)
    params = {"shared": {"generic": offset[0]}, "table": {"offset": offset}}
    catalogue = Catalogue(model, NAMES, bank, People(users, UserRegistry((None, *PEOPLE)), params))
    sizes = EngineSettings(slots=SLOTS, queue=QUEUE, chunk=8, steps=4, prefix_mb=PREFIX_MB)
    serve(catalogue, ServerSettings(port=0, drain_seconds=60, max_body=MAX_BODY), sizes)


def save_model(folder: pathlib.Path) -> pathlib.Path:
    """Writes the base with the tokenizer of the synthetic environment."""
    import jax

    from pjrlhf.data import synthetic
    from pjrlhf.models.config import ModelConfig
    from pjrlhf.models.decoder import Decoder, init_params
    from pjrlhf.models.huggingface import save_params

    synthetic.write_tokenizer(folder / "tokenizer")
    config = ModelConfig(
        vocab_size=len(synthetic.vocabulary()),
        hidden_size=32,
        intermediate_size=64,
        num_layers=2,
        num_heads=2,
        num_kv_heads=2,
        head_dim=16,
        max_length=128,
    )
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    params = init_params(Decoder(config), jax.random.key(0))
    save_params(folder / "model", config, params, tokenizer_folder=folder / "tokenizer", token_ids=ids)
    return folder / "model"


class Process:
    """The server as a process of its own; its log goes to a file."""

    def __init__(self, folder: pathlib.Path, name: str):
        self.log = folder / f"{name}.log"
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
        with open(self.log, "w") as log:
            command = [sys.executable, __file__, "--as-server", str(folder / "model")]
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        while not (found := re.search(r"at http://127\.0\.0\.1:(\d+)", self.log.read_text())):
            if self.process.poll() is not None:
                raise RuntimeError(self.log.read_text())
            time.sleep(0.1)
        self.port = int(found[1])

    def resident(self) -> float:
        """Resident memory in MB."""
        lines = pathlib.Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 1000


# ---- requests


def requests(count: int) -> list[tuple[str, dict[str, Any]]]:
    """(path, body) of requests that differ in everything."""
    rng, found = random.Random(0), []
    for i in range(count):
        text = " ".join(rng.choices(WORDS, k=rng.randint(1, 30)))
        body: dict[str, Any] = {"max_tokens": rng.choice([1, 3, 8, 20, 40]), "n": rng.choice([1, 1, 1, 2, 3])}
        body |= rng.choice([{"temperature": 0}, {"temperature": 1, "seed": i}, {"top_p": 0.8, "seed": i}])
        body |= rng.choice([{}, {}, {"stop": ["a", "zz"]}])
        body |= rng.choice([{}, {"user": rng.choice(PEOPLE)}, {"user": "a stranger"}])
        mix = {name: round(rng.uniform(-1, 1), 3) for name in NAMES}
        soup = "soup:" + ",".join(f"{name}={weight}" for name, weight in mix.items())
        body |= rng.choice([{"model": "base"}, {"model": "P2B"}, {"model": soup}, {"model": "base", "mix": mix}])
        if rng.random() < 0.5:
            chat = {"messages": [{"role": "user", "content": text}], "logprobs": rng.random() < 0.2}
            found.append(("/v1/chat/completions", body | chat))
        else:
            found.append(("/v1/completions", body | {"prompt": text} | rng.choice([{}, {"logprobs": 2, "echo": True}])))
    return found


STRANGE = (
    b"",
    b"{",
    b"null",
    b"[1, 2]",
    b"\xff\xfe\x00",
    b'{"messages": []}',
    b'{"model": "nobody", "messages": [{"role": "user", "content": "x"}]}',
    b'{"model": "base", "messages": "x"}',
    b'{"model": "base", "messages": [{"role": "user", "content": "x"}], "max_tokens": -1}',
    b'{"model": "base", "messages": [{"role": "user", "content": "x"}], "temperature": "hot"}',
    b'{"model": "base", "messages": [{"role": "user", "content": "x"}], "mix": {"P9": 1}}',
    b'{"model": "soup:P1A=", "messages": [{"role": "user", "content": "x"}]}',
    b'{"model": "base", "messages": [{"role": "user", "content": "' + b"rain " * 2000 + b'"}]}',
    b"[" * 5000,
    b" " * (MAX_BODY + 1),
)


async def send(port: int, path: str, body: bytes, leave: float | None = None) -> tuple[int, bytes, float]:
    """(status, body, seconds to its first byte) of a response; status 0 where the client left after `leave` seconds.

    HTTP/1.0, so that the end of the connection is the end of the body.
    """
    started = time.monotonic()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**24)
    try:
        head = f"POST {path} HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        async with asyncio.timeout(leave):
            status = int((await reader.readline()).split()[1])
            while (await reader.readline()).strip():
                pass
            first = await reader.read(1)
            seconds = time.monotonic() - started
            return status, first + await reader.read(), seconds
    except TimeoutError:
        return 0, b"", 0.0
    finally:
        writer.close()


def answer_of(body: bytes, stream: bool) -> list[tuple[str, str | None, int]]:
    """(text, finish reason, number of log-probs) of every choice; the same for a stream as for a whole answer.

    Raises:
      ValueError: the response is not complete.
    """
    if stream:
        events = [part.removeprefix("data: ") for part in body.decode().split("\n\n") if part]
        if events[-1] != "[DONE]":
            raise ValueError("the stream has no end")
        parts = [choice for event in events[:-1] for choice in json.loads(event)["choices"]]
    else:
        parts = json.loads(body)["choices"]
    found: dict[int, tuple[str, str | None, int]] = {}
    for part in parts:
        text, finish, count = found.get(part["index"], ("", None, 0))
        new = part.get("text") or (part.get("delta") or part.get("message") or {}).get("content") or ""
        logps = part.get("logprobs") or {}
        count += len(logps.get("content") or logps.get("tokens") or ())
        found[part["index"]] = text + new, finish or part["finish_reason"], count
    return [found[i] for i in sorted(found)]


# ---- the load


@dataclasses.dataclass
class Load:
    """Clients that send until they are stopped.

    Attributes:
      expected: by request, what an idle server answers.
      counts: of what happened.
      wrong: what must not happen.
      firsts: seconds to the first byte of streams.
    """

    port: int
    works: list[tuple[str, dict[str, Any]]]
    expected: list[list[tuple[str, str | None, int]]]
    counts: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    wrong: list[str] = dataclasses.field(default_factory=list)
    firsts: list[float] = dataclasses.field(default_factory=list)
    stopped: bool = False
    ending: bool = False  # the server has got a signal

    async def client(self, seed: int) -> None:
        """Sends one request after the other."""
        rng = random.Random(seed)
        while not self.stopped:
            kind = rng.choices(["whole", "leave", "strange"], [80, 12, 8])[0]
            try:
                await getattr(self, kind)(rng)
            except (ConnectionError, IndexError) as problem:
                if not self.ending:
                    self.wrong.append(f"no response: {problem!r}")
                refused = isinstance(problem, ConnectionRefusedError)
                self.counts["no server" if refused else "closed before it was answered"] += 1
                await asyncio.sleep(0.5)

    def pick(self, rng: random.Random) -> tuple[int, str, bytes, bool]:
        i, stream = rng.randrange(len(self.works)), rng.random() < 0.5
        path, body = self.works[i]
        return i, path, json.dumps(body | {"stream": stream}).encode(), stream

    async def whole(self, rng: random.Random) -> None:
        """Until it is answered."""
        i, path, body, stream = self.pick(rng)
        while True:
            status, got, seconds = await send(self.port, path, body)
            if status == 429:
                self.counts["429"] += 1
                await asyncio.sleep(rng.uniform(0.1, 0.5))
                continue
            if status == 503 and self.ending:
                self.counts["503"] += 1
                return
            break
        self.counts["answered"] += 1
        if stream:
            self.firsts.append(seconds)
        try:
            right = status == 200 and answer_of(got, stream) == self.expected[i]
        except (ValueError, LookupError) as problem:
            right, got = False, f"{problem!r}: {got[-300:]!r}".encode()
        if not right:
            self.wrong.append(f"{status} to {body.decode()}: {got[:1000]!r}, not {self.expected[i]}")

    async def leave(self, rng: random.Random) -> None:
        """Goes before the answer is complete, most times."""
        _, path, body, _ = self.pick(rng)
        status, *_ = await send(self.port, path, body, leave=rng.uniform(0, 0.4))
        self.counts["left" if not status else "answered too soon to leave" if status == 200 else str(status)] += 1

    async def strange(self, rng: random.Random) -> None:
        """What is no request."""
        path, body = rng.choice(["/v1/completions", "/v1/chat/completions"]), rng.choice(STRANGE)
        status, got, _ = await send(self.port, path, body)
        self.counts["malformed"] += 1
        if not (400 <= status < 500 or (status == 503 and self.ending)):
            self.wrong.append(f"{status} to {body[:100]!r}: {got[:200]!r}")


async def get(port: int, path: str) -> tuple[int, str]:
    """(status, body) of a GET."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {path} HTTP/1.0\r\n\r\n".encode())
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    return int(head.split()[1]), body.decode()


async def metric(port: int, name: str) -> float:
    """A value of /metrics."""
    found = re.search(rf"^{re.escape(name)} (\S+)$", (await get(port, "/metrics"))[1], re.MULTILINE)
    return float(found[1]) if found else 0.0


async def saturate(server: Process, load: Load, options: argparse.Namespace) -> dict[str, Any]:
    """The load for a while; what was measured."""
    clients = [asyncio.create_task(load.client(i)) for i in range(options.clients)]
    memory, started = [], time.monotonic()
    before = await metric(server.port, "pjrlhf_generated_tokens_total")
    waited = 0.0
    while time.monotonic() - started < options.seconds:
        await asyncio.sleep(0.5)
        memory.append(server.resident())
        waited = max(waited, await metric(server.port, "pjrlhf_requests_waiting"))
    seconds = time.monotonic() - started
    tokens = await metric(server.port, "pjrlhf_generated_tokens_total") - before
    load.stopped = True
    await asyncio.gather(*clients)
    while await metric(server.port, "pjrlhf_answers_running") or await metric(server.port, "pjrlhf_requests_waiting"):
        await asyncio.sleep(0.1)
    quarter = len(memory) // 4
    quarters = [statistics.median(memory[i * quarter : (i + 1) * quarter]) for i in range(4)]
    cache = await metric(server.port, "pjrlhf_prefix_cache_bytes")
    # Freed slots answer as before.
    for (path, body), want in list(zip(load.works, load.expected, strict=True))[:SLOTS]:
        status, got, _ = await send(server.port, path, json.dumps(body).encode())
        if status != 200 or answer_of(got, False) != want:
            load.wrong.append(f"after the load: {status} to {body}")
    if waited > QUEUE:
        load.wrong.append(f"{waited} requests waited, more than {QUEUE}")
    if cache > PREFIX_MB * 1e6:
        load.wrong.append(f"the prefix cache holds {cache} bytes")
    if not load.counts["429"]:
        load.wrong.append("the queue was never full")
    growth = quarters[3] - quarters[1]
    if growth > max(0.02 * quarters[1], 4.0):
        load.wrong.append(f"memory grows: {quarters} MB")
    firsts = sorted(load.firsts)
    return {
        "seconds": seconds,
        "counts": dict(load.counts),
        "wrong": len(load.wrong),
        "requests_per_second": sum(load.counts.values()) / seconds,
        "tokens_per_second": tokens / seconds,
        "first_byte_seconds": {"median": statistics.median(firsts), "p99": firsts[int(0.99 * len(firsts))]},
        "resident_mb_by_quarter": quarters,
        "prefix_cache_bytes": cache,
        "prefix_cache_hits": await metric(server.port, 'pjrlhf_prefix_cache_chunks_total{result="hit"}'),
        "prefix_cache_misses": await metric(server.port, 'pjrlhf_prefix_cache_chunks_total{result="miss"}'),
    }


async def end(server: Process, load: Load, sign: int, clients: int) -> dict[str, Any]:
    """A signal under load."""
    tasks = [asyncio.create_task(load.client(100 + i)) for i in range(clients)]
    await asyncio.sleep(3)
    load.ending = True
    server.process.send_signal(sign)
    started = time.monotonic()
    code = await asyncio.to_thread(server.process.wait, 90)
    load.stopped = True
    await asyncio.gather(*tasks)
    if sign == signal.SIGTERM and code != 0:
        load.wrong.append(f"exit code {code}: {server.log.read_text()[-2000:]}")
    return {"seconds": time.monotonic() - started, "exit_code": code, "counts": dict(load.counts)}


async def run(folder: pathlib.Path, options: argparse.Namespace) -> dict[str, Any]:
    """All of it."""
    works = requests(options.requests)
    server = Process(folder, "first")

    async def alone(port: int) -> list[Any]:
        return [answer_of((await send(port, path, json.dumps(body).encode()))[1], False) for path, body in works]

    expected = await alone(server.port)
    load = Load(server.port, works, expected)
    found = {"load": await saturate(server, load, options)}
    kill = Load(server.port, works, expected)
    # What a killed server had begun is lost; here only the restart counts.
    found["SIGKILL"] = await end(server, kill, signal.SIGKILL, options.clients)
    server = Process(folder, "second")
    again = await alone(server.port)
    drain = Load(server.port, works, expected)
    found["SIGTERM"] = await end(server, drain, signal.SIGTERM, options.clients)
    wrong = load.wrong + drain.wrong + ([] if again == expected else ["a server that was started again differs"])
    for one in wrong[:5]:
        print(one, file=sys.stderr)
    found["wrong"] = len(wrong)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--clients", type=int, default=48)
    parser.add_argument("--requests", type=int, default=80, help="different ones")
    parser.add_argument("--output", type=pathlib.Path, default=harness.FOLDER / "results" / "load.json")
    parser.add_argument("--as-server", metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.as_server:
        serve(options.as_server)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        save_model(folder)
        found = asyncio.run(run(folder, options))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))
    sys.exit(bool(found["wrong"]))


if __name__ == "__main__":
    main()
