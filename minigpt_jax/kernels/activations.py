"""Computes `activate`, and computes it again in the backward pass instead of keeping what JAX would.
Saves 54 MB of 808 at the peak of mini_gpt, and no time:
steps took 3 to 5 % longer with it (AMD EPYC, AVX2, two cores, 2026-11-28, `benchmark.py kernels`).
Proof: tests/test_kernels.py, test_every_implementation_of_an_op_is_its_equation.
"""

import math

import jax

from minigpt_jax.models import ops


def gelu(x: jax.Array) -> jax.Array:
    """(1 + tanh u) / 2 = sigmoid(2u), which is the faster one on a CPU."""
    return x * jax.nn.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))


def activate(x: jax.Array, activation: str) -> jax.Array:
    if activation == "swiglu":  # whose gate is a product away from the next layer, so that nothing would be saved
        return ops.ACTIVATIONS[activation](x)
    return jax.checkpoint(gelu if activation == "gelu" else ops.ACTIVATIONS[activation])(x)
