"""Matrix products of activations with a kernel, arranged for the fast path of each backend."""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Float

from pjrlhf.types import Array, DType

FEW_ROWS = 64


@jax.custom_vjp
def matmul(x: Float[Array, "*batch D"], kernel: Float[Array, "D F"]) -> Float[Array, "*batch F"]:
    """`x @ kernel` in the dtype of `x`.

    On a CPU the gradient of the kernel is computed from a transposed copy of `x`: XLA:CPU's fast GEMM (jax 0.10) does
    not accept a transposed left operand, and its fallback is half as fast. On other backends the gradient is JAX's.
    """
    return x @ kernel.astype(x.dtype)


def _forward(x, kernel):
    # Residuals are saved only where a gradient needs them: a frozen kernel needs no `x`.
    residuals = x.value if kernel.perturbed else None, kernel.value if x.perturbed else None
    return x.value @ kernel.value.astype(x.value.dtype), residuals


def _backward(residuals, gradient):
    x, kernel = residuals

    def transposed(x, gradient):
        rows = x.reshape(-1, x.shape[-1])
        return jax.lax.optimization_barrier(rows.T) @ gradient.reshape(len(rows), -1)

    def plain(x, gradient):
        return jnp.einsum("...d,...f->df", x, gradient)

    kernel_gradient = None
    if x is not None:
        kernel_gradient = jax.lax.platform_dependent(x, gradient, cpu=transposed, default=plain)
    x_gradient = None if kernel is None else gradient @ kernel.astype(gradient.dtype).T
    return x_gradient, kernel_gradient


matmul.defvjp(_forward, _backward, symbolic_zeros=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def matmul_frozen(
    floats: Callable[[Mapping[str, Array], DType], Float[Array, "D F"]],
    x: Float[Array, "*batch D"],
    stored: Mapping[str, Array],
) -> Float[Array, "*batch F"]:
    """`x @ floats(stored, dtype of x)`, with a kernel that is stored in another form and gets no gradient.

    The kernel is made again in the backward pass, so that the floats of all layers are never held at once.
    """
    return x @ floats(stored, x.dtype)


def _forward_frozen(floats, x, stored):
    return matmul_frozen(floats, x, stored), stored


def _backward_frozen(floats, stored, gradient):
    return gradient @ floats(stored, gradient.dtype).T, None


matmul_frozen.defvjp(_forward_frozen, _backward_frozen)


def matmul_transposed(x: Float[Array, "*batch D"], kernel: Float[Array, "F D"]) -> Float[Array, "*batch F"]:
    """`x @ kernel.T` in the dtype of `x`.

    For few rows, as in decoding, a CPU is twice as fast with the kernel as the left operand, which it then need not
    repack.
    """
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) > FEW_ROWS:
        return matmul(x, kernel.T)
    # The barriers stop XLA from undoing the transposes.
    product = jax.lax.optimization_barrier(kernel.astype(x.dtype) @ jax.lax.optimization_barrier(rows.T))
    return product.T.reshape(*x.shape[:-1], len(kernel))
