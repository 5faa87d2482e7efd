"""The matmuls and their gradients equal those of `x @ kernel`, under every transformation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjrlhf.models.matmul import FEW_ROWS, matmul, matmul_transposed
from pjrlhf.parallel.roofline import matmul_cost


def plain(x, kernel):
    return x @ kernel


def numbers(*shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape), dtype)


def found(multiply, x, kernel):
    def loss(x, kernel):
        return jnp.sin(multiply(jnp.cos(x), kernel)).astype(jnp.float32).sum()

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(x, kernel)


@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 3, 7)])
def test_values_and_gradients_are_those_of_the_plain_matmul(shape):
    x, kernel = numbers(*shape), numbers(7, 4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        found(matmul, x, kernel),
        found(plain, x, kernel),
    )


@pytest.mark.parametrize("rows", [1, FEW_ROWS, FEW_ROWS + 1])
def test_kernels_may_be_transposed(rows):
    x, kernel = numbers(rows, 1, 7), numbers(4, 7)
    got, want = found(matmul_transposed, x, kernel), found(plain, x, kernel.T)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got[1], (want[1][0], want[1][1].T)
    )
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)


def test_several_kernels_at_once():
    x, kernels = numbers(3, 2, 5, 7), numbers(3, 7, 4)
    got, want = (found(jax.vmap(multiply), x, kernels) for multiply in (matmul, plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)


def test_half_precision_is_kept():
    x, kernel = numbers(5, 7, dtype=jnp.bfloat16), numbers(7, 4, dtype=jnp.bfloat16)
    got, want = found(matmul, x, kernel), found(plain, x, kernel)
    for a, b in zip(jax.tree.leaves(got[1]), jax.tree.leaves(want[1]), strict=True):
        assert a.dtype == b.dtype == jnp.bfloat16
        np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), rtol=0.02, atol=0.02)


def test_what_is_compiled_for_an_accelerator_transposes_nothing():
    """The transposing branch is for CPUs only, on whatever machine it is compiled."""
    traced = jax.jit(lambda x, kernel: jax.vjp(matmul, x, kernel)[1](x @ kernel)).trace(numbers(5, 7), numbers(7, 4))
    assert "optimization_barrier" in traced.lower(lowering_platforms=("cpu",)).as_text()
    assert "optimization_barrier" not in traced.lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.parametrize("wanted", [0, 1])
def test_gradients_nobody_asks_for_are_not_computed(wanted):
    x, kernel = numbers(5, 7), numbers(7, 4)
    gradient = jax.make_jaxpr(jax.grad(lambda *args: matmul(*args).sum(), argnums=wanted))(x, kernel)
    assert matmul_cost(gradient.jaxpr).flops == 2 * (2 * 5 * 7 * 4)
