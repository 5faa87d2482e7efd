"""A soup per row, against one adapter, merged models, PEFT and static batches:  python benchmarks/serving.py

Three tables for every size; the sides of a table take turns in one process, with their programs compiled before.

Rows that start together, prompts and answers of equal length, greedy, as many slots as rows:

* a soup per row: every row has weights of its own for all K adapters;
* one adapter: all rows ask for the same adapter of this bank;
* base: an engine without a bank, which is also what one merged model costs;
* K merged models in turn: row i asks for model i mod K, and each model answers its rows before the next begins;
* PEFT: `generate(adapter_names=...)` of transformers, one of K adapters per row, which is as near to a soup per row as
  it comes (left out where torch or peft is missing).

Requests of mixed length, all waiting from the start, in fewer slots than there are requests: a soup per row, one
adapter, the base, and static batches of the same soups by `LanguageModel.generate`, in the order of arrival, each up to
the longest limit in it (rounded up to a power of two, for few programs). Tokens are those of the answers; what a static
batch draws beyond the limit of a row does not count.

A person never seen: the time from a request to its first token, alone in a running engine, for a soup never used before
and for one used before (with another prompt), and for merging that soup in memory and answering with the merged model.

Speeds are in tokens per second, and per second of processor time, which other processes on the machine disturb less. A
ratio is that of two neighbouring rounds, ours over theirs.
"""

import argparse
import contextlib
import functools
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import harness
import numpy as np

SIGMA = 0.7  # of the limits of answers, log-normal
OURS = "a soup per row"


def of_engine(engine: Any, prompts: list, limits: list[int], rows: Any) -> dict[str, Any]:
    """One round of an engine."""
    from pjrlhf.serving.tickets import Request

    started, spent = time.monotonic(), time.process_time()
    tickets, drawn = [], [0]

    def listener(ticket: Any, piece: Any) -> None:
        drawn[0] += len(piece.tokens)

    for tokens, limit, row in zip(prompts, limits, rows, strict=True):
        tickets.append(engine.submit(Request(tokens=tokens, max_new_tokens=limit, mix=row), listener))
    while engine.busy:
        engine.step()
    return {
        "seconds": time.monotonic() - started,
        "processor": time.process_time() - spent,
        "tokens": drawn[0],
        "first": statistics.median(ticket.first - started for ticket in tickets),
    }


def in_turn(engine: Any, prompts: list, limits: list[int], models: int) -> dict[str, Any]:
    """One round of merged models, each with its part of the rows."""
    parts = [range(k, len(prompts), models) for k in range(min(models, len(prompts)))]
    rounds = [of_engine(engine, [prompts[i] for i in p], [limits[i] for i in p], [None] * len(p)) for p in parts]
    before = np.cumsum([0.0, *(one["seconds"] for one in rounds)])
    firsts = [start + one["first"] for start, one, p in zip(before, rounds, parts, strict=False) for _ in p]
    total = {key: sum(one[key] for one in rounds) for key in ("seconds", "processor", "tokens")}
    return {**total, "first": statistics.median(firsts)}


def of_batches(model: Any, bank: Any, slots: int, prompts: list, limits: list[int], mix: Any) -> dict[str, Any]:
    """One round of static batches, whose answers come whole."""
    started, spent, ends = time.monotonic(), time.process_time(), []
    for i in range(0, len(limits), slots):
        part = slice(i, i + slots)
        texts = [harness.text(ids[1:]) for ids in prompts[part]]
        longest = 1 << (max(limits[part]) - 1).bit_length()
        model.generate(texts, bank, mix[part], max_new_tokens=longest)
        ends += [time.monotonic() - started] * len(texts)
    return {
        "seconds": time.monotonic() - started,
        "processor": time.process_time() - spent,
        "tokens": sum(limits),
        "first": statistics.median(ends),
    }


def with_peft(folder: pathlib.Path, prompts: list, new: int, adapters: int) -> Callable[[], dict[str, Any]]:
    """A round of transformers with adapters of PEFT."""
    import os

    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, GenerationConfig

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=8, lora_alpha=16, target_modules=layers, init_lora_weights=False)
    names = [f"k{i}" for i in range(adapters)]
    model: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(folder, dtype="float32"), config, names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    model.eval()
    settings = GenerationConfig(do_sample=False, max_new_tokens=new, min_new_tokens=new, pad_token_id=harness.PAD)
    tokens = torch.tensor(prompts)
    rows = [names[i % adapters] for i in range(len(prompts))]

    def one() -> dict[str, Any]:
        started, spent, first = time.monotonic(), time.process_time(), []

        def watch(ids: Any, scores: Any, **_: Any) -> Any:  # called after every token
            first.append(time.monotonic() - started)
            return torch.zeros(len(ids), dtype=torch.bool)

        with torch.inference_mode():
            mask = torch.ones_like(tokens)
            found = model.generate(
                input_ids=tokens,
                attention_mask=mask,
                generation_config=settings,
                adapter_names=rows,
                stopping_criteria=[watch],
            )
        return {
            "seconds": time.monotonic() - started,
            "processor": time.process_time() - spent,
            "tokens": found[:, tokens.shape[1] :].numel(),
            "first": first[0],
        }

    return one


