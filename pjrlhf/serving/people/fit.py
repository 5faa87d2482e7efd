"""Fits a person's row of a user table to their comparisons, everything else frozen.

The evaluation of new people (`protocols.cold_start`) and the server use the same fit: the loss of P-DPO (P-RLHF, arXiv
2402.05133) averaged over the person's own pairs, and some updates of Adam from where the row starts.
"""

import collections
import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float

from pjrlhf.data.comparisons import SIDES, PairBatch, pair_batch
from pjrlhf.data.messages import columns_of
from pjrlhf.data.packing import NOWHERE, PackedRows, PackLayout, align, choose_mode, pack, row_length
from pjrlhf.data.records import RecordError
from pjrlhf.data.schema import Example, parse
from pjrlhf.data.token_table import Lengths, TokenRow
from pjrlhf.data.tokenization import Tokenizer
from pjrlhf.models.adapters import Backbone
from pjrlhf.models.users import UserModel
from pjrlhf.objectives.preference import PAIRWISE
from pjrlhf.parallel.mesh import num_shards
from pjrlhf.rollout import scoring
from pjrlhf.rollout.preference import PreferenceConfig, answer_scores, pair_losses
from pjrlhf.serving.people.reading import Reader
from pjrlhf.settings import shown
from pjrlhf.types import Json, Params

# Comparisons read at once. A fit is many short dispatches, between which the engine has its turn; batches have few
# shapes, of which each compiles once.
SIZES = (2, 8)
CHUNK = SIZES[-1]
SHORTEST = 32  # positions of a row; longer ones have a power of two of them, or the greatest length
COLUMNS = ("prompt", *SIDES, "tools", "chat_template_kwargs")
Row = dict[str, Any]  # a row of a user table: its leaves without the axis of users


@dataclasses.dataclass(frozen=True, kw_only=True)
class Learning:
    """How people are fitted.

    Attributes:
      objective: of the entry that trained the user model.
      lengths: how comparisons are cut, as in training.
      steps: updates of a row.
      learning_rate: of Adam.
    """

    objective: PreferenceConfig
    lengths: Lengths
    steps: int = 20
    learning_rate: float = 0.1


def fit_rows(
    users: UserModel,
    objective: PreferenceConfig,
    backbone: Backbone,
    trainable: Params,
    rows: Params,
    batches: Sequence[tuple[PairBatch, Float[np.ndarray, " B"]]],
    steps: int,
    learning_rate: float,
    told: Callable[[int], None] = lambda step: None,
) -> Params:
    """The rows after `steps` updates of Adam. No row's gradient depends on another, so many are fitted side by side.

    Args:
      trainable: {"bank", "users"}, as in `answer_scores`; only `rows` move.
      rows: the table to fit: leaves [N, ...].
      batches: comparisons, whose `local` is a row of `rows`, with their weights in the loss of this row.
      told: called after every update with the number of updates.
    """
    state = None
    for step in range(steps):
        total = None
        for batch, weight in batches:
            part = _gradient(users, objective, rows, trainable, backbone, batch, weight)
            total = part if total is None else jax.tree.map(jnp.add, total, part)
        if total is not None:
            rows, state = _update(learning_rate, rows, state, total)
        told(step + 1)
    return rows


@functools.partial(jax.jit, static_argnums=0)
def _update(learning_rate, rows, state, gradient):
    optimizer = optax.adam(learning_rate)
    updates, state = optimizer.update(gradient, optimizer.init(rows) if state is None else state)
    return optax.apply_updates(rows, updates), state


@functools.partial(jax.jit, static_argnums=(0, 1))
def _gradient(users, objective, rows, trainable, backbone, batch, weight):
    def loss(rows):
        fitted = {**trainable, "users": {**trainable["users"], "table": rows}}
        losses = pair_losses(objective, answer_scores(backbone, users, fitted, batch), batch)
        return (jnp.where(weight > 0, losses, 0.0) * weight).sum()

    return jax.grad(loss)(rows)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _margins(users, objective, rows, trainable, backbone, batch):
    """(margins [B], their gradients, leaves [B, ...]) of comparisons with a row of their own each."""

    per_token = "lengths" in PAIRWISE.get(objective.loss).options
    lengths = batch.counts.T if per_token else jnp.ones(())

    def margins(rows):
        fitted = {**trainable, "users": {**trainable["users"], "table": rows}}
        scores = answer_scores(backbone, users, fitted, batch)
        rewards = objective.scale * (scores - batch.reference.T) / lengths
        return (rewards[0] - rewards[1]).sum(), rewards[0] - rewards[1]

    gradient, found = jax.grad(margins, has_aux=True)(rows)
    return found, gradient


@jax.jit
def _reference(backbone, rows):
    return scoring.packed_logps(backbone.policies(), rows).reshape(-1, 2)


