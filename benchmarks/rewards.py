"""The price of rewards from the host:  python benchmarks/rewards.py

A round is one PPO step of one policy, an adapter, with one reward. The sides differ in who scores the answers:

* adapter: our own reward model, inside the jitted step;
* function: a reward function that turns texts into tokens again and calls the same reward model;
* classifier: a sequence classifier of the same size, the source of that kind;
* free: a function that hardly does anything, so that its step is the host path without any scoring;
* slow, and slow in parts: a function that waits `--wait` seconds for a rollout, as for a server; in parts
  (`policy.reward_parts=4`) it waits for one part while the next is sampled.

With --clock cpu a round lasts as long as its process computes, which other work on the machine hardly changes; the slow
sides need the wall clock.

`scoring` is what the function takes in a step, and `model` the reward model alone, in the same shape. The host path
costs what free takes beyond adapter without its model, as a share of a step with scoring: the median over rounds, of
which each compares its own steps.
"""

import json
import shutil
import time

import harness
import rl

NAME = "P0"  # of the reward


def free(prompts, completions):
    """A reward that costs nothing."""
    return [float(len(text) % 7) for text in completions]


def slow(job):
    """A reward function that waits for every answer its share of `job["wait"]` seconds."""
    seconds = job["wait"] / (job["prompts"] * job["samples"])

    def rewards(prompts, completions):
        time.sleep(seconds * len(completions))
        return free(prompts, completions)

    return rewards


class Scoring:
    """A reward function that calls the reward model of `method` on texts; `seconds` is what the model took last."""

    def __init__(self, method, job):
        import jax
        import numpy as np

        from pjrlhf.rollout.experience import raw_rewards

        self.method, self.tokenizer = method, method.data.text.workspace.tokenizer
        self.prompt, self.answer, self.seconds = job["prompt"], job["new"], 0.0
        self.clock = harness.CLOCKS[job["clock"]]
        numbers = np.zeros((1, 1), np.int32)
        self.score = jax.jit(lambda backbone, models, *arrays: raw_rewards(backbone, models, numbers, *arrays))

    def __call__(self, prompts, completions):
        import numpy as np

        tokens = np.full((len(prompts), self.prompt + self.answer), self.tokenizer.pad_id, np.int32)
        valid = np.zeros(tokens.shape, bool)
        for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            ids, answers = self.tokenizer.encode_answers(prompt, [completion or " w3"])
            row = [*ids, *answers[0].ids[: self.answer]]
            start = self.prompt - len(ids)
            tokens[i, start : start + len(row)], valid[i, start : start + len(row)] = row, True
        started = self.clock()
        rewards = np.asarray(self.score(self.method.backbone, self.method.reward_models, tokens, valid))[:, 0]
        self.seconds = self.clock() - started
        return rewards.tolist()


def ours(job, turn):
    from pjrlhf.rewards.sources import RewardSource

    harness.load_ours()
    turn.begin()
    harness.watch_jax(turn, job)
    source = job["source"]
    spec = job["classifier"] if source == "classifier" else f"{__file__}:free"
    changes = {} if source == "adapter" else {"rewards": {NAME: spec}}
    method, state = rl.policy(job, changes=changes | {"policy.reward_parts": job.get("parts", 1)})
    function = Scoring(method, job)
    if source in ("function", "slow"):
        found = function if source == "function" else slow(job)
        method.targets.audience.sources[NAME] = RewardSource(NAME, found)
    turn({"versions": harness.our_versions()})

    def said(metrics):
        total, count = metrics["completions/mean_length"]
        found = {"length": float((total / count).mean())}
        if source != "adapter":
            found["scoring"] = float(metrics[f"rewards/{NAME}/seconds"][0])
        return found | ({"model": function.seconds} if source == "function" else {})

    harness.step_by_turns(method, state, method.batches.get_state(), job, turn, said)


def classifier(model, folder, width):
    """The folder of a classifier with one label: a causal language model with another head."""
    import numpy as np
    from safetensors.numpy import load_file, save_file

    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "reward"}}
    (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": harness.PAD}))
    file = folder / "model.safetensors"
    tensors = {name: x for name, x in load_file(file).items() if name != "lm_head.weight"}
    head = np.random.default_rng(0).standard_normal((1, width)).astype(np.float32)
    save_file(tensors | {"score.weight": head}, file, {"format": "pt"})
    return str(folder)


def host_path_percent(c):
    """Of every round: what the step of free takes beyond that of adapter without its model, in percent of the latter's
    step with it.
    """

    def each(side, name):
        return [report[name] for report in c.sides[side].reports if report["counts"]]

    rounds = zip(each("free", "seconds"), each("adapter", "seconds"), each("function", "model"), strict=True)
    return harness.spread([100 * (free - adapter + model) / adapter for free, adapter, model in rounds])


def compare(options, size):
    length, new, prompts = (12, 8, 2) if options.quick else (options.prompt, options.new, options.prompts)
    rows = prompts * options.samples
    with harness.Comparison(__file__, options) as c:
        shape = harness.save_model(c.folder / "model", size, length + new + 32)
        job = {
            "model": str(c.folder / "model"),
            "records": rl.records(c.folder, prompts + 1, length, shape["vocab_size"]),
            "prompt": length,
            "new": new,
            "prompts": prompts,
            "samples": options.samples,
            "batches": 1,
            "rank": 8,
            "estimator": "gae",
            "optimizer": {"learning_rate": 1e-6, "max_grad_norm": 1.0, "weight_decay": 0.0},
            "set": options.set,
            "classifier": {
                "kind": "classifier",
                "path": classifier(c.folder / "model", c.folder / "classifier", shape["hidden_size"]),
                "template": "{prompt}{answer}",
                "max_length": length + new,
                "batch_size": rows,
            },
        }
        job["wait"] = 0.2 if options.quick else options.wait
        sides = {name: {"source": name} for name in ("adapter", "function", "classifier", "free", "slow")}
        sides["slow in parts"] = {"source": "slow", "parts": 2 if options.quick else 4}
        for name, more in sides.items():
            if not options.sides or name in options.sides:
                c.start(name, c.ours("ours", **job, **more))
        c.run(options.rounds, 2)
        found = c.found("adapter")
        host_path = host_path_percent(c) if {"adapter", "function", "free"} <= {*c.sides} else {}
    about = {"parameters": shape["parameters"], "rows": rows, "prompt": length, "new": new}
    if host_path:
        about["host_path_percent"] = host_path
        low, middle, high = (host_path[name] for name in ("q1", "median", "q3"))
        print(f"the host path costs {middle:.1f} % [{low:.1f}, {high:.1f}] of a step beside the scoring")
    return found, about


def main():
    parser = harness.arguments(__doc__, models=("26m",))
    parser.add_argument("--prompts", type=int, default=4, help="per step")
    parser.add_argument("--samples", type=int, default=4, help="per prompt")
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--new", type=int, default=64, help="tokens")
    parser.add_argument("--wait", type=float, default=4.0, help="seconds that the slow function waits in a step")
    harness.report(
        harness.parse(parser),
        "rewards",
        compare,
        "adapter",
        lambda about: f"{about['rows']} answers of {about['new']} tokens a round",
        {"scoring": "scoring s", "model": "model s", "length": "mean length"},
    )


if __name__ == "__main__":
    harness.serve({"ours": ours})
    main()
