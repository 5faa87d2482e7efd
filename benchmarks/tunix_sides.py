"""The sides of google-tunix, on the others' weights: `DPOTrainer.train()` in `dpo.py`, `Sampler` in `generation.py`.

Tunix pads prompts on the left and answers on the right, and scores the whole row with the vocabulary. The best setting
of its trainer: no remat, the graph of the model cached (its default), and each batch padded to its own longest prompt
and answer, for one more compilation each, before the rounds that count. It has no precomputed reference: the base
without adapters scores each batch once more. The best setting of its sampler, which GRPO samples with: a cache and
prompts without padding.
"""

import functools
import itertools

import harness

PACKAGES = "google-tunix", "qwix", "flax", "jax", "jaxlib"


def _model(job):
    import jax
    from tunix.models.llama3 import model as llama
    from tunix.models.llama3 import params

    config = llama.ModelConfig(**job["shape"])
    # Its Llama has `rope_theta` in its configuration and rotates by 10^6, whatever stands there.
    llama.apply_rope = functools.partial(llama.apply_rope, rope_theta=config.rope_theta)
    return params.create_model_from_safe_tensors(job["model"], config, dtype=jax.numpy.float32)


def dpo(job, turn):
    import jax
    import numpy as np
    import optax
    import qwix
    from flax import nnx
    from tunix.sft.dpo import dpo_trainer

    jax.devices()
    turn.begin()
    harness.watch_jax(turn, job)

    class Trainer(dpo_trainer.DPOTrainer):
        """Keeps the loss of the last step."""

        def _buffer_metrics(self, metrics_buffer, loss, step, additional_metrics=None):
            self.last_loss = loss
            return super()._buffer_metrics(metrics_buffer, loss, step, additional_metrics)

    model = reference = base = _model(job)
    if job["lora"]:
        names = ".*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
        provider = qwix.LoraProvider(module_path=names, rank=job["lora"], alpha=2.0 * job["lora"])
        model = qwix.apply_lora_to_model(base, provider, **base.get_model_input(), rngs=nnx.Rngs(0))
    else:
        reference = nnx.clone(base)
    o = job["optimizer"]
    adam = optax.adamw(o["learning_rate"], weight_decay=o["weight_decay"])
    trainer = Trainer(
        model,
        reference,
        optax.chain(optax.clip_by_global_norm(o["max_grad_norm"]), adam),
        dpo_trainer.DPOTrainingConfig(eval_every_n_steps=10**9, beta=0.1),
    )
    records = [harness.ids_of(record) for record in harness.read_records(job["ordered"])]
    batches = [padded(records[i : i + job["pairs"]]) for i in range(0, len(records), job["pairs"])]

    def taken():
        """Every batch again and again; asked for the next one, Tunix may still compute: that is waited for."""
        turn({"peak": harness.gemm_peak("jax"), "versions": harness.versions(*PACKAGES)})
        for i in itertools.count():
            yield dpo_trainer.TrainingInput(**{name: np.array(x) for name, x in batches[i % len(batches)].items()})
            jax.block_until_ready((nnx.state(trainer.model), nnx.state(trainer.optimizer)))
            turn({"loss": float(trainer.last_loss)})

    trainer.train(taken())


def shape_of(shape):
    """Arguments of Tunix' `ModelConfig` for dimensions that `harness.save_model` returns."""
    names = ("num_layers", "vocab_size", "num_heads", "head_dim", "num_kv_heads", "rope_theta")
    return {
        **{name: shape[name] for name in names},
        "embed_dim": shape["hidden_size"],
        "hidden_dim": shape["intermediate_size"],
        "norm_eps": shape["norm_eps"],
        "weight_tying": shape["tie_embeddings"],
    }


def padded(batch):
    """Fields of `TrainingInput` for (prompt, chosen, rejected) of token ids."""
    import numpy as np

    found = {}
    longest = [max(len(row[0]) for row in batch), max(len(x) for row in batch for x in row[1:])]
    for i, name in enumerate(("prompt", "chosen", "rejected")):
        shape = len(batch), longest[min(i, 1)]
        ids, mask = np.full(shape, harness.PAD, np.int32), np.zeros(shape, np.int32)
        for row, one in enumerate(batch):
            place = slice(shape[1] - len(one[0]), None) if i == 0 else slice(len(one[i]))
            ids[row, place], mask[row, place] = one[i], 1
        found |= {f"{name}_ids": ids, f"{name}_mask": mask}
    return found


class _Ids:
    """A tokenizer whose texts are token ids."""

    def encode(self, text):
        return [int(one) for one in text.split()]

    def decode(self, ids):
        return ""

    def bos_id(self):
        return 0  # adds none

    def eos_id(self):
        return -1

    def pad_id(self):
        return harness.PAD


def sampler(job, turn):
    import jax
    from tunix.generate import sampler as tunix_sampler

    jax.devices()
    turn.begin()
    harness.watch_jax(turn, job)
    length, shape = len(job["prompt"][0]), job["shape"]
    sizes = {name: shape[name] for name in ("num_layers", "num_kv_heads", "head_dim")}
    cache = tunix_sampler.CacheConfig(cache_size=length + job["new"], **sizes)
    generate = tunix_sampler.Sampler(_model(job), _Ids(), cache)
    texts = [" ".join(map(str, row)) for row in job["prompt"]]
    turn({"peak": harness.gemm_peak("jax"), "versions": harness.versions(*PACKAGES)})
    while True:
        # Greedy, and no token ends an answer.
        found = generate(texts, job["new"], max_prompt_length=length, eos_tokens=[-1])
        turn({"tokens": [row.tolist() for row in found.tokens]})
