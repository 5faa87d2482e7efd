"""Prompts and their answers in rows of a static shape: a prompt once for all its answers, several prompts in a row.

Answers to one prompt share it: each sees the prompt and itself (its branch), not the other, at the positions it would
have alone, so that nothing but the amount of work tells a packed batch from a plain one.
"""

import dataclasses
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

# none: an answer per row, each with its prompt; share: a prompt with all its answers per row; pack: as many of those
# as a row holds; join: all in one row per device, the least padding, for attention that leaves out what nobody sees.
MODES = ("none", "share", "pack", "join")
NOWHERE = 2**30  # in place of an answer's number: of no answer
_SHAPES = 8  # how many lengths, or numbers of rows, there are at most: each is compiled once


class PackedRows(struct.PyTreeNode):
    """E examples, prompts of A answers each, in B rows of T slots; NumPy arrays on the host.

    The rows are Z parts of B / Z consecutive rows, with X scored tokens and Y last tokens each. Answer a of example e
    has the number A e + a. The shapes depend on the lengths, within a few steps, so that few programs are compiled.

    Attributes:
      segment: number of the example plus 1, 0 on padding.
      branch: 0 in a prompt, a + 1 in answer a.
      position: the position that a token would have in a row of its own.
      owner: whose token it is, below `owners`; 0 on padding. An example owns itself, see `by_group`.
      columns, targets, answer: at slot `columns` of a part's rows [B / Z T] the token `targets` of answer number
        `answer` is predicted, `NOWHERE` in places left over.
      last, last_answer: the slot of the last token of each answer, and its number.
      answers: E A, static.
      owners: O, the number of owners, static.
    """

    # The order of a program's arguments, on which the rounding of its results depends.
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
        """The same rows, owned by the `groups` equal consecutive groups of examples."""
        return self.replace(owner=self.owner // (self.owners // groups), owners=groups)

    def repeat(self, times: int) -> "PackedRows":
        """`times` copies of all rows, one after another; answers and owners of later copies are numbered on."""
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
      length: slots that an example may have, see `row_length`, and a row where they are not joined.
      pad_id: token of padding.
      multiple: what B and Z are multiples of: devices.
      groups: examples come in so many equal consecutive groups, and so do rows and parts: none has examples of two.
      user_slots, user_offset: room for user tokens in every prompt, see `models.users.reserve`.
    """

    mode: str
    length: int
    pad_id: int
    multiple: int = 1
    groups: int = 1
    user_slots: int = 0
    user_offset: int = 1


def choose_mode(mode: str, attention: str) -> str:
    """Resolves `auto` for an implementation of `models.attention`. UserError where there is no such mode."""
    if mode not in ("auto", *MODES):
        raise UserError(f"data.packing {mode!r}: unknown; choose one of auto, {', '.join(MODES)}")
    if mode != "auto":
        return mode
    return "join" if attention == "blocks" else "share"


def row_length(mode: str, prompt: int, answer: int, answers: int) -> int:
    """Slots that a prompt (user tokens included) and its answers need in a row, all of the greatest lengths."""
    return prompt + answer * (1 if mode == "none" else answers)


def pack(prompts: Sequence[Ids], answers: Sequence[Sequence[Ids]], layout: PackLayout) -> PackedRows:
    """Rows for E prompts of A answers each.

    Args:
      prompts: E sequences of ids.
      answers: E times A sequences of ids, none empty.

    Raises:
      ValueError: an example that does not fit into `layout.length`, or groups that are not equal.
    """
    mode, length, groups, multiple = layout.mode, layout.length, layout.groups, layout.multiple
    E, A = len(prompts), len(answers[0])
    if E % groups:
        raise ValueError(f"{E} examples cannot be split into {groups} equal groups")
    # A part stands in one row: an example and the numbers of its answers there.
    parts = [(e, [a]) for e in range(E) for a in range(A)] if mode == "none" else [(e, range(A)) for e in range(E)]
    sizes = [len(prompts[e]) + layout.user_slots + sum(len(answers[e][a]) for a in some) for e, some in parts]
    if max(sizes) > length:
        raise ValueError(f"an example of {max(sizes)} tokens does not fit into rows of {length}")
    each, Z = len(parts) // groups, math.lcm(groups, multiple)
    shares = [range(g * each, (g + 1) * each) for g in range(groups)]
    if mode == "join":
        bins = [_spread(share, sizes, Z // groups) for share in shares]
        fullest = max(sum(sizes[i] for i in row) for some in bins for row in some)
        T = _rounded(fullest, math.ceil(len(parts) / Z) * length, 3 * _SHAPES // 2)
    elif mode == "pack":
        T = _rounded(length, length, _SHAPES)
        bins = [_bins(share, sizes, T) for share in shares]
    else:
        T = _rounded(max(sizes), length, _SHAPES)
        bins = [[[i] for i in share] for share in shares]
    per_group = max(len(some) for some in bins)
    if mode == "pack":
        per_group = min(_up(per_group, math.ceil(each / _SHAPES)), each)
    while per_group * groups % multiple:
        per_group += 1
    rows = [row for some in bins for row in [*some, *[[]] * (per_group - len(some))]]

    made: dict[str, Any] = {
        name: np.zeros((len(rows), T), np.int32) for name in ("segment", "branch", "position", "owner")
    }
    made["tokens"] = np.full((len(rows), T), layout.pad_id, np.int32)
    together, offset = len(rows) // Z, layout.user_offset  # rows of a part
    scored: list[tuple[list, list, list]] = [([], [], []) for _ in range(Z)]
    last: list[tuple[list, list]] = [([], []) for _ in range(Z)]
    for r, row in enumerate(rows):
        at, tokens, first = 0, [], r % together * T  # slot of its part
        columns, targets, numbers = scored[r // together]
        for i in row:
            e, some = parts[i]
            prompt = [*prompts[e][:offset], *[0] * layout.user_slots, *prompts[e][offset:]]
            start, P = at, len(prompt)
            tokens += prompt
            made["position"][r, at : at + P] = np.arange(P)
            at += P
            for a in some:
                n, end = len(answers[e][a]), start + P - 1
                tokens += list(answers[e][a])
                made["position"][r, at : at + n] = np.arange(P, P + n)
                made["branch"][r, at : at + n] = a + 1
                # The first token is predicted where the prompt ends, the others by the one before.
                columns += [first + end, *range(first + at, first + at + n - 1)]
                targets += list(answers[e][a])
                numbers += [A * e + a] * n
                for ends, value in zip(last[r // together], (first + at + n - 1, A * e + a), strict=True):
                    ends.append(value)
                at += n
            made["segment"][r, start:at] = e + 1
            made["owner"][r, start:at] = e
        made["tokens"][r, :at] = tokens
    # Several rows together differ little in what is scored, and padding reaches the vocabulary.
    S = _up(max(len(columns) for columns, _, _ in scored), _up(together * T // (4 if groups < Z else 8), 8))
    M = 2 ** math.ceil(math.log2(max(len(ends) for ends, _ in last)))
    for names, found, width in (("columns", "targets", "answer"), scored, S), (("last", "last_answer"), last, M):
        for k, name in enumerate(names):
            made[name] = np.full((Z, width), NOWHERE if "answer" in name else 0, np.int32)
            for z, values in enumerate(found):
                made[name][z, : len(values[k])] = values[k]
    return PackedRows(**made, answers=E * A, owners=E)


def _up(x: int, unit: int) -> int:
    return x + -x % unit


def _rounded(slots: int, greatest: int, steps: int) -> int:
    """`slots` and a little more, so that of lengths up to `greatest` there are about `steps`."""
    unit = 8 if greatest < 1024 else 128
    return min(_up(slots, _up(math.ceil(greatest / steps), unit)), _up(greatest, unit))


def _spread(parts: Sequence[int], sizes: Sequence[int], count: int) -> list[list[int]]:
    """`count` rows about equally full: the longest first, each to the emptiest."""
    rows: list[list[int]] = [[] for _ in range(count)]
    full = [0] * count
    for i in sorted(parts, key=lambda i: -sizes[i]):
        r = min(range(count), key=full.__getitem__)
        rows[r].append(i)
        full[r] += sizes[i]
    return rows


def _bins(parts: Sequence[int], sizes: Sequence[int], length: int) -> list[list[int]]:
    """First fit, the longest first: at most 11 / 9 of the fewest rows (Johnson 1973)."""
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(parts, key=lambda i: -sizes[i]):
        r = next((r for r, left in enumerate(room) if left >= sizes[i]), len(rows))
        if r == len(rows):
            rows.append([])
            room.append(length)
        rows[r].append(i)
        room[r] -= sizes[i]
    return rows
