"""A soup per row, against one adapter, merged models and PEFT:  python benchmarks/serving.py

For every size, number of adapters K and number of rows: rows that start together, prompts and answers of equal length,
greedy, as many slots as rows.

* a soup per row: every row has weights of its own for all K adapters;
* one adapter: all rows ask for the same adapter of this bank, which is the same work;
* a bank of one adapter: an engine that has no other;
* base: an engine without a bank, which is also what one merged model costs;
* K merged models in turn: row i asks for model i mod K, and each model answers its rows before the next begins;
* PEFT: `generate(adapter_names=...)` of transformers, one of K adapters per row, which is as near to a soup per row as
  it comes; in a process of its own, with --torch_python (left out where that has no torch or peft).

A person never seen: the time from a request to its first token, alone in a running engine, for a soup never used before
and for one used before (with another prompt), and for merging that soup in memory and answering with the merged model.

Sides take turns, and every side is warm and is waited for. EOS does not end an answer. With --clock cpu seconds are
those of the processor, which other processes on the machine disturb less. A ratio is that of two neighbouring rounds,
ours over theirs.
"""

import argparse
import copy
import dataclasses
import functools
import pathlib
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import harness
import numpy as np

OURS = "a soup per row"
Round = Mapping[str, Any]  # "seconds", "tokens" drawn, "first": seconds to the first token, median over requests


class Engines:
    """Rounds of engines, timed by one clock."""

    def __init__(self, clock: str):
        self.clock = harness.CLOCKS[clock]

    def round(self, engine: Any, prompts: Sequence, limits: Sequence[int], rows: Any, start: Any = None) -> Round:
        """All requests at once, until the last token is on the host; `start` is when the round began, now if None."""
        from pjrlhf.serving.tickets import Request

        started, firsts, drawn = self.clock() if start is None else start, {}, [0]

        def listener(ticket: Any, piece: Any) -> None:
            firsts.setdefault(ticket, self.clock() - started)
            drawn[0] += len(piece.tokens)

        for tokens, limit, row in zip(prompts, limits, rows, strict=True):
            engine.submit(Request(tokens=tokens, max_new_tokens=limit, mix=row), listener)
        while engine.busy:
            engine.step()
        return {
            "seconds": self.clock() - started,
            "tokens": drawn[0],
            "first": statistics.median(firsts.values()),
            "firsts": list(firsts.values()),
        }

    def parts(self, engine: Any, parts: Sequence[Sequence[int]], prompts: Any, limits: Any, rows: Any) -> Round:
        """Requests in several parts, each after the one before has ended."""
        started, found = self.clock(), []
        for part in parts:
            own = ([x[i] for i in part] for x in (prompts, limits, rows))
            found.append(self.round(engine, *own, start=started))
        firsts = [first for one in found for first in one["firsts"]]
        return {
            "seconds": self.clock() - started,
            "tokens": sum(one["tokens"] for one in found),
            "first": statistics.median(firsts),
        }


