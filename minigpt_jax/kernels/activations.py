"""Computes `activate`, and recomputes it in the backward pass instead of storing what JAX would.
Saves 54 of 808 MB of peak memory for mini_gpt, but no time:
steps took 3 to 5 % longer (AMD EPYC, AVX2, two cores, 2026-11-28, `benchmark.py kernels`).
Proof: tests/test_kernels.py, test_every_implementation_of_an_op_matches_its_equation.
"""

import math

import jax

from minigpt_jax.models import ops


def gelu(x: jax.Array) -> jax.Array:
    """GELU with sigmoid(2u) in place of the equal (1 + tanh u) / 2: faster on a CPU."""
    return x * jax.nn.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))


def activate(x: jax.Array, activation: str) -> jax.Array:
    if activation == "swiglu":  # a product follows before the next layer, so recomputing would save nothing
        return ops.ACTIVATIONS[activation](x)
    return jax.checkpoint(gelu if activation == "gelu" else ops.ACTIVATIONS[activation])(x)
