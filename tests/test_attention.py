"""Attention: the equation against a plain loop, and the layer that wraps it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import MASKS, allowed_and_bias, attention_by_loop, masks, normal, random_params

from minigpt_jax import kernels
from minigpt_jax.config import ModelConfig
from minigpt_jax.models.attention import attention
from minigpt_jax.models.cache import KVCache
from minigpt_jax.models.gpt import GPT
from minigpt_jax.models.kernels import PLAIN
from minigpt_jax.models.layers import MultiHeadAttention
from minigpt_jax.models.masks import Mask

CONFIG = ModelConfig(num_layers=1, num_heads=4, embed_dim=16, ff_dim=16, context_length=8, vocab_size=5)
attend = jax.jit(attention)

# ---- The equation ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MASKS)
def test_attention_matches_the_equation(kind):
    B, T, S, H, K = 2, 5, 7, 3, 4
    q_BTHK, k_BSHK, v_BSHK = 3 * normal(B, T, H, K), normal(B, S, H, K, seed=1), normal(B, S, H, K, seed=2)
    mask = masks(B, S, H)[kind]
    expected_BTHK = attention_by_loop(q_BTHK, k_BSHK, v_BSHK, *allowed_and_bias(mask, B, T, S))
    np.testing.assert_allclose(attend(q_BTHK, k_BSHK, v_BSHK, mask), expected_BTHK, rtol=1e-5, atol=1e-5)


def test_weights_sum_to_one():
    q_BTHK, k_BSHK = 100 * normal(2, 5, 3, 4), 100 * normal(2, 7, 3, 4, seed=1)
    ones_BSHK = np.ones((2, 7, 3, 4), np.float32)
    np.testing.assert_allclose(attend(q_BTHK, k_BSHK, ones_BSHK, Mask(causal=True)), 1, rtol=1e-6)


def test_scores_are_scaled_by_the_size_of_a_head():
    """Queries and keys of ones have the score K / √K; the one other key has the score 0."""
    H, K = 4, 9
    q_BTHK, k_BSHK, v_BSHK = np.ones((2, 1, H, K)), np.ones((2, 2, H, K)), np.zeros((2, 2, H, K))
    k_BSHK[:, 1], v_BSHK[:, 0] = 0, 1
    o_BTHK = attend(*map(np.float32, (q_BTHK, k_BSHK, v_BSHK)), Mask())
    np.testing.assert_allclose(o_BTHK, 1 / (1 + np.exp(-np.sqrt(K))), rtol=1e-5)


@pytest.mark.parametrize("size", [1e2, 1e4, 1e15])
def test_extreme_scores_do_not_reveal_the_future(size):
    """All scores are far below zero, so a masked score that is not low enough would win over them."""
    q_BTHK = np.full((2, 4, 1, 2), size, np.float32)
    k_BSHK = size * np.arange(-4, 0, dtype=np.float32)[None, :, None, None] * np.ones((2, 1, 1, 2), np.float32)
    v_BSHK = normal(2, 4, 1, 2)
    # Without jit: XLA on a CPU rounds such large scores differently before and after taking their maximum.
    o_BTHK = attention(q_BTHK, k_BSHK, v_BSHK, Mask(causal=True))
    np.testing.assert_array_equal(o_BTHK, v_BSHK)  # the latest visible key has by far the largest score


def test_softmax_is_in_float32_when_the_inputs_are_not():
    """All scores here are exact in bfloat16, so only the softmax can lose precision."""
    q_BTHK = np.random.default_rng(0).integers(-2, 3, (2, 3, 2, 4))
    k_BSHK = np.random.default_rng(1).integers(-2, 3, (2, 5, 2, 4))
    v_BSHK = normal(2, 5, 2, 4)
    # The values stay in float32, so the weights do too.
    o_BTHK = attend(q_BTHK.astype(jnp.bfloat16), k_BSHK.astype(jnp.bfloat16), v_BSHK, Mask())
    expected_BTHK = attention_by_loop(q_BTHK, k_BSHK, v_BSHK, np.ones((2, 3, 5), bool))
    np.testing.assert_allclose(o_BTHK, expected_BTHK, rtol=1e-5, atol=1e-6)


def test_output_has_the_dtype_of_the_values():
    shape = jax.ShapeDtypeStruct((2, 3, 2, 4), jnp.bfloat16)
    assert jax.eval_shape(attention, shape, shape, shape, Mask()).dtype == jnp.bfloat16


# ---- The layer ------------------------------------------------------------------------------------------------------------


def layer_and_inputs(**changes):
    layer = MultiHeadAttention(dataclasses.replace(CONFIG, **changes))
    inputs = (normal(2, 6, CONFIG.embed_dim), Mask(causal=True), np.broadcast_to(np.arange(6), (2, 6)))
    return layer, random_params(layer, *inputs), inputs


def apply(layer, params, inputs):
    return jax.jit(layer.apply)({"params": params}, *inputs)


@pytest.mark.parametrize("num_kv_heads", [1, 2])
def test_grouped_query_attention_is_full_attention_with_repeated_heads(num_kv_heads):
    layer, params, inputs = layer_and_inputs(num_kv_heads=num_kv_heads, bias=True)
    D, H, G, K = CONFIG.embed_dim, CONFIG.num_heads, num_kv_heads, CONFIG.head_size

    repeated = dict(params)
    for name in ("key", "value"):
        kernel_DGK, bias_GK = params[name]["kernel"].reshape(D, G, K), params[name]["bias"].reshape(G, K)
        repeated[name] = {
            "kernel": np.repeat(kernel_DGK, H // G, axis=1).reshape(D, H * K),
            "bias": np.repeat(bias_GK, H // G, axis=0).reshape(H * K),
        }
    full = MultiHeadAttention(dataclasses.replace(layer.config, num_kv_heads=None))

    (y_BTD, no_cache), (full_y_BTD, _) = apply(layer, params, inputs), apply(full, repeated, inputs)
    np.testing.assert_allclose(y_BTD, full_y_BTD, rtol=1e-5, atol=1e-6)
    assert no_cache is None
    assert KVCache.empty(3, layer.config).v_BSGK.shape == (3, CONFIG.context_length, G, K)


def test_layer_is_projections_around_the_equation():
    """There is nothing else in it without rotary positions and QK norm."""
    layer, params, inputs = layer_and_inputs(positions="learned", qk_norm=False, bias=True)
    x_BTD, _, _ = inputs
    B, T, H, K = 2, 6, CONFIG.num_heads, CONFIG.head_size

    def project(x, name):
        return x @ params[name]["kernel"] + params[name]["bias"]

    q_BTHK, k_BTHK, v_BTHK = (project(x_BTD, name).reshape(B, T, H, K) for name in ("query", "key", "value"))
    o_BTHK = attention_by_loop(q_BTHK, k_BTHK, v_BTHK, np.broadcast_to(np.tri(T, dtype=bool), (B, T, T)))
    y_BTD, _ = apply(layer, params, inputs)
    np.testing.assert_allclose(y_BTD, project(o_BTHK.reshape(B, T, H * K), "output"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_qk_norm_makes_the_scale_of_queries_and_keys_irrelevant(qk_norm):
    layer, params, inputs = layer_and_inputs(qk_norm=qk_norm, bias=False)
    larger = params | {name: jax.tree.map(lambda leaf: 10 * leaf, params[name]) for name in ("query", "key")}
    run = jax.jit(layer.apply)
    empty = KVCache.empty(2, dataclasses.replace(CONFIG, context_length=6))
    (y_BTD, cache), (larger_y_BTD, _) = (run({"params": each}, *inputs, empty) for each in (params, larger))
    assert np.allclose(y_BTD, larger_y_BTD, atol=1e-3) == qk_norm
    assert np.allclose(np.square(cache.k_BSGK).mean(axis=-1), 1, atol=1e-3) == qk_norm


ONES_BS = np.ones((2, 6), int)


@pytest.mark.parametrize("mask", [Mask(), Mask(causal=True, padding_BS=ONES_BS), Mask(causal=True, segments_BS=ONES_BS)])
def test_masks_that_a_cache_does_not_support_are_rejected(mask):
    layer, params, (x_BTD, _, positions_BT) = layer_and_inputs()
    with pytest.raises(ValueError, match="cache"):
        layer.apply({"params": params}, x_BTD, mask, positions_BT, KVCache.empty(2, CONFIG))


# ---- Intermediate values --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_kernels", [PLAIN, kernels.SPLIT], ids=["plain", "tuned"])
def test_sown_intermediates_match_the_forward_pass(model_kernels):
    """The weights give the heads' outputs, the embeddings the first residual state, and the last one the logits."""
    config = dataclasses.replace(CONFIG, num_layers=2, num_kv_heads=2, positions="learned", qk_norm=False)
    model, tokens_BT = GPT(config, model_kernels), np.random.default_rng(0).integers(5, size=(2, 6))
    params = random_params(model, tokens_BT)
    run = jax.jit(lambda: model.apply({"params": params}, tokens_BT, mutable=["intermediates"]))
    (logits_BTV, _), variables = run()
    intermediates = variables["intermediates"]["transformer"]
    [weights_BHTS], [heads_BTHK] = (intermediates["block_1"]["attention"][name] for name in ("weights_BHTS", "heads_BTHK"))
    np.testing.assert_allclose(weights_BHTS.sum(axis=-1), 1, rtol=1e-5)
    assert (np.asarray(weights_BHTS)[..., ~np.tri(6, dtype=bool)] == 0).all()
    first_BTD, middle_BTD, last_BTD = intermediates["residual_BTD"]

    def norm(x_BTD, scale_D):
        return x_BTD / np.sqrt(np.mean(np.square(x_BTD), axis=-1, keepdims=True) + 1e-5) * scale_D[None, None]

    block = params["transformer"]["block_1"]
    v_BSGK = (norm(middle_BTD, block["attention_norm"]["scale"]) @ block["attention"]["value"]["kernel"]).reshape(2, 6, 2, 4)
    expected_BTHK = jnp.einsum("BHTS,BSHK->BTHK", weights_BHTS, jnp.repeat(v_BSGK, 2, axis=2))
    np.testing.assert_allclose(heads_BTHK, expected_BTHK, rtol=1e-4, atol=1e-5)
    expected_BTV = norm(last_BTD, params["transformer"]["final_norm"]["scale"]) @ params["head"]["kernel"]
    np.testing.assert_allclose(logits_BTV, expected_BTV, rtol=1e-4, atol=1e-4)
    embedding = params["embedding"]
    expected_BTD = embedding["tokens"]["embedding"][tokens_BT] + embedding["positions"]["embedding"][None, :6]
    np.testing.assert_allclose(first_BTD, expected_BTD, rtol=1e-6)


def test_intermediates_are_not_computed_unless_requested():
    """Blocked attention never forms the weights, so the traced program has them only when they are sown."""
    config = dataclasses.replace(CONFIG, context_length=128)
    model, tokens_BT = GPT(config, kernels.BLOCKED), np.zeros((2, 128), np.int32)
    params = random_params(model, tokens_BT)
    default_program = str(jax.make_jaxpr(lambda: model.apply({"params": params}, tokens_BT))())
    sowing_program = str(jax.make_jaxpr(lambda: model.apply({"params": params}, tokens_BT, mutable=["intermediates"]))())
    assert "[2,4,128,128]" not in default_program
    assert "[2,4,128,128]" in sowing_program
