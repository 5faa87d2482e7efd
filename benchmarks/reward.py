"""A step of a reward model against TRL:  python benchmarks/reward.py

A round is one Bradley-Terry step (loss, gradient, AdamW) of all parameters and a scalar head, on the same pairs, from
the same weights, in float32: ours is the step of the stage `reward` with one objective, theirs `RewardTrainer` as
`trainer.train()` runs it, without gradient checkpointing.
"""

import harness
import pairs


def ours(job, turn):
    import jax
    import numpy as np

    from pjrlhf.algorithms import reward

    harness.load_ours()
    turn.begin()
    harness.watch_jax(turn, job)
    changes = {
        **harness.ONE_OBJECTIVE,
        "reward.data": {"kind": "jsonl", "path": job["records"]},
        "reward.heldout_fraction": 1e-6,  # one prompt
        "reward.batch_size": job["pairs"],
        "reward.steps": 10**6,
        "reward.optimizer": job["optimizer"] | {"schedule": "constant"},
        "adapter.rank": 0,
        **pairs.length_settings(job),
    }
    method = reward.method_of(harness.our_run(job, "soups", "hf", changes))
    state = jax.block_until_ready(method.init())
    places = {}
    for record in harness.read_records(job["records"]):
        question, chosen, _ = harness.ids_of(record)
        places[tuple(question + chosen)] = record["row"]
    start, rows = method.batches.get_state(), []
    for _ in range(job["batches"]):
        packed, taken = next(method.batches).rows, []
        for segment in range(1, job["pairs"] + 1):
            # The prompt is in branch 0 and chosen in branch 1 of the row that has both.
            row = (packed.segment == segment) & (packed.branch <= 1)
            row &= (row & (packed.branch == 1)).any(1, keepdims=True)
            taken.append(places[tuple(packed.tokens[row].tolist())])
        rows.append(taken)
    head = np.asarray(state.trainable["heads"]["kernel"][0]).tolist()
    turn({"rows": rows, "head": head, "peak": harness.gemm_peak("jax"), "versions": harness.our_versions()})

    def loss(metrics):
        total, count = metrics["loss"]
        return {"loss": float(total.sum() / count.sum())}

    harness.step_by_turns(method, state, start, job, turn, loss)


def trl(job, turn):
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    turn.begin()
    harness.watch_torch(turn)
    model = AutoModelForSequenceClassification.from_pretrained(job["model"], num_labels=1, dtype="float32")
    with torch.no_grad():
        model.score.weight.copy_(torch.tensor([job["head"]]))
    settings = harness.trainer_settings(job)
    arguments = RewardConfig(output_dir=f"{job['folder']}/trl", max_length=None, **settings)
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    trainer = RewardTrainer(model, args=arguments, train_dataset=pairs.dataset(job), processing_class=tokenizer)
    report = {"peak": harness.gemm_peak("torch"), "versions": harness.their_versions("trl", "accelerate")}
    harness.train_by_turns(trainer, turn, report)


def compare(options, size):
    with harness.Comparison(__file__, options) as c:
        work = pairs.Pairs(c, options, size)
        ready = c.start("ours", c.ours("ours", **work.job))
        work.order(ready["rows"])
        c.start("TRL", c.theirs("trl", **work.job, head=ready["head"]))
        return work.run("ours", scored=lambda answer: 0)


def main():
    pairs.report(harness.parse(pairs.arguments(__doc__)), "reward", compare, "ours")


if __name__ == "__main__":
    harness.serve({"ours": ours, "trl": trl})
    main()
