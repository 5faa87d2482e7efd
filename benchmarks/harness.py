"""What the comparisons share: sides that take turns, each in a process of its own, and what is said about them.

A script lists its sides: functions `side(job, turn)` that build something once and then do one round of work between
two calls of `turn`. The script starts itself once per side, with the interpreter and libraries of that side, and gives
the turn to one after the other, round by round, so that whatever else the machine does meets all of them; a ratio
compares rounds that stand next to each other. All sides are pinned to the same cores, and have as many threads.

Peak memory is the high-water mark of a process' resident set (of a GPU's allocator with --device gpu) above what it was
before anything was built: libraries loaded, no model yet. The steady peak is that of the counted rounds, which
building, compiling and warming up are no part of.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any

import numpy as np

FOLDER = pathlib.Path(__file__).parent
# Llama shapes; parameters are counted with the embedding, once where it is tied.
MODELS = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_layers": 2, "num_heads": 2, "vocab_size": 512},
    "26m": {"hidden_size": 384, "intermediate_size": 1024, "num_layers": 8, "num_heads": 6, "vocab_size": 32000},
    "100m": {
        "hidden_size": 640,
        "intermediate_size": 1728,
        "num_layers": 12,
        "num_heads": 10,
        "vocab_size": 32000,
        "tie_embeddings": False,
    },
    "134m": {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_layers": 12,
        "num_heads": 12,
        "vocab_size": 32000,
        "tie_embeddings": False,
    },
}
PAD, BOS, EOS, FIRST = 0, 1, 2, 3  # ids; those from FIRST on stand for words
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
LENGTHS = {"prompt": (60, 0.9), "answer": (220, 0.7)}  # median and sigma of log-normal token counts


# ---- the side of the worker


class Turn:
    """How a side takes part: `turn.begin()` before it builds anything, `turn(report)` when it is built and after every
    round; that returns when the next round begins, and never where there is none. A report may have "seconds" of its
    own, where the round ended earlier.

    Args:
      threads: cores to run on.
      clock: one of `CLOCKS`; "cpu" counts seconds of this process' threads, which other processes disturb less.
    """

    def __init__(self, threads: int, clock: str):
        self._clock = CLOCKS[clock]
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what libraries print is no part of the conversation
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
        self._before = self._started = 0.0
        self.memory_peak: Callable[[], int] | None = None  # bytes, where it is not that of this process

    def begin(self) -> None:
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(len(os.sched_getaffinity(0)))
        self._before, self._started = _memory("VmRSS"), self._clock()

    def seconds(self) -> float:
        """Since the turn began."""
        return self._clock() - self._started

    def __call__(self, report: Mapping[str, Any]) -> None:
        seconds = self.seconds()
        peak = self.memory_peak() if self.memory_peak else _memory("VmHWM") - self._before
        self._out.write(json.dumps({"seconds": seconds, "peak_bytes": peak, **report}) + "\n")
        self._out.flush()
        if not sys.stdin.readline():
            os._exit(0)
        with contextlib.suppress(OSError):  # the high-water mark of every round is its own
            pathlib.Path("/proc/self/clear_refs").write_text("5")
        self._started = self._clock()


def _memory(name: str) -> int:
    """A line of /proc/self/status, bytes."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def serve(sides: Mapping[str, Callable[[dict, Turn], None]]) -> None:
    """What a script does where it was started as a side; returns at once where it was not."""
    if len(sys.argv) > 2 and sys.argv[1] == "--side":
        job = json.loads(sys.argv[2])
        sides[job["side"]](job, Turn(job["threads"], job["clock"]))
        sys.exit(0)


# ---- the script's own side


@dataclasses.dataclass
class Side:
    """One of those compared.

    Args:
      kind: name of its function in the script.
      python: the interpreter to run it with.
      options: what its function finds in `job` besides the common settings.
    """

    kind: str
    python: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    process: Any = None
    reports: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    ready: dict[str, Any] = dataclasses.field(default_factory=dict)