def rounds_of(sides: dict[str, Callable[[], dict[str, Any]]], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """What the sides report, in turns; the first turn compiles."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, side in sides.items():
            result = side()
            if turn:
                found[name].append(result)
    return found


def table(title: str, found: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Prints and returns what is said about a comparison."""
    print(f"\n{title}", flush=True)
    rows: dict[str, dict[str, Any]] = {}
    for name, reports in found.items():
        pairs = list(zip(found[OURS], reports, strict=True))
        rows[name] = {
            "tokens_per_second": harness.spread([r["tokens"] / r["seconds"] for r in reports]),
            "tokens_per_processor_second": harness.spread([r["tokens"] / r["processor"] for r in reports]),
            "ratio": harness.spread([a["tokens"] / a["seconds"] * b["seconds"] / b["tokens"] for a, b in pairs]),
            "ratio_processor": harness.spread(
                [a["tokens"] / a["processor"] * b["processor"] / b["tokens"] for a, b in pairs]
            ),
            "first_token_seconds": harness.spread([r["first"] for r in reports]),
        }
        middle = {key: harness.rounded(spread["median"]) for key, spread in rows[name].items()}
        low, high = (harness.rounded(rows[name]["ratio_processor"][key]) for key in ("q1", "q3"))
        print(
            f"{name:24}{middle['tokens_per_second']:>7} tokens/s,{middle['tokens_per_processor_second']:>7} per CPU "
            f"second; ours is {middle['ratio']} times as fast, {middle['ratio_processor']} ({low} to {high}) by CPU "
            f"time; first token after {middle['first_token_seconds']} s",
            flush=True,
        )
    return rows


def bank_of(model: Any, count: int) -> Any:
    """Adapters as after training: the second factor starts at zero."""
    import jax

    from pjrlhf.models.adapters import init_bank

    bank = init_bank(model.backbone.base, model.backbone.adapter, count, jax.random.key(0))
    return jax.tree.map(lambda x: x + 0.01 * jax.random.normal(jax.random.key(x.size), x.shape), bank)


def compare_rows(options: argparse.Namespace, model: Any, folder: pathlib.Path, rows: int, count: int) -> dict:
    """Rows that start together."""
    from pjrlhf.serving.engine import Engine
    from pjrlhf.serving.settings import EngineSettings

    rng = np.random.default_rng(0)
    context = options.prompt + options.new
    sizes = EngineSettings(slots=rows, chunk=min(64, options.prompt), context=context, prefix_mb=0.0)
    vocabulary = model.backbone.model.config.vocab_size
    prompts = [[harness.BOS, *harness.words(rng, options.prompt - 1, vocabulary)] for _ in range(rows)]
    limits = [options.new] * rows
    soups = Engine(model.backbone, model.tokenizer, bank_of(model, count), settings=sizes)
    plain = Engine(model.backbone, model.tokenizer, None, settings=sizes)
    mix = rng.dirichlet(np.ones(count), rows).astype(np.float32)
    sides = {
        OURS: lambda: of_engine(soups, prompts, limits, mix),
        "one adapter": lambda: of_engine(soups, prompts, limits, np.eye(count, dtype=np.float32)[np.zeros(rows, int)]),
        "base": lambda: of_engine(plain, prompts, limits, [None] * rows),
        "K merged models in turn": lambda: in_turn(plain, prompts, limits, count),
    }
    with contextlib.suppress(ImportError):
        sides["PEFT"] = with_peft(folder, prompts, options.new, count)
    return rounds_of(sides, options.rounds)


def compare_mixed(options: argparse.Namespace, model: Any, count: int) -> dict:
    """Requests of mixed length."""
    from pjrlhf.serving.engine import Engine
    from pjrlhf.serving.settings import EngineSettings

    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(options.prompt / 2), 0.6, options.requests), 2, options.prompt).astype(int)
    drawn = rng.lognormal(np.log(options.median), SIGMA, options.requests)
    limits = np.clip(drawn, 4, options.longest).astype(int).tolist()
    vocabulary = model.backbone.model.config.vocab_size
    prompts = [[harness.BOS, *harness.words(rng, n, vocabulary)] for n in lengths]
    mix = rng.dirichlet(np.ones(count), options.requests).astype(np.float32)
    one = np.eye(count, dtype=np.float32)[np.zeros(options.requests, int)]
    sizes = EngineSettings(
        slots=options.slots,
        chunk=min(64, options.prompt),
        context=options.prompt + options.longest + 1,
        queue=options.requests,
        prefix_mb=0.0,
    )
    bank = bank_of(model, count)
    soups = Engine(model.backbone, model.tokenizer, bank, settings=sizes)
    plain = Engine(model.backbone, model.tokenizer, None, settings=sizes)
    sides = {
        OURS: lambda: of_engine(soups, prompts, limits, mix),
        "one adapter": lambda: of_engine(soups, prompts, limits, one),
        "base": lambda: of_engine(plain, prompts, limits, [None] * len(limits)),
        "static batches": lambda: of_batches(model, bank, options.slots, prompts, limits, mix),
    }
    return rounds_of(sides, options.rounds)


