"""Optimizers from a config section, and their vectorisation over K independent policies."""

import difflib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from pjrlhf.errors import UserError

# Setting -> default; None marks a required setting.
DEFAULTS = {
    "name": "adamw",  # "adamw", "sgd", or "adafactor" (arXiv 1804.04235, factored second moments)
    "learning_rate": None,  # peak, reached after warm-up
    "schedule": "constant",  # after warm-up: "constant", or "linear" / "cosine" down to 0 at the end of the stage
    "warmup_steps": 0,  # linear rise; step 1 already moves
    "b1": 0.9,  # adamw: decay of the first moment
    "b2": 0.999,  # adamw: decay of the second moment
    "eps": 1e-8,  # adamw: added to the root of the second moment
    "eps_root": 0.0,  # adamw: added under the root
    "weight_decay": 0.0,  # decoupled; not applied to leaves named scale or bias
    "max_grad_norm": 1.0,  # global-norm clipping; 0 turns it off
}
SCHEDULES = ("constant", "linear", "cosine")
OPTIMIZERS = ("adamw", "sgd", "adafactor")
NO_DECAY = ("scale", "bias")


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """`DEFAULTS` updated by `config`, checked."""
    for key in config:
        if key not in DEFAULTS:
            closest = difflib.get_close_matches(key, DEFAULTS, 1)
            hint = f"did you mean {closest[0]}?" if closest else f"known keys: {', '.join(DEFAULTS)}"
            raise UserError(f"optimizer.{key}: no such setting; {hint}")
    settings = {**DEFAULTS, **config}
    for key, known in (("name", OPTIMIZERS), ("schedule", SCHEDULES)):
        if settings[key] not in known:
            raise UserError(f"optimizer.{key}: {settings[key]!r} is unknown; use one of {', '.join(known)}")
    for key in DEFAULTS.keys() - {"name", "schedule"}:
        value = settings[key]
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
            raise UserError(f"optimizer.{key}: {value!r} is no number >= 0; set it in the config")
    return settings


def make_schedule(config: Mapping[str, Any], total_steps: int) -> optax.Schedule:
    """Learning rate as a function of the number of updates already done; see `DEFAULTS` for the keys.

    Raises:
      UserError: unknown key or value, or a warm-up that is not shorter than the stage.
    """
    settings = _settings(config)
    peak, warmup = settings["learning_rate"], int(settings["warmup_steps"])
    if warmup >= max(total_steps, 1):
        raise UserError(f"optimizer.warmup_steps: {warmup} leaves none of the {total_steps} steps; make it smaller")
    rest = max(total_steps - warmup, 1)
    after = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
    }[settings["schedule"]]
    if not warmup:
        return after
    # Warm-up starts at peak / (warmup + 1) rather than 0, so that the first step is not wasted.
    return optax.join_schedules([optax.linear_schedule(peak / (warmup + 1), peak, warmup), after], [warmup])


def _decayed(params: Any) -> Any:
    """True for leaves with weight decay.

    Decided by name, not by rank: a scanned norm scale is [L, D], a reward head's kernel [D].
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: jax.tree_util.keystr(path[-1:], simple=True) not in NO_DECAY, params
    )


def make_optimizer(config: Mapping[str, Any], total_steps: int) -> optax.GradientTransformation:
    """The optimizer of one policy, from a config section with the keys of `DEFAULTS`.

    Raises:
      UserError: unknown key or value.
    """
    settings = _settings(config)
    schedule = make_schedule(config, total_steps)
    clip = optax.clip_by_global_norm(settings["max_grad_norm"]) if settings["max_grad_norm"] else optax.identity()
    if settings["name"] == "sgd":
        return optax.chain(clip, optax.add_decayed_weights(settings["weight_decay"], _decayed), optax.sgd(schedule))
    if settings["name"] == "adafactor":
        # Not `optax.adafactor`, whose weight decay is not scaled by the learning rate.
        return optax.chain(
            clip,
            optax.scale_by_factored_rms(),
            optax.clip_by_block_rms(1.0),
            optax.add_decayed_weights(settings["weight_decay"], _decayed),
            optax.scale_by_learning_rate(schedule),
        )
    adam = {key: settings[key] for key in ("b1", "b2", "eps", "eps_root", "weight_decay")}
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

    return optax.GradientTransformationExtraArgs(jax.vmap(optimizer.init), update)
