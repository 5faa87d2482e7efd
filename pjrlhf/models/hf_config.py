"""Conversion between config.json of a Hugging Face folder and `ModelConfig`, through the tables of `families`.

Settings that the decoder cannot compute raise an error. Settings that it does not need, such as dropout, are ignored.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp

from pjrlhf.errors import UserError
from pjrlhf.models.config import LINEARS, ModelConfig, RopeScaling
from pjrlhf.models.families import Family, get_family
from pjrlhf.models.folders import Folder, equal_values, open_tensors, read_json, weight_files
from pjrlhf.models.generation import GENERATION, TOKEN_IDS, read_generation
from pjrlhf.types import DType, Json

# Type of RoPE scaling -> our name of each of its numbers -> theirs.
ROPE_FIELDS = {
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_position": "original_max_position_embeddings",
    },
}
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "max_length",
)
MOST_LAYERS = 10_000
# Fields in which null means "off"; in all others it means the default.
NULLABLE = ("attention_softcap", "logit_softcap")
LOCAL, GLOBAL = "sliding_attention", "full_attention"


def read_eos_ids(folder: Folder) -> list[int]:
    """All tokens that generation_config.json and config.json name as EOS: any of them ends an answer.

    Raises:
      UserError: an unreadable file, or a value that is neither an id nor a list of ids.
    """
    found: list[int] = []
    for file in (pathlib.Path(folder) / name for name in (GENERATION, "config.json")):
        value = read_json(file).get("eos_token_id") if file.is_file() else None
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(i) is int for i in ids):
            raise UserError(f"{file}: eos_token_id={value!r} is not a token id, or a list of ids; correct it")
        found += [i for i in ids if i >= 0]  # some configs write -1 for a token that the model does not have
    return list(dict.fromkeys(found))


def generation_config(
    folder: Folder | None, settings: Mapping[str, Json] | None, token_ids: Mapping[str, Json], rows: int | None = None
) -> dict[str, Json]:
    """The content of generation_config.json for a model derived from that in `folder`.

    Args:
      settings: of generation, such as temperature; those of the folder where None.
      token_ids: take the place of the settings of these names, where they are not None.
      rows: ids that the model knows.

    Raises:
      UserError: an unreadable file, or a setting of the folder that is none, see `generation.read_generation`.
    """
    if settings is None:
        settings = {} if folder is None else read_generation(folder, rows)
    return {**settings, **{name: value for name, value in token_ids.items() if value is not None}}


def read_config(folder: Folder) -> ModelConfig:
    """The dimensions and switches of the model in `folder`, from its config.json.

    Reads both spellings of RoPE: top-level `rope_theta` / `rope_scaling`, and `rope_parameters` of transformers 5.
    Where the folder has weights, looks into them too: a head that differs from the embedding is a head of its own,
    whatever `tie_word_embeddings` says (as in transformers 5).

    Raises:
      UserError: a missing or unreadable file, a missing key, a setting that the decoder does not support, or sizes that
        no tensor of the weights has.
    """
    folder = pathlib.Path(folder)
    source = folder / "config.json"
    raw = read_json(source)
    config = _parse(raw, source)
    files = weight_files(folder)
    if not all(file.is_file() for file in files):  # a config without weights, or one whose weights cannot be loaded
        return config
    stats = tuple((file, stat.st_ino, stat.st_mtime_ns, stat.st_size) for file in files for stat in [file.stat()])
    family = get_family(raw["model_type"], source)
    weights = _survey(stats, family.prefix, f"{family.modules['embed']}.weight", f"{family.modules['head']}.weight")
    # Before anything of these sizes is built.
    for name in SIZES:
        bound = weights.tensors if name == "num_layers" else weights.numbers
        if getattr(config, name) > bound and (name != "max_length" or config.positions == "learned"):
            raise UserError(
                f"{source}: {family.fields.get(name, name)} is {getattr(config, name)}, but the weights hold "
                f"{weights.tensors} tensors of {weights.numbers} numbers in all; use the config.json of these weights"
            )
    return config.replace(tie_embeddings=False) if config.tie_embeddings and weights.own_head else config


class _Survey(NamedTuple):
    """What weights hold: how many tensors, how many numbers, and whether a head differs from the embedding."""

    tensors: int
    numbers: int
    own_head: bool


@functools.lru_cache(maxsize=64)
def _survey(stats: tuple[tuple[pathlib.Path, int, int, int], ...], prefix: str, embed: str, head: str) -> _Survey:
    """Looks into weight files, once as long as they are unchanged: `stats` are path, inode, time and size of each."""
    with open_tensors([file for file, *_ in stats], prefix) as files:
        shapes = {name: files[name].get_slice(name).get_shape() for name in files}
        numbers = sum(map(math.prod, shapes.values()))
        own_head = {embed, head} <= shapes.keys() and (
            shapes[embed] != shapes[head] or not equal_values(files[embed].flat(embed), files[head].flat(head))
        )
    return _Survey(len(shapes), numbers, own_head)


def _parse(raw: Mapping[str, Json], source: object) -> ModelConfig:
    try:
        return _parse_family(raw, get_family(raw.get("model_type"), source), source)
    except UserError:
        raise
    except (TypeError, ValueError, AttributeError, OverflowError) as e:  # a wrong value, perhaps of a wrong type
        raise UserError(f"{source}: {e}; copy the config.json that came with the weights") from e


def _parse_family(raw: Mapping[str, Json], family: Family, source: object) -> ModelConfig:
    if raw.get("quantization_config"):
        raise UserError(f"{source}: quantization_config is not supported; use weights that are not quantised")
    for name, value in family.fixed.items():
        if (raw.get(name, value) or None) != (value or None):
            raise UserError(f"{source}: {name}={raw[name]!r} is not supported; use a model with {name}={value!r}")

    def setting(theirs: str) -> Json:
        value = raw.get(theirs)
        return family.defaults.get(theirs) if value is None else value

    values = {ours: setting(theirs) for ours, theirs in family.fields.items()}
    values |= {ours: raw[family.fields[ours]] for ours in NULLABLE if family.fields.get(ours) in raw}
    if type(values["hidden_size"]) is type(values["num_heads"]) is int and values["num_heads"]:
        values["head_dim"] = values.get("head_dim") or values["hidden_size"] // values["num_heads"]
        values["num_kv_heads"] = values.get("num_kv_heads") or values["num_heads"]
        if family.fields["intermediate_size"] == "n_inner":
            values["intermediate_size"] = values["intermediate_size"] or 4 * values["hidden_size"]
    missing = [theirs for ours, theirs in family.fields.items() if values[ours] is None and ours not in NULLABLE]
    if missing:
        raise UserError(f"{source}: the key {missing[0]!r} is missing; copy the config.json that came with the weights")
    for name in SIZES:
        limit = MOST_LAYERS if name == "num_layers" else 2**31 - 1
        if type(values[name]) is not int or not 1 <= values[name] <= limit:
            theirs = family.fields.get(name, name)
            raise UserError(
                f"{source}: {theirs}={values[name]!r} is no whole number from 1 to {limit}; copy the config.json that "
                "came with the weights"
            )
    activation = setting(family.activation)
    if activation not in ACTIVATIONS:
        raise UserError(
            f"{source}: {family.activation}={activation!r} is not supported; "
            f"use a model with one of {', '.join(ACTIVATIONS)}"
        )
    flagged = [names for flag, names in family.biases.items() if setting(flag)]
    biases = {*family.switches.get("biases", ()), *(name for names in flagged for name in names)}
    values |= family.switches
    values |= {"activation": ACTIVATIONS[activation], "biases": tuple(name for name in LINEARS if name in biases)}
    if "use_parallel_residual" in family.defaults:
        values["residual"] = "parallel" if setting("use_parallel_residual") else "sequential"
    values["windows"] = _read_windows(raw, family, values["num_layers"], source)
    values |= _read_rope(raw, family, values["head_dim"], bool(values["windows"]), source)
    return ModelConfig(**values)


def _read_windows(raw: Mapping[str, Json], family: Family, layers: int, source: object) -> tuple[int, ...]:
    if family.sliding is None:
        return ()
    size = raw.get("sliding_window", family.defaults["sliding_window"])
    if raw.get("layer_types"):
        if unknown := {*raw["layer_types"]} - {LOCAL, GLOBAL}:
            raise UserError(
                f"{source}: layer type {min(unknown)!r} is not supported; use a model with {LOCAL} and {GLOBAL} alone"
            )
        sliding = [kind == LOCAL for kind in raw["layer_types"]]
        if any(sliding) and "use_sliding_window" in family.defaults and not raw.get("use_sliding_window"):
            raise UserError(
                f"{source}: layer_types contradicts use_sliding_window; keep the one the model was trained with"
            )
    elif size is None and "layer_types" in family.fixed:
        return ()
    else:
        sliding = family.sliding(raw, layers)
    if not any(sliding):
        return ()
    if not size:
        raise UserError(
            f"{source}: the key 'sliding_window' is missing; copy the config.json that came with the weights"
        )
    return tuple(size if local else 0 for local in sliding)


def _read_rope(
    raw: Mapping[str, Json], family: Family, head_dim: int, windows: bool, source: object
) -> dict[str, Json]:
    """The fields of `ModelConfig` about rotary embeddings."""
    found = {name: _settings_of(raw, name, source) for name in ("rope_scaling", "rope_parameters")}
    given = {name: block for name, block in found.items() if block}
    if not family.rope:
        if given:
            raise UserError(f"{source}: {next(iter(given))} is not supported; use a model of this type without it")
        return {}
    if family.rope == "by_layer_type":
        both = given.get("rope_parameters", {})
        if both.keys() - {LOCAL, GLOBAL}:
            raise UserError(
                f"{source}: rope_parameters must have the keys {LOCAL} and {GLOBAL}; export the model again"
            )
        old = {"rope_theta": raw.get("rope_theta"), **given.get("rope_scaling", {})}
        theta, scaling = _one_rope([old, _settings_of(both, GLOBAL, source)], 1_000_000.0, source)
        old = {"rope_theta": raw.get("rope_local_base_freq")}
        local, local_scaling = _one_rope([old, _settings_of(both, LOCAL, source)], 10_000.0, source)
        if local_scaling:
            raise UserError(f"{source}: scaled rope of {LOCAL} layers is not supported; use a model that scales none")
        return {"rope_theta": theta, "rope_scaling": scaling, "local_rope_theta": local if windows else None}
    old = {"rope_theta": raw.get("rotary_emb_base" if family.rope == "neox" else "rope_theta")}
    theta, scaling = _one_rope([old, *given.values()], 10_000.0, source)
    stated = [block.get("partial_rotary_factor") for block in (raw, *given.values())]
    if family.rope == "neox":
        stated.append(raw.get("rotary_pct"))
    fractions = {float(value) for value in stated if value is not None}
    fraction = fractions.pop() if fractions else 0.25 if family.rope == "neox" else 1.0
    if fractions or (family.rope != "neox" and fraction != 1.0):
        raise UserError(f"{source}: partial_rotary_factor is not supported; use a model that rotates whole heads")
    width = {"rotary_dim": int(head_dim * fraction)} if family.rope == "neox" else {}
    return {"rope_theta": theta, "rope_scaling": scaling, **width}


def _settings_of(block: Mapping[str, Json], name: str, source: object) -> Mapping[str, Json]:
    """The JSON object `name` of a block of settings; {} where it is absent, null or empty."""
    found = block.get(name) or {}
    if not isinstance(found, Mapping):
        raise UserError(f"{source}: {name} is no JSON object; copy the config.json that came with the weights")
    return found


def _one_rope(blocks: list[Mapping[str, Json]], theta: float, source: object) -> tuple[float, RopeScaling | None]:
    """(theta, scaling) that all `blocks` of settings agree on; the default `theta` where none has one."""
    thetas = {float(block["rope_theta"]) for block in blocks if block.get("rope_theta") is not None}
    scalings = {_read_scaling(block, source) for block in blocks if block.keys() - {"rope_theta"}}
    if len(thetas) > 1 or len(scalings) > 1:
        raise UserError(
            f"{source}: rope_parameters contradicts rope_theta or rope_scaling; keep the one the model was trained with"
        )
    return next(iter(thetas), theta), next(iter(scalings), None)


def _read_scaling(block: Mapping[str, Json], source: object) -> RopeScaling | None:
    kind = block.get("rope_type", block.get("type", "default"))
    if kind not in ("default", *ROPE_FIELDS):
        raise UserError(
            f"{source}: rope type {kind!r} is not supported; use a model with rope type default, "
            f"{' or '.join(ROPE_FIELDS)}"
        )
    fields = ROPE_FIELDS.get(kind, {})
    missing = [theirs for theirs in fields.values() if theirs not in block]
    if missing:
        raise UserError(
            f"{source}: the rope key {missing[0]!r} is missing; copy the config.json that came with the weights"
        )
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *fields.values()}
    if unknown := sorted(name for name, value in block.items() if name not in known and value is not None):
        raise UserError(
            f"{source}: the rope key {unknown[0]!r} is not supported for rope type {kind!r}; use a model without it"
        )
    return RopeScaling(**{ours: block[theirs] for ours, theirs in fields.items()}) if fields else None


def config_to_hf(
    config: ModelConfig, *, model_type: str = "llama", dtype: DType = jnp.float32, **token_ids: Json
) -> dict[str, Json]:
    """The content of config.json, with both spellings of RoPE and of the dtype.

    Args:
      token_ids: bos_token_id, eos_token_id, pad_token_id (an int, or a list for eos). Absent ones are written as null,
        so that no library fills in its default.

    Raises:
      UserError: an unknown token id, or a `model_type` that cannot express `config`.
    """
    if unknown := set(token_ids) - set(TOKEN_IDS):
        raise UserError(f"token_ids: {sorted(unknown)} is unknown; choose from {', '.join(TOKEN_IDS)}")
    family = get_family(model_type, "config")
    name = jnp.dtype(dtype).name
    activations = {"silu": "silu", "gelu": "gelu", "gelu_tanh": family.gelu_tanh}
    raw = {
        "architectures": [family.architecture],
        "model_type": model_type,
        **{theirs: getattr(config, ours) for ours, theirs in family.fields.items()},
        **{theirs: value for theirs, value in family.fixed.items() if value is not None},
        family.activation: activations[config.activation],
        **{flag: set(names) <= set(config.biases) for flag, names in family.biases.items()},
        **_write_windows(config, family),
        **_write_rope(config, family),
        "dtype": name,
        "torch_dtype": name,
        **{name: token_ids.get(name) for name in TOKEN_IDS},
    }
    if "use_parallel_residual" in family.defaults:
        raw["use_parallel_residual"] = config.residual == "parallel"
    again = _parse(raw, f"config.json of type {model_type!r}")
    for field in dataclasses.fields(ModelConfig):
        want, have = getattr(config, field.name), getattr(again, field.name)
        if want != have:
            raise UserError(
                f"config: a model of type {model_type!r} has {field.name}={have!r}, not {want!r}; "
                "export it as the type it came from"
            )
    return raw


def _write_windows(config: ModelConfig, family: Family) -> dict[str, Json]:
    if family.sliding is None:
        return {}
    size = max(config.windows, default=0)
    if "layer_types" in family.fixed:
        return {"sliding_window": size or None}
    sliding = [window > 0 for window in config.windows] or [False] * config.num_layers
    kinds = {"layer_types": [LOCAL if local else GLOBAL for local in sliding]}
    if "use_sliding_window" not in family.defaults:
        return kinds | {"sliding_window": size or family.defaults["sliding_window"]}
    first = sliding.index(True) if any(sliding) else config.num_layers
    return kinds | {"sliding_window": size or None, "use_sliding_window": size > 0, "max_window_layers": first}


def _write_rope(config: ModelConfig, family: Family) -> dict[str, Json]:
    if not family.rope:
        return {}
    scaling = None
    if config.rope_scaling is not None:
        kind = "linear" if config.rope_scaling.low_freq_factor is None else "llama3"
        scaling = {theirs: getattr(config.rope_scaling, ours) for ours, theirs in ROPE_FIELDS[kind].items()}
        scaling["rope_type"] = kind
    new = {"rope_theta": config.rope_theta, **(scaling or {"rope_type": "default"})}
    if family.rope == "neox":
        fraction = (config.rotary_dim or config.head_dim) / config.head_dim
        new["partial_rotary_factor"] = fraction
        old = {"rotary_emb_base": config.rope_theta, "rotary_pct": fraction}
    elif family.rope == "by_layer_type":
        local = config.local_rope_theta or config.rope_theta
        old = {"rope_theta": config.rope_theta, "rope_local_base_freq": local}
        new = {GLOBAL: new, LOCAL: {"rope_theta": local, "rope_type": "default"}}
    else:
        old = {"rope_theta": config.rope_theta}
    return {**old, "rope_scaling": scaling, "rope_parameters": new}
