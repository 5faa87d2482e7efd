"""A linear regression trained by the loop, and a process that runs it: `python toy.py <workdir> <delay per step>
[<steps between checkpoints> [<bytes a file may have at most>]]`.
"""

import resource
import signal
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pjrlhf.training.loop import LoopSettings, Method, run
from pjrlhf.training.metrics import masked
from pjrlhf.training.optimizer import OptimizerSettings, make_optimizer
from pjrlhf.training.state import State
from pjrlhf.training.workdir import Workdir

STEPS = 12
ROWS = np.random.default_rng(0).normal(size=(24, 5)).astype(np.float32)


class Shuffled:
    """Batches of 4 rows, a new order each epoch."""

    def __init__(self, poison: int | None = None):
        self.position = 0
        self.poison = poison  # the batch made of NaN

    def __next__(self):
        epoch, i = divmod(self.position, 6)
        rows = ROWS[np.random.default_rng(epoch).permutation(24)[4 * i : 4 * i + 4]]
        if self.position == self.poison:
            rows = rows * np.nan
        self.position += 1
        return {"x": rows[:, :4], "y": rows[:, 4]}

    def get_state(self):
        return {"position": self.position, "raw": bytes([self.position])}

    def set_state(self, state):
        assert state["raw"] == bytes([state["position"]])
        self.position = state["position"]


class Linear(Method):
    """Noisy least squares: the noise uses `state.rng`, the running mean sits in `state.extra`."""

    def __init__(self, poison: int | None = None, delay: float = 0.0, steps: int = STEPS):
        self.batches = Shuffled(poison)
        self.delay = delay
        settings = OptimizerSettings(learning_rate=0.1, schedule="cosine", warmup_steps=2)
        self.optimizer = make_optimizer(settings, steps)
        self._step = jax.jit(self._update, donate_argnums=0)

    def init(self):
        return State.create(jax.random.key(0), {"w": jnp.zeros(4)}, self.optimizer, mean=jnp.zeros(()))

    def _update(self, state, batch):
        rng, noise = jax.random.split(state.rng)

        def loss(p):
            errors = batch["x"] @ p["w"] - batch["y"] + 0.1 * jax.random.normal(noise, (4,))
            return jnp.square(errors).mean(), errors

        (value, errors), grads = jax.value_and_grad(loss, has_aux=True)(state.trainable)
        updates, opt_state = self.optimizer.update(grads, state.opt_state, state.trainable)
        state = State(
            state.step + 1,
            rng,
            optax.apply_updates(state.trainable, updates),
            opt_state,
            {"mean": 0.9 * state.extra["mean"] + 0.1 * value},
        )
        return state, {"loss": masked(jnp.square(errors), jnp.ones(4)), "mean": (state.extra["mean"], jnp.ones(()))}

    def step(self, state, batch):
        time.sleep(self.delay)
        return self._step(state, batch)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    folder, delay, every, limit = [*sys.argv[1:], *("5", "0")[len(sys.argv) - 3 :]]
    if int(limit):
        # What a full disk looks like to the one who writes.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
    settings = LoopSettings(checkpoint_every=int(every), log_every=1)
    run(Linear(delay=float(delay)), Workdir(folder), "fit", STEPS, settings)
