"""Rewards from sequence classifiers: `{"kind": "classifier", "path": FOLDER, ...}`, see `ClassifierSettings`.

Families that our decoder computes run on the mesh of the run, the others in torch, in a process of their own.
"""

import dataclasses
import functools
import threading
from collections.abc import Collection, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Bool, Float, Int

from pjrlhf.data.batching import buckets, pad_right
from pjrlhf.data.messages import Prompt
from pjrlhf.errors import UserError
from pjrlhf.models.attention import choose
from pjrlhf.models.classifier import (
    ONE,
    REGRESSION,
    SEVERAL,
    Classifier,
    class_logits,
    load_classifier,
    read_classifier,
)
from pjrlhf.models.decoder import Decoder
from pjrlhf.models.hub import hub_name, model_folder
from pjrlhf.parallel.mesh import batch_sharding, leaf_sharding
from pjrlhf.rewards.inputs import SIDES, Inputs, Row
from pjrlhf.rewards.sources import SOURCES, RewardFunction, SourceContext
from pjrlhf.rewards.torch_worker import TorchWorker, check_torch
from pjrlhf.runtime.devices import Devices
from pjrlhf.runtime.scorer import Scorer
from pjrlhf.settings import Settings, parse, setting

SHORTEST = 32  # tokens to which inputs are padded at least; further lengths are its doubles
ACTIVATIONS = ("raw", "sigmoid", "softmax", "log_probability", "log_odds")
_making = threading.Lock()
DEFAULTS = {REGRESSION: "raw", SEVERAL: "sigmoid", ONE: "softmax"}  # problem -> activation


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifierSettings(Settings):
    """A sequence classifier as a reward source."""

    path: str = setting("", "Hugging Face folder of a *ForSequenceClassification, or its name on the hub", path=True)
    label: str | int = setting("", "name or index of the label whose score is the reward; not needed for a single one")
    activation: str = setting(
        "",
        "of the logits: raw; sigmoid or softmax, the probability; log_probability; log_odds, log p - log(1 - p). By "
        "default raw for one label, sigmoid for independent labels, softmax for labels that exclude each other",
        choices=("", *ACTIVATIONS),
    )
    template: str | tuple[str, ...] = setting(
        "",
        "its input: chat, a format of rewards/inputs.py, a text with {prompt} and {answer}, or two such texts; by "
        "default chat where its tokenizer has a chat template, else pair",
    )
    truncate: str = setting(
        "", "side on which long inputs are cut; left, but right where the answer comes first", choices=("", *SIDES)
    )
    max_length: int = setting(0, "tokens of an input; 0 is what model and tokenizer allow", low=0, high=2**24)
    dtype: str = setting("float32", "of weights and activations", choices=("float32", "bfloat16"))
    batch_size: int = setting(0, "inputs at once; 0 is sample_rows", low=0, high=2**20)
    device: str = setting("cpu", "torch device of models that run in torch")


class Model(Protocol):
    """What gives the float32 logits [N, labels] of N rows of tokens."""

    def __call__(self, rows: Sequence[Row]) -> Float[np.ndarray, "N labels"]: ...


class ClassifierReward:
    """The score of a label of a classifier.

    Args:
      objective: the reward, for messages.
      context: of the run.

    Raises:
      UserError: no such folder, one without a classifier, no choice among several labels, an unknown label, a template
        that cannot be used, or torch is needed and not installed.
    """

    def __init__(self, settings: ClassifierSettings, objective: str, context: SourceContext):
        self.settings, self.context = settings, context
        name = f"rewards.{objective}"
        if not settings.path:
            raise UserError(f"{name}.path: names no classifier; set it to a Hugging Face folder")
        self.classifier = read_classifier(model_folder(settings.path))
        self.label = _label(self.classifier, settings.label, name)
        self.activation = settings.activation or DEFAULTS[self.classifier.problem]
        if self.activation in ("softmax", "log_odds") and len(self.classifier.labels) == 1:
            raise UserError(
                f"{name}.activation: {self.activation} of the only label of {settings.path} says nothing; choose raw "
                "or sigmoid"
            )
        if not self.classifier.in_decoder:
            check_torch(self.classifier.folder, self.classifier.architecture)
        c = self.classifier
        self.inputs = Inputs(
            name, c.folder, settings.template, settings.max_length, c.max_length, c.vocab_size, settings.truncate
        )
        if context.devices is not None:
            logging.info(
                "%s: %s of the label %r of %s%s; its input is %s",
                *(name, self.activation, c.labels[self.label], settings.path),
                "" if settings.activation else f", the default where the problem is {c.problem}",
                " and ".join(map(repr, self.inputs.parts)),
            )

    @property
    def on_all_processes(self) -> bool:
        return self.classifier.in_decoder

    @property
    def waits(self) -> bool:
        return not self.classifier.in_decoder

    def check_columns(self, columns: Collection[str]) -> None:
        """Raises UserError where the template shows another column than these of the records."""
        self.inputs.check_columns(columns)

    def __call__(
        self, prompts: Sequence[Prompt], completions: Sequence[str], **columns: Sequence[Any]
    ) -> list[float | None]:
        """Rewards of N answers; None for an input without a token, and where a column of the template has no value.

        Raises:
          UserError: the weights cannot be loaded, or the model fails.
        """
        rows = self.inputs(prompts, completions, columns)
        known = [i for i, row in enumerate(rows) if row["input_ids"]]
        found: list[float | None] = [None] * len(rows)
        if known:
            logits = self._model()([rows[i] for i in known])
            for i, score in zip(
                known, activated(logits, self.label, self.activation, self.classifier.problem), strict=True
            ):
                found[i] = float(score)
        return found

    def _model(self) -> Model:
        """The model, which rewards from the same folder share."""
        s, shared = self.settings, self.context.shared
        key = "classifier", s.path, s.dtype, s.batch_size, s.device
        with _making:  # sources that wait for others are asked in threads
            if key not in shared:
                shared[key] = self._make(s.batch_size or self.context.rows)
            return shared[key]

    def _make(self, size: int) -> Model:
        s, devices = self.settings, self.context.devices
        if not self.classifier.in_decoder:
            return TorchWorker(self.classifier.folder, s.dtype, s.device, size, _title(s.path))
        if devices is None:
            raise UserError(f"classifier {s.path}: runs on the mesh of a run; use it as a reward in a config")
        return MeshClassifier(self.classifier, s.dtype, devices(), size, _title(s.path))


