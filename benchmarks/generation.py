"""Sampling against transformers, and what a soup per request costs:  python benchmarks/generation.py

A round is one greedy answer of as many tokens to every prompt of a batch, with a key/value cache, from the same weights
in float32. Ours is `rollout.sampler.generate`, jitted; theirs `model.generate` with its default (growing) cache and
with a static one. The soup side mixes three LoRA adapters of rank 8 with weights of every row's own. `same` is the
share of tokens that are those of ours. "Tunix" is `tunix_sides.py`, where --tunix_python names an interpreter with
google-tunix.
"""

import harness
import tunix_sides


def ours(job, turn):
    import jax
    import jax.numpy as jnp
    import numpy as np

    from pjrlhf.models.adapters import AdapterConfig, Policies, init_bank
    from pjrlhf.models.decoder import Decoder, choose_decode
    from pjrlhf.models.huggingface import load_params, read_config
    from pjrlhf.rollout.batches import Prompts
    from pjrlhf.rollout.sampler import Sampling, generate

    jax.devices()
    turn.begin()
    harness.watch_jax(turn, job)
    model = Decoder(read_config(job["model"]), decode=choose_decode(jax.default_backend()))
    adapter = AdapterConfig(rank=8, alpha=16.0)
    base = load_params(job["model"])
    prompt = jnp.asarray(job["prompt"], jnp.int32)
    bank = mix = None
    if job["soup"]:
        bank = init_bank(base, adapter, 3, jax.random.key(1))
        # Adapters as after training: the second factor starts at zero.
        bank = jax.tree.map(lambda x: x + 1e-3, bank)
        mix = jnp.asarray(np.random.default_rng(0).dirichlet([1.0] * 3, len(prompt)), jnp.float32)
    sampling = Sampling(max_new_tokens=job["new"], eos_ids=(-1,), pad_id=harness.PAD, temperature=0.0)

    @jax.jit
    def draw(base, bank, mix, prompt):
        policies = Policies(model, adapter, base, bank, mix)
        return generate(policies, sampling, Prompts(prompt, jnp.ones(prompt.shape, bool)), jax.random.key(0)).tokens

    turn({"peak": harness.gemm_peak("jax"), "versions": harness.our_versions()})
    while True:
        turn({"tokens": np.asarray(draw(base, bank, mix, prompt)).tolist()})


def transformers(job, turn):
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    turn.begin()
    harness.watch_torch(turn)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype="float32").to(device).eval()
    # Greedy, and no token ends an answer.
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=job["new"], pad_token_id=harness.PAD, cache_implementation=job["cache"]
    )
    prompt = torch.tensor(job["prompt"], device=device)
    mask = torch.ones_like(prompt)
    turn({"peak": harness.gemm_peak("torch"), "versions": harness.their_versions()})
    while True:
        with torch.inference_mode():
            tokens = model.generate(prompt, attention_mask=mask)[:, prompt.shape[1] :]
        turn({"tokens": tokens.tolist()})


def compare(options, size, batch):
    import numpy as np

    length, new = (16, 8) if options.quick else (options.prompt, options.new)
    with harness.Comparison(__file__, options) as c:
        shape = harness.save_model(c.folder / "model", size, length + new + 32)
        rng = np.random.default_rng(0)
        prompt = [harness.words(rng, length, shape["vocab_size"]) for _ in range(batch)]
        job = {"model": str(c.folder / "model"), "prompt": prompt, "new": new}
        sides = {
            "ours": c.ours("ours", **job, soup=False),
            "transformers": c.theirs("transformers", **job, cache=None),
            "transformers, static cache": c.theirs("transformers", **job, cache="static"),
            "ours, soup per row": c.ours("ours", **job, soup=True),
            "Tunix": harness.Side("tunix", options.tunix_python, {**job, "shape": tunix_sides.shape_of(shape)}),
        }
        for name, side in sides.items():
            if side.python and (name == "ours" or not options.sides or name in options.sides):
                c.start(name, side)
        c.run(options.rounds, 2)
        found = c.found("ours")
        peak = max(side.ready["peak"] for side in c.sides.values())
    own = np.array(found["ours"]["tokens"])
    for name, row in found.items():
        tokens = np.array(row.pop("tokens"))
        if "soup" not in name:
            row["same"] = float((tokens == own).mean())
    flops = batch * harness.matmul_flops(shape, length + new, new)
    harness.utilisation(found, flops, batch * new, peak)
    return found, {"parameters": shape["parameters"], "prompt": length, "new": new, "peak_flops": peak}


def main():
    parser = harness.arguments(__doc__, models=("26m",))
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--new", type=int, default=128, help="tokens")
    parser.add_argument("--tunix_python", default="", help="interpreter with google-tunix")
    options = harness.parse(parser)
    tables, about = {}, {}
    for size in options.model:
        for batch in options.batch:
            name = f"{size}, {batch} rows"
            tables[name], about[name] = compare(options, size, batch)
            columns = {"tokens_per_second": "new tokens/s", "mfu_percent": "MFU %", "same": "same"}
            harness.table(f"{about[name]['parameters'] / 1e6:.1f}M parameters, {batch} rows", tables[name], columns)
    name = "generation_tunix" if options.sides == ["Tunix"] else "generation"
    harness.bars(harness.write(options, name, {"models": about}, tables), tables, "ours")


if __name__ == "__main__":
    harness.serve({"ours": ours, "transformers": transformers, "tunix": tunix_sides.sampler})
    main()
