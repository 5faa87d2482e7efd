"""The catalogue's reward models of people, small enough to run whole in a test."""

from support import tiny, tiny_users

SHARED = {
    key: value for key, value in tiny_users.TINY.items() if key.split(".")[0] not in ("preference", "evaluate_users")
}
TINY = SHARED | {
    "population.users": 6,
    "population.new_users": 3,
    "user_models.seeds": (0, 1),
    "user_models.batch_size": 16,
    "user_models.query": 4,
    "user_models.counts": (0, 2, 4),
    "user_models.pool": 6,
    "user_models.components": 8,
    "user_models.resamples": 50,
}
MODELS = {
    "pooled": {"kind": "pooled", "steps": 20},
    "pref": {"kind": "pref", "steps": 20, "factors": 2, "active": True, "fit_steps": 10},
    "vpl": {"kind": "vpl", "steps": 20, "hidden": 8, "latent": 4},
    "permuted": {"kind": "pttt", "steps": 20, "hidden": 8, "permuted": True},
}


def settings(models=None, **changes):
    """The tiny config; `changes` name keys with __ for the dots."""
    config = tiny.catalogue("user_models").get_config()
    config.update_from_flattened_dict(TINY | {key.replace("__", "."): value for key, value in changes.items()})
    with config.ignore_type():
        config.user_models.models = type(config)(MODELS if models is None else models)
    return config
