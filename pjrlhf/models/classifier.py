"""Sequence classifiers in Hugging Face folders, classes `*ForSequenceClassification` of `transformers`.

Of a family that the decoder computes, a classifier is the decoder with a linear head without bias on the hidden state
of the last token, in place of the head over the vocabulary.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from pjrlhf.errors import UserError
from pjrlhf.models.config import ModelConfig
from pjrlhf.models.decoder import Decoder
from pjrlhf.models.families import FAMILIES, Family
from pjrlhf.models.folders import Folder, open_tensors, read_json, reading, weight_files
from pjrlhf.models.hf_config import read_config
from pjrlhf.models.huggingface import load_params
from pjrlhf.parallel.processes import to_devices
from pjrlhf.terminal import quiet_libraries
from pjrlhf.types import Array, DType, Params

SUFFIX = "ForSequenceClassification"  # of the classes
HEAD = "score.weight"  # of the classes of all families of the decoder, [labels, D]
# Their positions start after the id of the padding token.
LATE_POSITIONS = (
    "camembert",
    "ibert",
    "longformer",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
)
REGRESSION, SEVERAL, ONE = "regression", "multi_label_classification", "single_label_classification"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classifier:
    """What config.json says about a classifier.

    Attributes:
      folder: local.
      model_type, architecture: as `transformers` names them.
      labels: their names, by index.
      problem: "regression", "multi_label_classification" (labels independent of each other) or
        "single_label_classification" (labels that exclude each other). Where config.json does not say it, one label is
        a regression and several exclude each other, as in `transformers`.
      pad_id: the token that is never the last one of a text; None where there is none.
      vocab_size: the number of ids that the model knows.
      max_length: positions that the model has; None where config.json does not say.
    """

    folder: pathlib.Path
    model_type: str
    architecture: str
    labels: tuple[str, ...]
    problem: str
    pad_id: int | None
    vocab_size: int
    max_length: int | None

    @property
    def in_decoder(self) -> bool:
        """Whether our decoder computes the model."""
        return self.model_type in FAMILIES

    def last_token(self, ids: Sequence[int]) -> int:
        """The index of the token whose state is classified: the rightmost one that is not the padding token, also where
        a text ends with that token; 0 where there is no other.
        """
        return max((i for i, token in enumerate(ids) if token != self.pad_id), default=0)


def read_classifier(folder: Folder) -> Classifier:
    """The classifier in a local folder; no code of the folder runs, and no weights are loaded.

    Raises:
      UserError: no such folder, a missing or unreadable file, a model without the head of a classifier, or one that
        `transformers` does not know.
    """
    quiet_libraries()
    from transformers import AutoConfig

    folder = pathlib.Path(folder)
    source = folder / "config.json"
    if not folder.is_dir():
        raise UserError(f"classifier {folder}: no such folder; name one with config.json, safetensors and a tokenizer")
    raw = read_json(source)
    try:
        config: Any = AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
        labels, text = dict(config.id2label), config.get_text_config()
        pad_id, vocab_size = text.pad_token_id, text.vocab_size
        max_length = getattr(text, "max_position_embeddings", None)
        if config.model_type in LATE_POSITIONS:
            max_length -= pad_id + 1
        problem = config.problem_type or (REGRESSION if len(labels) == 1 else ONE)
    except Exception as error:  # the library has no narrower one
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"{source}: is no classifier that transformers can read ({reason}); use a model of one of its classes "
            f"*{SUFFIX}, whose code it has itself"
        ) from error
    if sorted(labels) != list(range(len(labels))):
        raise UserError(f"{source}: id2label has the ids {sorted(labels)}; number the labels from 0 on")
    architectures = raw.get("architectures") or [""]
    found = Classifier(
        folder=folder,
        model_type=config.model_type,
        architecture=str(architectures[0]),
        labels=tuple(str(labels[i]) for i in range(len(labels))),
        problem=problem,
        pad_id=pad_id,
        vocab_size=vocab_size,
        max_length=max_length,
    )
    _check_head(found)
    return found


def _check_head(classifier: Classifier) -> None:
    """Raises UserError where the weights have no head, or one of other labels."""
    folder, names = classifier.folder, ", ".join(classifier.labels)
    other = UserError(
        f"classifier {folder}: has no score head, its class is {classifier.architecture or 'not named'}; name the "
        f"folder of a *{SUFFIX}"
    )
    files = weight_files(folder)
    if not classifier.in_decoder:
        for file in files:
            with reading(file):
                file.stat()
        if not classifier.architecture.endswith(SUFFIX):
            raise other
        return
    read_config(folder)
    with open_tensors(files, FAMILIES[classifier.model_type].prefix) as tensors:
        if HEAD not in tensors:
            raise other
        outputs = tensors[HEAD].get_slice(HEAD).get_shape()[0]
    if outputs != len(classifier.labels):
        raise UserError(
            f"classifier {folder}: its head has {outputs} outputs and config.json {len(classifier.labels)} labels "
            f"({names}); use the config.json of these weights"
        )


def load_classifier(
    classifier: Classifier,
    dtype: DType = jnp.float32,
    place: Callable[[str, tuple[int, ...]], jax.sharding.Sharding] | None = None,
) -> tuple[ModelConfig, Params]:
    """(dimensions of the decoder, parameters) of a classifier that our decoder computes.

    Args:
      dtype: of the decoder's leaves.
      place: see `huggingface.load_params`.

    Returns:
      "decoder", the tree of the decoder without a head over the vocabulary, and "score", float32 [D, labels].

    Raises:
      UserError: a missing, unused or wrongly shaped tensor, or numbers that are not finite.
    """
    folder, family = classifier.folder, FAMILIES[classifier.model_type]
    config = read_config(folder)
    config = config.replace(tie_embeddings=True, biases=tuple(name for name in config.biases if name != "head"))
    decoder = load_params(folder, config, dtype, place, family=_without_head(family))
    with open_tensors(weight_files(folder), family.prefix) as tensors, reading(folder):
        score = jnp.asarray(tensors[HEAD].get_tensor(HEAD).T, jnp.float32)
    if score.shape != (config.hidden_size, len(classifier.labels)) or not jnp.isfinite(score).all():
        raise UserError(
            f"{folder}: {HEAD} of shape {score.T.shape} holds no finite weights of {len(classifier.labels)} labels and "
            f"width {config.hidden_size}; restore the weights"
        )
    score = score if place is None else to_devices(score, place("score", score.shape))
    return config, {"decoder": decoder, "score": score}


def _without_head(family: Family) -> Family:
    """The table of a family whose classifiers have a head of their own, and may have kept that of a language model."""
    return dataclasses.replace(family, unused=(HEAD, *(f"{family.modules['head']}.{x}" for x in ("weight", "bias"))))


@functools.partial(jax.jit, static_argnums=0)
def class_logits(
    model: Decoder, params: Params, tokens: Int[Array, "B T"], valid: Bool[Array, "B T"], last: Int[Array, " B"]
) -> Float[Array, "B labels"]:
    """Float32 logits of all labels.

    Args:
      params: see `load_classifier`.
      valid: False on padding.
      last: see `Classifier.last_token`, counted with the padding on the left.
    """
    hidden, _ = model.apply({"params": params["decoder"]}, tokens, valid)
    state = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    return state.astype(jnp.float32) @ params["score"]
