"""Computes `matmul`. JAX's own gradient contracts several axes at once, and for that XLA on a CPU transposes the large
cotangent element by element.
Saves 27 % of a training step of nanogpt_cpu and 15 % of one of mini_gpt
(AMD EPYC, AVX2, two cores, 2026-11-28, `benchmark.py kernels`).
Proof: tests/test_kernel_gradients.py, test_matmul_and_its_gradients_match_jax.
"""

import jax


@jax.custom_vjp
def matmul(x: jax.Array, kernel_DF: jax.Array) -> jax.Array:
    """x W over the last axis of x. Its gradients are plain matrix products, with the leading axes of x merged into one."""
    return x @ kernel_DF


def matmul_forward(x: jax.Array, kernel_DF: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return x @ kernel_DF, (x, kernel_DF)


def matmul_backward(residuals: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel_DF = residuals
    x_ND, dy_NF = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])  # N: the merged leading axes
    D, F = kernel_DF.shape
    # On a CPU, XLA is slower at tall matmuls than at wide ones. The barrier keeps it from undoing the transposition.
    dkernel_DF = x_ND.T @ dy_NF if D <= F else jax.lax.optimization_barrier(dy_NF.T @ x_ND).T
    return (dy_NF @ kernel_DF.T).reshape(x.shape), dkernel_DF


matmul.defvjp(matmul_forward, matmul_backward)
