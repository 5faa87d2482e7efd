"""Prompts and their answers in rows of a static shape: a prompt once for all its answers, several prompts in a row.

Answers to one prompt share it: each sees the prompt and itself (its branch), not the other, at the positions it would
have alone, so that nothing but the amount of work tells a packed batch from a plain one.
"""

import math
from collections.abc import Sequence

import numpy as np

from pjrlhf.errors import UserError

Arrays = dict[str, np.ndarray]
Ids = Sequence[int] | np.ndarray
# none: an answer per row, each with its prompt; share: a prompt with all its answers per row; pack: as many of those
# as a row holds.
MODES = ("none", "share", "pack")
NOWHERE = 2**30  # in place of an answer's number: of no answer
_SHAPES = 8  # how many lengths, or numbers of rows, there are at most: each is compiled once


def check_mode(mode: str) -> str:
    """`mode`. UserError where there is no such."""
    if mode not in MODES:
        raise UserError(f"data.packing {mode!r}: unknown; choose one of {', '.join(MODES)}")
    return mode


def row_length(mode: str, prompt: int, answer: int, answers: int) -> int:
    """Slots that a row needs for a prompt (user tokens included) and its answers of the greatest lengths."""
    return prompt + answer * (1 if mode == "none" else answers)


def pack(
    prompts: Sequence[Ids],
    answers: Sequence[Sequence[Ids]],
    *,
    mode: str,
    length: int,
    pad_id: int,
    multiple: int = 1,
    groups: int = 1,
    user_slots: int = 0,
    user_offset: int = 1,
) -> Arrays:
    """Rows for E prompts of A answers each.

    Shapes: R rows, T slots, S scored tokens of a row, M last tokens of a row. They depend on the lengths, within a few
    steps, so that few programs are compiled.

    Args:
      prompts: E sequences of ids.
      answers: E times A sequences of ids, none empty.
      mode: one of `MODES`.
      length: slots a row may have; see `row_length`.
      multiple: what R is a multiple of.
      groups: examples come in so many equal consecutive groups, and so do rows: no row has examples of two groups.
      user_slots, user_offset: room for user tokens in every prompt, see `models.users.reserve`.

    Returns:
      tokens [R, T]; segment [R, T], the number of the example plus 1, 0 on padding; branch [R, T], 0 in a prompt, a + 1
      in answer a; position [R, T]; owner [R, T], the number of the example (0 on padding); all int32;
      columns, targets, answer [R, S]: at slot `columns` the token `targets` of answer number `answer` is predicted,
      A e + a, `NOWHERE` in places left over;
      last, last_answer [R, M]: the slot of the last token of each answer.

    Raises:
      ValueError: an example that does not fit into `length`, or groups that are not equal.
    """
    E, A = len(prompts), len(answers[0])
    if E % groups:
        raise ValueError(f"{E} examples cannot be split into {groups} equal groups")
    # A part stands in one row: an example and the numbers of its answers there.
    parts = [(e, [a]) for e in range(E) for a in range(A)] if mode == "none" else [(e, range(A)) for e in range(E)]
    sizes = [len(prompts[e]) + user_slots + sum(len(answers[e][a]) for a in some) for e, some in parts]
    if max(sizes) > length:
        raise ValueError(f"an example of {max(sizes)} tokens does not fit into rows of {length}")
    unit = 8 if length < 1024 else 128
    T = _up(length, unit)
    if mode != "pack":
        T = min(T, _up(max(sizes), _up(math.ceil(length / _SHAPES), unit)))
    each = len(parts) // groups
    bins = []
    for g in range(groups):
        mine = range(g * each, (g + 1) * each)
        bins.append(_bins(mine, sizes, T) if mode == "pack" else [[i] for i in mine])
    per_group = max(len(some) for some in bins)
    if mode == "pack":
        per_group = min(_up(per_group, math.ceil(each / _SHAPES)), each)
    while per_group * groups % multiple:
        per_group += 1
    rows = [row for some in bins for row in [*some, *[[]] * (per_group - len(some))]]

    made = {name: np.zeros((len(rows), T), np.int32) for name in ("segment", "branch", "position", "owner")}
    made["tokens"] = np.full((len(rows), T), pad_id, np.int32)
    scored: list[tuple[list, list, list]] = []
    last: list[tuple[list, list]] = []
    for r, row in enumerate(rows):
        at, tokens, columns, targets, numbers, ends = 0, [], [], [], [], []
        for i in row:
            e, some = parts[i]
            prompt = [*prompts[e][:user_offset], *[0] * user_slots, *prompts[e][user_offset:]]
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
                columns += [end, *range(at, at + n - 1)]
                targets += list(answers[e][a])
                numbers += [A * e + a] * n
                ends.append((at + n - 1, A * e + a))
                at += n
            made["segment"][r, start:at] = e + 1
            made["owner"][r, start:at] = e
        made["tokens"][r, :at] = tokens
        scored.append((columns, targets, numbers))
        last.append(tuple(zip(*ends, strict=True)) or ((), ()))
    S = _up(max(len(columns) for columns, _, _ in scored), max(8, T // 4))
    M = 2 ** math.ceil(math.log2(max(len(ends) for ends, _ in last)))
    for names, found, width in (("columns", "targets", "answer"), scored, S), (("last", "last_answer"), last, M):
        for k, name in enumerate(names):
            made[name] = np.full((len(rows), width), NOWHERE if "answer" in name else 0, np.int32)
            for r, values in enumerate(found):
                made[name][r, : len(values[k])] = values[k]
    return made


def _up(x: int, unit: int) -> int:
    return x + -x % unit


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
