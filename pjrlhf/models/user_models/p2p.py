"""Weights over a basis of rewards by a hypernetwork: the idea of Profile-to-PEFT (arXiv 2510.16282) on frozen features.

    e = [mean_j x_chosen; mean_j (x_chosen - x_rejected)]      the profile: a frozen embedding of the history
    w = H(e)                                                   H: MLP, the hypernetwork
    r(x) = x V w                                               V [D, B], the basis

The paper embeds a summary of the history, and its hypernetwork writes a whole LoRA for every layer, told by embeddings
of module and depth. Here it writes B numbers, the weights of one shared basis, so there are no such embeddings. A new
person costs one forward pass of H, and B floats; training goes through H from end to end, as in the paper. Without a
history the profile is 0, and H(0) is the generic person. With a linear H the reward is bilinear in answer and profile.

No code of the paper is public. Two mistakes that such code may make: a sum over the history, so that H meets profiles
whose length grows with the number of comparisons (here they are means), and a hypernetwork that gives everybody the
same weights, which no loss shows: `spread` does. It is the root mean square over people and bases of how far the
weights are from their mean, divided by the root mean square of the weights themselves.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from pjrlhf.models.user_models.base import (
    Comparisons,
    Slots,
    State,
    UserRewards,
    apply_perceptron,
    masked_mean,
    perceptron,
)
from pjrlhf.settings import setting
from pjrlhf.types import Array, Params, PRNGKey


@dataclasses.dataclass(frozen=True, kw_only=True)
class P2p(UserRewards):
    """A hypernetwork from the embedded history to weights over a basis of rewards."""

    learning_rate: float = setting(1e-2, "of Adam, with a cosine down to 0", above=0.0, high=1e3)
    weight_decay: float = setting(0.1, "decoupled", low=0.0, high=1e3)
    bases: int = setting(8, "rewards of the basis", low=1, high=4096)
    hidden: int = setting(64, "width of the hidden layer of the hypernetwork; 0 makes it linear", low=0, high=2**16)

    slots: ClassVar[Slots] = Slots("pairs", "weights", "reward head")

    def init(self, key: PRNGKey, width: int, people: int) -> Params:
        basis, hyper = jax.random.split(key)
        sizes = (2 * width, *((self.hidden,) if self.hidden else ()), self.bases)
        return {
            "basis": jax.random.normal(basis, (width, self.bases)) * width**-0.5,
            "hypernetwork": perceptron(hyper, *sizes),
        }

    def profile(self, context: Comparisons) -> Float[Array, " P"]:
        """e, the embedding of what a person has compared: P = 2 D numbers."""
        parts = context.chosen, context.chosen - context.rejected
        return jnp.concatenate([masked_mean(x, context.weight) for x in parts])

    def person(self, params: Params, row: Int[Array, ""], context: Comparisons) -> State:
        return {"weights": apply_perceptron(params["hypernetwork"], self.profile(context))}

    def rewards(self, params: Params, state: State, x: Float[Array, "n D"]) -> Float[Array, " n"]:
        return x @ (params["basis"] @ state["weights"])

    def described(self, states: State) -> dict[str, float]:
        weights = states["weights"]
        size = jnp.sqrt(jnp.mean(weights**2))
        return {"spread": float(jnp.sqrt(jnp.var(weights, axis=0).mean()) / jnp.maximum(size, 1e-12))}


MODEL = P2p