class Comparison:
    """The sides of one script; a context that starts and ends them.

    Args:
      script: its __file__.
      options: of `arguments`.
    """

    def __init__(self, script: str, options: argparse.Namespace):
        self.script, self.options = script, options
        self.sides: dict[str, Side] = {}
        self._exit = contextlib.ExitStack()

    def __enter__(self) -> "Comparison":
        self.folder = pathlib.Path(self._exit.enter_context(tempfile.TemporaryDirectory(dir=self.options.folder)))
        return self

    def __exit__(self, *_: Any) -> None:
        for name in list(self.sides):
            self.stop(name)
        self._exit.close()

    def ours(self, kind: str, /, **options: Any) -> Side:
        return Side(kind, sys.executable, options)

    def theirs(self, kind: str, /, **options: Any) -> Side:
        return Side(kind, self.options.torch_python, options)

    def start(self, name: str, side: Side) -> dict[str, Any]:
        """Starts a side, waits until it is built, and returns what it says about itself."""
        threads, o = self.options.threads, self.options
        common = {"threads": threads, "device": o.device, "clock": o.clock, "folder": str(self.folder)}
        job = {"side": side.kind, **common, **side.options}
        quiet = {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
        caches = {"XDG_CACHE_HOME": self.folder / name, "HF_HOME": self.folder / name}
        count = {variable: threads for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NPROC")}
        hidden = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""} if o.device == "cpu" else {}
        path = os.pathsep.join([str(FOLDER.parent), os.environ.get("PYTHONPATH", "")])
        rest = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}
        pages = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}  # huge ones for everybody, as launch/local.sh has them
        environment = {key: str(value) for key, value in (quiet | caches | count | hidden | rest | pages).items()}
        environment |= side.options.get("environment", {})
        with open(self.folder / f"{name}.log", "w") as log:
            side.process = subprocess.Popen(
                [side.python, self.script, "--side", json.dumps(job)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | environment,
            )
        self.sides[name] = side
        side.ready = self._hear(name)
        print(f"{name}: ready after {side.ready['seconds']:.1f} s", file=sys.stderr)
        return side.ready

    def _hear(self, name: str) -> dict[str, Any]:
        line = self.sides[name].process.stdout.readline()
        if not line:
            log = (self.folder / f"{name}.log").read_text()[-4000:]
            raise SystemExit(f"{log}\n{name}: ended before its turn was over; what it said last is above")
        return json.loads(line)

    def stop(self, name: str) -> Side:
        side = self.sides.pop(name)
        with contextlib.suppress(BrokenPipeError):
            side.process.stdin.close()
        side.process.wait()
        return side

    def round(self, name: str) -> dict[str, Any]:
        side = self.sides[name]
        side.process.stdin.write("go\n")
        side.process.stdin.flush()
        return self._hear(name)

    def run(self, rounds: int, warm_up: int) -> None:
        """All sides take turns, every other round in reverse order; of the first `warm_up` ones only memory counts."""
        for i in range(warm_up + rounds):
            for name in list(self.sides)[:: 1 if i % 2 else -1]:
                self.sides[name].reports.append(self.round(name) | {"counts": i >= warm_up})
            print(f"round {i - warm_up + 1} of {rounds}", file=sys.stderr)

    def found(self, first: str) -> dict[str, dict[str, Any]]:
        """Per side: seconds per round, their ratio to those of `first`, peak memory, what it said last."""
        times = {
            name: [report["seconds"] for report in side.reports if report["counts"]]
            for name, side in self.sides.items()
        }
        found = {}
        for name, side in self.sides.items():
            last = {k: v for k, v in side.reports[-1].items() if k not in ("counts", "seconds", "peak_bytes")}
            found[name] = {
                "seconds": spread(times[name]),
                "each_seconds": times[name],
                "ratio": spread([a / b for a, b in zip(times[name], times[first], strict=True)]),
                "peak_bytes": max(report["peak_bytes"] for report in [side.ready, *side.reports]),
                "steady_peak_bytes": max(report["peak_bytes"] for report in side.reports if report["counts"]),
                "setup_seconds": side.ready["seconds"],
                "warm_up_seconds": sum(r["seconds"] for r in side.reports if not r["counts"]),
                "versions": side.ready.get("versions", {}),
                **last,
            }
        return found


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and extremes."""
    low, middle, high = np.percentile(values, [25, 50, 75])
    return {"median": middle, "q1": low, "q3": high, "min": min(values), "max": max(values)}


def arguments(description: str, *, rounds: int = 8, models: Sequence[str] = ("26m", "100m")) -> argparse.ArgumentParser:
    """The flags all scripts have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    torch = os.environ.get("TORCH_PYTHON", sys.executable)
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--torch_python", default=torch, help="interpreter with torch, trl, ...; else $TORCH_PYTHON")
    parser.add_argument("--model", choices=[*MODELS], nargs="+", default=list(models))
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--threads", type=int, default=cores, help="of every side, on the first so many cores")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: seconds of the processor")
    parser.add_argument("--sides", nargs="+", help="only these")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of our config")
    parser.add_argument("--folder", help="where temporary files go")
    parser.add_argument("--results", type=pathlib.Path, default=FOLDER / "results")
    parser.add_argument("--quick", action="store_true", help="tiny sizes and two rounds: does it work?")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    options = parser.parse_args()
    if options.quick:
        options.model, options.rounds = ["tiny"], 2
    return options


