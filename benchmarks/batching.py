"""Continuous batching against static batches, on requests of mixed length:  python benchmarks/batching.py

All requests wait from the start; there are several for each slot, and each has a soup of its own. Lengths of answers
are exponential, with --mean tokens and at most twelve times as many: the workload with which Anyscale compared servers
("How continuous batching enables 23x throughput in LLM inference", 2023: 1000 requests, mean 128, at most 1536, EOS
ignored). Prompts have 19 tokens on average, as in Alpaca (Kwon et al. 2023, arXiv 2309.06180, fig. 11).

* continuous: the engine as it is;
* static: the same engine with the same programs; the next batch starts when the last answer of the one before ends;
* generate: static batches of `LanguageModel.generate`, each up to its longest limit, rounded up to 16 tokens.

A static batch lasts as long as its longest answer. The ideal ratio counts steps alone: the sum of the longest answers
of the static batches, over the length of a list schedule (an answer starts when the first one before it ends). With B
slots and endless requests it tends to 1 + 1/2 + ... + 1/B: 3.4 for 16 slots, 4.1 for 32. The schedule ends with empty
slots, when nobody waits any more, so the ratio is less for few requests per slot.

A further round waits for every program before it goes on, and says where its time goes: prompts, copies into slots,
steps of slots with an answer and of slots without, and the host.
"""

import contextlib
import heapq
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import harness
import numpy as np
import serving


def schedule(limits: Sequence[int], slots: int) -> dict[str, float]:
    """Steps of both ways, and their ratio."""
    batches = [limits[i : i + slots] for i in range(0, len(limits), slots)]
    free = [0] * slots
    for limit in limits:
        heapq.heapreplace(free, free[0] + limit)
    static, continuous = sum(map(max, batches)), max(free)
    return {
        "static_steps": static,
        "continuous_steps": continuous,
        "ideal_ratio": static / continuous,
        "longest_over_mean": statistics.mean(map(max, batches)) / statistics.mean(limits),
    }


@contextlib.contextmanager
def timed(clock: Callable[[], float]) -> Iterator[dict[str, float]]:
    """Seconds of every program of the engine, and "steps" of its slots."""
    import jax

    from pjrlhf.serving import programs

    names = ("prefill", "insert", "decode")
    found: dict[str, float] = dict.fromkeys((*names, "steps"), 0.0)
    real = {name: getattr(programs, name) for name in names}

    def watch(name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            started = clock()
            result = jax.block_until_ready(real[name](*arguments))
            found[name] += clock() - started
            if name == "decode":
                found["steps"] += int(np.asarray(result[1].emitted).any(1).sum())
            return result

        return call

    for name in names:
        setattr(programs, name, watch(name))
    try:
        yield found
    finally:
        for name in names:
            setattr(programs, name, real[name])


def said(values: Mapping[str, float]) -> str:
    return ", ".join(f"{key} {harness.rounded(value)}" for key, value in values.items())


def account(clock: Callable[[], float], slots: int, run: Callable[[], serving.Round]) -> dict[str, float]:
    """Seconds of a round by what they are spent on."""
    with timed(clock) as found:
        round = run()
    busy = round["tokens"] / (found["steps"] * slots)
    parts = {
        "prompts": found["prefill"],
        "copies": found["insert"],
        "steps of answers": found["decode"] * busy,
        "steps of empty slots": found["decode"] * (1 - busy),
    }
    return {
        **parts,
        "host": round["seconds"] - sum(parts.values()),
        "seconds": round["seconds"],
        "steps": found["steps"],
    }


def compare(options: Any, model: Any) -> tuple[dict, dict]:
    """(rounds by side, what is known about the workload and where time goes)."""
    rng, engines = np.random.default_rng(0), serving.Engines(options.clock)
    vocabulary = model.backbone.model.config.vocab_size
    drawn = rng.exponential(options.mean, options.requests)
    limits = np.clip(np.ceil(drawn), 1, 12 * options.mean).astype(int).tolist()
    lengths = np.clip(np.ceil(rng.exponential(options.prompt, options.requests)), 2, 6 * options.prompt).astype(int)
    prompts = [[harness.BOS, *harness.words(rng, n - 1, vocabulary)] for n in lengths]
    mix = rng.dirichlet(np.ones(options.adapters), options.requests).astype(np.float32)
    bank, slots = serving.bank_of(model, options.adapters), options.slots
    engine = serving.engine_of(model, bank, slots, 6 * options.prompt + 12 * options.mean)
    engine.warm_up()
    batches = [range(i, min(i + slots, len(limits))) for i in range(0, len(limits), slots)]

    def generate() -> serving.Round:
        started, ends = engines.clock(), []
        for batch in batches:
            texts = [harness.text(prompts[i][1:]) for i in batch]
            longest = -(-max(limits[i] for i in batch) // 16) * 16
            model.generate(texts, bank, mix[list(batch)], max_new_tokens=longest)
            ends += [engines.clock() - started] * len(texts)
        return {"seconds": ends[-1], "tokens": sum(limits), "first": statistics.median(ends)}

    sides = {
        serving.OURS: lambda: engines.round(engine, prompts, limits, mix),
        "static": lambda: engines.parts(engine, batches, prompts, limits, mix),
    }
    about: dict[str, Any] = {"ideal": schedule(limits, slots)}
    about["where_seconds_go"] = {}
    for name, side in sides.items():
        about["where_seconds_go"][name] = parts = account(engines.clock, slots, side)
        print(f"{name}: " + said(parts), flush=True)
    if not options.path and serving.wanted(options, "generate"):  # its prompts are texts of our own words
        sides["generate"] = generate
        generate()
    found: dict[str, list[serving.Round]] = {name: [] for name in sides}
    for turn in range(options.rounds):  # all are warm
        for name in list(sides)[:: 1 if turn % 2 else -1]:
            found[name].append(sides[name]())
    return found, about


def main() -> None:
    parser = serving.arguments(__doc__ or "", 3)
    parser.add_argument("--adapters", type=int, default=6, help="K")
    parser.add_argument("--requests", type=int, default=384)
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--mean", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--prompt", type=int, default=19, help="tokens on average")
    parser.add_argument("--name", default="batching", help="of the file of results")
    options = harness.parse(parser)
    if options.quick:
        options.requests, options.slots, options.mean, options.adapters = 16, 4, 4, 2
    tables: dict[str, Any] = {}
    abouts: dict[str, Any] = {}
    for size in [options.path.name] if options.path else options.model:
        model, _, about = serving.open_model(options, size, 6 * options.prompt + 12 * options.mean + 32)
        found, more = compare(options, model)
        names = ("requests", "slots", "mean", "prompt", "adapters")
        abouts[size] = {**about, **{name: getattr(options, name) for name in names}, **more}
        title = (
            f"{size}, {about['parameters'] / 1e6:.1f}M parameters, {options.requests} requests, {options.slots} slots"
        )
        tables[title] = serving.table(title, found)
        print("ideal: " + ", ".join(f"{key} {harness.rounded(value)}" for key, value in more["ideal"].items()))
        for name, parts in more["where_seconds_go"].items():
            print(
                f"{name}: " + ", ".join(f"{key} {harness.rounded(value)}" for key, value in parts.items()), flush=True
            )
        harness.write(options, options.name, {"models": abouts}, tables)


if __name__ == "__main__":
    main()
