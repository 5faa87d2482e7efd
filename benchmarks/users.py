"""What a training step costs as the number of users grows: `python benchmarks/users.py`.

One P-DPO step (loss, gradient, optimizers) of 16 pairs of random users, on a one-layer model so that the user table
stands out. Sizes take turns in every round, so that whatever else the machine does meets all of them; a ratio
compares steps of the same round. Writes results/users.json and results/users.png beside this file.
"""

import functools
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax

from pjrlhf.algorithms.pdpo import Optimizers
from pjrlhf.algorithms.pdpo_objective import preference_loss
from pjrlhf.data.comparisons import PairBatch
from pjrlhf.data.packing import PackLayout, pack
from pjrlhf.models.adapters import AdapterConfig, Backbone, init_bank
from pjrlhf.models.config import ModelConfig
from pjrlhf.models.decoder import Decoder, init_params
from pjrlhf.models.users import UserModel, gather_rows
from pjrlhf.rollout.preference import PreferenceConfig
from pjrlhf.training.lazy_adam import lazy_adam

SIZES = {"cluster": (10, 10_000, 1_000_000), "individualized": (10, 1_000, 100_000)}
PAIRS, PROMPT, ANSWER = 16, 8, 8
ROUNDS, STEPS, WARM_UP = 40, 16, 4
CONFIG = ModelConfig(
    vocab_size=128, hidden_size=32, intermediate_size=64, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16
)
FOLDER = pathlib.Path(__file__).parent / "results"


class Trainer:
    """Steps of one user model with `count` users."""

    def __init__(self, kind: str, count: int):
        model, adapter = Decoder(CONFIG), AdapterConfig(rank=4, alpha=8.0)
        self.backbone = Backbone(model, adapter, init_params(model, jax.random.key(0)))
        base = self.backbone.base
        users = UserModel(kind=kind, num_users=count, tokens=2, width=CONFIG.hidden_size, clusters=4)
        params = {"bank": init_bank(base, adapter, 1, jax.random.key(1))}
        params["users"] = users.init(jax.random.key(2), base["embed"]["embedding"])
        optimizers, objective = Optimizers(optax.adam(1e-3), lazy_adam(1e-2)), PreferenceConfig(mixture="dropout")
        self.state = params, optimizers.init(params)
        self.rng, self.count, self.slots = np.random.default_rng(0), count, users.num_tokens

        @functools.partial(jax.jit, donate_argnums=0)
        def step(state, backbone, batch):
            params, opt_state = state
            small, local, rows = gather_rows(params["users"], batch.users)
            gradient, _ = jax.grad(preference_loss, argnums=3, has_aux=True)(
                backbone, users, objective, {**params, "users": small}, batch.replace(local=local)
            )
            return optimizers.update(gradient, rows, params, opt_state)

        self.step = step

    def batch(self) -> PairBatch:
        ids = self.rng.integers(3, CONFIG.vocab_size, (PAIRS, PROMPT + 2 * ANSWER), np.int32)
        answers = [(row[PROMPT : PROMPT + ANSWER], row[PROMPT + ANSWER :]) for row in ids]
        length = PROMPT + self.slots + 2 * ANSWER
        layout = PackLayout(mode="share", length=length, pad_id=0, num_user_tokens=self.slots)
        return PairBatch(
            rows=pack(ids[:, :PROMPT], answers, layout),
            index=np.arange(PAIRS, dtype=np.int32),
            users=self.rng.integers(1, self.count + 1, PAIRS, np.int32),
            reference=np.zeros((PAIRS, 2), np.float32),
            counts=np.full((PAIRS, 2), ANSWER, np.float32),
            margin=np.zeros(PAIRS, np.float32),
        )

    def seconds(self, steps: int) -> float:
        """Per step."""
        batches = jax.block_until_ready([jax.tree.map(jnp.asarray, self.batch()) for _ in range(steps)])
        start = time.perf_counter()
        for batch in batches:
            self.state = self.step(self.state, self.backbone, batch)
        jax.block_until_ready(self.state)
        return (time.perf_counter() - start) / steps


def measure() -> list[dict]:
    """One entry per kind and number of users: milliseconds per step, and ratios to the smallest number."""
    trainers = {(kind, count): Trainer(kind, count) for kind, counts in SIZES.items() for count in counts}
    for trainer in trainers.values():
        trainer.seconds(WARM_UP)
    times = {key: [] for key in trainers}
    for _ in range(ROUNDS):
        for key, trainer in trainers.items():
            times[key].append(1e3 * trainer.seconds(STEPS))
    found = []
    for (kind, count), each in times.items():
        ratio = np.array(each) / np.array(times[kind, SIZES[kind][0]])
        low, middle, high = np.percentile(ratio, [10, 50, 90])
        table = jax.tree.leaves(trainers[kind, count].state[0]["users"]["table"])
        megabytes = sum(x.nbytes for x in table) / 1e6
        found.append(
            {"kind": kind, "users": count, "table_megabytes": megabytes, "milliseconds": float(np.median(each))}
        )
        found[-1] |= {"ratio": float(middle), "ratio_p10": float(low), "ratio_p90": float(high)}
    return found


def plot(found: list[dict], path: pathlib.Path) -> None:
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(4.5, 3), layout="constrained")
    for kind in SIZES:
        rows = [row for row in found if row["kind"] == kind]
        ratio = np.array([row["ratio"] for row in rows])
        spread = [ratio - [row["ratio_p10"] for row in rows], [row["ratio_p90"] for row in rows] - ratio]
        axes.errorbar([row["users"] for row in rows], ratio, spread, marker="o", capsize=3, label=kind)
    axes.set(xscale="log", xlabel="users", ylabel="time of a step / that with 10 users", ylim=(0, None))
    axes.axhline(1, color="0.7", linewidth=1, zorder=0)
    axes.legend()
    figure.savefig(path, dpi=90)


def main() -> None:
    found = measure()
    print(f"{'kind':16}{'users':>10}{'table MB':>10}{'ms/step':>10}{'ratio':>8}{'10-90 %':>14}")
    for row in found:
        spread = f"{row['ratio_p10']:.2f}-{row['ratio_p90']:.2f}"
        print(
            f"{row['kind']:16}{row['users']:10}{row['table_megabytes']:10.2f}{row['milliseconds']:10.2f}"
            f"{row['ratio']:8.2f}{spread:>14}"
        )
    FOLDER.mkdir(exist_ok=True)
    about = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "rounds": ROUNDS, "steps": STEPS}
    (FOLDER / "users.json").write_text(json.dumps({**about, "results": found}, indent=1) + "\n")
    plot(found, FOLDER / "users.png")


if __name__ == "__main__":
    main()
