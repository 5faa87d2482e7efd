"""The catalogue's family, small enough to run whole in a test."""

from support import tiny

POINTS = ((0.0, 1.0), (0.5, 0.5), (1.0, 0.0))
TINY = {
    **{key: value for key, value in tiny.TINY.items() if not key.startswith(("evaluate.", "objectives", "methods."))},
    "data.max_prompt": 36,
    "model.max_length": 64,
    "policy.steps": 2,
    "policy.rollouts": 4,
    "modpo.steps": 2,
    "modpo.batch_size": 2,
    "ric.samples": 32,
    "ric.steps": 2,
    "ric.batch_size": 8,
    "ric.online_samples": 16,
    "ric.online_steps": 2,
    "evaluate_front.base_samples": 4,
}
# One of every way to train and to answer.
QUICK = ("prompting", "rsoups", "bone", "mod", "moc", "clp", "ric", "modpo")


def settings(entries=QUICK, variant="two", **changes):
    """The tiny config with these entries; `changes` name keys with __ for the dots."""
    config = tiny.catalogue("family").get_config(variant)
    flat = TINY | {"evaluate_front.points": POINTS} | {key.replace("__", "."): value for key, value in changes.items()}
    config.update_from_flattened_dict({key: value for key, value in flat.items() if key != "evaluate_front.points"})
    config.evaluate_front.points = flat["evaluate_front.points"]
    for name in list(config.methods):
        if name not in entries:
            del config.methods[name]
        elif "rollouts" in config.methods[name]:
            config.methods[name].rollouts = 4
    return config
