"""The training state: what a step updates and a checkpoint holds. It excludes the frozen base."""

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Int

from pjrlhf.types import Array, Params, PRNGKey, Tree


class State(struct.PyTreeNode):
    """State of a training stage, a pytree.

    Attributes:
      step: int32 scalar, number of updates so far. `method.step` adds 1.
      rng: typed PRNG key, `jax.random.key(...)`.
      trainable: the parameters being trained (adapter bank, heads, user tables, or full parameters).
      opt_state: state of the optimizer over `trainable`.
      extra: further arrays that must survive a restart (KL controller, reward normalisers); may be empty.
    """

    step: Int[Array, ""]
    rng: PRNGKey
    trainable: Tree
    opt_state: optax.OptState
    extra: Params

    @classmethod
    def create(cls, rng: PRNGKey, trainable: Tree, optimizer: optax.GradientTransformation, **extra: Tree) -> "State":
        """The state before the first step."""
        return cls(jnp.zeros((), jnp.int32), rng, trainable, optimizer.init(trainable), extra)

    @property
    def key(self) -> PRNGKey:
        """The PRNG key of the next update, which depends on `rng` and `step` alone."""
        return jax.random.fold_in(self.rng, self.step)

    def apply_gradients(self, gradient: Tree, optimizer: optax.GradientTransformation) -> "State":
        """The state after one update of all of `trainable`."""
        updates, opt_state = optimizer.update(gradient, self.opt_state, self.trainable)
        trainable = optax.apply_updates(self.trainable, updates)
        return self.replace(step=self.step + 1, trainable=trainable, opt_state=opt_state)
