"""A DPO step against TRL and a torch loop, and what personalisation costs:  python benchmarks/dpo.py [--lora 8]

A round is one step (loss, gradient, AdamW) on the same pairs on all sides, from the same weights, in float32. Ours is
the step of the stage `preference`. TRL is `DPOTrainer` as `trainer.train()` runs it, without gradient checkpointing,
with the reference's log-probabilities precomputed or not. "torch" is a hand-written loop with the tricks that torch has
too: precomputed reference, chosen and rejected in one pass, logits of answer tokens only, fused attention, fused AdamW.
P-DPO sides are ours with a user model of ten tokens a person, and are compared with our own pooled step.
"""

import itertools

import harness

LIMITS = (192, 448)  # tokens of prompt and answer at most
POOLED = "ours"


def ours(job, turn):
    import jax

    from pjrlhf.stages.pairs import Pairs
    from pjrlhf.stages.preference import Preference

    harness.load_ours()
    turn.begin()
    harness.watch_jax(turn, job)
    prompt, answer = job["limits"]
    changes = {
        "preference.data.path": job["records"],
        "preference.models": {"entry": job["entry"]},
        "preference.heldout_share": 1e-6,  # one prompt
        "preference.batch_size": job["pairs"],
        "preference.steps": 10**6,
        "preference.mixture": job["entry"].get("mixture", "exact"),
        "preference.optimizer": job["optimizer"] | {"schedule": "constant"},
        "preference.user_optimizer": {"learning_rate": 1e-3, "schedule": "constant"},
        "adapter": {"rank": job["lora"], "alpha": 2.0 * job["lora"]},
        "data.max_prompt": prompt,
        "data.max_completion": answer,
        "data.prompt_buckets": job["buckets"][0],
        "data.completion_buckets": job["buckets"][1],
    }
    run = harness.our_run(job, "pdpo", "records", changes)
    pairs = Pairs(run)
    method = Preference(run, "entry", pairs)
    state = jax.block_until_ready(method.init())
    examples, start = pairs.tables["train"].examples, method.batches.get_state()
    rows = [[examples[i].extra["row"] for i in next(method.batches)["index"]] for _ in range(job["batches"])]
    turn({"rows": rows, "peak": harness.gemm_peak("jax"), "versions": harness.our_versions()})
    for i in itertools.count():
        if i % job["batches"] == 0:
            method.batches.set_state(start)
        state, metrics = method.step(state, next(method.batches))
        jax.block_until_ready(state)
        total, count = metrics["loss"]
        turn({"loss": float(total) / float(count)})


def trl(job, turn):
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    turn.begin()
    harness.watch_torch(turn)
    keep = ("prompt", "chosen", "rejected")
    data = datasets.Dataset.from_list([{k: r[k] for k in keep} for r in harness.read_records(job["ordered"])])
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
        train_dataset=data,
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
            "lora": options.lora,
            "optimizer": {"learning_rate": 1e-5, "max_grad_norm": 1.0, "weight_decay": 0.0},
            "set": options.set,
        }
        people = {"kind": "individualized", "tokens": 10}
        sides = {
            POOLED: c.ours("ours", **job, entry={"kind": "uniform"}),
            "TRL": c.theirs("trl", **job, precompute=True),
            "TRL, live reference": c.theirs("trl", **job, precompute=False),
            "torch": c.theirs("loop", **job),
            "ours, P-DPO dropout": c.ours("ours", **job, entry={**people, "mixture": "dropout"}),
            "ours, P-DPO exact": c.ours("ours", **job, entry={**people, "mixture": "exact"}),
        }
        for name, side in sides.items():
            if name != POOLED and options.sides and name not in options.sides:
                continue
            ready = c.start(name, side)
            if name == POOLED:
                used = [records[i] for batch in ready["rows"] for i in batch]
                harness.write_records(c.folder / "ordered.jsonl", used)
        c.run(-(-options.rounds // batches) * batches, batches)
        found = c.found(POOLED)
        peak = max(side.ready["peak"] for side in c.sides.values())
    rows = [(len(p), len(a)) for r in used for p, *answers in [harness.ids_of(r)] for a in answers]
    tokens = sum(p + a for p, a in rows) / batches
    flops = 3 * sum(harness.matmul_flops(shape, p + a, a) for p, a in rows) / batches
    harness.utilisation(found, flops, tokens, peak)
    about = {"parameters": shape["parameters"], "pairs": pairs, "tokens_per_round": tokens, "limits": limits}
    return found, {**about, "flops_per_round": flops, "peak_flops": peak, "lora": options.lora}


def main():
    parser = harness.arguments(__doc__)
    parser.add_argument("--lora", type=int, default=0, help="rank of adapters; 0 trains all parameters")
    parser.add_argument("--pairs", type=int, default=4, help="per step")
    parser.add_argument("--batches", type=int, default=4, help="that are gone through again and again")
    options = harness.parse(parser)
    tables, about = {}, {}
    for size in options.model:
        tables[size], about[size] = compare(options, size)
        title = f"{about[size]['parameters'] / 1e6:.1f}M parameters, {about[size]['pairs']} pairs a round"
        columns = {"tokens_per_second": "tokens/s", "mfu_percent": "MFU %", "loss": "last loss"}
        harness.table(title, tables[size], columns)
    name = "dpo_lora" if options.lora else "dpo"
    harness.bars(harness.write(options, name, {"models": about}, tables), tables, POOLED)


if __name__ == "__main__":
    harness.serve({"ours": ours, "trl": trl, "loop": loop})
    main()