def machine(options: argparse.Namespace) -> dict[str, Any]:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "device": options.device,
        "threads": options.threads,
        "clock": options.clock,
        "rounds": options.rounds,
        "set": options.set,
    }


def write(options: argparse.Namespace, name: str, about: Mapping[str, Any], tables: Mapping[str, Any]) -> pathlib.Path:
    """Writes <results>/<name>.json, in a quick run elsewhere than the real results; returns where the plot goes."""
    folder = pathlib.Path(tempfile.gettempdir()) / "pjrlhf_quick" if options.quick else options.results
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({**machine(options), **about, "results": tables}, indent=1, default=_plain) + "\n")
    print(f"written: {path}", file=sys.stderr)
    return path.with_suffix(".png")


def _plain(x: Any) -> Any:
    return x.item() if isinstance(x, np.generic) else str(x)


def rounded(x: float) -> str:
    return f"{x:.3g}" if abs(x) < 1000 else f"{x:.0f}"


def table(title: str, found: Mapping[str, Mapping[str, Any]], columns: Mapping[str, str] | None = None) -> None:
    """Prints one row per side: time, ratio with its spread, peak memory, and `columns` of its own {key: heading}."""
    columns = columns or {}
    width = max(map(len, found)) + 2
    print(f"\n{title}")
    head = f"{'':{width}}{'s/round':>10}{'ratio':>8}{'quartiles':>14}{'min-max':>14}{'peak MiB':>10}{'steady':>8}"
    print(head + "".join(f"{heading:>14}" for heading in columns.values()))
    for name, row in found.items():
        seconds, ratio = row["seconds"], row["ratio"]
        line = f"{name:{width}}{rounded(seconds['median']):>10}{ratio['median']:8.2f}"
        line += f"{ratio['q1']:.2f}-{ratio['q3']:.2f}".rjust(14) + f"{ratio['min']:.2f}-{ratio['max']:.2f}".rjust(14)
        line += f"{row['peak_bytes'] / 2**20:10.0f}{row.get('steady_peak_bytes', math.nan) / 2**20:8.0f}"
        print(line + "".join(f"{rounded(row[key]) if key in row else '':>14}" for key in columns))


