"""What a reward model of people on frozen features is, and what several of them share.

A user model is a value that names its four parts (`Slots`): where knowledge of a person comes from, what it becomes,
where that enters, and what is minimised. As functions:

    state = person(params, row, context)      from the source: a row of a table, or k comparisons of the person, or
                                              what they chose in these
    rewards = rewards(params, state, x)       of answers with features x
    loss = loss(params, one, key, step)       of one person in a step
    state = meet(params, context)             of a new person, with everything else frozen

All are written for one person; training and evaluation map them over people with `jax.vmap`. A state is any pytree
whose shapes do not depend on the person. `params` are a nested dict. Comparisons that are padding have weight 0 and
must not matter; a context of padding alone is a person nobody knows anything about, the generic one.
"""

import abc
import dataclasses
from typing import Any, ClassVar, TypeAlias

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Float, Int

from pjrlhf.objectives.preference import bradley_terry_loss
from pjrlhf.settings import Settings, setting
from pjrlhf.types import Array, Params, PRNGKey

State: TypeAlias = Any  # a pytree of arrays

SOURCES = ("nobody", "id", "pairs", "history")
STATES = ("nothing", "head", "weights", "point", "latent", "memory", "fast weights")
INJECTIONS = ("nowhere", "reward head", "head input", "attention")
OBJECTIVES = ("Bradley-Terry", "variational", "inner step", "contrastive")


@dataclasses.dataclass(frozen=True)
class Slots:
    """The four parts of a user model.

    Attributes:
      source: what it reads of a person: nobody's identity, an id (a row of a table), labelled pairs, or a history,
        which is the chosen answers of these alone.
      state: what a person becomes.
      injection: where the state enters the reward.
      objective: what training minimises.

    Raises:
      ValueError: a part that is not in its list.
    """

    source: str
    state: str
    injection: str
    objective: str = "Bradley-Terry"

    def __post_init__(self):
        for name, known in zip(("source", "state", "injection", "objective"), _KNOWN, strict=True):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; choose one of {', '.join(known)}")


_KNOWN = (SOURCES, STATES, INJECTIONS, OBJECTIVES)


class Comparisons(struct.PyTreeNode):
    """n comparisons of one person; with a leading axis, of several people.

    Attributes:
      chosen, rejected: features of the answers.
      weight: 1, or 0 for padding.
    """

    chosen: Float[Array, "*people n D"]
    rejected: Float[Array, "*people n D"]
    weight: Float[Array, "*people n"]

    def reversed(self) -> "Comparisons":
        """The same comparisons by somebody who wants the opposite."""
        return self.replace(chosen=self.rejected, rejected=self.chosen)

    def first(self, count: int) -> "Comparisons":
        """The first `count` of them; the others become padding."""
        keep = jnp.arange(self.weight.shape[-1]) < count
        return self.replace(weight=jnp.where(keep, self.weight, 0.0))


class Person(struct.PyTreeNode):
    """What one training step sees of one person; with a leading axis, of several.

    Attributes:
      row: of tables; row 0 is the generic person.
      count: training comparisons of the person.
      context, query: comparisons of the person, none of them in both.
    """

    row: Int[Array, "*people"]
    count: Float[Array, "*people"]
    context: Comparisons
    query: Comparisons


