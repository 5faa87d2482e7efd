"""VPL, variational preference learning (arXiv 2408.10075): a latent of a person from k labelled pairs, and the swap
guidance of SPL against its collapse (arXiv 2603.12595).

    h_j = MLP([x_chosen; x_rejected]),  a = self-attention(h),  m = mean_j a_j
    q(z | pairs) = N(mu(m), exp(l(m))),  both clipped to [-1, 1]
    r(x, z) = MLP([x; z])
    loss = E_q[-log s(margin)] + kl KL(q | N(0, I))        KL = -1/2 sum(1 + l - mu^2 - e^l)
           + guidance (1/2 (1 + cos(mu, mu')) + 1/2 (1 - cos(l, l')))

mu', l' are of the same pairs with chosen and rejected swapped: SPL's flows and its FiLM decoder
are left out. The weight of the KL follows a cosine from a tenth to the whole in every `kl_period` steps. z is the mean
outside training.

The authors scale z to length sqrt(d) in training and not in evaluation, so that the decoder meets latents it has never
seen; here `normalized` holds for both. Figures of a collapsed posterior: `active_units`, the fraction of dimensions
whose mean varies over people by more than 0.01 (arXiv 1509.00519), and `kl`, in nats.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from pjrlhf.models.user_models.base import (
    Comparisons,
    Person,
    Slots,
    State,
    UserRewards,
    apply_perceptron,
    dense,
    linear,
    masked_mean,
    perceptron,
)
from pjrlhf.settings import setting
from pjrlhf.types import Array, Params, PRNGKey

FLOOR = 0.1  # of the annealed weight
ACTIVE = 0.01  # variance over people from which a dimension is used


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vpl(UserRewards):
    """A latent of a person from labelled pairs."""

    learning_rate: float = setting(1e-3, "of Adam, with a cosine down to 0", above=0.0, high=1e3)
    latent: int = setting(16, "dimensions of the latent", low=1, high=2**16)
    hidden: int = setting(64, "width of encoder and decoder", low=1, high=2**16)
    kl: float = setting(1e-4, "weight of the KL from N(0, I)", low=0.0, high=1e6)
    kl_period: int = setting(0, "steps of a cosine from a tenth of that weight to the whole; 0 is constant", low=0)
    guidance: float = setting(0.0, "weight of the swap guidance of SPL", low=0.0, high=1e6)
    normalized: bool = setting(True, "scale the latent to the length of the root of its dimensions")

    slots: ClassVar[Slots] = Slots("pairs", "latent", "head input", "variational")

    def init(self, key: PRNGKey, width: int, people: int) -> Params:
        keys, H = jax.random.split(key, 7), self.hidden
        return {
            "encoder": perceptron(keys[0], 2 * width, H, H),
            "attention": {name: dense(k, H, H) for name, k in zip("qkv", keys[1:4], strict=True)},
            "mean": dense(keys[4], H, self.latent),
            "log_variance": dense(keys[5], H, self.latent),
            "decoder": perceptron(keys[6], width + self.latent, H, H, 1),
        }

    def person(self, params: Params, row: Int[Array, ""], context: Comparisons) -> State:
        h = apply_perceptron(params["encoder"], jnp.concatenate([context.chosen, context.rejected], axis=-1))
        q, k, v = (linear(params["attention"][name], h) for name in "qkv")
        scores = jnp.where(context.weight > 0, q @ k.T * self.hidden**-0.5, -1e9)
        pooled = masked_mean(jax.nn.softmax(scores) @ v, context.weight)
        return {name: jnp.clip(linear(params[name], pooled), -1.0, 1.0) for name in ("mean", "log_variance")}

    def rewards(self, params: Params, state: State, x: Float[Array, "n D"]) -> Float[Array, " n"]:
        return self.decoded(params, state["mean"], x)

    def decoded(self, params: Params, z: Float[Array, " z"], x: Float[Array, "n D"]) -> Float[Array, " n"]:
        """Rewards of answers for the latent z."""
        z = jnp.broadcast_to(self.scaled(z), (len(x), self.latent))
        return apply_perceptron(params["decoder"], jnp.concatenate([x, z], axis=-1))[:, 0]

    def scaled(self, z: Float[Array, " z"]) -> Float[Array, " z"]:
        """z as the decoder reads it."""
        if not self.normalized:
            return z
        return z * jnp.sqrt(self.latent / (jnp.square(z).sum() + 1e-6))

    def loss(
        self, params: Params, one: Person, key: PRNGKey, step: Int[Array, ""]
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        state = self.person(params, one.row, one.context)
        noise = jnp.exp(0.5 * state["log_variance"]) * jax.random.normal(key, (self.latent,))
        fit = self.bradley_terry(params, {**state, "mean": state["mean"] + noise}, one.query)
        divergence = kl_divergence(state["mean"], state["log_variance"])
        loss = fit + self.kl * self.annealed(step) * divergence
        metrics = {"kl": divergence}
        if self.guidance:
            swapped = self.person(params, one.row, one.context.reversed())
            apart = (1 + cosine(state["mean"], swapped["mean"])) / 2
            alike = (1 - cosine(state["log_variance"], swapped["log_variance"])) / 2
            known = one.context.weight.sum() > 0  # nothing is the opposite of nothing
            metrics["guidance"] = jnp.where(known, apart + alike, 0.0)
            loss += self.guidance * metrics["guidance"]
        return loss, metrics

    def annealed(self, step: Int[Array, ""]) -> Float[Array, ""] | float:
        """Fraction of the weight of the KL at a step."""
        if not self.kl_period:
            return 1.0
        phase = (step % self.kl_period) / self.kl_period
        return FLOOR + (1 - FLOOR) * (1 - jnp.cos(jnp.pi * phase)) / 2

    def described(self, states: State) -> dict[str, float]:
        varies = jnp.var(states["mean"], axis=0) > ACTIVE
        divergence = jax.vmap(kl_divergence)(states["mean"], states["log_variance"])
        return {"kl": float(divergence.mean()), "active_units": float(varies.mean())}


def kl_divergence(mean: Float[Array, " z"], log_variance: Float[Array, " z"]) -> Float[Array, ""]:
    """KL(N(mean, e^log_variance) | N(0, I)) in nats."""
    return -0.5 * (1 + log_variance - mean**2 - jnp.exp(log_variance)).sum()


def cosine(a: Float[Array, " z"], b: Float[Array, " z"]) -> Float[Array, ""]:
    """Cosine of two vectors; 0 for a vector of zeros."""
    return (a * b).sum() * jax.lax.rsqrt((a**2).sum() * (b**2).sum() + 1e-12)


MODEL = Vpl
