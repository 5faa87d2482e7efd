"""Requests with a soup each, against one adapter, the base, and static batches:  python benchmarks/serving.py

A round answers `--requests` greedy requests of mixed length, all of them waiting from the start. The sides take turns
in one process, each with its programs compiled before:

* base: an engine without a bank;
* one adapter: all requests ask for the same adapter of a bank of K;
* a soup per row: every request has weights of its own for all K;
* static batches: the same soups by `LanguageModel.generate`, in batches of as many rows as the engine has slots, in the
  order of arrival, each up to the longest limit in it (rounded up to a power of two, for few programs).

Tokens are those of the answers; what a static batch draws beyond the limit of a row does not count. The time to the
first token is the median over requests, from the start of the round.
"""

import argparse
import pathlib
import tempfile
import time

import harness
import numpy as np

LIMITS = 60, 0.7  # median and sigma of the limits of answers, log-normal


def requests_of(options: argparse.Namespace, shape: dict, adapters: int) -> dict:
    """Prompts, limits and rows of mix."""
    rng = np.random.default_rng(0)
    count = options.requests
    lengths = np.clip(rng.lognormal(np.log(options.prompt / 2), 0.6, count), 2, options.prompt).astype(int)
    limits = np.clip(rng.lognormal(np.log(LIMITS[0]), LIMITS[1], count), 4, options.new).astype(int)
    prompts = [[harness.BOS, *harness.words(rng, n, shape["vocab_size"])] for n in lengths]
    return {"prompts": prompts, "limits": limits, "mix": rng.dirichlet(np.ones(adapters), count).astype(np.float32)}


def of_engine(engine, work: dict, mix: np.ndarray | None) -> dict:
    """One round of an engine."""
    from pjrlhf.serving.tickets import Request

    rows = [None] * len(work["limits"]) if mix is None else mix
    jobs = zip(work["prompts"], work["limits"].tolist(), rows, strict=True)
    started = time.monotonic()
    tickets, drawn = [], [0]

    def listener(ticket, piece):
        drawn[0] += len(piece.tokens)

    for tokens, limit, row in jobs:
        tickets.append(engine.submit(Request(tokens=tokens, max_new_tokens=limit, mix=row), listener))
    while engine.busy:
        engine.step()
    seconds = time.monotonic() - started
    first = float(np.median([ticket.first - started for ticket in tickets]))
    return {"seconds": seconds, "tokens": drawn[0], "first": first}


def of_batches(model, bank, slots: int, work: dict, tokens: int) -> dict:
    """One round of static batches, whose answers come whole."""
    started, ends = time.monotonic(), []
    for i in range(0, len(work["limits"]), slots):
        part = slice(i, i + slots)
        prompts = [harness.text(ids[1:]) for ids in work["prompts"][part]]
        longest = 1 << (int(work["limits"][part].max()) - 1).bit_length()
        model.generate(prompts, bank, work["mix"][part], max_new_tokens=longest)
        ends += [time.monotonic() - started] * len(prompts)
    return {"seconds": time.monotonic() - started, "tokens": tokens, "first": float(np.median(ends))}


def measure(options: argparse.Namespace, model, shape: dict, count: int) -> dict:
    """The rounds of every side, for a bank of `count` adapters."""
    import jax

    from pjrlhf.models.adapters import init_bank
    from pjrlhf.serving.engine import Engine
    from pjrlhf.serving.settings import EngineSettings

    sizes = EngineSettings(slots=options.slots, chunk=min(64, options.prompt), queue=options.requests)
    bank = init_bank(model.backbone.base, model.backbone.adapter, count, jax.random.key(0))
    bank = jax.tree.map(lambda x: x + 0.01 * jax.random.normal(jax.random.key(x.size), x.shape), bank)
    work = requests_of(options, shape, count)
    plain = Engine(model.backbone, model.tokenizer, None, settings=sizes)
    soups = Engine(model.backbone, model.tokenizer, bank, settings=sizes)
    one = np.eye(count, dtype=np.float32)[np.zeros(options.requests, int)]
    tokens = of_engine(soups, work, work["mix"])["tokens"]
    sides = {
        "a soup per row": lambda: of_engine(soups, work, work["mix"]),
        "one adapter": lambda: of_engine(soups, work, one),
        "base": lambda: of_engine(plain, work, None),
        "static batches": lambda: of_batches(model, bank, options.slots, work, tokens),
    }
    found = {name: [] for name in sides}
    for turn in range(options.rounds + 1):
        for name, side in sides.items():
            result = side()
            if turn:  # the first compiles
                found[name].append(result)
    return found


def main():
    parser = harness.arguments(__doc__, rounds=5, models=("26m",))
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--adapters", type=int, nargs="+", default=[2, 6, 16], help="K")
    parser.add_argument("--prompt", type=int, default=64, help="tokens at most")
    parser.add_argument("--new", type=int, default=256, help="tokens of an answer at most")
    options = harness.parse(parser)
    if options.quick:
        options.requests, options.new, options.adapters = 12, 32, [2]

    from pjrlhf.language_model import load_model
    from pjrlhf.models.adapters import AdapterConfig

    tables, about = {}, {}
    for size in options.model:
        folder = pathlib.Path(tempfile.mkdtemp(dir=options.folder)) / "model"
        shape = harness.save_model(folder, size, options.prompt + options.new + 16)
        model = load_model(folder, adapter=AdapterConfig(rank=8, alpha=16.0))
        about[size] = {"parameters": shape["parameters"], "slots": options.slots, "requests": options.requests}
        for count in options.adapters:
            found = measure(options, model, shape, count)
            speeds = {name: [r["tokens"] / r["seconds"] for r in rounds] for name, rounds in found.items()}
            ours = speeds["a soup per row"]
            print(f"\n{shape['parameters'] / 1e6:.1f}M parameters, K = {count}, {options.slots} slots")
            rows = tables[f"{size}, K = {count}"] = {}
            for name, speed in speeds.items():
                rows[name] = {
                    "tokens_per_second": harness.spread(speed),
                    "ratio": harness.spread([x / y for x, y in zip(ours, speed, strict=True)]),
                    "first_token_seconds": harness.spread([r["first"] for r in found[name]]),
                }
                middle = {key: harness.rounded(spread["median"]) for key, spread in rows[name].items()}
                print(
                    f"{name:16}{middle['tokens_per_second']:>7} tokens/s; a soup per row is {middle['ratio']} times as "
                    f"fast; first token after {middle['first_token_seconds']} s"
                )
    harness.write(options, "serving", {"models": about}, tables)


if __name__ == "__main__":
    main()
