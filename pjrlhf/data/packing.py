"""Packs prompts and their answers into rows of static shapes.

The answers to a prompt share one copy of it, and a row may hold several prompts. Attention lets an answer see its
prompt and itself (its branch), and tokens keep the positions that they have in a row of their own. A packed batch
therefore gives the same results as a padded one, with less computation.
"""

import bisect
import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Int

from pjrlhf.data.batching import Ids
from pjrlhf.errors import UserError
from pjrlhf.types import Array

# Contents of a row. none: one answer with its prompt; share: a prompt with all its answers; pack: as many prompts with
# their answers as fit; join: all that one device gets. Joined rows have the least padding, but are fast only where
# attention skips blocks that are masked out.
MODES = ("none", "share", "pack", "join")
NOWHERE = 2**30  # the number of no answer
_SHAPES = 8  # limit on the different lengths, and on the different numbers of rows; every shape compiles once


class PackedRows(struct.PyTreeNode):
    """Packed examples: a prompt with A answers each, in B rows of T positions.

    The rows form Z parts of B / Z consecutive rows. A part has X scored tokens and Y last tokens. Answer a of example e
    has the number A e + a. Shapes take few different values, so that few programs are compiled.

    Attributes:
      tokens: ids; `PackLayout.pad_id` on padding.
      segment: number of the example plus 1; 0 on padding.
      branch: 0 in a prompt, a + 1 in answer a.
      position: the position of a token in a row of its own.
      owner: the owner of a token, below `owners`; 0 on padding. Every example owns itself unless `by_group` is called.
      columns: index of a predicting position in the flattened rows [B / Z * T] of its part.
      targets: the token that this position predicts.
      answer: number of the answer with this token; `NOWHERE` on padding of X.
      last: index of the last token of an answer in the flattened rows of its part.
      last_answer: number of this answer; `NOWHERE` on padding of Y.
      answers: number of all answers, static.
      owners: O, number of owners, static.
    """

    # The order of the fields is that of a program's arguments, on which rounding depends.
    answer: Int[Array, "Z X"]
    branch: Int[Array, "B T"]
    columns: Int[Array, "Z X"]
    last: Int[Array, "Z Y"]
    last_answer: Int[Array, "Z Y"]
    owner: Int[Array, "B T"]
    position: Int[Array, "B T"]
    segment: Int[Array, "B T"]
    targets: Int[Array, "Z X"]
    tokens: Int[Array, "B T"]
    answers: int = struct.field(pytree_node=False)
    owners: int = struct.field(pytree_node=False)

    def by_group(self, groups: int) -> "PackedRows":
        """The same rows with `groups` owners: equal, consecutive groups of examples."""
        return self.replace(owner=self.owner // (self.owners // groups), owners=groups)

    def repeat(self, times: int) -> "PackedRows":
        """`times` copies of all rows, one after the other, with consecutive numbers of answers and owners."""
        copied = jax.tree.map(lambda x: jnp.concatenate([x] * times), self)
        numbers = {"owner": self.owners, "answer": self.answers, "last_answer": self.answers}
        moved = {
            name: jnp.concatenate([getattr(self, name) + i * step for i in range(times)])
            for name, step in numbers.items()
        }
        return copied.replace(**moved, answers=times * self.answers, owners=times * self.owners)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackLayout:
    """How `pack` fills rows.

    Attributes:
      mode: one of `MODES`.
      length: longest example, and longest row unless rows are joined; see `row_length`.
      pad_id: id of padding.
      multiple: B and Z are multiples of it: the number of devices.
      groups: number of equal, consecutive groups of examples; a row or part has examples of one group only.
      num_user_tokens, user_offset: positions for user tokens in every prompt; see `models.users.reserve`.
      rows: B of the mode "pack", where it is fixed; 0 takes as many as are needed, rounded up.
    """

    mode: str
    length: int
    pad_id: int
    multiple: int = 1
    groups: int = 1
    rows: int = 0
    num_user_tokens: int = 0
    user_offset: int = 1


def choose_mode(mode: str, attention: str) -> str:
    """The mode that `auto` stands for with an implementation of `models.attention`; other modes are returned as given.

    Raises:
      UserError: an unknown mode.
    """
    if mode not in ("auto", *MODES):
        raise UserError(f"data.packing {mode!r}: unknown; choose one of auto, {', '.join(MODES)}")
    if mode != "auto":
        return mode
    return "join" if attention == "blocks" else "share"


def row_length(mode: str, prompt: int, answer: int, answers: int) -> int:
    """Length of a row that holds a longest prompt, user tokens included, and its longest answers."""
    return prompt + answer * (1 if mode == "none" else answers)


def whole_length(length: int) -> int:
    """The length of rows of the mode "pack" that are to hold at least `length` positions."""
    return _rounded(length, length, _SHAPES)


def pack(
    prompts: Sequence[Ids],
    answers: Sequence[Sequence[Ids]],
    layout: PackLayout,
    masks: Sequence[Sequence[np.ndarray | None]] | None = None,
) -> PackedRows:
    """Packs E prompts with A answers each.

    Args:
      prompts: ids of E prompts.
      answers: ids of A answers to every prompt. An empty one stands for no answer: it has a number, and no token.
      masks: which tokens of every answer are scored, bool [length]; None for all of an answer, or of all answers.

    Returns:
      NumPy arrays, int32.

    Raises:
      ValueError: an example is longer than `layout.length`, the groups are not equal, or the examples do not fit into
        `layout.rows` rows.
    """
    mode, length, groups, multiple = layout.mode, layout.length, layout.groups, layout.multiple
    E, A = len(prompts), len(answers[0])
    if E % groups:
        raise ValueError(f"{E} examples cannot be split into {groups} equal groups")
    # (example, numbers of its answers in the same row).
    parts = [(e, [a]) for e in range(E) for a in range(A)] if mode == "none" else [(e, range(A)) for e in range(E)]
    sizes = [len(prompts[e]) + layout.num_user_tokens + sum(len(answers[e][a]) for a in some) for e, some in parts]
    if max(sizes) > length:
        raise ValueError(f"an example of {max(sizes)} tokens does not fit into rows of {length}")
    each, Z = len(parts) // groups, math.lcm(groups, multiple)
    members = [range(g * each, (g + 1) * each) for g in range(groups)]
    if mode == "join":
        bins = [_spread(group, sizes, Z // groups) for group in members]
        fullest = max(sum(sizes[i] for i in row) for some in bins for row in some)
        T = _rounded(fullest, math.ceil(len(parts) / Z) * length, 3 * _SHAPES // 2)
    elif mode == "pack":
        T = whole_length(length)
        bins = [bins_of(group, sizes, T) for group in members]
    else:
        T = _rounded(max(sizes), length, _SHAPES)
        bins = [[[i] for i in group] for group in members]
    per_group = max(len(some) for some in bins)
    if layout.rows:
        if per_group * groups > layout.rows:
            raise ValueError(f"{E} examples do not fit into {layout.rows} rows of {T}")
        per_group = layout.rows // groups
    elif mode == "pack":
        per_group = min(_up(per_group, math.ceil(each / _SHAPES)), each)
    while per_group * groups % multiple:
        per_group += 1
    rows = [row for some in bins for row in [*some, *[[]] * (per_group - len(some))]]

    made: dict[str, Any] = {
        name: np.zeros((len(rows), T), np.int32) for name in ("segment", "branch", "position", "owner")
    }
    made["tokens"] = np.full((len(rows), T), layout.pad_id, np.int32)
    together, offset = len(rows) // Z, layout.user_offset  # rows per part
    scored: list[tuple[list, list, list]] = [([], [], []) for _ in range(Z)]
    last: list[tuple[list, list]] = [([], []) for _ in range(Z)]
    for r, row in enumerate(rows):
        at, tokens, first = 0, [], r % together * T  # index of the row in its part
        columns, targets, numbers = scored[r // together]
        for i in row:
            e, some = parts[i]
            prompt = [*prompts[e][:offset], *[0] * layout.num_user_tokens, *prompts[e][offset:]]
            start, P = at, len(prompt)
            tokens += prompt
            made["position"][r, at : at + P] = np.arange(P)
            at += P
            for a in some:
                n, end = len(answers[e][a]), start + P - 1
                if not n:
                    continue
                tokens += list(answers[e][a])
                made["position"][r, at : at + n] = np.arange(P, P + n)
                made["branch"][r, at : at + n] = a + 1
                # The last token of the prompt predicts the first one, and every token the next.
                found = [first + end, *range(first + at, first + at + n - 1)], list(answers[e][a]), [A * e + a] * n
                mask = masks[e][a] if masks else None
                for values, more in zip((columns, targets, numbers), found, strict=True):
                    values += more if mask is None else itertools.compress(more, mask)
                for ends, value in zip(last[r // together], (first + at + n - 1, A * e + a), strict=True):
                    ends.append(value)
                at += n
            made["segment"][r, start:at] = e + 1
            made["owner"][r, start:at] = e
        made["tokens"][r, :at] = tokens
    # Parts of several rows differ little in X, and its padding costs logits over the vocabulary, so it is kept small.
    S = _up(max(len(columns) for columns, _, _ in scored), _up(together * T // (4 if groups < Z else 8), 8))
    M = 2 ** math.ceil(math.log2(max(len(ends) for ends, _ in last)))
    for names, found, width in (("columns", "targets", "answer"), scored, S), (("last", "last_answer"), last, M):
        for k, name in enumerate(names):
            made[name] = np.full((Z, width), NOWHERE if "answer" in name else 0, np.int32)
            for z, values in enumerate(found):
                made[name][z, : len(values[k])] = values[k]
    return PackedRows(**made, answers=E * A, owners=E)


def align(parts: Sequence[PackedRows]) -> list[PackedRows]:
    """The same rows, with padding to equal shapes. All parts have as many answers, owners and parts Z."""
    Z = len(parts[0].columns)
    B, T = (max(part.tokens.shape[axis] for part in parts) for axis in (0, 1))
    widths = {
        names: max(getattr(part, names[0]).shape[1] for part in parts)
        for names in (("columns", "targets", "answer"), ("last", "last_answer"))
    }

    def padded(part: PackedRows) -> PackedRows:
        rows, length = part.tokens.shape[0] // Z, part.tokens.shape[1]
        made: dict[str, Any] = {}
        for name in ("tokens", "segment", "branch", "position", "owner"):
            x = np.asarray(getattr(part, name)).reshape(Z, rows, length)
            x = np.pad(x, [(0, 0), (0, B // Z - rows), (0, T - length)])
            made[name] = x.reshape(B, T)
        for names, width in widths.items():
            for name in names:
                x = np.asarray(getattr(part, name))
                if name in ("columns", "last"):  # indices of flattened rows, which are longer now
                    x = x // length * T + x % length
                fill = NOWHERE if "answer" in name else 0
                made[name] = np.pad(x, [(0, 0), (0, width - x.shape[1])], constant_values=fill)
        return part.replace(**made)

    return [padded(part) for part in parts]


def _up(x: int, unit: int) -> int:
    return x + -x % unit


def _rounded(length: int, greatest: int, steps: int) -> int:
    """`length` rounded up so that lengths up to `greatest` take about `steps` different values."""
    unit = 8 if greatest < 1024 else 128
    return min(_up(length, _up(math.ceil(greatest / steps), unit)), _up(greatest, unit))


def _spread(parts: Sequence[int], sizes: Sequence[int], count: int) -> list[list[int]]:
    """`count` rows of similar length: the longest part first, always into the shortest row."""
    rows: list[list[int]] = [[] for _ in range(count)]
    full = [0] * count
    for i in sorted(parts, key=lambda i: -sizes[i]):
        r = min(range(count), key=full.__getitem__)
        rows[r].append(i)
        full[r] += sizes[i]
    return rows


def bins_of(parts: Sequence[int], sizes: Sequence[int], length: int) -> list[list[int]]:
    """Rows of at most `length` that hold `parts`, by best-fit decreasing: at most about 11/9 of the least number
    (Johnson et al. 1974). The parts of any of these rows alone give the same rows.

    Args:
      parts: indices of `sizes`, none above `length`.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (what is left, row), in order
    for i in sorted(parts, key=lambda i: -sizes[i]):
        fits = bisect.bisect_left(room, (sizes[i], 0))
        if fits == len(room):
            rows.append([])
            left, r = length, len(rows) - 1
        else:
            left, r = room.pop(fits)
        rows[r].append(i)
        bisect.insort(room, (left - sizes[i], r))
    return rows
