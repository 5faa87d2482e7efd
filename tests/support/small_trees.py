"""Comparing pytrees of arrays in tests."""

import jax
import numpy as np


def assert_trees(actual, expected, **tolerance):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), actual, expected)


def assert_same(actual, expected):
    assert_trees(actual, expected, rtol=0, atol=0)
