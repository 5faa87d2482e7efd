"""The scorer: every row once, in the order of the rows, whatever the chunks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjrlhf.runtime.devices import Devices, MeshSettings
from pjrlhf.runtime.scorer import Scorer


@pytest.fixture(scope="module")
def rows():
    return np.random.default_rng(0).integers(1, 9, 21).tolist()


@jax.jit
def squares(batch):
    return jnp.stack([batch**2, -batch], 1)


@pytest.mark.parametrize("by_length", [False, True])
@pytest.mark.parametrize("size", [1, 4, 21, 64])
def test_scores_stand_in_the_order_of_the_rows(rows, size, by_length):
    scorer = Scorer(Devices(MeshSettings(), 1), size)
    assert scorer.size % jax.device_count() == 0 and scorer.size >= size
    seen = []

    def collate(chunk):
        seen.append(list(chunk))
        return np.array(chunk)

    found = scorer("squares", rows, collate, squares, rows if by_length else None)
    np.testing.assert_array_equal(found, np.stack([np.square(rows), np.negative(rows)], 1))
    # One shape, each row once, and the last chunk is filled up with its own first row.
    assert {len(chunk) for chunk in seen} == {scorer.size}
    order = [x for chunk in seen for x in chunk]
    assert order[: len(rows)] == (sorted(rows) if by_length else rows)
    assert set(order[len(rows) :]) <= {seen[-1][0]}
