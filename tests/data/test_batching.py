"""Shapes and masks, an order that resumes exactly and does not know the number of processes, splits without leaks."""

import itertools
import json

import numpy as np
import pytest

from pjrlhf.data.batching import (
    batches,
    buckets,
    collate_completion,
    pad_left,
    pad_right,
    split_by,
)
from pjrlhf.errors import UserError

PAD = 0


def make_row(i, prompt=(5, 6), chosen=(7, 8, 9), rejected=(7,), completion=(3, 2), **columns):
    ids = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "completion": completion}
    columns = {"user_id": None, "objective": None, "margin": None, "preference": None, "where": f"row {i}"} | columns
    return {"index": i} | {name: np.array(value, np.int32) for name, value in ids.items()} | columns


ROWS = [make_row(i, prompt=range(1, 2 + i % 5)) for i in range(23)]


def prompts_of(rows):
    prompt, valid = pad_left([row["prompt"] for row in rows], 8, PAD)
    return {"prompt": prompt, "valid": valid, "index": np.array([row["index"] for row in rows], np.int32)}


def indices(iterator, count=None):
    return [batch["index"].tolist() for batch in itertools.islice(iterator, count)]


def test_rows_that_are_held_out_take_their_keys_from_training():
    keys, held = ["a", "b", "a", "c", "c"], [False, False, True, False, False]
    train, tested = split_by(keys, 0.5, 0, held=held)
    assert train.tolist() == [1, 3, 4] and tested.tolist() == [2]


def test_padding():
    rows = [[1, 2, 3], [4], []]
    tokens, valid = pad_left(rows, 4, 9)
    assert tokens.tolist() == [[9, 1, 2, 3], [9, 9, 9, 4], [9, 9, 9, 9]]
    assert valid.tolist() == [[False, True, True, True], [False, False, False, True], [False] * 4]
    mirrored, mirrored_valid = pad_right([row[::-1] for row in rows], 4, 9)
    assert (mirrored[:, ::-1] == tokens).all() and (mirrored_valid[:, ::-1] == valid).all()
    assert (tokens.dtype, valid.dtype) == (np.int32, np.bool_)
    with pytest.raises(ValueError, match="3 tokens does not fit into 2"):
        pad_right(rows, 2, 9)


def test_mask_comes_from_lengths_not_ids():
    tokens, valid = pad_right([[9, 1, 9]], 4, 9)  # an answer may hold the padding id
    assert valid.tolist() == [[True, True, True, False]] and tokens.tolist() == [[9, 1, 9, 9]]


def test_buckets_round_up():
    assert buckets([1, 16, 17, 64], (64, 16, 32)).tolist() == [16, 16, 32, 64]
    with pytest.raises(ValueError, match="65"):
        buckets([3, 65], (16, 64))


def test_completion_batch():
    rows = [make_row(4, prompt=(5,)), make_row(7, completion=(3, 4, 2))]
    batch = collate_completion(rows, prompt_length=3, completion_length=4, pad_id=PAD)
    assert batch.tokens.tolist() == [[0, 0, 5, 3, 2, 0, 0], [0, 5, 6, 3, 4, 2, 0]]
    assert batch.valid.tolist() == (batch.tokens != PAD).tolist()
    assert batch.prompt_length == 3


def test_epochs_hold_every_row_once_in_new_orders():
    seen = [i for batch in indices(batches(ROWS, 4, seed=1, collate=prompts_of), 23 * 2) for i in batch]
    epochs = [seen[start : start + 23] for start in range(0, 184, 23)]
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)
    assert indices(batches(ROWS, 4, seed=1, collate=prompts_of), 8) != indices(
        batches(ROWS, 4, seed=2, collate=prompts_of), 8
    )
    plain = batches(ROWS, 4, seed=1, shuffle=False, epochs=1, collate=prompts_of)
    assert indices(plain) == np.arange(20).reshape(5, 4).tolist()


def test_resume_is_exact_from_any_step():
    def make():
        return batches(ROWS, 4, seed=3, epochs=3, collate=prompts_of)

    whole = indices(make())
    assert len(whole) == 23 * 3 // 4
    for step in (0, 1, 6, len(whole)):
        first = make()
        head = indices(first, step)
        state = json.loads(json.dumps(first.get_state()))
        second = make()
        second.set_state(state)
        assert head + indices(second) == whole
        assert indices(first) == whole[step:]  # looking at the state moves nothing


@pytest.mark.parametrize(
    ("rows", "change", "message"),
    [
        (ROWS, {"batch_size": 24}, "batch_size: a batch takes 24 rows, and there are only 23 to train on; lower it"),
        ([], {"batch_size": 1}, "there are only 0 to train on"),
    ],
)
def test_batches_that_cannot_be(rows, change, message):
    with pytest.raises(UserError, match=message):
        batches(rows, seed=0, collate=prompts_of, **change)


def test_split_never_parts_a_group():
    rng = np.random.default_rng(0)
    keys = [f"user {i}" for i in rng.integers(0, 40, 500)]
    train, held = split_by(keys, 0.2, seed=1)
    assert sorted([*train, *held]) == list(range(500))
    train_keys, held_keys = {keys[i] for i in train}, {keys[i] for i in held}
    assert not train_keys & held_keys
    assert len(held_keys) == 8
    order = rng.permutation(500)
    _, again = split_by([keys[i] for i in order], 0.2, seed=1)
    assert {keys[order[i]] for i in again} == held_keys
    assert {keys[i] for i in split_by(keys, 0.2, seed=2)[1]} != held_keys


def test_split_is_the_same_on_every_machine():
    assert [split_by("abcdefghij", 0.3, seed=seed)[1].tolist() for seed in (0, 1)] == [[2, 3, 5], [0, 7, 8]]


def test_small_split_holds_out_one_group():
    for fraction in (0.01, 0.99):
        train, held = split_by(["a", "a", "b"], fraction, seed=0)
        assert len(train) and len(held)


@pytest.mark.parametrize(
    ("keys", "fraction", "message"),
    [
        (["a", "b"], 1.0, "held-out fraction 1.0"),
        (["a", None], 0.5, "row 1: has no key"),
        (["a", "a"], 0.5, "the 2 rows have one key, so nothing can be held out; split by another one"),
    ],
)
def test_splits_that_cannot_be(keys, fraction, message):
    with pytest.raises(UserError, match=message):
        split_by(keys, fraction, seed=0)
