"""A step of online RL against TRL:  python benchmarks/rl.py

A round is one step: sample answers to the same prompts, as many per prompt and of as many tokens, score them with a
reward model of the same size, compare with the reference, one epoch of one update of all parameters, in float32. Ours
is the step of the stage `policy` with one policy, by leave-one-out (RLOO) and by PPO with a value head; theirs
`RLOOTrainer` and `GRPOTrainer` as `trainer.train()` runs them (TRL has PPO no longer), sampling with transformers.

The work differs in this: ours computes the log-probabilities of the sampling policy in a pass of its own, which with
one epoch of one update could be left out, as TRL does; TRL turns answers into text and back for its reward model. FLOPs
count what every side must do: sampling, reward, reference, and three times a forward pass for the update.
"""

import harness


def policy(job, count=1, changes=()):
    """(method, state) of the stage `policy` with `count` policies; `changes` are {dotted key of the config: value}."""
    import jax
    import jax.numpy as jnp

    from pjrlhf.algorithms.policy import method_of
    from pjrlhf.models.adapters import init_bank
    from pjrlhf.rollout.scoring import init_heads

    names = tuple(f"P{k}" for k in range(count))
    settings = {
        "objectives": names,
        "preferences": {name: {"dimension": name, "sentence": ""} for name in names},
        "judge": dict.fromkeys(names, "short"),
        "data.prompts": {"kind": "jsonl", "path": job["records"]},
        "data.heldout_fraction": 1e-6,  # one prompt
        "data.max_prompt": job["prompt"],
        "data.prompt_buckets": (),
        "data.max_completion": job["new"],
        "adapter": {"rank": job["rank"], "alpha": 2.0 * max(job["rank"], 1)},
        "policy.steps": 10**6,
        "policy.rollouts": job["prompts"] * job["samples"],
        "policy.experience.estimator": job["estimator"],
        "policy.experience.samples_per_prompt": job["samples"],
        "policy.ppo.epochs": 1,
        "policy.ppo.minibatches": 1,
        "policy.optimizer": job["optimizer"] | {"schedule": "constant", "b2": 0.999, "eps": 1e-8},
    }
    run = harness.our_run(job, "soups", "hf", settings | dict(changes))
    models = {
        "bank": init_bank(run.workspace.base, run.workspace.adapter, count, jax.random.key(1)),
        "heads": init_heads(count, run.workspace.model_config.hidden_size, jax.random.key(2)),
    }
    rewarder = {
        **(models if run.audience.learned else {}),
        "mean": jnp.zeros(count),
        "std": jnp.ones(count),
        "low": jnp.zeros(count),
        "high": jnp.ones(count),
    }
    method = method_of(run, rewarder=rewarder)
    method.reward_models = models  # of all rewards, whether the run has them or not
    return method, jax.block_until_ready(method.init())


def ours(job, turn):
    harness.load_ours()
    turn.begin()
    harness.watch_jax(turn, job)
    method, state = policy(job, job.get("policies", 1))
    start, prompts = method.batches.get_state(), []
    for _ in range(job["batches"]):
        batch = next(method.batches)
        one = batch.prompts
        plain = zip(one.tokens[0, :: job["samples"]], one.valid[0, :: job["samples"]], strict=True)
        prompts.append([tokens[valid].tolist() for tokens, valid in plain])
    turn({"prompts": prompts, "peak": harness.gemm_peak("jax"), "versions": harness.our_versions()})

    def length(metrics):
        total, count = metrics["completions/mean_length"]
        return {"length": float((total / count).mean())}

    harness.step_by_turns(method, state, start, job, turn, length)


