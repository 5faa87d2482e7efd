"""Products of activations with a kernel that suit the machine."""

import jax
import jax.numpy as jnp

FEW_ROWS = 64


@jax.custom_vjp
def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`x` [..., D] times `kernel` [D, F], [..., F], in the dtype of `x`. A kernel of integers is constant to gradients.

    On a CPU the gradient of the kernel is taken from a turned copy of `x`: XLA's fast product there (jax 0.10) takes
    no turned first factor, and its other one is half as fast. Elsewhere it is what JAX would have made of `x @ kernel`.
    """
    return x @ kernel.astype(x.dtype)


def _forward(x, kernel):
    # What is not asked for is not kept for the gradient: a frozen kernel has none. Integers are converted anew.
    wanted = kernel.perturbed and not jnp.issubdtype(kernel.value.dtype, jnp.integer)
    kept = x.value if wanted else None, kernel.value if x.perturbed else None
    return x.value @ kernel.value.astype(x.value.dtype), kept


def _backward(saved, gradient):
    x, kernel = saved

    def turned(x, gradient):
        rows = x.reshape(-1, x.shape[-1])
        return jax.lax.optimization_barrier(rows.T) @ gradient.reshape(len(rows), -1)

    def plain(x, gradient):
        return jnp.einsum("...d,...f->df", x, gradient)

    of_kernel = None if x is None else jax.lax.platform_dependent(x, gradient, cpu=turned, default=plain)
    of_x = None if kernel is None else gradient @ kernel.astype(gradient.dtype).T
    return of_x, of_kernel


product.defvjp(_forward, _backward, symbolic_zeros=True)


def turned_product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`x` [..., D] times the turned `kernel` [F, D], [..., F].

    For few rows, as in decoding, a CPU is twice as fast with the kernel as the first factor, which is not rearranged.
    """
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) > FEW_ROWS:
        return product(x, kernel.T)
    # The barriers keep XLA from turning both back.
    found = jax.lax.optimization_barrier(kernel.astype(x.dtype) @ jax.lax.optimization_barrier(rows.T))
    return found.T.reshape(*x.shape[:-1], len(kernel))
