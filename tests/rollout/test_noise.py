"""The noise of draws is JAX's, bit for bit, and the largest score wins."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.random import threefry2x32_p

from pjrlhf.rollout.noise import likeliest, noise_of_keys, row_noise

TOTAL, SIZE = 37, 501
KINDS = "threefry2x32", "rbg"


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_of_the_whole_batch(kind):
    key, rows = jax.random.key(7, impl=kind), jnp.asarray([36, 0, 5, 5, 17])
    noise = jax.jit(functools.partial(row_noise, total=TOTAL, size=SIZE))(key, rows)
    np.testing.assert_array_equal(noise, jax.random.gumbel(key, (TOTAL, SIZE))[rows])


@pytest.mark.parametrize("kind", KINDS)
def test_every_key_has_noise_of_its_own(kind):
    keys = jax.random.split(jax.random.key(7, impl=kind), 5)
    noise = jax.jit(noise_of_keys, static_argnums=1)(keys, SIZE)
    np.testing.assert_array_equal(noise, jax.vmap(lambda key: jax.random.gumbel(key, (SIZE,)))(keys))


def test_a_setting_of_jax_changes_the_noise_as_it_changes_that_of_jax():
    key, rows = jax.random.key(7), jnp.asarray([3, 1])
    plain = row_noise(key, rows, 4, SIZE)
    with jax.threefry_partitionable(False):
        noise = row_noise(key, rows, 4, SIZE)
        np.testing.assert_array_equal(noise, jax.random.gumbel(key, (4, SIZE))[rows])
    assert not np.array_equal(noise, plain)


def test_the_last_elements_that_32_bits_number_are_those_of_jax():
    # Rows that jax.random.gumbel would take 17 GB to reach: its bits come from the same generator, element by element.
    total, size, key = 2**22, 1000, jax.random.key(3)
    noise = row_noise(key, jnp.asarray([total - 1]), total, size)
    index = jnp.arange(size, dtype=jnp.uint32) + np.uint32((total - 1) * size)
    words = jax.random.key_data(key)
    first, second = threefry2x32_p.bind(words[0], words[1], jnp.zeros_like(index), index)
    upper = np.asarray(first ^ second) >> 9
    uniform = np.maximum(upper.astype(np.float64) / 2**23, np.finfo(np.float32).tiny)
    np.testing.assert_allclose(noise[0], -np.log(-np.log(uniform)), rtol=1e-4, atol=1e-5)


def test_the_likeliest_is_the_first_of_equals():
    scores = np.random.default_rng(0).integers(0, 9, (50, 30)).astype(np.float32)
    scores[:10, 4:] = -np.inf
    np.testing.assert_array_equal(likeliest(jnp.asarray(scores)), scores.argmax(-1))