def peft(job: dict, turn: harness.Turn) -> None:
    """transformers with K adapters of PEFT."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, GenerationConfig

    clock, prompts, new = harness.CLOCKS[job["clock"]], job["prompts"], job["new"]
    turn.begin()
    layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=8, lora_alpha=16, target_modules=layers, init_lora_weights=False)
    names = [f"k{i}" for i in range(job["adapters"])]
    model: Any = get_peft_model(
        AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32), config, names[0]
    )
    for name in names[1:]:
        model.add_adapter(name, config)
    model.eval()
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=new, min_new_tokens=new, pad_token_id=0, eos_token_id=None
    )
    tokens = torch.tensor(prompts)
    rows = [names[i % len(names)] for i in range(len(prompts))]
    turn({"versions": harness.their_versions("peft")})
    while True:
        started, first = clock(), []

        def watch(ids: Any, scores: Any, started: float = started, first: list = first, **_: Any) -> Any:
            first.append(clock() - started)  # called after every token
            return torch.zeros(len(ids), dtype=torch.bool)

        with torch.inference_mode():
            found = model.generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                generation_config=settings,
                adapter_names=rows,
                stopping_criteria=[watch],
            )
        drawn = found[:, tokens.shape[1] :].numel()
        turn({"seconds": clock() - started, "tokens": drawn, "first": first[0]})


def in_turns(sides: Mapping[str, Callable[[], Round]], rounds: int) -> dict[str, list[Round]]:
    """What the sides report, every other turn in reverse order; the first turn compiles."""
    found: dict[str, list[Round]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name in list(sides)[:: 1 if turn % 2 else -1]:
            result = sides[name]()
            if turn:
                found[name].append(result)
    return found


def table(title: str, found: Mapping[str, Sequence[Round]]) -> dict[str, dict[str, Any]]:
    """Prints and returns what is said about a comparison."""
    print(f"\n{title}", flush=True)
    rows: dict[str, dict[str, Any]] = {}
    for name, reports in found.items():
        pairs = list(zip(found[OURS], reports, strict=True))
        row = rows[name] = {
            "tokens_per_second": harness.spread([r["tokens"] / r["seconds"] for r in reports]),
            "ratio": harness.spread([a["tokens"] / a["seconds"] * b["seconds"] / b["tokens"] for a, b in pairs]),
            "first_token_seconds": harness.spread([r["first"] for r in reports]),
        }
        speed, ratio, first = (row[key] for key in row)
        low, middle, high = (harness.rounded(ratio[key]) for key in ("q1", "median", "q3"))
        print(
            f"{name:32}{harness.rounded(speed['median']):>7} tokens/s; ours is {middle} ({low} to {high}) times as "
            f"fast; first token after {harness.rounded(first['median'])} s",
            flush=True,
        )
    return rows


def bank_of(model: Any, count: int) -> Any:
    """Adapters as after training: the second factor starts at zero."""
    import jax

    from pjrlhf.models.adapters import init_bank

    bank = init_bank(model.backbone.base, model.backbone.adapter, count, jax.random.key(0))
    return jax.tree.map(lambda x: x + 0.01 * jax.random.normal(jax.random.key(x.size), x.shape), bank)


def endless(model: Any) -> Any:
    """The same model, whose answers end by their limits alone."""
    tokenizer = copy.copy(model.tokenizer)
    tokenizer.eos_ids = (-1,)
    return dataclasses.replace(model, tokenizer=tokenizer)


def open_model(options: argparse.Namespace, size: str, longest: int) -> tuple[Any, pathlib.Path, dict[str, Any]]:
    """(model, its folder, what results say about it) of a size, or of --path."""
    import jax

    from pjrlhf.language_model import load_model
    from pjrlhf.models.adapters import AdapterConfig

    folder = options.path
    if folder is None:
        folder = pathlib.Path(tempfile.mkdtemp(dir=options.folder)) / "model"
        harness.save_model(folder, size, longest)
    model = endless(load_model(folder, adapter=AdapterConfig(rank=8, alpha=16.0)))
    parameters = sum(x.size for x in jax.tree.leaves(model.backbone.base))
    return model, folder, {"parameters": parameters, "clock": options.clock}


def engine_of(model: Any, bank: Any, slots: int, context: int) -> Any:
    """With the default sizes but these."""
    from pjrlhf.serving.engine import Engine
    from pjrlhf.serving.settings import EngineSettings

    sizes = EngineSettings(slots=slots, context=context, queue=2**16, prefix_mb=0.0)
    return Engine(model.backbone, model.tokenizer, bank, settings=sizes)


def wanted(options: argparse.Namespace, name: str) -> bool:
    return not options.sides or name in options.sides


def compare_rows(options: argparse.Namespace, model: Any, folder: pathlib.Path, rows: int, count: int) -> dict:
    """Rows that start together."""
    rng, engines = np.random.default_rng(0), Engines(options.clock)
    vocabulary = model.backbone.model.config.vocab_size
    prompts = [[harness.BOS, *harness.words(rng, options.prompt - 1, vocabulary)] for _ in range(rows)]
    limits, none = [options.new] * rows, [None] * rows
    context = options.prompt + options.new
    soups = engine_of(model, bank_of(model, count), rows, context)
    plain = engine_of(model, None, rows, context)
    lone = engine_of(model, bank_of(model, 1), rows, context)
    mix = rng.dirichlet(np.ones(count), rows).astype(np.float32)
    one = np.eye(count, dtype=np.float32)[np.zeros(rows, int)]
    turns = [range(k, rows, count) for k in range(min(count, rows))]
    sides: dict[str, Callable[[], Round]] = {
        OURS: lambda: engines.round(soups, prompts, limits, mix),
        "one adapter": lambda: engines.round(soups, prompts, limits, one),
        "a bank of one adapter": lambda: engines.round(lone, prompts, limits, np.ones((rows, 1), np.float32)),
        "base": lambda: engines.round(plain, prompts, limits, none),
        f"{count} merged models in turn": lambda: engines.parts(plain, turns, prompts, limits, none),
    }
    sides = {name: side for name, side in sides.items() if name == OURS or wanted(options, name)}
    with harness.Comparison(__file__, options) as c:
        has_peft = subprocess.run([options.torch_python, "-c", "import torch, peft"], capture_output=True)
        if wanted(options, "PEFT") and not has_peft.returncode:
            job = {"model": str(folder.resolve()), "prompts": prompts, "new": options.new, "adapters": count}
            c.start("PEFT", c.theirs("peft", **job))
            sides["PEFT"] = functools.partial(c.round, "PEFT")
        return in_turns(sides, options.rounds)


def newcomer(options: argparse.Namespace, model: Any, count: int) -> dict[str, Any]:
    """Seconds from a request to its first token, for a person never seen."""
    import jax
    import jax.numpy as jnp

    from pjrlhf.models.adapters import Backbone

    rng, engines = np.random.default_rng(0), Engines(options.clock)
    bank, vocabulary = bank_of(model, count), model.backbone.model.config.vocab_size
    context = options.prompt + options.new
    soups = engine_of(model, bank, 1, context)
    scale = model.backbone.adapter.scale

    @jax.jit
    def merge(base: Any, bank: Any, mix: Any) -> Any:
        layers = dict(base["layers"])
        for block, names in bank["layers"].items():
            own = {}
            for name, factors in names.items():
                delta = scale * jnp.einsum("k,kldr,klrf->ldf", mix, factors["a"], factors["b"])
                own[name] = {**base["layers"][block][name], "kernel": base["layers"][block][name]["kernel"] + delta}
            layers[block] = {**base["layers"][block], **own}
        return {**base, "layers": layers}

    def merged(prompts: list, limits: list[int], rows: Any) -> Round:
        started = engines.clock()
        base = merge(model.backbone.base, bank, rows[0])
        backbone = Backbone(model.backbone.model, model.backbone.adapter, base)
        engine = engine_of(dataclasses.replace(model, backbone=backbone), None, 1, context)
        return engines.round(engine, prompts, limits, [None], start=started)

    def once(kind: Callable[..., Round], mix: Any) -> Callable[[], Round]:
        def one() -> Round:
            prompt = [harness.BOS, *harness.words(rng, options.prompt - 1, vocabulary)]
            return kind([prompt], [1], [rng.dirichlet(np.ones(count)).astype(np.float32) if mix is None else mix])

        return one

    sides = {
        OURS: once(functools.partial(engines.round, soups), None),
        "a soup used before": once(functools.partial(engines.round, soups), np.full(count, 1 / count, np.float32)),
        "merge, then answer": once(merged, None),
    }
    found = in_turns(sides, 2 * options.rounds)
    rows = {name: {"first_token_seconds": harness.spread([r["first"] for r in one])} for name, one in found.items()}
    for name, row in rows.items():
        low, middle, high = (harness.rounded(row["first_token_seconds"][key]) for key in ("q1", "median", "q3"))
        print(f"{name:32}first token of a person after {middle} s ({low} to {high})", flush=True)
    return rows


def arguments(description: str, rounds: int) -> argparse.ArgumentParser:
    """The flags of the scripts about serving."""
    parser = harness.arguments(description, rounds=rounds, models=("tiny", "26m"))
    parser.add_argument("--path", type=pathlib.Path, help="a model in Hugging Face layout in place of --model")
    return parser


def main() -> None:
    parser = arguments(__doc__ or "", 5)
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 8, 32], help="1 also brings the person never seen")
    parser.add_argument("--adapters", type=int, nargs="+", default=[2, 6, 16], help="K; the first for that person")
    parser.add_argument("--prompt", type=int, default=32, help="tokens")
    parser.add_argument("--new", type=int, default=32, help="tokens of an answer")
    parser.add_argument("--name", default="serving", help="of the file of results")
    options = harness.parse(parser)
    if options.quick:
        options.adapters, options.rows = [2], [1, 4]
    tables: dict[str, Any] = {}
    about: dict[str, Any] = {}
    for size in [options.path.name] if options.path else options.model:
        model, folder, about[size] = open_model(options, size, options.prompt + options.new + 64)
        about[size] |= {"prompt": options.prompt, "new": options.new}
        name = f"{size}, {about[size]['parameters'] / 1e6:.1f}M parameters"
        if 1 in options.rows:
            tables[f"{name}, a person never seen"] = newcomer(options, model, options.adapters[0])
        for count in options.adapters:
            for rows in options.rows:
                title = f"{name}, K = {count}, {rows} rows"
                tables[title] = table(title, compare_rows(options, model, folder, rows, count))
                harness.write(options, options.name, {"models": about}, tables)


if __name__ == "__main__":
    harness.serve({"peft": peft})
    main()
