"""A DPO step against TRL and a torch loop, and what personalisation costs:  python benchmarks/dpo.py [--lora 8]

A round is one step (loss, gradient, AdamW) on the same pairs on all sides, from the same weights, in float32. Ours is
the step of the stage `preference`. TRL is `DPOTrainer` as `trainer.train()` runs it, without gradient checkpointing,
with the reference's log-probabilities precomputed or not. "torch" is a hand-written loop with the tricks that torch has
too: precomputed reference, chosen and rejected in one pass, logits of answer tokens only, fused attention, fused AdamW.
"Tunix" is `tunix_sides.py`, where --tunix_python names an interpreter with google-tunix; its reference is always live.
P-DPO sides are ours with a user model of ten tokens a person, and are compared with our own pooled step.
"""

import itertools

import harness
import pairs
import tunix_sides

POOLED = "ours"


def ours(job, turn):
    import jax

    from pjrlhf.algorithms.pdpo import Preference
    from pjrlhf.algorithms.pdpo_settings import PreferenceSettings
    from pjrlhf.feedback.pairs import read_pairs

    harness.load_ours()
    turn.begin()
    harness.watch_jax(turn, job)
    changes = {
        "preference.data.path": job["records"],
        "preference.models": {"entry": job["entry"]},
        "preference.heldout_fraction": 1e-6,  # one prompt
        "preference.batch_size": job["pairs"],
        "preference.steps": 10**6,
        "preference.mixture": job["entry"].get("mixture", "exact"),
        "preference.optimizer": job["optimizer"] | {"schedule": "constant"},
        "preference.user_optimizer": {"learning_rate": 1e-3, "schedule": "constant"},
        "adapter": {"rank": job["lora"], "alpha": 2.0 * max(job["lora"], 1)},
        **pairs.length_settings(job),
    }
    run = harness.our_run(job, "pdpo", "records", changes)
    settings = run.section(PreferenceSettings)
    comparisons = read_pairs(run, settings)
    method = Preference(settings.entry("entry"), comparisons, run.devices, run.workspace.backbone, run.streams)
    state = jax.block_until_ready(method.init())
    examples, start = comparisons.tables["train"].examples, method.batches.get_state()
    rows = [[examples[i].extra["row"] for i in next(method.batches).index] for _ in range(job["batches"])]
    turn({"rows": rows, "peak": harness.gemm_peak("jax"), "versions": harness.our_versions()})

    def loss(metrics):
        total, count = metrics["loss"]
        return {"loss": float(total) / float(count)}

    harness.step_by_turns(method, state, start, job, turn, loss)


def trl(job, turn):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    turn.begin()
    harness.watch_torch(turn)
    arguments = DPOConfig(
        output_dir=f"{job['folder']}/trl",
        **harness.trainer_settings(job),
        max_length=None,
        beta=0.1,
        precompute_ref_log_probs=job["precompute"],
    )
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(job["model"], dtype="float32"),
        args=arguments,
        train_dataset=pairs.dataset(job),
        processing_class=AutoTokenizer.from_pretrained(job["model"]),
        peft_config=harness.lora(job),
    )
    report = {"peak": harness.gemm_peak("torch"), "versions": harness.their_versions("trl", "accelerate")}
    harness.train_by_turns(trainer, turn, report)


def loop(job, turn):
    import torch
    import torch.nn.functional as F
    from transformers import AutoModelForCausalLM

    turn.begin()
    harness.watch_torch(turn)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype="float32", attn_implementation="sdpa").to(device)
    if job["lora"]:
        from peft import get_peft_model

        model = get_peft_model(model, harness.lora(job))
    records = [harness.ids_of(record) for record in harness.read_records(job["ordered"])]
    B = job["pairs"]
    batches = [records[i : i + B] for i in range(0, len(records), B)]

    def collated(batch):
        rows = [(prompt, answer) for side in (1, 2) for prompt, answer in ((r[0], r[side]) for r in batch)]
        tokens = torch.full((len(rows), max(len(p) + len(a) for p, a in rows)), harness.PAD)
        valid, scored = torch.zeros_like(tokens), torch.zeros_like(tokens, dtype=torch.bool)
        for i, (prompt, answer) in enumerate(rows):
            size = len(prompt) + len(answer)
            tokens[i, :size], valid[i, :size] = torch.tensor(prompt + answer), 1
            scored[i, len(prompt) - 1 : size - 1] = True
        return tokens.to(device), valid.to(device), scored.to(device)

    def logps(batch):
        tokens, valid, scored = collated(batch)
        inner = model.get_base_model() if job["lora"] else model
        hidden = inner.model(input_ids=tokens, attention_mask=valid, use_cache=False).last_hidden_state
        targets = tokens.roll(-1, 1)[scored]
        each = -F.cross_entropy(inner.lm_head(hidden[scored]).float(), targets, reduction="none")
        rows = torch.arange(len(tokens), device=device)[:, None].expand_as(scored)[scored]
        return torch.zeros(len(tokens), device=device).index_add(0, rows, each).chunk(2)

    with torch.no_grad():
        reference = [logps(batch) for batch in batches]  # adapters start at zero
    moving = [p for p in model.parameters() if p.requires_grad]
    o = job["optimizer"]
    adam = torch.optim.AdamW(moving, lr=o["learning_rate"], weight_decay=o["weight_decay"], fused=True)
    model.train()
    turn({"peak": harness.gemm_peak("torch"), "versions": harness.their_versions()})
    for i in itertools.count():
        chosen, rejected = logps(batches[i % len(batches)])
        before = reference[i % len(batches)]
        loss = -F.logsigmoid(0.1 * (chosen - before[0] - rejected + before[1])).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(moving, o["max_grad_norm"])
        adam.step()
        adam.zero_grad()
        turn({"loss": float(loss)})


def compare(options, size):
    with harness.Comparison(__file__, options) as c:
        work = pairs.Pairs(c, options, size)
        job = work.job | {"lora": options.lora}
        people = {"kind": "individualized", "tokens": 10}
        sides = {
            POOLED: c.ours("ours", **job, entry={"kind": "uniform"}),
            "TRL": c.theirs("trl", **job, precompute=True),
            "TRL, live reference": c.theirs("trl", **job, precompute=False),
            "torch": c.theirs("loop", **job),
            "Tunix": harness.Side("tunix", options.tunix_python, {**job, "shape": tunix_sides.shape_of(work.shape)}),
            "ours, P-DPO dropout": c.ours("ours", **job, entry={**people, "mixture": "dropout"}),
            "ours, P-DPO exact": c.ours("ours", **job, entry={**people, "mixture": "exact"}),
        }
        for name, side in sides.items():
            if (name != POOLED and options.sides and name not in options.sides) or not side.python:
                continue
            ready = c.start(name, side)
            if name == POOLED:
                work.order(ready["rows"])
        found, about = work.run(POOLED, scored=lambda answer: answer)
    return found, {**about, "lora": options.lora}


def main():
    parser = pairs.arguments(__doc__)
    parser.add_argument("--lora", type=int, default=0, help="rank of adapters; 0 trains all parameters")
    parser.add_argument("--tunix_python", default="", help="interpreter with google-tunix")
    options = harness.parse(parser)
    pairs.report(options, "dpo_lora" if options.lora else "dpo", compare, POOLED)


if __name__ == "__main__":
    harness.serve({"ours": ours, "trl": trl, "loop": loop, "tunix": tunix_sides.dpo})
    main()
