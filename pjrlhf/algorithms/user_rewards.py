"""Trains reward models of people on frozen features, see `models.user_models`: a step takes a fraction of a millisecond
to a few milliseconds, and all of them run inside one program.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pjrlhf.errors import UserError
from pjrlhf.feedback.feature_pairs import TrainingPeople, comparisons, people_of
from pjrlhf.models.user_models.base import Comparisons, UserRewards
from pjrlhf.training.progress import progress
from pjrlhf.types import Array, Params, PRNGKey

CHUNK = 50  # steps of a program


def train(
    name: str,
    model: UserRewards,
    features: np.ndarray,
    people: TrainingPeople,
    key: PRNGKey,
    rng: np.random.Generator,
    *,
    batch: int = 16,
    context: int = 16,
    query: int = 8,
) -> tuple[Params, dict[str, float]]:
    """A trained user model, and the mean metrics of its last steps.

    Args:
      name: of the entry, for messages.
      features: float32 [A, D].
      people: their training comparisons.
      key, rng: of initial values and noise, and of the batches.
      batch, context, query: people of a step, and comparisons of each to learn the person from and to be scored on.

    Raises:
      UserError: the loss is not finite.
    """
    first, noise = jax.random.split(key)
    x, pairs = jnp.asarray(features), jnp.asarray(people.pairs)
    everything = comparisons(x, pairs, jnp.arange(len(people.pairs)), jnp.ones(len(people.pairs)))
    params = model.init(first, features.shape[1], people.registry.capacity)
    params = model.start(params, jnp.asarray(people.rows), everything)
    carry: Any = (params, _optimizer(model).init(params), jnp.int32(0))
    found: dict[str, float] = {}
    plan = people.batches(model.steps, batch, context, query, rng)
    with progress(f"user_models: training {name}", model.steps, ("loss",)) as bar:
        for chunk in plan.chunks(CHUNK):
            carry, metrics = _advance(model, x, pairs, noise, carry, chunk)
            found = {part: float(values.mean()) for part, values in metrics.items()}
            if not np.isfinite(found["loss"]):
                raise UserError(
                    f"user_models.models.{name}: the loss is not finite after {int(carry[2])} steps; lower its "
                    "learning_rate"
                )
            bar.update(int(carry[2]), found)
    return _finished(model, carry[0], everything), found


def _optimizer(model: UserRewards) -> optax.GradientTransformation:
    schedule = optax.cosine_decay_schedule(model.learning_rate, model.steps)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=model.weight_decay))


# The model is static, so that all seeds share the programs of shapes they have in common.


@functools.partial(jax.jit, static_argnums=0)
def _advance(model: UserRewards, x: Array, pairs: Array, noise: PRNGKey, carry: Any, batches: dict[str, Array]):
    """(parameters, moments, step) after the steps of `batches`, and the metrics of each step."""

    def loss_of(params, batch, key, step):
        persons = people_of(x, pairs, batch)
        keys = jax.random.split(key, len(batch["rows"]))
        losses, metrics = jax.vmap(functools.partial(model.loss, params), in_axes=(0, 0, None))(persons, keys, step)
        return model.over_people(losses), {"loss": losses, **metrics}

    def update(carry, batch):
        params, moments, step = carry
        gradient, metrics = jax.grad(loss_of, has_aux=True)(params, batch, jax.random.fold_in(noise, step), step)
        updates, moments = _optimizer(model).update(gradient, moments, params)
        return (optax.apply_updates(params, updates), moments, step + 1), jax.tree.map(jnp.mean, metrics)

    return jax.lax.scan(update, carry, batches)


@functools.partial(jax.jit, static_argnums=0)
def _finished(model: UserRewards, params: Params, everything: Comparisons) -> Params:
    return model.finish(params, everything)
