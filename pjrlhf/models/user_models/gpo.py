"""GPO, group preference optimization (arXiv 2310.11523): a transformer neural process over labelled answers.

Every answer of the context is a token MLP([x; label]), label 1 for chosen and -1 for rejected, beside one learned token
that stands for no context. Context tokens attend to each other; the token of an answer to be scored, MLP([x; 0]),
attends to the context alone. The reward is linear in its last state, and the loss is Bradley-Terry, the softmax over
the two options of a question. There are no positions: the order of the context does not matter.

The state of a person is what scored answers attend to: the context tokens before every layer.
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
    dense,
    linear,
    perceptron,
)
from pjrlhf.settings import setting
from pjrlhf.types import Array, Params, PRNGKey


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpo(UserRewards):
    """A transformer over labelled answers."""

    learning_rate: float = setting(3e-3, "of Adam, with a cosine down to 0", above=0.0, high=1e3)
    layers: int = setting(2, "of the transformer", low=1, high=1000)
    hidden: int = setting(32, "width of the transformer", low=1, high=2**16)

    slots: ClassVar[Slots] = Slots("pairs", "memory", "attention")

    def init(self, key: PRNGKey, width: int, people: int) -> Params:
        keys, H = jax.random.split(key, self.layers + 3), self.hidden
        return {
            "token": perceptron(keys[0], width + 1, H, H),
            "empty": jax.random.normal(keys[1], (H,)),
            "layers": {f"layer{i}": self._init_layer(keys[3 + i]) for i in range(self.layers)},
            "head": dense(keys[2], H, 1),
        }

    def _init_layer(self, key: PRNGKey) -> Params:
        keys, H = jax.random.split(key, 5), self.hidden
        attention = {name: dense(k, H, H) for name, k in zip("qkvo", keys[:4], strict=True)}
        return {"attention": attention, "mlp": perceptron(keys[4], H, 2 * H, H)}

    def person(self, params: Params, row: Int[Array, ""], context: Comparisons) -> State:
        labelled = [
            jnp.concatenate([x, jnp.full((len(x), 1), label)], axis=-1)
            for x, label in ((context.chosen, 1.0), (context.rejected, -1.0))
        ]
        tokens = apply_perceptron(params["token"], jnp.concatenate(labelled))
        h = jnp.concatenate([params["empty"][None], tokens])
        weight = jnp.concatenate([jnp.ones(1), context.weight, context.weight])
        memory = []
        for i in range(self.layers):
            memory.append(h)
            h = self._layer(params["layers"][f"layer{i}"], h, h, weight)
        return {"memory": jnp.stack(memory), "weight": weight}

    def _layer(
        self, layer: Params, h: Float[Array, "n H"], memory: Float[Array, "c H"], weight: Float[Array, " c"]
    ) -> Float[Array, "n H"]:
        """One pre-norm layer in which rows of h attend to the memory."""
        query, seen = _normalized(h), _normalized(memory)
        q, k, v = (linear(layer["attention"][n], x) for n, x in (("q", query), ("k", seen), ("v", seen)))
        scores = jnp.where(weight > 0, q @ k.T * self.hidden**-0.5, -1e9)
        h = h + linear(layer["attention"]["o"], jax.nn.softmax(scores) @ v)
        return h + apply_perceptron(layer["mlp"], _normalized(h))

    def rewards(self, params: Params, state: State, x: Float[Array, "n D"]) -> Float[Array, " n"]:
        h = apply_perceptron(params["token"], jnp.concatenate([x, jnp.zeros((len(x), 1))], axis=-1))
        for i in range(self.layers):
            h = self._layer(params["layers"][f"layer{i}"], h, state["memory"][i], state["weight"])
        return linear(params["head"], _normalized(h))[:, 0]


def _normalized(x: Float[Array, "n H"]) -> Float[Array, "n H"]:
    return (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-6)


MODEL = Gpo