@dataclasses.dataclass(frozen=True, kw_only=True)
class UserRewards(Settings, abc.ABC):
    """A reward model of people; its fields are the settings of an entry of `user_models.models`."""

    steps: int = setting(600, "updates", low=1, high=10**9)
    learning_rate: float = setting(1e-2, "of Adam, with a cosine down to 0", above=0.0, high=1e3)
    weight_decay: float = setting(0.0, "decoupled", low=0.0, high=1e3)
    permuted: bool = setting(False, "train with the people of the pairs exchanged at random: the control")

    slots: ClassVar[Slots]

    @abc.abstractmethod
    def init(self, key: PRNGKey, width: int, people: int) -> Params:
        """Initial parameters, float32, for features of this width and so many people beside the generic one."""

    @abc.abstractmethod
    def person(self, params: Params, row: Int[Array, ""], context: Comparisons) -> State:
        """The state of one person."""

    @abc.abstractmethod
    def rewards(self, params: Params, state: State, x: Float[Array, "n D"]) -> Float[Array, " n"]:
        """Rewards of answers as this person sees them."""

    def margins(self, params: Params, state: State, pairs: Comparisons) -> Float[Array, " n"]:
        """Reward of the chosen answer less that of the rejected one."""
        return self.rewards(params, state, pairs.chosen) - self.rewards(params, state, pairs.rejected)

    def loss(
        self, params: Params, one: Person, key: PRNGKey, step: Int[Array, ""]
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """(loss of one person, metrics): the mean of -log s(margin) over the query."""
        return self.bradley_terry(params, self.person(params, one.row, one.context), one.query), {}

    def bradley_terry(self, params: Params, state: State, pairs: Comparisons) -> Float[Array, ""]:
        """The mean of -log s(margin) over the comparisons that are no padding; 0 where all are."""
        margins = self.margins(params, state, pairs)
        return bradley_terry_loss(margins, jnp.zeros_like(margins), weight=pairs.weight)

    def over_people(self, losses: Float[Array, " m"]) -> Float[Array, ""]:
        """The loss of a step from those of its people."""
        return losses.mean()

    def start(self, params: Params, rows: Int[Array, " N"], pairs: Comparisons) -> Params:
        """Parameters that training starts from, given all N training comparisons and whose they are."""
        return params

    def finish(self, params: Params, pairs: Comparisons) -> Params:
        """Parameters after training, given all training comparisons."""
        return params

    def meet(self, params: Params, context: Comparisons) -> State:
        """The state of a new person; everything else stays frozen."""
        return self.person(params, jnp.int32(0), context)

    def informativeness(
        self, params: Params, state: State, asked: Comparisons, pool: Comparisons
    ) -> Float[Array, " n"] | None:
        """How much the answer to each question of the pool would tell, which does not depend on the answer; None for a
        model that takes questions as they come.

        Args:
          asked: what the person has answered.
        """
        return None

    def described(self, states: State) -> dict[str, float]:
        """Further figures of a trained model, given the states of several people, leaves [m, ...]."""
        return {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table(UserRewards):
    """A user model whose source is an id: `params` are {"shared", "table": leaves [U + 1, ...]}.

    A person's row has a Gaussian prior around the generic row 0. Training minimises the mean loss of a person plus
    prior / (training comparisons of the person), so that it and `meet` have the same optimum: the mode of the
    posterior of that row.
    """

    precision: float = setting(1.0, "of the prior of a person's numbers around the generic ones", low=0.0, high=1e9)
    fit_steps: int = setting(150, "updates that fit a new person's numbers", low=1, high=10**6)
    fit_rate: float = setting(0.1, "of Adam in these updates", above=0.0, high=1e3)

    def person(self, params: Params, row: Int[Array, ""], context: Comparisons) -> State:
        return jax.tree.map(lambda x: x[row], params["table"])

    def prior(self, params: Params, state: State) -> Float[Array, ""]:
        """precision / 2 |state - generic state|^2."""
        generic = jax.lax.stop_gradient(jax.tree.map(lambda x: x[0], params["table"]))
        squares = jax.tree.map(lambda a, b: jnp.square(a - b).sum(), state, generic)
        return 0.5 * self.precision * jax.tree.reduce(jnp.add, squares)

    def loss(
        self, params: Params, one: Person, key: PRNGKey, step: Int[Array, ""]
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        state = self.person(params, one.row, one.context)
        prior = self.prior(params, state) / jnp.maximum(one.count, 1.0)
        return self.bradley_terry(params, state, one.query) + prior, {}

    def finish(self, params: Params, pairs: Comparisons) -> Params:
        """The generic person becomes who fits everybody's comparisons best, with what people share frozen."""
        generic = self.meet(params, pairs)
        return {**params, "table": jax.tree.map(lambda x, own: x.at[0].set(own), params["table"], generic)}

    def meet(self, params: Params, context: Comparisons) -> State:
        """Fits a row, from the generic one, to the sum of -log s(margin) and the prior."""
        count = context.weight.sum()

        def loss(state):
            fit = count * self.bradley_terry(params, state, context) + self.prior(params, state)
            return fit / jnp.maximum(count, 1.0)

        return minimized(loss, self.person(params, jnp.int32(0), context), self.fit_steps, self.fit_rate)


def minimized(loss, start: State, steps: int, rate: float) -> State:
    """`start` after `steps` updates of Adam on `loss`, with a cosine down to 0."""
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))

    def step(carry, _):
        state, moments = carry
        updates, moments = optimizer.update(jax.grad(loss)(state), moments)
        return (optax.apply_updates(state, updates), moments), None

    (found, _), _ = jax.lax.scan(step, (start, optimizer.init(start)), length=steps)
    return found


def dense(key: PRNGKey, inputs: int, outputs: int) -> Params:
    """A linear layer with N(0, 1 / inputs) weights."""
    return {"kernel": jax.random.normal(key, (inputs, outputs)) * inputs**-0.5, "bias": jnp.zeros(outputs)}


def linear(layer: Params, x: Float[Array, "*batch a"]) -> Float[Array, "*batch b"]:
    return x @ layer["kernel"] + layer["bias"]


def perceptron(key: PRNGKey, *sizes: int) -> Params:
    """Linear layers between these widths."""
    keys = jax.random.split(key, len(sizes) - 1)
    return {f"layer{i}": dense(k, a, b) for i, (k, a, b) in enumerate(zip(keys, sizes[:-1], sizes[1:], strict=True))}


def apply_perceptron(layers: Params, x: Float[Array, "*batch a"]) -> Float[Array, "*batch b"]:
    """Leaky ReLU (slope 0.2) between the layers."""
    for i in range(len(layers)):
        x = linear(layers[f"layer{i}"], jax.nn.leaky_relu(x, 0.2) if i else x)
    return x


def masked_mean(x: Float[Array, "n ..."], weight: Float[Array, " n"]) -> Float[Array, "..."]:
    """The mean of rows with weight; 0 where none has."""
    return jnp.einsum("n...,n->...", x, weight) / jnp.maximum(weight.sum(), 1.0)
