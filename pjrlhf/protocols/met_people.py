"""People as a trained reward model meets them: what they tell, what they are tested on, and what they cost."""

import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from pjrlhf.errors import UserError
from pjrlhf.feedback.feature_pairs import Part, TrainingPeople, padded
from pjrlhf.models.user_models.base import Comparisons, State, UserRewards
from pjrlhf.types import Array, Params

TIMINGS = 20  # of which the median counts


@dataclasses.dataclass(frozen=True, eq=False)
class People:
    """Several people: what is known of them, and comparisons to test on.

    Attributes:
      names: of the people, in order.
      rows: int32 [m], their rows of tables.
      context: all that can be told of them; a new person tells a beginning of it.
      tested: comparisons, none of them in the context.
    """

    names: tuple[str, ...]
    rows: np.ndarray
    context: Comparisons
    tested: Comparisons

    def labelled(self, margins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(margins, names) of the comparisons that are no padding, from margins [m, n]."""
        real = np.asarray(self.tested.weight) > 0
        return margins[real], np.repeat(self.names, real.sum(1))


def known_people(features: np.ndarray, part: Part, held: Part, people: TrainingPeople, size: int) -> People:
    """The people of training, with a context of their training comparisons; what they are tested on is not in it, also
    where they are tested on training comparisons.
    """
    told, tested = part.of_people(), held.of_people()
    if held is part:
        tested = {name: rows[size:] for name, rows in told.items() if len(rows) > size}
    names = tuple(name for name in tested if name in told)
    if not names:
        raise UserError(
            "user_models: nobody has comparisons in training and held out; give more records of each person"
        )
    context = padded(features, part, [told[name] for name in names], size)
    return People(
        names, people.registry.indices(names), context, padded(features, held, [tested[name] for name in names])
    )


def new_people(features: np.ndarray, part: Part, size: int, pool: int) -> People:
    """The people who are met after training and have `size` comparisons or more to tell, on prompts that others trained
    on, and comparisons to be tested on, on prompts that nobody trained on.

    Args:
      pool: the most comparisons of a context, among which an active user model chooses.
    """
    told, tested = {}, {}
    for name, rows in part.of_people().items():
        own, test = rows[~part.held_out[rows]], rows[part.held_out[rows]]
        if len(own) >= size and len(test):
            told[name], tested[name] = own[:pool], test
    if not told:
        raise UserError(
            f"user_models: no new person has {size} comparisons on prompts of training and others to test on; lower "
            "user_models.counts, or give more records of each person"
        )
    names = tuple(told)
    context = padded(features, part, [told[name] for name in names], pool)
    tests = padded(features, part, [tested[name] for name in names])
    return People(names, np.zeros(len(names), np.int32), context, tests)


class Fitted:
    """A trained entry, ready to be asked about people."""

    def __init__(self, model: UserRewards, params: Params):
        self.model, self.params = model, params

    def known(self, people: People) -> State:
        """States of the people of training, as they stand in a table or by their contexts."""
        return _known(self.model, self.params, people.rows, people.context)

    def met(self, context: Comparisons, count: int) -> State:
        """States of new people after the first `count` comparisons of their contexts."""
        return _met(self.model, self.params, context.first(count))

    def margins(self, state: State, people: People) -> np.ndarray:
        """Float32 [m, n], of the tested comparisons."""
        return np.asarray(_margins(self.model, self.params, state, people.tested))

    def asked(self, context: Comparisons, count: int) -> Comparisons:
        """The first `count` comparisons of each context, in the order in which the model asks for them."""
        people, size = context.weight.shape
        if not self._asks(context):
            return _taken(context, np.tile(np.arange(count), (people, 1)))
        order = np.zeros((people, 0), np.int64)
        for k in range(count):
            rest = np.array([[i for i in range(size) if i not in own] for own in order])
            so_far = _taken(context, np.concatenate([order, rest], axis=1)).first(k)
            found = _informativeness(self.model, self.params, self.met(so_far, k), so_far, context)
            value = np.where(np.asarray(context.weight) > 0, np.asarray(found), -np.inf)
            np.put_along_axis(value, order, -np.inf, axis=1)
            order = np.concatenate([order, value.argmax(1)[:, None]], axis=1)
        return _taken(context, order)

    def _asks(self, context: Comparisons) -> bool:
        """Whether the model chooses what to ask; told without compiling anything."""
        one = jax.tree.map(lambda x: jnp.asarray(x[0]), context)
        state = jax.eval_shape(self.model.meet, self.params, one)
        return jax.eval_shape(self.model.informativeness, self.params, state, one, one) is not None

    def nobody(self, context: Comparisons, people: int) -> State:
        """The states of so many people of whom nothing is known.

        Args:
          context: of anybody; its size counts alone.
        """
        one = self.met(jax.tree.map(lambda x: x[:1], context), 0)
        return jax.tree.map(lambda x: jnp.repeat(x, people, axis=0), one)

    def cost(self, people: People, count: int) -> dict[str, float]:
        """Bytes of a person's state, and the median milliseconds that it takes to make it from `count` comparisons."""
        one = jax.tree.map(lambda x: jnp.asarray(x[:1, :count]), people.context)
        state, seconds = jax.block_until_ready(_met(self.model, self.params, one)), []
        for _ in range(TIMINGS):
            started = time.perf_counter()
            jax.block_until_ready(_met(self.model, self.params, one))
            seconds.append(time.perf_counter() - started)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        return {"bytes": float(size), "milliseconds": 1e3 * float(np.median(seconds))}


# The model is static, so that all seeds share the programs of shapes they have in common.


@functools.partial(jax.jit, static_argnums=0)
def _known(model: UserRewards, params: Params, rows: Array, context: Comparisons) -> State:
    return jax.vmap(functools.partial(model.person, params))(rows, context)


@functools.partial(jax.jit, static_argnums=0)
def _met(model: UserRewards, params: Params, context: Comparisons) -> State:
    return jax.vmap(functools.partial(model.meet, params))(context)


@functools.partial(jax.jit, static_argnums=0)
def _margins(model: UserRewards, params: Params, state: State, pairs: Comparisons) -> Array:
    return jax.vmap(functools.partial(model.margins, params))(state, pairs)


@functools.partial(jax.jit, static_argnums=0)
def _informativeness(
    model: UserRewards, params: Params, state: State, asked: Comparisons, pool: Comparisons
) -> Array | None:
    return jax.vmap(functools.partial(model.informativeness, params))(state, asked, pool)


def _taken(context: Comparisons, order: np.ndarray) -> Comparisons:
    """The comparisons of every person in an order, int [m, n]."""

    def one(x):
        return np.take_along_axis(np.asarray(x), order.reshape(*order.shape, *[1] * (x.ndim - 2)), axis=1)

    return jax.tree.map(one, context)
