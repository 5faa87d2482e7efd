"""The cache of reference log-probs: a hit exactly when the numbers are the same."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.small_policies import ADAPTERS, MODEL, PAD, base

from pjrlhf.data.packing import PackLayout, pack
from pjrlhf.data.records import BadRecords
from pjrlhf.data.schema import Example
from pjrlhf.data.token_table import TokenTable
from pjrlhf.errors import UserError
from pjrlhf.models.adapters import Backbone
from pjrlhf.rollout import reference, scoring
from pjrlhf.rollout.reference import cache_key, reference_logps, shared_prompts, summed_logps

COLUMNS = ("prompt", "chosen", "rejected")
N = 5


def table_of(tokens, user="ann"):
    rows = len(tokens["prompt"])
    examples = tuple(Example(where=f"line {i}", prompt="", user_id=user) for i in range(rows))
    tokens = {name: tuple(np.asarray(ids, np.int32) for ids in tokens[name]) for name in COLUMNS}
    return TokenTable("preference", examples, tokens, BadRecords("table", rows))


def drawn():
    rng = np.random.default_rng(0)
    sizes = {"prompt": (2, 5), "chosen": (2, 4), "rejected": (1, 5)}
    return {name: [rng.integers(2, 24, rng.integers(*sizes[name])) for _ in range(N)] for name in COLUMNS}


@jax.jit
def summed(batch):
    return summed_logps(Backbone(MODEL, ADAPTERS["lora"], base()), batch)


def score(answers):
    layout = PackLayout(mode="share", length=16, pad_id=PAD)
    prompts, completions, masks = zip(
        *((row["prompt"], [row["completion"]], [row["completion_mask"]]) for row in answers), strict=True
    )
    return np.asarray(summed(pack(prompts, completions, layout, masks)))[:, 0]


def refuse(answers):
    raise AssertionError("computed")


def logps(table, folder, base_hash="b" * 16, score=score):
    return reference_logps(table, cache_key(table, base_hash, np.dtype("float32"), MODEL), folder, score)


def test_sums_are_those_of_the_base_on_each_row_alone(tmp_path):
    table = table_of(drawn())
    found = logps(table, tmp_path)
    assert found.shape == (N, 2) and found.dtype == np.float32
    policy = Backbone(MODEL, ADAPTERS["lora"], base()).policies()

    @jax.jit
    def alone(tokens, valid):
        return scoring.sequence_logps(policy, tokens, valid, 6)[0]

    for row, sums in zip(table, found, strict=True):
        for side, value in zip(("chosen", "rejected"), sums, strict=True):
            tokens, valid = np.full((1, 11), PAD, np.int32), np.zeros((1, 11), bool)
            place = slice(6 - len(row["prompt"]), 6 + len(row[side]))
            tokens[0, place], valid[0, place] = np.concatenate([row["prompt"], row[side]]), True
            assert value == pytest.approx(float(alone(tokens, valid)[0]), rel=1e-5)


def test_the_second_call_reads_the_file(tmp_path):
    first = logps(table_of(drawn()), tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".npy"]
    # The user does not matter.
    again = logps(table_of(drawn(), user="bob"), tmp_path, score=refuse)
    assert first.tobytes() == again.tobytes()
    with pytest.raises(AssertionError, match="computed"):
        logps(table_of(drawn()), tmp_path, base_hash="c" * 16, score=refuse)


def one_token(tokens):
    tokens["chosen"][2][0] = (tokens["chosen"][2][0] + 1) % 24


def other_tokenizer(tokens):
    for ids in tokens.values():
        ids[:] = [x[::-1] + 1 for x in ids]


def boundary(tokens):
    """The last token of a prompt becomes the first of both answers: the same texts, another boundary."""
    for side in ("chosen", "rejected"):
        tokens[side][0] = np.concatenate([tokens["prompt"][0][-1:], tokens[side][0]])
    tokens["prompt"][0] = tokens["prompt"][0][:-1]


def row_boundary(tokens):
    """The same ids, distributed differently over two rows."""
    tokens["prompt"][1] = np.concatenate([tokens["prompt"][0][-1:], tokens["prompt"][1]])
    tokens["prompt"][0] = tokens["prompt"][0][:-1]


def truncated(tokens):
    tokens["rejected"] = [ids[:2] for ids in tokens["rejected"]]


def swapped(tokens):
    tokens["chosen"], tokens["rejected"] = tokens["rejected"], tokens["chosen"]


def one_row_less(tokens):
    for ids in tokens.values():
        del ids[-1]


CHANGES = [one_token, other_tokenizer, boundary, row_boundary, truncated, swapped, one_row_less]


def key(tokens, base_hash="b" * 16, dtype=jnp.float32, model=MODEL):
    return cache_key(table_of(tokens), base_hash, np.dtype(dtype), model)


@pytest.mark.parametrize("change", CHANGES, ids=[change.__name__ for change in CHANGES])
def test_other_tokens_have_another_key(change):
    tokens = drawn()
    change(tokens)
    assert key(tokens) != key(drawn()) == key(drawn())


def test_masks_have_another_key_and_other_sums(tmp_path):
    table = table_of(drawn())
    mask = np.arange(len(table.tokens["chosen"][0])) > 0
    masks = {"chosen": (mask, *[None] * (N - 1)), "rejected": (None,) * N}
    masked = dataclasses.replace(table, masks=masks)
    none = dataclasses.replace(table, masks={name: (None,) * N for name in masks})
    whole, same, partial = (logps(each, tmp_path) for each in (table, none, masked))
    np.testing.assert_array_equal(whole, same)
    assert partial[0, 0] > whole[0, 0] and len({*tmp_path.iterdir()}) == 2
    np.testing.assert_allclose(partial.flat[1:], whole.flat[1:], rtol=1e-5)
    moved = dataclasses.replace(table, masks={"chosen": (None,) * N, "rejected": (np.ones(1, bool), *[None] * (N - 1))})
    keys = {cache_key(each, "b", np.dtype("float32"), MODEL) for each in (table, none, masked, moved)}
    assert len(keys) == 3


def test_another_computation_has_another_key():
    others = [
        dataclasses.replace(MODEL, **changes)
        for changes in (
            {"dtype": jnp.bfloat16},
            {"attention": "einsum"},
            {"config": dataclasses.replace(MODEL.config, rope_theta=5000.0)},
        )
    ]
    keys = [key(drawn(), model=model) for model in (MODEL, *others)]
    keys += [key(drawn(), base_hash="c" * 16), key(drawn(), dtype=jnp.bfloat16)]
    assert len(set(keys)) == len(keys)
    # Saving memory changes no number; a dtype has two spellings.
    for changes in ({"remat": "full"}, {"dtype": np.dtype("float32")}):
        assert key(drawn(), model=dataclasses.replace(MODEL, **changes)) == keys[0]


def cut(path):
    path.write_bytes(path.read_bytes()[:-5])


def emptied(path):
    path.write_bytes(b"")


def garbled(path):
    path.write_bytes(b"no array at all")


def of_other_rows(path):
    np.save(path, np.zeros((N - 1, 2), np.float32))


def of_other_type(path):
    np.save(path, np.zeros((N, 2)))


def zeros(path):
    np.save(path, np.zeros((N, 2), np.float32))


def one_bit(path):
    data = bytearray(path.read_bytes())
    data[-30] ^= 1
    path.write_bytes(bytes(data))


def not_finite(path):
    reference._write(path, np.full((N, 2), np.nan, np.float32))


DAMAGES = [cut, emptied, garbled, of_other_rows, of_other_type, zeros, one_bit, not_finite]


@pytest.mark.parametrize("damage", DAMAGES, ids=[damage.__name__ for damage in DAMAGES])
def test_a_damaged_file_is_computed_again(tmp_path, caplog, damage):
    table = table_of(drawn())
    first = logps(table, tmp_path)
    (path,) = tmp_path.iterdir()
    damage(path)
    assert logps(table, tmp_path).tobytes() == first.tobytes()
    assert f"{path}: not a whole cache" in caplog.text
    assert logps(table, tmp_path, score=refuse).tobytes() == first.tobytes()


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_log_probs_that_are_not_finite_blame_the_base(tmp_path, value):
    def broken(answers):
        return np.where(np.arange(len(answers)) == 1, np.float32(value), score(answers))

    with pytest.raises(
        UserError, match=r"reference: the base gives log-probs .* not finite for 1 of 5 pairs; check its"
    ):
        logps(table_of(drawn()), tmp_path, score=broken)
    assert not list(tmp_path.iterdir())


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"reference: reference log-probs cannot be kept there .*XDG_CACHE_HOME"):
        logps(table_of(drawn()), tmp_path / "file" / "reference", score=refuse)  # known before any scoring


def test_a_full_disk(tmp_path, monkeypatch):
    def full(file, array):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(reference.np, "save", full)
    with pytest.raises(UserError, match=r"cannot be kept there \(No space left on device\); make room, or choose"):
        logps(table_of(drawn()), tmp_path)


def test_an_answer_that_many_people_compared_is_scored_once(tmp_path):
    tokens = drawn()
    # Every user compared every pair, every second one in the other order.
    swapped = tokens | {"chosen": tokens["rejected"], "rejected": tokens["chosen"]}
    many = {name: tokens[name] + swapped[name] + tokens[name] for name in COLUMNS}
    seen = []

    def watched(answers):
        seen.extend((tuple(row["prompt"]), tuple(row["completion"])) for row in answers)
        return score(answers)

    found = logps(table_of(many), tmp_path / "many", score=watched)
    assert len(seen) == len(set(seen)) == 2 * N
    once = logps(table_of(tokens), tmp_path / "once")
    np.testing.assert_allclose(found, np.concatenate([once, once[:, ::-1], once]), rtol=1e-6)


def test_the_answers_to_a_prompt_share_it():
    def answers(*lengths):
        return [
            {"prompt": np.full(P, i, np.int32), "completion": np.arange(n)}
            for i, (P, counts) in enumerate(lengths)
            for n in counts
        ]

    for rows in (answers((50, (3, 4, 5, 6)), (50, (2, 2, 2, 2))), answers((50, (3, 3, 3)), (2, (9,)), (40, (1,) * 20))):
        groups = shared_prompts(rows, 8)
        assert sorted(i for group in groups for i in group) == [*range(len(rows))]
        for group in groups:
            assert len({rows[i]["prompt"].tobytes() for i in group}) == 1
    assert shared_prompts(answers((50, (3, 4, 5, 6)), (50, (2, 2, 2, 2))), 8) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    # Eight would read the prompt no less often than seven.
    assert list(map(len, shared_prompts(answers((40, (1,) * 20)), 8))) == [7, 7, 6]
    assert shared_prompts(answers(*((9, (4,)) for _ in range(5))), 8) == [[0], [1], [2], [3], [4]]
    # A long row costs more than reading a short prompt again.
    assert shared_prompts(answers((1, (30, 30, 30))), 8) == [[0], [1], [2]]
