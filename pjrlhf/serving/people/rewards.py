"""People as reward models know them (stage `user_models`): the state of a person comes from the comparisons that the
server keeps, and scores answers. The base alone writes answers.

A person of the training of the run has no state here: a server knows what people tell it.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pjrlhf.data.comparisons import SIDES
from pjrlhf.data.messages import Prompt
from pjrlhf.data.records import RecordError
from pjrlhf.data.schema import Example
from pjrlhf.data.token_table import Lengths, TokenRow, in_room
from pjrlhf.errors import UserError
from pjrlhf.language_model import LanguageModel, load_base
from pjrlhf.models.config import ModelConfig
from pjrlhf.models.storage import load_tree
from pjrlhf.models.user_models.base import Comparisons, UserRewards
from pjrlhf.models.user_models.kinds import user_model
from pjrlhf.rollout.features import STATES, Reduction, answer_states
from pjrlhf.serving.people.kept import Kept
from pjrlhf.serving.people.reading import Reader
from pjrlhf.types import Array, Params

FILE = "model.safetensors"
# Texts of people who are served are cut rather than refused.
LONG = {"long_prompt": "truncate_left", "long_completion": "truncate"}
LEAST = 16  # comparisons of a context of a model that fits a row, which are padded to powers of two


@dataclasses.dataclass(frozen=True)
class Rewarded:
    """Stands where a server has the user model of a policy: nobody's answers are their own here.

    Attributes:
      kind: of the reward model.
      personal: whether it differs between people.
    """

    kind: str
    personal: bool
    mixes: bool = False
    num_tokens: int = 0
    policies: int = 1

    def apply(self, params: Params, users: Array) -> tuple[None, None]:
        return None, None


class Scorer:
    """Makes the state of a person from comparisons, and scores answers.

    Args:
      model, params: the reward model; of a table the generic row alone.
      reduction: of the features.
      states: which features of `rollout.features.STATES` it has.
      context: comparisons that a model whose source is not an id was trained to read; the last ones count.
      base: with its tokenizer.
      chat: text prompts are the first message of a conversation.
      lengths: how texts are cut.
    """

    def __init__(
        self,
        model: UserRewards,
        params: Params,
        reduction: Reduction,
        states: Sequence[str],
        context: int,
        base: LanguageModel,
        chat: bool,
        lengths: Lengths,
    ):
        self.model, self.params, self.reduction, self.context = model, params, reduction, context
        self.reader = Reader(base.tokenizer, chat, lengths)
        self._columns = [STATES.index(name) for name in states]
        self._width = base.backbone.model.config.hidden_size
        self._states = Kept(base.backbone, base.tokenizer.pad_id, answer_states)

    @property
    def variance(self) -> float:
        """Of a person's numbers around the generic ones, by the prior of the model; 1 where it has none."""
        return 1.0 / (getattr(self.model, "precision", 1.0) or 1.0)

    @functools.cached_property
    def generic(self) -> Params:
        """The state of somebody who has told nothing."""
        return self._met(*np.zeros((2, 0, self.reduction.axes.shape[1]), np.float32))

    # ---- as `fit.Fitter`

    def check(self, example: Example) -> None:
        """Raises RecordError or UserError for a comparison that the model cannot read."""
        self.reader.encoded(example)

    def fit(self, start: Params, examples: Sequence[Example]) -> Params:
        """The state after comparisons, float32 leaves on the host; what the base cannot read is left out."""
        rows = self.reader.rows(examples)
        if self.model.slots.source != "id":
            rows = rows[-self.context :]
        return self._met(*self._sides(rows))

    def margins(self, row: Params, examples: Sequence[Example]) -> tuple[np.ndarray, np.ndarray]:
        """(margins float32 [N], their gradients with respect to the state [N, S]) of comparisons.

        Raises:
          UserError: the state is no row with a prior, so that what is not known about it cannot be told.
        """
        if self.model.slots.source != "id":
            raise UserError(
                f"pairs: this reward model reads a person from {self.model.slots.source} and cannot say which pair "
                "tells most; ask pairs in any order, or serve an entry whose source is an id"
            )
        chosen, rejected = self._sides(self.reader.rows(examples))
        if not len(chosen):
            return np.zeros(0, np.float32), np.zeros((0, sum(x.size for x in jax.tree.leaves(row))), np.float32)
        pairs = Comparisons(*map(jnp.asarray, (chosen, rejected, np.ones(len(chosen)))))
        margins, slopes = _margins(self.model, self.params, row, pairs)
        flat = [np.asarray(x).reshape(len(chosen), -1) for x in jax.tree.leaves(slopes)]
        return np.asarray(margins), np.concatenate(flat, axis=1)

    def warm_up(self, likely: Sequence[Example] = ()) -> Iterator[None]:
        """Makes the state of somebody with one comparison, whatever is likely."""
        token = self.reader.tokenizer.eos_ids[0]
        features = self._features([{"prompt": [token], "completion": [token]}])
        yield
        self._met(features, features)
        yield

    # ---- scores

    def rewards(self, state: Params, prompt: Prompt, answers: Sequence[str]) -> list[float]:
        """Rewards of answers to a prompt.

        Raises:
          UserError: a text that the base cannot read.
        """
        rows: list[TokenRow] = []
        for i, text in enumerate(answers, 1):
            try:
                ids = self.reader.encoded(Example(prompt=prompt, completion=text), "completion").ids
            except RecordError as error:
                raise UserError(f"answers: number {i}: {error}; correct it") from error
            rows.append({name: np.asarray(ids[name], np.int32) for name in ("prompt", "completion")})
        return _rewards(self.model, self.params, state, self._features(rows)).tolist()

    # ---- features

    def _sides(self, rows: Sequence[TokenRow]) -> tuple[np.ndarray, np.ndarray]:
        """Reduced features of the chosen and of the rejected answers of comparisons, float32 [N, d] each."""
        chosen, rejected = (
            self._features([{"prompt": row["prompt"], "completion": row[side]} for row in rows]) for side in SIDES
        )
        return chosen, rejected

    def _features(self, rows: Sequence[TokenRow]) -> np.ndarray:
        """Reduced features of answers, float32 [N, d]."""
        states = np.array(self._states(rows), np.float32).reshape(len(rows), len(STATES), self._width)
        return self.reduction(np.concatenate([states[:, i] for i in self._columns], axis=1))

    def _met(self, chosen: np.ndarray, rejected: np.ndarray) -> Params:
        size = self.context
        if self.model.slots.source == "id":
            size = max(LEAST, 1 << max(len(chosen) - 1, 0).bit_length())
        width = self.reduction.axes.shape[1]
        answers, weight = np.zeros((2, size, width), np.float32), np.zeros(size, np.float32)
        answers[:, : len(chosen)], weight[: len(chosen)] = (chosen, rejected), 1.0
        context = Comparisons(*map(jnp.asarray, (*answers, weight)))
        return jax.tree.map(lambda x: np.asarray(x, np.float32), _met(self.model, self.params, context))


