"""Six policies in one program against six runs, one after the other:  python benchmarks/bank.py

Every run is a process of its own from its start to its last PPO step: libraries, model, compilation, `--steps` steps of
the stage `policy` on LoRA adapters, on random prompts. The one program trains all ingredients at once on as many
answers each. Wall time is that of all processes of a way; its peak memory that of the largest, as they run in turn.
"""

import time

import harness
import rl

COUNT = 6


def run_all(c, name, job, policies, processes, steps):
    """One way of training `COUNT` policies."""
    started, peaks, steady, later, compiling = time.perf_counter(), [], [], [], 0.0
    for i in range(processes):
        side = c.ours("ours", **job, policies=policies)
        ready = c.start(f"{name} {i}", side)
        reports = [c.round(f"{name} {i}") for _ in range(steps)]
        c.stop(f"{name} {i}")
        peaks += [r["peak_bytes"] for r in (ready, *reports)]
        steady += [r["peak_bytes"] for r in reports[1:]]
        later += [r["seconds"] for r in reports[1:]]
        compiling += reports[0]["seconds"] - min(r["seconds"] for r in reports[1:])
    wall = time.perf_counter() - started
    found = {"wall": wall, "peak_bytes": max(peaks), "steady_peak_bytes": max(steady), "compiling": compiling}
    return found | {"step": sum(later) / len(later) * processes}


def main():
    parser = harness.arguments(__doc__, rounds=3, models=("26m",))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rollouts", type=int, default=8, help="per policy and step")
    parser.add_argument("--new", type=int, default=64, help="tokens of an answer")
    options = harness.parse(parser)
    if options.quick:
        options.rounds = 1
    tables, about = {}, {}
    for size in options.model:
        length, new, steps = (12, 8, 3) if options.quick else (64, options.new, options.steps)
        found = {"ours, one program": [], "ours, six runs": []}
        with harness.Comparison(__file__, options) as c:
            shape = harness.save_model(c.folder / "model", size, length + new + 32)
            job = {
                "model": str(c.folder / "model"),
                "records": rl.records(c.folder, 2 * options.rollouts + 1, length, shape["vocab_size"]),
                "prompt": length,
                "new": new,
                "prompts": options.rollouts,
                "samples": 1,
                "batches": 1,
                "rank": 8,
                "estimator": "gae",
                "optimizer": {"learning_rate": 1e-4, "max_grad_norm": 1.0, "weight_decay": 0.0},
                "set": options.set,
            }
            for _ in range(options.rounds):
                found["ours, one program"].append(run_all(c, "one", job, COUNT, 1, steps))
                found["ours, six runs"].append(run_all(c, "six", job, 1, COUNT, steps))
        one = found["ours, one program"]
        tables[size] = {
            name: {
                "seconds": harness.spread([r["wall"] for r in runs]),
                "ratio": harness.spread([r["wall"] / o["wall"] for r, o in zip(runs, one, strict=True)]),
                **{key: max(r[key] for r in runs) for key in ("peak_bytes", "steady_peak_bytes")},
                "compiling": harness.spread([r["compiling"] for r in runs])["median"],
                "step": harness.spread([r["step"] for r in runs])["median"],
            }
            for name, runs in found.items()
        }
        about[size] = {"parameters": shape["parameters"], "steps": steps, "rollouts": options.rollouts, "new": new}
        title = f"{shape['parameters'] / 1e6:.1f}M parameters, {COUNT} policies, {steps} steps: the whole run"
        harness.table(title, tables[size], {"compiling": "compiling s", "step": "s/step of all"})
    path = harness.write(options, "bank", {"models": about}, tables)
    harness.bars(path, tables, "one program")


if __name__ == "__main__":
    harness.serve({"ours": rl.ours})
    main()