def bars(path: pathlib.Path, tables: Mapping[str, Mapping[str, Any]], first: str) -> None:
    """A row of bars per table: the ratio of times with its quartiles, and peak memory."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    count = max(map(len, tables.values()))
    shape = {"figsize": (8, 0.6 + len(tables) * (0.6 + 0.28 * count)), "layout": "constrained"}
    figure, axes = plt.subplots(len(tables), 2, squeeze=False, sharey="row", **shape)
    for (title, found), (left, right) in zip(tables.items(), axes, strict=True):
        ratios = [row["ratio"] for row in found.values()]
        middle = [r["median"] for r in ratios]
        errors = [[m - r["q1"] for m, r in zip(middle, ratios, strict=True)]]
        errors.append([r["q3"] - m for m, r in zip(middle, ratios, strict=True)])
        colours = ["C0" if "ours" in name else "0.6" for name in found]
        left.barh(list(found), middle, xerr=errors, color=colours, capsize=2)
        left.axvline(1, color="0.3", linewidth=0.8)
        left.set(xlabel=f"time / that of {first}", title=title)
        for key, alpha in (("peak_bytes", 0.4), ("steady_peak_bytes", 1.0)):
            right.barh(list(found), [row.get(key, 0) / 2**20 for row in found.values()], color=colours, alpha=alpha)
        right.set(xlabel="peak MiB (pale: when compiling)")
        left.invert_yaxis()
    figure.savefig(path, dpi=90)


def report(
    options: argparse.Namespace,
    name: str,
    compare: Callable[[argparse.Namespace, str], tuple[dict, dict]],
    first: str,
    round_of: Callable[[Mapping[str, Any]], str],
    columns: Mapping[str, str],
) -> None:
    """Runs `compare(options, size)` for every size of model, which gives a table and what it is about, and prints,
    writes and plots them; `round_of` says what a round is.
    """
    tables, about = {}, {}
    for size in options.model:
        tables[size], about[size] = compare(options, size)
        title = f"{about[size]['parameters'] / 1e6:.1f}M parameters, {round_of(about[size])}"
        table(title, tables[size], columns)
    bars(write(options, name, {"models": about}, tables), tables, first)


# ---- work that is the same on all sides


def words(rng: np.random.Generator, count: int, vocab_size: int) -> list[int]:
    return rng.integers(FIRST, vocab_size, count).tolist()


def text(ids: Sequence[int]) -> str:
    """What the tokenizer of `save_model` turns into `ids`."""
    return " ".join(f"w{i}" for i in ids)


def lengths(rng: np.random.Generator, name: str, count: int, limit: int) -> np.ndarray:
    """Log-normal token counts by `LENGTHS`, from 4 to `limit`. Those of answers with one EOS more are at most limit."""
    median, sigma = LENGTHS[name]
    return np.clip(np.round(median * np.exp(sigma * rng.standard_normal(count))), 4, limit - 1).astype(int)


def pair_records(count: int, vocab_size: int, limits: tuple[int, int], whole: bool = False) -> list[dict]:
    """Comparisons of random words by 16 people; prompt and answers are as long as those of people, see `LENGTHS`, or
    `whole`: as long as they may be.
    """
    rng = np.random.default_rng(0)
    prompts = lengths(rng, "prompt", count, limits[0])
    answers = lengths(rng, "answer", 2 * count, limits[1]).reshape(count, 2)
    if whole:
        prompts[:], answers[:] = limits[0], limits[1] - 1
    records = []
    for i in range(count):
        ids = [words(rng, n, vocab_size) for n in (prompts[i], *answers[i])]
        prompt, chosen, rejected = map(text, ids)
        row = {"prompt": prompt, "chosen": " " + chosen, "rejected": " " + rejected, "row": i}
        records.append({**row, "user_id": f"u{rng.integers(16)}", "objective": "one"})
    return records


def write_records(path: pathlib.Path, records: Sequence[Mapping[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def read_records(path: str) -> list[dict]:
    return [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]


def ids_of(record: Mapping[str, Any]) -> tuple[list[int], list[int], list[int]]:
    """Token ids of prompt, chosen and rejected, the answers with EOS: what the tokenizers on both sides make of it."""
    prompt, *answers = ([int(w[1:]) for w in record[name].split()] for name in ("prompt", "chosen", "rejected"))
    return prompt, *([*answer, EOS] for answer in answers)


def save_model(folder: pathlib.Path, size: str, max_length: int, seed: int = 0, **changes: Any) -> dict[str, Any]:
    """Writes a random Llama of a size of `MODELS`, with `changes` of its shape, and a tokenizer of one token per word;
    returns its dimensions and parameters.
    """
    import jax
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    jax.config.update("jax_platforms", "cpu")  # an accelerator is the sides'
    from pjrlhf.data.tokenizer_files import write_folder
    from pjrlhf.models.config import ModelConfig
    from pjrlhf.models.decoder import Decoder, init_params
    from pjrlhf.models.huggingface import save_params

    shape = MODELS[size] | changes
    heads = shape["num_heads"]
    config = ModelConfig(**shape, num_kv_heads=heads, head_dim=shape["hidden_size"] // heads, max_length=max_length)
    special = ["<pad>", "<s>", "</s>"]
    vocabulary = {name: i for i, name in enumerate([*special, *(f"w{i}" for i in range(FIRST, config.vocab_size))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    words_folder = folder.with_name(f"{folder.name}-tokenizer")
    write_folder(words_folder, tokenizer)
    params = init_params(Decoder(config), jax.random.key(seed))
    ids = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    save_params(folder, config, params, tokenizer_folder=words_folder, token_ids=ids)
    count = sum(x.size for x in jax.tree.leaves(params))
    return {**dataclasses.asdict(config), "parameters": count}


def matmul_flops(shape: Mapping[str, Any], row: int, scored: int) -> float:
    """FLOPs of the matrix products that one forward pass of a row of `row` tokens needs, of which `scored` reach the
    vocabulary: 2 per weight of a layer and token, 2 x 2 x heads x head width x row^2 / 2 for causal attention, 2 x
    width x vocabulary per scored token. A training step needs three times that.
    """
    D, F, L = shape["hidden_size"], shape["intermediate_size"], shape["num_layers"]
    q, kv = shape["num_heads"] * shape["head_dim"], shape["num_kv_heads"] * shape["head_dim"]
    layer = D * (2 * q + 2 * kv) + 3 * D * F
    return 2.0 * row * L * layer + 2.0 * L * q * row**2 + 2.0 * scored * D * shape["vocab_size"]


def gemm_peak(framework: str, size: int = 1024, seconds: float = 1.0) -> float:
    """FLOP/s of the best of many products of square float32 matrices: what this side's library can reach here."""
    if framework == "jax":
        import jax
        import jax.numpy as jnp

        a = jnp.ones((size, size))
        product = jax.jit(lambda x: x @ x)
        step = lambda: jax.block_until_ready(product(a))  # noqa: E731
    else:
        import torch

        a = torch.ones(size, size, device="cuda" if torch.cuda.is_available() else "cpu")

        def step():
            a @ a
            if a.is_cuda:
                torch.cuda.synchronize()

    best, end = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < end:
        started = time.perf_counter()
        step()
        best = min(best, time.perf_counter() - started)
    return 2.0 * size**3 / best