def _title(path: str) -> str:
    """Of a progress bar; the folder of a model from elsewhere may have a name that says nothing."""
    return f"classifier {path.rstrip('/').rpartition('/')[2]}"


def _label(classifier: Classifier, label: str | int, name: str) -> int:
    """The index of a label; UserError where there is none, or no choice among several."""
    labels = classifier.labels
    listed = ", ".join(f"{text!r} ({i})" for i, text in enumerate(labels))
    if label == "":
        if len(labels) == 1:
            return 0
        raise UserError(
            f"{name}.label: is not set, and {classifier.folder} has {len(labels)} labels; choose one of {listed}"
        )
    if isinstance(label, str) and label in labels:
        return labels.index(label)
    index = int(label) if str(label).isdecimal() else -1
    if not 0 <= index < len(labels):
        raise UserError(f"{name}.label: {classifier.folder} has no label {label!r}; choose one of {listed}")
    return index


def activated(
    logits: Float[np.ndarray, "N labels"], label: int, activation: str, problem: str
) -> Float[np.ndarray, " N"]:
    """The score of a label from the logits of all, float64.

    Args:
      activation: one of `ACTIVATIONS`. Probabilities are those of a softmax where labels exclude each other, and of a
        sigmoid elsewhere.
      problem: see `models.classifier.Classifier`.
    """
    logits = logits.astype(np.float64)
    own = logits[:, label]
    exclusive = problem == ONE and logits.shape[1] > 1
    if activation == "raw":
        return own
    if activation == "sigmoid":
        return np.exp(-np.logaddexp(0.0, -own))
    log_softmax = own - np.logaddexp.reduce(logits, axis=1)
    if activation == "softmax":
        return np.exp(log_softmax)
    if activation == "log_probability":
        return log_softmax if exclusive else -np.logaddexp(0.0, -own)
    others = np.delete(logits, label, axis=1)
    return own - np.logaddexp.reduce(others, axis=1) if exclusive else own


class MeshClassifier:
    """A classifier that our decoder computes, sharded over the mesh like every model.

    Args:
      dtype: of weights and activations.
      size: rows of a chunk at most.
      title: of the progress.

    Raises:
      UserError: the weights cannot be loaded.
    """

    def __init__(self, classifier: Classifier, dtype: str, devices: Devices, size: int, title: str):
        mesh = devices.mesh
        self.classifier, self.devices, self.size, self.title = classifier, devices, size, title
        place = functools.partial(leaf_sharding, mesh)
        config, self.params = load_classifier(classifier, jnp.dtype(dtype), place)
        self.model = Decoder(
            config,
            dtype=jnp.dtype(dtype),
            attention=choose("auto", mesh.devices.flat[0].platform, dtype, mesh.size),
            batch_sharding=batch_sharding(mesh) if mesh.size > 1 else None,
        )
        self._lock = threading.Lock()

    def __call__(self, rows: Sequence[Row]) -> Float[np.ndarray, "N labels"]:
        """Float32 logits of N rows, in their order. Chunks have few shapes: all have as many rows, and lengths are
        powers of two.
        """
        ids = [row["input_ids"] for row in rows]
        size = min(self.size, 1 << (len(ids) - 1).bit_length())
        with self._lock:
            return Scorer(self.devices, size)(self.title, ids, self._collate, self._score, [len(one) for one in ids])

    def _collate(
        self, rows: list[list[int]]
    ) -> tuple[Int[np.ndarray, "B T"], Bool[np.ndarray, "B T"], Int[np.ndarray, " B"]]:
        lengths = [SHORTEST * 2**i for i in range(20)]
        limit = self.classifier.max_length
        if limit is not None:
            lengths = [*(length for length in lengths if length < limit), limit]
        length = int(buckets([max(map(len, rows))], lengths)[0])
        tokens, valid = pad_right(rows, length, 0)
        return tokens, valid, np.array([self.classifier.last_token(row) for row in rows], np.int32)

    def _score(self, batch: Any) -> jax.Array:
        return class_logits(self.model, self.params, *batch)


@SOURCES.register("classifier")
def by_classifier(objective: str, context: SourceContext, **settings: Any) -> RewardFunction:
    """The score of a classifier in a Hugging Face folder; for settings see `ClassifierSettings`.

    A model on the hub is fetched when a run starts, and checked then.
    """
    own = parse(ClassifierSettings, settings, f"rewards.{objective}")
    if context.devices is None and hub_name(own.path):
        return _not_fetched
    return ClassifierReward(own, objective, context)


def _not_fetched(prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float | None]:
    raise UserError("classifier: a model on the hub is read in a run; use it as a reward in a config")
