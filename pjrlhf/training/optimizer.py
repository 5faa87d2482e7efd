"""Optimizers from a config section, and their vectorisation over K independent policies."""

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from pjrlhf.errors import UserError
from pjrlhf.settings import Settings, setting
from pjrlhf.types import Tree

SCHEDULES = ("constant", "linear", "cosine")
OPTIMIZERS = ("adamw", "sgd", "adafactor")
NO_DECAY = ("scale", "bias")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerSettings(Settings):
    """An optimizer and its learning-rate schedule. Adafactor (arXiv 1804.04235) keeps factored second moments."""

    name: str = setting("adamw", "the optimizer", choices=OPTIMIZERS)
    learning_rate: float = setting(1e-3, "peak, reached after the warm-up", low=0.0)
    schedule: str = setting(
        "constant", "after the warm-up: constant, or down to 0 at the end of the stage", choices=SCHEDULES
    )
    warmup_steps: int = setting(0, "steps of linear rise; the first step already moves", low=0)
    b1: float = setting(0.9, "adamw: decay of the first moment", low=0.0, below=1.0)
    b2: float = setting(0.999, "adamw: decay of the second moment", low=0.0, below=1.0)
    eps: float = setting(1e-8, "adamw: added to the root of the second moment", low=0.0)
    eps_root: float = setting(0.0, "adamw: added under the root", low=0.0)
    weight_decay: float = setting(0.0, "decoupled; leaves named scale or bias are exempt", low=0.0)
    max_grad_norm: float = setting(1.0, "global-norm clipping; 0 turns it off", low=0.0)

    def rates(self, name: str = "optimizer") -> dict[str, float]:
        """The learning rate by its key; `name` is the key of the section."""
        return {f"{name}.learning_rate": self.learning_rate}


def check_warmup(settings: OptimizerSettings, updates: int, name: str = "optimizer", part: str = "") -> None:
    """Raises UserError for a warm-up that is not shorter than `updates`.

    Args:
      name: key of the section.
      part: which updates these are, where they are a part of the training.
    """
    if settings.warmup_steps >= max(updates, 1):
        raise UserError(
            f"{name}.warmup_steps: {settings.warmup_steps} leaves none of the {updates} updates{part}; make it at most "
            f"{max(updates, 1) - 1}"
        )


def steps_of(
    steps: int, epochs: float, rows: int, batch_size: int, stage: str = "", optimizer: OptimizerSettings | None = None
) -> int:
    """Number of updates of a stage: those of `epochs` passes over `rows` rows, at least one; `steps` without epochs.

    Args:
      stage, optimizer: key of its section, and its optimizer.

    Raises:
      UserError: a warm-up of `optimizer` that is not shorter.
    """
    if not epochs:
        return steps
    found = max(1, round(epochs * rows / batch_size))
    if optimizer:
        check_warmup(optimizer, found, f"{stage}.optimizer", passes(epochs, rows, batch_size))
    return found


def passes(epochs: float, rows: int, batch_size: int) -> str:
    """For messages: what makes the number of updates."""
    return f" of epochs={epochs:g} over {rows} rows in batches of {batch_size}"


def make_schedule(settings: OptimizerSettings, total_steps: int) -> optax.Schedule:
    """Learning rate as a function of the number of updates already done.

    Raises:
      UserError: a warm-up that is not shorter than the stage.
    """
    peak, warmup = settings.learning_rate, settings.warmup_steps
    check_warmup(settings, total_steps)
    rest = max(total_steps - warmup, 1)
    after = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
    }[settings.schedule]
    if not warmup:
        return after
    # Warm-up starts at peak / (warmup + 1) rather than 0, so that the first step is not wasted.
    return optax.join_schedules([optax.linear_schedule(peak / (warmup + 1), peak, warmup), after], [warmup])


def _decayed(params: Tree) -> Tree:
    """True for leaves with weight decay.

    Decided by name, not by rank: a scanned norm scale is [L, D], a reward head's kernel [D].
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: jax.tree_util.keystr(path[-1:], simple=True) not in NO_DECAY, params
    )


def make_optimizer(settings: OptimizerSettings, total_steps: int) -> optax.GradientTransformation:
    """The optimizer of one policy that is updated `total_steps` times.

    Raises:
      UserError: a warm-up that is not shorter than the stage.
    """
    schedule = make_schedule(settings, total_steps)
    clip = optax.clip_by_global_norm(settings.max_grad_norm) if settings.max_grad_norm else optax.identity()
    if settings.name == "sgd":
        return optax.chain(clip, optax.add_decayed_weights(settings.weight_decay, _decayed), optax.sgd(schedule))
    if settings.name == "adafactor":
        # Not `optax.adafactor`, which takes weight decay apart from the learning rate.
        return optax.chain(
            clip,
            optax.scale_by_factored_rms(),
            optax.clip_by_block_rms(1.0),
            optax.add_decayed_weights(settings.weight_decay, _decayed),
            optax.scale_by_learning_rate(schedule),
        )
    adam = {key: getattr(settings, key) for key in ("b1", "b2", "eps", "eps_root", "weight_decay")}
    return optax.chain(clip, optax.adamw(schedule, **adam, mask=_decayed))


def per_ingredient(optimizer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`optimizer` for K independent policies stacked on axis 0 of every leaf.

    Clipping, moments and step counts are per policy: the result equals K separate optimizers. `update` takes an
    optional `active`, bool [K]. Where it is False, the update is zero and the optimizer state is unchanged, even if the
    gradient is NaN.
    """

    def update(grads, state, params=None, *, active=None):
        updates, new_state = jax.vmap(optimizer.update)(grads, state, params)
        if active is None:
            return updates, new_state

        def keep(new, old):
            return jnp.where(active.reshape(-1, *[1] * (new.ndim - 1)), new, old)

        return jax.tree.map(lambda x: keep(x, jnp.zeros_like(x)), updates), jax.tree.map(keep, new_state, state)

    return optax.GradientTransformationExtraArgs(jax.vmap(optimizer.init), cast(Any, update))
