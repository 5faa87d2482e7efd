"""Rows of the input embedding that the head never samples, in a model that other programs load as it is.

Untying the head is not enough: a row of it gives some logit to every hidden state, and a row of zeros gives 0, which
may be more than that of a word. So the new rows get a logit that is far below all others, whatever the hidden state:

* A head with a bias (GPT-J) gets a very negative one.
* LayerNorm gives h = n * g + b with sum_i n_i = 0. So the row c / g gives c sum_i b_i / g_i, the same for every h.
* RMSNorm gives h = x g / rms(x), without a constant. The width grows by a few channels in which the residual stream
  always holds the constant c: the embedding writes it there, no layer reads or changes it, and only the new rows of the
  head read it, with a negative factor. With k channels of c the mean square over the larger width D' is
  (sum x^2 + k c^2) / D'. Scales times sqrt(D / D') and an epsilon of (D eps - k c^2) / D' undo this exactly. Outputs of
  layers have no c: where these are normalised too (Gemma, OLMo 2), c^2 is small beside epsilon, and the relative error
  is below 1 % of epsilon over the mean square. Norms of queries and keys see the new epsilon: both are scaled by
  sqrt(eps' / eps), which undoes it.
"""

import math

import flax.traverse_util
import numpy as np

from pjrlhf.errors import UserError
from pjrlhf.models.config import ModelConfig
from pjrlhf.types import Params

LOGIT = -1e4
LEAST_CAP = 20.0  # a smaller cap of logits would leave new rows a probability that matters
LARGEST_RMS = 1e3  # of the residual stream, up to which logits of new rows are at most LOGIT
READS = ("query", "key", "value", "gate", "up")  # linear layers that read the residual stream; the others write to it


def add_rows(config: ModelConfig, params: Params, rows: np.ndarray, model_type: str) -> tuple[ModelConfig, Params]:
    """A model with further rows of the input embedding, whose log-probs of the old tokens are those of `params`.

    Args:
      params: of the decoder.
      rows: [N, D], inputs for the token ids from `config.vocab_size` on.
      model_type: family of the model.

    Returns:
      (its config, its parameters as numpy arrays, float32). The head is not tied.

    Raises:
      UserError: the final norm has no bias by which new rows could be told from others, or logits are capped too low.
    """
    if config.logit_softcap is not None and config.logit_softcap < LEAST_CAP:
        raise UserError(
            f"--for vocabulary: this model caps logits at {config.logit_softcap:g}, so user tokens would be sampled; "
            "serve it with pjrlhf serve"
        )
    flat = {path: np.asarray(x, np.float32) for path, x in flax.traverse_util.flatten_dict(params, sep="/").items()}
    if config.tie_embeddings:
        flat["head/kernel"] = flat["embed/embedding"].T
    config = config.replace(vocab_size=config.vocab_size + len(rows), tie_embeddings=False)
    flat["embed/embedding"] = np.concatenate([flat["embed/embedding"], rows.astype(np.float32)])
    if config.norm == "layer":
        column = np.zeros(config.hidden_size, np.float32)
        if "head/bias" in flat:
            flat["head/bias"] = np.pad(flat["head/bias"], (0, len(rows)), constant_values=LOGIT)
        else:
            column = _below(flat["final_norm/scale"], flat["final_norm/bias"])
    else:
        config, flat, column = _widened(config, flat, model_type)
    head = np.repeat(column[:, None], len(rows), axis=1)
    flat["head/kernel"] = np.concatenate([flat["head/kernel"], head], axis=1)
    return config, flax.traverse_util.unflatten_dict(flat, sep="/")


def _below(scale: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """The row of a head, [D], whose logit is LOGIT for every output of a LayerNorm."""
    wide = scale.astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        total = float((bias / wide).sum())
    if not abs(total) >= 0.05 * math.sqrt(len(wide)):  # rounding would matter, or a scale is 0
        raise UserError(
            "--for vocabulary: the final norm of this model has too small a bias to keep user tokens from being "
            "sampled; serve it with pjrlhf serve"
        )
    return (LOGIT / total / wide).astype(np.float32)


def extra_width(config: ModelConfig, model_type: str) -> int:
    """k, the channels that are added to a model with RMSNorm.

    `transformers` wants a multiple of the heads for some families; for the others vLLM takes the width over the heads,
    rounded down, as the width of a head.
    """
    heads, width = config.num_heads, config.hidden_size
    if model_type in ("qwen2", "mistral", "olmo2") and (width + 8) // heads == width // heads:
        return 8
    return math.lcm(heads, 8)


def _sizes(config: ModelConfig, model_type: str) -> tuple[int, float, float]:
    """(k, the constant c, the new epsilon) of a model with RMSNorm."""
    extra, width = extra_width(config, model_type), config.hidden_size
    part = 0.5 if config.norm_placement == "before" else 0.0
    constant = math.sqrt((part or 0.01) * width * config.norm_eps / extra)
    return extra, constant, (1 - part) * width * config.norm_eps / (width + extra)


def widen(config: ModelConfig, model_type: str, path: str, x: np.ndarray) -> np.ndarray:
    """A kernel, a bias or a low-rank factor of the model that `add_rows` makes.

    Args:
      config: of the model before.
    """
    if config.norm == "layer":
        return x
    extra, _, eps = _sizes(config, model_type)
    *_, module, leaf = path.split("/")
    if config.qk_norm and module in ("query", "key") and leaf in ("kernel", "bias", "b"):
        x = x * np.float32(math.sqrt(eps / config.norm_eps))
    reads = module in READS
    axis = {"kernel": -2 if reads else -1, "a": -2 if reads else None, "b": None if reads else -1}.get(leaf)
    axis = -1 if leaf == "bias" and not reads else axis
    if axis is None:
        return x
    return np.pad(x, [(0, extra) if i == x.ndim + axis else (0, 0) for i in range(x.ndim)])


def _widened(
    config: ModelConfig, flat: dict[str, np.ndarray], model_type: str
) -> tuple[ModelConfig, dict[str, np.ndarray], np.ndarray]:
    """The model with k more channels; returns also the row [D + k] of the head that reads them."""
    before, width = config, config.hidden_size
    extra, constant, eps = _sizes(config, model_type)
    shrink = math.sqrt(width / (width + extra))
    offset = 1.0 if config.norm == "rms_plus_one" else 0.0
    # Both factors of the logit are as large as each other, so that 16 bits hold them.
    factor = math.sqrt(-LOGIT * LARGEST_RMS / (extra * constant))
    scaled = math.sqrt(width + extra) if config.scale_embeddings else 1.0

    def changed(path: str, x: np.ndarray) -> np.ndarray:
        *_, module, leaf = path.split("/")
        if path == "embed/embedding":
            x = x * np.float32(shrink) if before.scale_embeddings else x
            return np.pad(x, ((0, 0), (0, extra)), constant_values=constant / scaled)
        if path == "head/kernel":
            return np.pad(x, ((0, extra), (0, 0)))
        if module in ("query_norm", "key_norm"):
            return x
        if leaf == "scale":
            own = factor if module == "final_norm" else 0.0
            pad = [(0, 0)] * (x.ndim - 1) + [(0, extra)]
            return np.pad((x + offset) * np.float32(shrink), pad, constant_values=own) - np.float32(offset)
        return widen(before, model_type, path, x)

    column = np.concatenate([np.zeros(width, np.float32), np.full(extra, -factor, np.float32)])
    config = config.replace(hidden_size=width + extra, norm_eps=eps)
    return config, {path: changed(path, x) for path, x in flat.items()}, column