def newcomer(options: argparse.Namespace, model: Any, count: int) -> dict[str, Any]:
    """Seconds from a request to its first token, for a person never seen."""
    import jax
    import jax.numpy as jnp

    from pjrlhf.models.adapters import Backbone
    from pjrlhf.serving.engine import Engine
    from pjrlhf.serving.settings import EngineSettings

    rng = np.random.default_rng(0)
    sizes = EngineSettings(slots=1, steps=1, chunk=min(64, options.prompt), context=options.prompt + options.new)
    bank, vocabulary = bank_of(model, count), model.backbone.model.config.vocab_size
    soups = Engine(model.backbone, model.tokenizer, bank, settings=sizes)
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

    def merged(prompts: list, limits: list[int], rows: Any) -> dict[str, Any]:
        started, spent = time.monotonic(), time.process_time()
        base = merge(model.backbone.base, bank, rows[0])
        backbone = Backbone(model.backbone.model, model.backbone.adapter, base)
        engine = Engine(backbone, model.tokenizer, None, settings=sizes)
        found = of_engine(engine, prompts, limits, [None])
        ready = time.monotonic() - started
        return {**found, "first": ready, "seconds": ready, "processor": time.process_time() - spent}

    def once(kind: Callable[..., dict[str, Any]], mix: Any) -> Callable[[], dict[str, Any]]:
        def one() -> dict[str, Any]:
            prompt = [harness.BOS, *harness.words(rng, options.prompt - 1, vocabulary)]
            return kind([prompt], [1], [rng.dirichlet(np.ones(count)).astype(np.float32) if mix is None else mix])

        return one

    used = np.full(count, 1 / count, np.float32)
    sides = {
        OURS: once(functools.partial(of_engine, soups), None),
        "a soup used before": once(functools.partial(of_engine, soups), used),
        "merge, then answer": once(merged, None),
    }
    found = rounds_of(sides, 2 * options.rounds)
    rows = {name: {"first_token_seconds": harness.spread([r["first"] for r in one])} for name, one in found.items()}
    for name, row in rows.items():
        print(f"{name:24}first token of a person after {harness.rounded(row['first_token_seconds']['median'])} s")
    return rows


def main():
    parser = harness.arguments(__doc__, rounds=5, models=("tiny", "26m"))
    parser.add_argument("--path", type=pathlib.Path, help="a model in Hugging Face layout in place of --model")
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 8, 32], help="1 also brings the person never seen")
    parser.add_argument(
        "--adapters", type=int, nargs="+", default=[2, 6, 16], help="K; the first also in the other tables"
    )
    parser.add_argument("--prompt", type=int, default=32, help="tokens")
    parser.add_argument("--new", type=int, default=32, help="tokens of an answer")
    parser.add_argument("--requests", type=int, default=96, help="of mixed length; 0 leaves this table out")
    parser.add_argument("--slots", type=int, default=16, help="for requests of mixed length")
    parser.add_argument("--median", type=int, default=60, help="tokens of an answer to a request of mixed length")
    parser.add_argument("--longest", type=int, default=256, help="the same at most")
    parser.add_argument("--name", default="serving", help="of the file of results")
    options = harness.parse(parser)
    if options.quick:
        options.requests, options.longest, options.adapters, options.rows, options.slots = 12, 32, [2], [4], 4

    from pjrlhf.language_model import load_model
    from pjrlhf.models.adapters import AdapterConfig

    tables: dict[str, Any] = {}
    about: dict[str, Any] = {}
    for size in [options.path.name] if options.path else options.model:
        folder = options.path
        if folder is None:
            folder = pathlib.Path(tempfile.mkdtemp(dir=options.folder)) / "model"
            harness.save_model(folder, size, options.prompt + max(options.new, options.longest) + 64)
        model = load_model(folder, adapter=AdapterConfig(rank=8, alpha=16.0))
        import jax

        parameters = sum(x.size for x in jax.tree.leaves(model.backbone.base))
        about[size] = {"parameters": parameters, "prompt": options.prompt, "new": options.new}
        name = f"{size}, {parameters / 1e6:.1f}M parameters"
        for count in options.adapters:
            for rows in options.rows:
                title = f"{name}, K = {count}, {rows} rows"
                tables[title] = table(title, compare_rows(options, model, folder, rows, count))
        if options.requests:
            title = (
                f"{name}, K = {options.adapters[0]}, {options.requests} requests of mixed length, {options.slots} slots"
            )
            tables[title] = table(title, compare_mixed(options, model, options.adapters[0]))
        if 1 in options.rows:
            tables[f"{name}, a person never seen"] = newcomer(options, model, options.adapters[0])
        harness.write(options, options.name, {"models": about}, tables)


if __name__ == "__main__":
    main()
