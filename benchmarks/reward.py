"""A step of a reward model against TRL:  python benchmarks/reward.py

A round is one Bradley-Terry step (loss, gradient, AdamW) of all parameters and a scalar head, on the same pairs, from
the same weights, in float32: ours is the step of the stage `reward` with one objective, theirs `RewardTrainer` as
`trainer.train()` runs it, without gradient checkpointing.
"""

import itertools

import harness

LIMITS = (192, 448)  # tokens of prompt and answer at most


def ours(job, turn):
    import jax
    import numpy as np

    from pjrlhf.stages.reward import Reward

    harness.load_ours()
    turn.begin()
    harness.watch_jax(turn, job)
    prompt, answer = job["limits"]
    changes = {
        **harness.ONE_OBJECTIVE,
        "reward.data": {"kind": "jsonl", "path": job["records"]},
        "reward.heldout_share": 1e-6,  # one prompt
        "reward.batch_size": job["pairs"],
        "reward.steps": 10**6,
        "reward.optimizer": job["optimizer"] | {"schedule": "constant"},
        "adapter.rank": 0,
        "data.max_prompt": prompt,
        "data.max_completion": answer,
        "data.prompt_buckets": job["buckets"][0],
        "data.completion_buckets": job["buckets"][1],
    }
    method = Reward(harness.our_run(job, "soups", "hf", changes))
    state = jax.block_until_ready(method.init())
    places = {}
    for record in harness.read_records(job["records"]):
        question, chosen, _ = harness.ids_of(record)
        places[tuple(question + chosen)] = record["row"]
    start, rows = method.batches.get_state(), []
    for _ in range(job["batches"]):
        batch = next(method.batches)
        chosen = zip(batch["tokens"][:, 0, 0], batch["valid"][:, 0, 0], strict=True)
        rows.append([places[tuple(tokens[valid].tolist())] for tokens, valid in chosen])
    head = np.asarray(state.trainable["heads"]["kernel"][0]).tolist()
    turn({"rows": rows, "head": head, "peak": harness.gemm_peak("jax"), "versions": harness.our_versions()})
    for i in itertools.count():
        if i % job["batches"] == 0:
            method.batches.set_state(start)
        state, metrics = method.step(state, next(method.batches))
        jax.block_until_ready(state)
        total, count = metrics["loss"]
        turn({"loss": float(total.sum() / count.sum())})


def trl(job, turn):
    import datasets
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    turn.begin()
    harness.watch_torch(turn)
    keep = ("prompt", "chosen", "rejected")
    data = datasets.Dataset.from_list([{k: r[k] for k in keep} for r in harness.read_records(job["ordered"])])
    model = AutoModelForSequenceClassification.from_pretrained(job["model"], num_labels=1, dtype="float32")
    with torch.no_grad():
        model.score.weight.copy_(torch.tensor([job["head"]]))
    settings = harness.trainer_settings(job)
    arguments = RewardConfig(output_dir=f"{job['folder']}/trl", max_length=None, **settings)
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    trainer = RewardTrainer(model, args=arguments, train_dataset=data, processing_class=tokenizer)
    report = {"peak": harness.gemm_peak("torch"), "versions": harness.their_versions("trl", "accelerate")}
    harness.train_by_turns(trainer, turn, report)


def compare(options, size):
    quick = options.quick
    limits, batches = ((24, 40), 2) if quick else (LIMITS, options.batches)
    pairs = 4 if quick else options.pairs
    with harness.Comparison(__file__, options) as c:
        shape = harness.save_model(c.folder / "model", size, sum(limits) + 32)
        records = harness.pair_records(pairs * batches + 2, shape["vocab_size"], limits)
        job = {
            "model": str(c.folder / "model"),
            "records": harness.write_records(c.folder / "pairs.jsonl", records),
            "ordered": str(c.folder / "ordered.jsonl"),
            "limits": limits,
            "buckets": [(), ()] if quick else [(64,), (224,)],
            "pairs": pairs,
            "batches": batches,
            "optimizer": {"learning_rate": 1e-5, "max_grad_norm": 1.0, "weight_decay": 0.0},
            "set": options.set,
        }
        ready = c.start("ours", c.ours("ours", **job))
        used = [records[i] for batch in ready["rows"] for i in batch]
        harness.write_records(c.folder / "ordered.jsonl", used)
        c.start("TRL", c.theirs("trl", **job, head=ready["head"]))
        c.run(-(-options.rounds // batches) * batches, batches)
        found = c.found("ours")
        peak = max(side.ready["peak"] for side in c.sides.values())
    rows = [len(p) + len(a) for r in used for p, *answers in [harness.ids_of(r)] for a in answers]
    flops = 3 * sum(harness.matmul_flops(shape, row, 0) for row in rows) / batches
    tokens = sum(rows) / batches
    harness.utilisation(found, flops, tokens, peak)
    about = {"parameters": shape["parameters"], "pairs": pairs, "tokens_per_round": tokens, "limits": limits}
    return found, {**about, "flops_per_round": flops, "peak_flops": peak}


def main():
    parser = harness.arguments(__doc__)
    parser.add_argument("--pairs", type=int, default=4, help="per step")
    parser.add_argument("--batches", type=int, default=4, help="that are gone through again and again")
    options = harness.parse(parser)
    tables, about = {}, {}
    for size in options.model:
        tables[size], about[size] = compare(options, size)
        title = f"{about[size]['parameters'] / 1e6:.1f}M parameters, {about[size]['pairs']} pairs a round"
        columns = {"tokens_per_second": "tokens/s", "mfu_percent": "MFU %", "loss": "last loss"}
        harness.table(title, tables[size], columns)
    harness.bars(harness.write(options, "reward", {"models": about}, tables), tables, "ours")


if __name__ == "__main__":
    harness.serve({"ours": ours, "trl": trl})
    main()
