"""The side of google-tunix in `dpo.py`: `DPOTrainer.train()` on the pairs and weights of the others.

Tunix pads prompts on the left and answers on the right, and scores the whole row with the vocabulary. Its best setting:
no remat, the graph of the model cached (its default), and each batch padded to its own longest prompt and answer, for
one more compilation each, before the rounds that count. Its trainer has no precomputed reference: the base without
adapters scores each batch once more.
"""

import itertools

import harness


def tunix(job, turn):
    import jax
    import numpy as np
    import optax
    import qwix
    from flax import nnx
    from tunix.models.llama3 import model as llama
    from tunix.models.llama3 import params
    from tunix.sft.dpo import dpo_trainer

    jax.devices()
    turn.begin()
    harness.watch_jax(turn, job)

    class Trainer(dpo_trainer.DPOTrainer):
        """Keeps the loss of the last step."""

        def _buffer_metrics(self, metrics_buffer, loss, step, additional_metrics=None):
            self.last_loss = loss
            return super()._buffer_metrics(metrics_buffer, loss, step, additional_metrics)

    base = params.create_model_from_safe_tensors(
        job["model"], llama.ModelConfig(**job["shape"]), dtype=jax.numpy.float32
    )
    model = reference = base
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
        versions = harness.versions("google-tunix", "qwix", "flax", "jax", "jaxlib")
        turn({"peak": harness.gemm_peak("jax"), "versions": versions})
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
