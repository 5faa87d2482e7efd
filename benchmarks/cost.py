"""How our own steps grow with length, number of policies and devices:  python benchmarks/cost.py

Length: a pooled DPO step of all parameters on pairs of rows of so many tokens, a quarter of them prompt. Policies: a
PPO step of K adapters, as many answers each. Devices: the DPO step on as many virtual CPU devices, which share the same
cores, so that anything above 1 is what splitting costs.
"""

import dpo
import harness
import rl

OPTIMIZER = {"learning_rate": 1e-5, "max_grad_norm": 1.0, "weight_decay": 0.0}


def pair_job(c, shape_size, length, options, devices=1):
    limits, pairs = (length // 4, length - length // 4), 8
    name = f"model-{length}"
    if not (c.folder / name).exists():
        c.shape = harness.save_model(c.folder / name, shape_size, length + 32)
        records = harness.pair_records(2 * pairs, c.shape["vocab_size"], limits, whole=True)
        harness.write_records(c.folder / f"{name}.jsonl", records)
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"} if devices > 1 else {}
    return {
        "model": str(c.folder / name),
        "records": str(c.folder / f"{name}.jsonl"),
        "limits": limits,
        "buckets": [(), ()],
        "pairs": pairs,
        "batches": 1,
        "lora": 0,
        "entry": {"kind": "uniform"},
        "optimizer": OPTIMIZER,
        "set": options.set,
        "environment": flags,
    }


def policy_job(c, size, count, options):
    length, new = (12, 8) if options.quick else (64, 64)
    folder = c.folder / "model-policy"
    if not folder.exists():
        c.shape = harness.save_model(folder, size, length + new + 32)
        c.records = rl.records(c.folder, 17, length, c.shape["vocab_size"])
    shared = {"model": str(folder), "records": c.records, "prompt": length, "new": new, "batches": 1, "rank": 8}
    rest = {"prompts": 8, "samples": 1, "estimator": "gae", "optimizer": OPTIMIZER, "set": options.set}
    return {**shared, **rest, "policies": count}


def main():
    parser = harness.arguments(__doc__, rounds=5, models=("26m",))
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 256, 512, 1024])
    parser.add_argument("--policies", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2, 4, 8])
    options = harness.parse(parser)
    if options.quick:
        options.lengths, options.policies, options.devices = [32, 64], [1, 2], [1, 2]
    size, tables = options.model[0], {}
    with harness.Comparison(__file__, options) as c:
        short = options.lengths[0]
        groups = {
            "length": {n: ("pairs", pair_job(c, size, n, options)) for n in options.lengths},
            "policies": {n: ("policies", policy_job(c, size, n, options)) for n in options.policies},
            "devices": {n: ("pairs", pair_job(c, size, short, options, n)) for n in options.devices},
        }
        for title, settings in groups.items():
            for n, (kind, job) in settings.items():
                c.start(f"{title} {n}", c.ours(kind, **job))
            c.run(options.rounds, 2)
            tables[title] = c.found(f"{title} {next(iter(settings))}")
            for n, name in zip(settings, list(c.sides), strict=True):
                tables[title][name]["n"] = n
                c.stop(name)
            harness.table(f"{c.shape['parameters'] / 1e6:.1f}M parameters, by {title}", tables[title])
        path = harness.write(options, "cost", {"parameters": c.shape["parameters"]}, tables)
    plot(path, tables)


def plot(path, tables):
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(tables), figsize=(9, 3), layout="constrained")
    for axis, (title, found) in zip(axes, tables.items(), strict=True):
        x = [row["n"] for row in found.values()]
        ratios = [row["ratio"] for row in found.values()]
        middle = [r["median"] for r in ratios]
        below = [r["median"] - r["q1"] for r in ratios]
        above = [r["q3"] - r["median"] for r in ratios]
        axis.errorbar(x, middle, [below, above], marker="o", capsize=3)
        axis.plot(x, [n / x[0] for n in x], color="0.7", linewidth=1, zorder=0)
        axis.set(xlabel=title, ylabel="time / that of the first", xscale="log", yscale="log")
        axis.set_xticks(x, [str(n) for n in x], minor=False)
        axis.minorticks_off()
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    harness.serve({"pairs": dpo.ours, "policies": rl.ours})
    main()