def as_example(comparison: Mapping[str, Json], where: str = "comparison") -> Example:
    """A comparison {"prompt" or "messages", "chosen", "rejected"} as a record.

    Raises:
      RecordError: it has another form, or both answers are the same.
    """
    record = {name: value for name, value in comparison.items() if name != "messages"}
    if "messages" in comparison:
        if "prompt" in comparison:
            raise RecordError("prompt beside messages", "give one of the two")
        record["prompt"] = comparison["messages"]
    if unknown := sorted(set(map(str, record)) - set(COLUMNS)):
        raise RecordError("unknown field", f"{shown(unknown[0])}; a comparison has {', '.join(COLUMNS)} or messages")
    if missing := [name for name in COLUMNS[:3] if name not in record]:
        raise RecordError(f"no {missing[0]}", "a comparison has a prompt (or messages), chosen and rejected")
    return parse(record, "preference", where=where)


def as_json(example: Example) -> dict[str, Json]:
    """The comparison that `as_example` reads."""
    prompt = example.original
    name = "prompt" if isinstance(prompt, str) else "messages"
    return {name: prompt, **{side: getattr(example, side) for side in SIDES}, **columns_of(prompt)}


class Fitter:
    """Fits the rows of people who are served.

    Args:
      backbone: the frozen base.
      tokenizer: of the base.
      chat: text prompts are the first message of a conversation.
      users, trainable: the user model, and {"bank", "users"}.
      learning: how.
    """

    def __init__(
        self,
        backbone: Backbone,
        tokenizer: Tokenizer,
        chat: bool,
        users: UserModel,
        trainable: Params,
        learning: Learning,
    ):
        self.backbone, self.users = backbone, users
        self.reader = Reader(tokenizer, chat, learning.lengths)
        self.trainable, self.learning = trainable, learning
        lengths, mode = learning.lengths, choose_mode("auto", backbone.model.attention)
        self._layout = PackLayout(
            mode=mode,
            length=row_length(mode, lengths.prompt + users.num_tokens, lengths.completion, len(SIDES)),
            pad_id=tokenizer.pad_id,
            multiple=1 if backbone.model.batch_sharding is None else num_shards(backbone.model.batch_sharding),
            user_offset=backbone.model.user_offset,
        )

    def check(self, example: Example) -> None:
        """Raises RecordError or UserError for a comparison that the model cannot read."""
        self.reader.encoded(example)

    def fit(self, start: Row, examples: Sequence[Example]) -> Row:
        """The row after the fit to some comparisons, from a row to start from: float32 leaves on the host.

        The same comparisons give the same bits in whatever order they come.
        """
        batches = self._batches(examples)
        if not batches:
            return start
        count = sum(int((weight > 0).sum()) for _, weight in batches)
        batches = [(batch, weight / count) for batch, weight in batches]
        fitted = self._fitted(self._table(start, 1), batches, self.learning.steps)
        return jax.tree.map(lambda x: np.asarray(x)[1], fitted)

    def _fitted(self, table: Params, batches: Sequence[tuple[PairBatch, np.ndarray]], steps: int) -> Params:
        batches = [(batch.replace(local=np.ones(len(batch), np.int32)), weight) for batch, weight in batches]
        options = steps, self.learning.learning_rate
        return fit_rows(self.users, self.learning.objective, self.backbone, self.trainable, table, batches, *options)

    def _table(self, row: Row, count: int) -> Params:
        """A table of the generic user and `count` times a row."""
        return jax.tree.map(lambda generic, x: np.stack([generic, *[x] * count]), self._row(0), row)

    def margins(self, row: Row, examples: Sequence[Example]) -> tuple[np.ndarray, np.ndarray]:
        """(margins float32 [N], their gradients with respect to the row, float32 [N, D'] with all its leaves side by
        side) of comparisons, in their order.
        """
        margins, gradients = [], []
        for batch, weight in self._batches(examples, ordered=True):
            B, kept = len(batch), int((weight > 0).sum())
            batch = batch.replace(local=np.arange(1, B + 1, dtype=np.int32))
            parts = self.users, self.learning.objective, self._table(row, B), self.trainable, self.backbone, batch
            found, slopes = _margins(*parts)
            flat = [np.asarray(x)[1:].reshape(B, -1) for x in jax.tree.leaves(slopes)]
            margins.append(np.asarray(found)[:kept])
            gradients.append(np.concatenate(flat, axis=1)[:kept])
        size = sum(x.size for x in jax.tree.leaves(row))
        return np.concatenate([np.zeros(0, np.float32), *margins]), np.concatenate([np.zeros((0, size)), *gradients])

    def _row(self, index: int) -> Row:
        return jax.tree.map(lambda x: np.asarray(x[index], np.float32), self.trainable["users"]["table"])

    def _batches(
        self, examples: Sequence[Example], ordered: bool = False
    ) -> list[tuple[PairBatch, Float[np.ndarray, " B"]]]:
        """Batches of a few sizes, with weight 1 for every comparison and 0 for padding; what the model cannot read is
        left out.
        """
        if not ordered:
            examples = sorted(examples, key=lambda example: json.dumps(as_json(example), sort_keys=True))
        rows = self.reader.rows(examples)
        found = []
        for start in range(0, len(rows), CHUNK):
            part = rows[start : start + CHUNK]
            size = self._size(len(part))
            padded = [*part, *[part[0]] * (size - len(part))]
            plain, packed = self._packed(padded, 0), self._packed(padded, self.users.num_tokens)
            reference = np.asarray(_reference(self.backbone, plain))
            batch = pair_batch(padded, packed, np.zeros(size, np.int32), reference)
            found.append((batch, (np.arange(size) < len(part)).astype(np.float32)))
        return found

    def _size(self, count: int) -> int:
        """Comparisons of a batch that holds `count`."""
        size = next(size for size in SIZES if size >= count)
        return size + -size % self._layout.multiple

    def _packed(self, rows: Sequence[TokenRow], user_tokens: int) -> PackedRows:
        layout = dataclasses.replace(self._layout, num_user_tokens=user_tokens)
        answers = [[row[side] for side in SIDES] for row in rows]
        masks = [[row[f"{side}_mask"] for side in SIDES] for row in rows]
        packed = pack([row["prompt"] for row in rows], answers, layout, masks)
        length, scored = packed.tokens.shape[1], (packed.answer != NOWHERE).sum(1).max()
        return _padded(packed, *next((T, X) for T, X in self._shapes(len(rows)) if length <= T and scored <= X))

    def _shapes(self, size: int) -> list[tuple[int, int]]:
        """(T, X) of the rows that `size` comparisons may have, see `PackedRows`, ascending."""
        layout = self._layout
        each = size // layout.multiple  # comparisons of a part
        greatest, rows = (each * layout.length, 1) if layout.mode == "join" else (layout.length, each)
        greatest += -greatest % (8 if greatest < 1024 else 128)  # as `pack` rounds it
        found, T = [], SHORTEST
        while 2 * greatest >= 3 * T:
            found.append(T)
            T *= 2
        return [(T, rows * T // part) for T in (*found, greatest) for part in (2, 1)]

    def warm_up(self, likely: Sequence[Example] = ()) -> Iterator[None]:
        """Compiles one program after the other, and yields after each; afterwards neither fits nor margins compile
        anything.

        Args:
          likely: comparisons of the shapes that come first, alone or many at once; then those for few and short ones.
        """
        row: Any = {"index": 0, "margin": None, "prompt": [0]}
        row |= {key: value for side in SIDES for key, value in ((side, [0]), (f"{side}_mask", None))}
        start, placed = self._table(self._row(0), 1), None
        sizes = list(dict.fromkeys(map(self._size, SIZES)))
        some = [self._shapes_of(likely, size) for size in sizes]
        order = [one for together in itertools.zip_longest(*some) for one in together if one is not None]
        order += [(size, shape) for size in sizes for shape in self._shapes(size)]
        for B, shape in dict.fromkeys(order):
            nobody = np.zeros(B, np.int32)
            least = [self._packed([row] * B, E) for E in (0, self.users.num_tokens)]
            plain, packed = (_padded(one, *shape) for one in least)
            _reference.lower(self.backbone, plain).compile()
            yield
            batch = pair_batch([row] * B, packed, nobody, np.zeros((B, 2), np.float32))
            weight = np.ones(B, np.float32)
            if placed is None:  # real updates say where they leave the rows; two batches add their gradients
                placed = self._fitted(start, [(batch, weight)] * 2, steps=3)
                yield
            parts = self.trainable, self.backbone, batch.replace(local=nobody)
            for table in (start, placed):
                _gradient.lower(self.users, self.learning.objective, table, *parts, weight).compile()
            yield
            table = self._table(self._row(0), B)
            _margins.lower(self.users, self.learning.objective, table, *parts).compile()
            yield

    def _shapes_of(self, examples: Sequence[Example], size: int) -> list[tuple[int, tuple[int, int]]]:
        """`size` with the shapes that comparisons have, one in a batch of the least size, as many as fit in another;
        the most frequent one first.
        """
        rows, found = self.reader.rows(examples), collections.Counter[tuple[int, int]]()
        each = 1 if size == self._size(1) else CHUNK
        for start in range(0, len(rows), each):
            part = rows[start : start + each]
            padded = [*part, *[part[0]] * (size - len(part))]
            packed = [self._packed(padded, E) for E in dict.fromkeys((0, self.users.num_tokens))]
            found.update((one.tokens.shape[1], one.columns.shape[1]) for one in packed)
        return [(size, shape) for shape, _ in found.most_common()]


def _padded(packed: PackedRows, length: int, scored: int) -> PackedRows:
    """The same rows with `length` positions, and `scored` places for scored tokens, of which none is lost."""
    (B, _), Z = packed.tokens.shape, len(packed.columns)
    places = ("answer", "columns", "targets")
    packed = packed.replace(**{name: getattr(packed, name)[:, :scored] for name in places})
    rows = dict.fromkeys(("branch", "owner", "position", "segment", "tokens"), np.zeros((B, length), np.int32))
    wide = dict.fromkeys(places, np.zeros((Z, scored), np.int32))
    last = dict.fromkeys(("last", "last_answer"), np.zeros(packed.last.shape, np.int32))
    like: PackedRows = packed.replace(**rows, **wide, **last)
    return align([packed, like])[0]