@functools.partial(jax.jit, static_argnums=0)
def _met(model: UserRewards, params: Params, context: Comparisons) -> Params:
    return model.meet(params, context)


@functools.partial(jax.jit, static_argnums=0)
def _rewards(model: UserRewards, params: Params, state: Params, x: Array) -> Array:
    return model.rewards(params, state, x)


@functools.partial(jax.jit, static_argnums=0)
def _margins(model: UserRewards, params: Params, state: Params, pairs: Comparisons) -> tuple[Array, Params]:
    def margins(state):
        return model.margins(params, state, pairs)

    return margins(state), jax.jacrev(margins)(state)


def lengths_of(data: Mapping[str, Any], base: ModelConfig, user_tokens: int = 0) -> Lengths:
    """The lengths of a run's texts, cut to the context of its base as its training cut them.

    Args:
      data: the section of the config of the run.
      user_tokens: that stand before a prompt.
    """
    prompt, completion, context = data["max_prompt"], data["max_completion"], base.max_length
    if prompt + completion + user_tokens * (base.positions == "learned") > context:
        prompt, completion = in_room(prompt, completion, context - user_tokens)
    return Lengths(prompt=prompt, completion=completion, context=context, **LONG)


def open_scorer(path: pathlib.Path, data: Mapping[str, Any], mesh: Mesh | None = None) -> tuple[Scorer, LanguageModel]:
    """(what scores, its base) of a trained entry of the stage user_models.

    Args:
      data: the section of the config of the run.
      mesh: of the base.

    Raises:
      UserError: a damaged file, or another base.
    """
    tree, note = load_tree(path)
    if "user_rewards" not in note:
        raise UserError(f"{path}: is no reward model of people; name user_models/<name>/{FILE} of a run")
    if note.get("encoder"):
        raise UserError(
            f"{path}: was trained on vectors of {note['encoder']!r}, which a server does not call; train it on states "
            'of the base with --config.user_models.encoder=""'
        )
    base = load_base(path, note, mesh=mesh)
    lengths = lengths_of(data, base.backbone.model.config)
    fields = jax.tree.map(np.asarray, tree["reduction"])
    reduction = Reduction(**{**fields, "scale": float(fields["scale"])})
    parts = user_model(note["user_rewards"], str(path)), tree["params"], reduction, note["states"], note["context"]
    return Scorer(*parts, base, bool(note["chat"]), lengths), base
