"""Computes `recompute`. On a CPU, XLA as of jax 0.10 removes the barriers that `nn.remat` relies on, so every activation is
stored anyway (jax 0.12 keeps them). This implementation recomputes them with both. Saves 218 of 367 MB of temporary memory
for the gradient of mini_gpt, at 1.22 × the time (AMD EPYC, AVX-512, two cores, 2026-11-26, `benchmark.py train`).
Proof: tests/test_kernel_gradients.py, test_recomputed_blocks_give_the_same_gradients.
"""

from typing import Any

import jax
from flax import linen as nn

from minigpt_jax.models.masks import Mask


def recompute(
    block: nn.Module, x_BTD: jax.Array, mask: Mask, positions_BT: jax.Array, cache: None, dropout: jax.Array | None
) -> jax.Array:
    """block(x_BTD, …), storing only its inputs for the backward pass, which recomputes the rest."""
    unbound, variables = block.unbind()
    rngs = None if dropout is None else {"dropout": block.make_rng("dropout")}

    def run(variables: Any, x_BTD: jax.Array, others: Any) -> jax.Array:
        mask, positions_BT, dropout, rngs = others  # inputs without a gradient
        return unbound.apply(variables, x_BTD, mask, positions_BT, cache, dropout, rngs=rngs)[0]

    def forward(*inputs):
        return run(*inputs), inputs

    def backward(inputs, dy_BTD):
        variables, x_BTD, others = inputs
        # Adding 0 · dy makes the second run wait for dy, and so for all later blocks. (If dy is not finite, the sum is NaN,
        # but so are the gradients then.)
        x_BTD = x_BTD + 0 * dy_BTD[:, :1, :1]
        _, gradient = jax.vjp(lambda variables, x_BTD: run(variables, x_BTD, others), variables, x_BTD)
        return *gradient(dy_BTD), None

    recomputed = jax.custom_vjp(run)
    recomputed.defvjp(forward, backward)
    return recomputed(variables, x_BTD, (mask, positions_BT, dropout, rngs))
