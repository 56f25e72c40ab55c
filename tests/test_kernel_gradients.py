"""Kernels with custom gradients: they match those of the equations, and store as little as claimed."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, normal
from helpers import random_params as random_params_for
from jax.test_util import check_grads

from minigpt_jax.config import ModelConfig
from minigpt_jax.kernels import BLOCKED, SPLIT
from minigpt_jax.kernels.dense import matmul
from minigpt_jax.kernels.norms import center, unit_rms
from minigpt_jax.models.masks import Mask
from minigpt_jax.models.transformer import Transformer

pytestmark = pytest.mark.slow

# ---- Norms ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1.0, 3e-3])
@pytest.mark.parametrize(
    "ours, equation",
    [
        (lambda x: unit_rms(x, 1e-5), lambda x: x / jnp.sqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-5)),
        (center, lambda x: x - jnp.mean(x, axis=-1, keepdims=True)),
    ],
    ids=["unit_rms", "center"],
)
def test_norms_and_their_gradients_match_the_equations(ours, equation, size):
    x_BTD, weights_BTD = size * normal(2, 3, 8) + size, normal(2, 3, 8, seed=1)

    def gradient(function):
        return jax.jit(jax.grad(lambda x_BTD: jnp.sum(function(x_BTD) * weights_BTD)))(x_BTD)

    np.testing.assert_allclose(jax.jit(ours)(x_BTD), jax.jit(equation)(x_BTD), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(gradient(ours), gradient(equation), rtol=1e-4, atol=1e-5 / size)


def test_unit_rms_keeps_the_dtype_and_stores_only_its_result_and_one_number_per_row():
    y_BTD, gradient = jax.vjp(lambda x: unit_rms(x, 1e-5), jnp.asarray(normal(2, 3, 8), jnp.bfloat16))
    assert y_BTD.dtype == gradient(y_BTD)[0].dtype == jnp.bfloat16
    stored = sorted((leaf.size, leaf.dtype) for leaf in jax.tree.leaves(gradient))
    assert stored == [(2 * 3, jnp.float32), (2 * 3 * 8, jnp.bfloat16)]


# ---- Matmul ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_features", [3, 4, 5])
@pytest.mark.parametrize("leading", [(6,), (2, 3), (2, 3, 2)])
def test_matmul_and_its_gradients_match_jax(leading, num_features):
    x, kernel_DF, weight = normal(*leading, 4), normal(4, num_features, seed=1), normal(*leading, num_features, seed=2)

    @jax.jit
    def both(x, kernel_DF):
        def run(multiply):
            return jax.value_and_grad(lambda x, kernel_DF: (multiply(x, kernel_DF) * weight).sum(), (0, 1))(x, kernel_DF)

        return run(matmul), run(jnp.matmul)

    assert_close(*both(x, kernel_DF), rtol=1e-5, atol=1e-5)


# ---- In the stack of blocks -----------------------------------------------------------------------------------------------

CONFIG = ModelConfig(num_layers=2, num_heads=2, embed_dim=8, ff_dim=12, context_length=4, vocab_size=5, bias=True)
B, T, D = 2, 4, CONFIG.embed_dim
POSITIONS_BT = np.broadcast_to(np.arange(T), (B, T))
X_BTD = normal(B, T, D)
with_both_kernels = pytest.mark.parametrize("kernels", [SPLIT, BLOCKED], ids=lambda kernels: kernels.name)


def random_params(module):
    return random_params_for(module, X_BTD, Mask(), POSITIONS_BT)


def configured(**changes):
    return dataclasses.replace(CONFIG, **changes)


def test_gradient_of_the_residual_stream_is_summed_once():
    """Not recomputed in each block from those of all later blocks, which would make fusions grow with the depth."""

    def most_inputs(num_layers):
        """The largest number of inputs of a fusion in the compiled gradient."""
        model = Transformer(configured(num_layers=num_layers, norm="layernorm", activation="gelu"), SPLIT)
        gradient = jax.grad(lambda params: jnp.sum(model.apply({"params": params}, X_BTD, Mask(), POSITIONS_BT)[0] ** 2))
        compiled = jax.jit(gradient).lower(random_params(model)).compile()
        return max(inputs.count("%") for inputs in re.findall(r" fusion\((.*?)\), kind", compiled.as_text()))

    assert most_inputs(3) <= most_inputs(1) + 2


# ---- Recomputation --------------------------------------------------------------------------------------------------------


def compiled_gradient(config, kernels, num_positions=64):
    """The compiled gradient of a sum over the output by parameters and input, and arguments to call it with."""
    x_BTD, positions_BT = normal(B, num_positions, D), np.broadcast_to(np.arange(num_positions), (B, num_positions))
    model = Transformer(config, kernels)

    def loss(params, x_BTD, key):
        rngs, mask = {"dropout": key}, Mask(causal=True)
        y_BTD, _ = model.apply({"params": params}, x_BTD, mask, positions_BT, None, config.dropout or None, rngs=rngs)
        return jnp.sum(y_BTD**3)

    inputs = random_params(model), x_BTD, jax.random.key(0)
    return jax.jit(jax.grad(loss, (0, 1))).lower(*inputs).compile(), inputs


@with_both_kernels
def test_recomputed_blocks_give_the_same_gradients(kernels):
    (stored, inputs), (recomputed, _) = (compiled_gradient(configured(remat=remat), kernels) for remat in (False, True))
    assert_close(recomputed(*inputs), stored(*inputs), rtol=1e-4, atol=1e-4)


def test_recomputed_blocks_need_little_memory():
    stored, recomputed = (
        compiled_gradient(configured(remat=remat, num_layers=8), SPLIT)[0].memory_analysis().temp_size_in_bytes
        for remat in (False, True)
    )
    assert 0 < recomputed < 0.6 * stored


@with_both_kernels
def test_recomputed_blocks_use_the_same_dropout_mask_again(kernels):
    """Compared with finite differences: with another mask it would be the gradient of a different function."""
    model = Transformer(configured(remat=True), kernels)
    params, kwargs = random_params(model), {"dropout": 0.5, "rngs": {"dropout": jax.random.key(0)}}

    def value(x_BTD):
        y_BTD, _ = model.apply({"params": params}, x_BTD, Mask(causal=True), POSITIONS_BT, **kwargs)
        return jnp.sum(y_BTD * normal(B, T, D, seed=1))

    check_grads(jax.jit(value), (X_BTD,), order=1, modes=["rev"], rtol=1e-2, atol=1e-2)