def utilisation(found: dict[str, dict[str, Any]], flops: float, tokens: float, peak: float) -> None:
    """Adds tokens/s and model-FLOPs utilisation: `flops` that a round needs / (its seconds x `peak` FLOP/s)."""
    for row in found.values():
        row["tokens_per_second"] = tokens / row["seconds"]["median"]
        row["mfu_percent"] = 100 * flops / row["seconds"]["median"] / peak


def versions(*names: str) -> dict[str, str]:
    return {name: metadata.version(name) for name in names}


# ---- our side

# A run with one reward and one policy, whatever it is about.
ONE_OBJECTIVE = {
    "objectives": ("one",),
    "preferences": {"one": {"dimension": "one", "sentence": ""}},
    "judge": {"one": "short"},
}


def our_run(job: Mapping[str, Any], config_file: str, variant: str, changes: Mapping[str, Any]) -> Any:
    """A run of a config of the catalogue on the model of this comparison, with `changes` {dotted key: value}, and those
    of --set over them.
    """
    import ast
    import importlib.util

    from pjrlhf.pipeline import stages
    from pjrlhf.training.workdir import Workdir

    spec = importlib.util.spec_from_file_location("config", FOLDER.parent / "configs" / f"{config_file}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(variant)
    given = {}
    for item in job.get("set", ()):
        key, _, value = item.partition("=")
        try:
            given[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            given[key] = value
    with config.ignore_type():
        config.update_from_flattened_dict({"model.path": job["model"], "data.chat": False, **changes, **given})
    return stages.read(config).run(Workdir(pathlib.Path(job["folder"]) / f"work-{os.getpid()}"))


def step_by_turns(
    method: Any, state: Any, start: Any, job: Mapping[str, Any], turn: Turn, say: Callable[[Mapping], dict]
) -> None:
    """One training step per round, on the same `job["batches"]` batches again and again.

    Args:
      start: state of `method.batches` before the first of them.
      say: of the metrics of a step, what the side says after the round.
    """
    import jax

    for i in itertools.count():
        if i % job["batches"] == 0:
            method.batches.set_state(start)
        state, metrics = method.step(state, next(method.batches))
        jax.block_until_ready(state)
        turn(say(metrics))


def load_ours() -> None:
    """What the first steps of a run would load: libraries are no part of peak memory."""
    import datasets  # noqa: F401
    import grain  # noqa: F401
    import jax
    import transformers  # noqa: F401

    jax.devices()


def our_versions() -> dict[str, str]:
    return versions("jax", "jaxlib")


def watch_jax(turn: Turn, job: Mapping[str, Any]) -> None:
    """On an accelerator, memory is that of its allocator."""
    import jax

    if job["device"] != "cpu":
        turn.memory_peak = lambda: jax.devices()[0].memory_stats()["peak_bytes_in_use"]


# ---- the side of torch


def their_versions(*names: str) -> dict[str, str]:
    return versions("torch", "transformers", *names)


def watch_torch(turn: Turn) -> None:
    import torch

    if torch.cuda.is_available():
        turn.memory_peak = torch.cuda.max_memory_allocated
        torch.set_float32_matmul_precision("high")  # TF32, as XLA does by default


def trainer_settings(job: Mapping[str, Any]) -> dict[str, Any]:
    """Of transformers' Trainer: the same optimizer as ours, one step per batch, the batches in their order, no
    gradient checkpointing (the default of TRL, which takes a third longer).
    """
    o = job["optimizer"]
    return {
        "per_device_train_batch_size": job["pairs"],
        "learning_rate": o["learning_rate"],
        "lr_scheduler_type": "constant",
        "max_grad_norm": o["max_grad_norm"],
        "weight_decay": o["weight_decay"],
        "num_train_epochs": 10**6,
        "train_sampling_strategy": "sequential",
        "gradient_checkpointing": False,
        "bf16": False,
        "logging_steps": 10**9,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": job["device"] == "cpu",
    }


def lora(job: Mapping[str, Any]) -> Any:
    """Adapters on the layers that ours has them on, if any."""
    if not job["lora"]:
        return None
    from peft import LoraConfig

    return LoraConfig(r=job["lora"], lora_alpha=2 * job["lora"], target_modules="all-linear", task_type="CAUSAL_LM")


def train_by_turns(trainer: Any, turn: Turn, ready: Mapping[str, Any], more: Callable[[], dict] = dict) -> None:
    """Runs `trainer.train()`, one optimizer step per round: what lies between two steps (data, logging) is part of it.

    Args:
      ready: what the side says when it is built.
      more: what it says after every round, besides the loss.
    """
    from transformers import TrainerCallback

    seen: dict[str, Any] = {}
    compute_loss = trainer.compute_loss

    def noted(*arguments: Any, **keywords: Any) -> Any:
        loss = compute_loss(*arguments, **keywords)
        seen["loss"] = (loss[0] if isinstance(loss, tuple) else loss).detach()
        return loss

    trainer.compute_loss = noted

    class Turns(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            turn(ready)

        def on_step_end(self, *_: Any, **__: Any) -> None:
            turn({"loss": float(seen["loss"]), **more()})

    trainer.add_callback(Turns())
    trainer.train()