def trl(job, turn):
    import datasets
    import trl as library
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl.trainer import grpo_trainer, rloo_trainer  # noqa: F401  (loaded late else)

    turn.begin()
    harness.watch_torch(turn)
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    data = datasets.Dataset.from_list([{"prompt": harness.text(ids)} for ids in job["ordered"]])
    settings = harness.trainer_settings(job)
    settings["per_device_train_batch_size"] = job["prompts"] * job["samples"]
    del settings["train_sampling_strategy"]
    kind = job["kind"]
    arguments = getattr(library, f"{kind}Config")(
        output_dir=f"{job['folder']}/{kind}",
        **settings,
        num_generations=job["samples"],
        max_completion_length=job["new"],
        steps_per_generation=1,
        shuffle_dataset=False,
        beta=job["beta"],
    )
    reward = AutoModelForSequenceClassification.from_pretrained(job["model"], num_labels=1, dtype="float32")
    reward.config.pad_token_id = harness.PAD
    trainer = getattr(library, f"{kind}Trainer")(
        AutoModelForCausalLM.from_pretrained(job["model"], dtype="float32"),
        reward_funcs=reward,
        args=arguments,
        train_dataset=data,
        processing_class=tokenizer,
        reward_processing_classes=tokenizer,
    )
    report = {"peak": harness.gemm_peak("torch"), "versions": harness.their_versions("trl", "accelerate")}

    def length():
        return {"length": trainer._metrics["train"]["completions/mean_length"][-1]}

    harness.train_by_turns(trainer, turn, report, length)


def records(folder, count, length, vocab_size):
    import numpy as np

    rng = np.random.default_rng(0)
    rows = [{"prompt": harness.text(harness.words(rng, length, vocab_size))} for _ in range(count)]
    return harness.write_records(folder / "prompts.jsonl", rows)


def compare(options, size):
    length, new, prompts, batches = (12, 8, 2, 1) if options.quick else (128, options.new, options.prompts, 2)
    rows = prompts * options.samples
    with harness.Comparison(__file__, options) as c:
        shape = harness.save_model(c.folder / "model", size, length + new + 32)
        job = {
            "model": str(c.folder / "model"),
            "records": records(c.folder, prompts * batches + 1, length, shape["vocab_size"]),
            "prompt": length,
            "new": new,
            "prompts": prompts,
            "pairs": prompts,
            "samples": options.samples,
            "batches": batches,
            "rank": 0,
            "beta": 0.1,
            "optimizer": {"learning_rate": 1e-6, "max_grad_norm": 1.0, "weight_decay": 0.0},
            "set": options.set,
        }
        ready = c.start("ours, RLOO", c.ours("ours", **job, estimator="rloo"))
        ordered = [ids for batch in ready["prompts"] for ids in batch]
        sides = {
            "TRL, RLOO": c.theirs("trl", **job, kind="RLOO", ordered=ordered),
            "TRL, GRPO": c.theirs("trl", **job, kind="GRPO", ordered=ordered),
            "ours, PPO": c.ours("ours", **job, estimator="gae"),
        }
        for name, side in sides.items():
            if not options.sides or name in options.sides:
                c.start(name, side)
        c.run(options.rounds, 2)
        found = c.found("ours, RLOO")
        peak = max(side.ready["peak"] for side in c.sides.values())
    scored = harness.matmul_flops(shape, length + new, new)
    flops = rows * (scored + harness.matmul_flops(shape, length + new, 0) + scored + 3 * scored)
    harness.utilisation(found, flops, rows * new, peak)
    return found, {"parameters": shape["parameters"], "rows": rows, "prompt": length, "new": new, "peak_flops": peak}


def main():
    parser = harness.arguments(__doc__, models=("26m",))
    parser.add_argument("--prompts", type=int, default=4, help="per step")
    parser.add_argument("--samples", type=int, default=4, help="per prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens")
    options = harness.parse(parser)
    harness.report(
        options,
        "rl",
        compare,
        "ours, RLOO",
        lambda about: f"{about['rows']} answers of {about['new']} tokens a round",
        {"tokens_per_second": "new tokens/s", "mfu_percent": "MFU %", "length": "mean length"},
    )


if __name__ == "__main__":
    harness.serve({"ours": ours, "trl": trl})
    main()
