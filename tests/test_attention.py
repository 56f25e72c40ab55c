"""Attention: the equation against a plain loop, the masks against drawings, the cache as the ring that it is said to be."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minigpt_jax.config import ModelConfig
from minigpt_jax.models import attention
from minigpt_jax.models.attention import (
    KVCache,
    MultiHeadAttention,
    causal_attention,
    causal_mask,
    scaled_dot_product_attention,
    suited_attention,
    suited_parts,
)

CONFIG = ModelConfig(num_layers=1, num_heads=4, embed_dim=16, ff_dim=16, context_length=8, vocab_size=5)
attend = jax.jit(scaled_dot_product_attention)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def attention_by_loop(q_BTHK, k_BSHK, v_BSHK, mask_BTS):
    """Equation 1 of the paper for one batch row, query and head at a time."""
    B, T, H, K = q_BTHK.shape
    o_BTHK = np.zeros((B, T, H, K))
    for b, t, h in np.ndindex(B, T, H):
        seen = np.flatnonzero(mask_BTS[b, t])
        scores = np.array([np.dot(q_BTHK[b, t, h], k_BSHK[b, s, h]) / np.sqrt(K) for s in seen])
        weights = np.exp(scores - scores.max())
        o_BTHK[b, t, h] = sum(w * v_BSHK[b, s, h] for w, s in zip(weights / weights.sum(), seen, strict=True))
    return o_BTHK


# ---- In blocks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_positions", [5, 64, 65, 150])
def test_attention_in_blocks_is_attention_with_the_causal_mask(num_positions):
    shape = (2, num_positions, 3, 4)
    q_BTHK, k_BTHK, v_BTHK = 3 * normal(*shape), normal(*shape, seed=1), normal(*shape, seed=2)
    weights_BTHK = normal(*shape, seed=3)

    def value_and_grad(attention):
        loss = lambda *qkv: jnp.sum(attention(*qkv) * weights_BTHK)  # noqa: E731
        return jax.jit(attention)(q_BTHK, k_BTHK, v_BTHK), *jax.jit(jax.grad(loss, (0, 1, 2)))(q_BTHK, k_BTHK, v_BTHK)

    mask_BTS = causal_mask(num_positions)
    plain = value_and_grad(lambda q, k, v: scaled_dot_product_attention(q, k, v, mask_BTS))
    for ours, theirs in zip(value_and_grad(causal_attention), plain, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-5)


def test_attention_in_blocks_survives_large_scores_and_keeps_the_type():
    q_BTHK = k_BTHK = jnp.asarray(100 * normal(2, 100, 2, 4), jnp.bfloat16)
    v_BTHK = jnp.asarray(normal(2, 100, 2, 4), jnp.bfloat16)
    grads = jax.grad(lambda *qkv: causal_attention(*qkv).astype(jnp.float32).sum(), (0, 1, 2))(q_BTHK, k_BTHK, v_BTHK)
    for array in (causal_attention(q_BTHK, k_BTHK, v_BTHK), *grads):
        assert array.dtype == jnp.bfloat16
        assert jnp.isfinite(array).all()


def test_what_attention_in_blocks_keeps_for_the_gradient_does_not_grow_with_the_square_of_the_context():
    qkv_BTHK = [normal(2, 256, 2, 4, seed=seed) for seed in range(3)]
    _, gradient = jax.vjp(causal_attention, *qkv_BTHK)
    assert 0 < max(leaf.size for leaf in jax.tree.leaves(gradient)) <= qkv_BTHK[0].size


def test_what_attention_in_blocks_takes_for_a_moment_does_not_grow_with_the_square_of_the_context():
    def temporary_bytes(num_positions):
        qkv = [jax.ShapeDtypeStruct((2, num_positions, 2, 4), jnp.float32)] * 3
        gradient = jax.grad(lambda *qkv: causal_attention(*qkv).sum(), (0, 1, 2))
        return jax.jit(gradient).lower(*qkv).compile().memory_analysis().temp_size_in_bytes

    assert 0 < temporary_bytes(2048) < 2.2 * temporary_bytes(1024)


CPU = types.SimpleNamespace(platform="cpu")
TPU = types.SimpleNamespace(platform="tpu")


def gpu(capability):
    return types.SimpleNamespace(platform="gpu", compute_capability=capability)


@pytest.mark.parametrize(
    "device, changes, way",
    [
        (CPU, {}, "halves"),
        (CPU, {"context_length": 64}, "halves"),
        (CPU, {"context_length": 65}, "blocks"),
        (CPU, {"context_length": 65, "dtype": "bfloat16", "embed_dim": 32}, "blocks"),
        (gpu("8.0"), {"dtype": "bfloat16", "embed_dim": 32}, "cudnn"),
        (gpu("10.0"), {"dtype": "bfloat16", "embed_dim": 512}, "cudnn"),
        (gpu("9.0"), {"dtype": "bfloat16", "embed_dim": 544}, "whole"),  # heads of 136
        (gpu("9.0"), {"dtype": "bfloat16", "embed_dim": 16}, "whole"),  # heads of 4
        (gpu("9.0"), {"dtype": "float32", "embed_dim": 32}, "whole"),
        (gpu("7.5"), {"dtype": "bfloat16", "embed_dim": 32}, "whole"),  # Turing
        (gpu("gfx942"), {"dtype": "bfloat16", "embed_dim": 32}, "whole"),  # AMD
        (TPU, {"dtype": "bfloat16", "embed_dim": 32}, "whole"),
    ],
)
def test_the_way_that_suits_a_device(device, changes, way):
    assert suited_attention(dataclasses.replace(CONFIG, **changes), device) == way


@pytest.mark.parametrize("way, batch_size", [("whole", 2), ("halves", 4), ("halves", 3), ("halves", 1), ("cudnn", 2)])
def test_every_way_is_attention_with_the_causal_mask(monkeypatch, way, batch_size):
    """Of cuDNN's what can be known without a GPU: which function it is asked of, and that this one means the same by it."""
    asked = []

    def on_a_cpu(*qkv, implementation, **options):
        asked.append(implementation)
        return plain(*qkv, implementation="xla", **options)

    plain = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", on_a_cpu)
    qkv_BTHK = [normal(batch_size, 100, 2, 8, seed=seed) for seed in range(3)]
    expected_BTHK = scaled_dot_product_attention(*qkv_BTHK, causal_mask(100))
    np.testing.assert_allclose(causal_attention(*qkv_BTHK, way), expected_BTHK, rtol=1e-5, atol=1e-5)
    assert asked == ["cudnn"] * (way == "cudnn")


def test_the_layer_takes_the_way_that_suits_the_device(monkeypatch):
    ways = []
    monkeypatch.setattr(jax, "devices", lambda: [gpu("8.0")])
    monkeypatch.setattr(attention, "causal_attention", lambda q, k, v, way: ways.append(way) or v)
    config = dataclasses.replace(CONFIG, dtype="bfloat16", embed_dim=32)
    inputs = normal(1, 8, 32), attention.CAUSAL, jnp.arange(8)[None]
    MultiHeadAttention(config).init_with_output(jax.random.key(0), *inputs)
    assert ways == ["cudnn"]


# ---- The equation ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["none", "all", "causal", "random"])
def test_attention_is_the_equation(kind):
    B, T, S, H, K = 2, 5, 7, 3, 4
    q_BTHK, k_BSHK, v_BSHK = 3 * normal(B, T, H, K), normal(B, S, H, K, seed=1), normal(B, S, H, K, seed=2)
    mask_BTS = {
        "none": None,
        "all": np.ones((B, T, S), bool),
        "causal": np.broadcast_to(np.tril(np.ones((T, S), bool)), (B, T, S)),
        "random": (normal(B, T, S, seed=3) > 0) | (np.arange(S) == 2),  # each query sees at least one key
    }[kind]
    o_BTHK = attend(q_BTHK, k_BSHK, v_BSHK, mask_BTS)
    expected_BTHK = attention_by_loop(q_BTHK, k_BSHK, v_BSHK, np.ones((B, T, S), bool) if mask_BTS is None else mask_BTS)
    np.testing.assert_allclose(o_BTHK, expected_BTHK, rtol=1e-5, atol=1e-5)


def test_weights_sum_to_one():
    q_BTHK, k_BSHK = 100 * normal(2, 5, 3, 4), 100 * normal(2, 7, 3, 4, seed=1)
    ones_BSHK = np.ones((2, 7, 3, 4), np.float32)
    mask_BTS = np.broadcast_to(np.tri(5, 7, dtype=bool), (2, 5, 7))
    np.testing.assert_allclose(attend(q_BTHK, k_BSHK, ones_BSHK, mask_BTS), 1, rtol=1e-6)


def test_scores_are_scaled_by_the_size_of_a_head():
    """Queries and keys of ones have the score K / √K; the one key that differs has 0."""
    H, K = 4, 9
    q_BTHK, k_BSHK, v_BSHK = np.ones((2, 1, H, K)), np.ones((2, 2, H, K)), np.zeros((2, 2, H, K))
    k_BSHK[:, 1], v_BSHK[:, 0] = 0, 1
    o_BTHK = attend(*map(np.float32, (q_BTHK, k_BSHK, v_BSHK)), None)
    np.testing.assert_allclose(o_BTHK, 1 / (1 + np.exp(-np.sqrt(K))), rtol=1e-5)


@pytest.mark.parametrize("size", [1e2, 1e4, 1e15])
def test_no_score_is_extreme_enough_to_see_the_future(size):
    """All scores are far below zero, so that a mask that is not low enough would make the future the better choice."""
    q_BTHK = np.full((2, 4, 1, 2), size, np.float32)
    k_BSHK = size * np.arange(-4, 0, dtype=np.float32)[None, :, None, None] * np.ones((2, 1, 1, 2), np.float32)
    v_BSHK = normal(2, 4, 1, 2)
    o_BTHK = attend(q_BTHK, k_BSHK, v_BSHK, causal_mask(4))
    np.testing.assert_array_equal(o_BTHK, v_BSHK)  # of the keys that may be seen the latest has by far the largest score


def test_softmax_is_in_float32_when_the_inputs_are_not():
    """All scores here are exact in bfloat16, so that what is left to go wrong is the softmax."""
    q_BTHK = np.random.default_rng(0).integers(-2, 3, (2, 3, 2, 4))
    k_BSHK = np.random.default_rng(1).integers(-2, 3, (2, 5, 2, 4))
    v_BSHK = normal(2, 5, 2, 4)
    o_BTHK = attend(q_BTHK.astype(jnp.bfloat16), k_BSHK.astype(jnp.bfloat16), v_BSHK, None)
    expected_BTHK = attention_by_loop(q_BTHK, k_BSHK, v_BSHK, np.ones((2, 3, 5), bool))
    np.testing.assert_allclose(o_BTHK, expected_BTHK, rtol=1e-5, atol=1e-6)


def test_output_has_the_type_of_the_values():
    shape = jax.ShapeDtypeStruct((2, 3, 2, 4), jnp.bfloat16)
    assert jax.eval_shape(scaled_dot_product_attention, shape, shape, shape, None).dtype == jnp.bfloat16


# ---- Masks ----------------------------------------------------------------------------------------------------------------


def drawn(drawing: str) -> np.ndarray:
    return np.array([[[cell == "■" for cell in line.split()] for line in drawing.strip().splitlines()]])


def test_causal_mask_as_drawn():
    assert drawn("""
        ■ · · ·
        ■ ■ · ·
        ■ ■ ■ ·
        ■ ■ ■ ■
    """).tolist() == causal_mask(4).tolist()  # fmt: skip


def test_causal_mask_with_a_window_as_drawn():
    assert drawn("""
        ■ · · ·
        ■ ■ · ·
        · ■ ■ ·
        · · ■ ■
    """).tolist() == causal_mask(4, window=2).tolist()  # fmt: skip


def test_a_window_of_one_sees_itself_and_a_wide_one_changes_nothing():
    assert causal_mask(5, window=1).tolist() == np.eye(5, dtype=bool)[None].tolist()
    assert causal_mask(5, window=5).tolist() == causal_mask(5).tolist()


# ---- The cache ------------------------------------------------------------------------------------------------------------


RING = dataclasses.replace(CONFIG, num_heads=1, embed_dim=4, num_kv_heads=None, context_length=4)


def entries(names_BT):
    """Keys and values of one head of size 4 that carry these numbers."""
    k_BTGK = jnp.asarray(np.broadcast_to(np.asarray(names_BT)[:, :, None, None], (*np.shape(names_BT), 1, 4)), jnp.float32)
    return k_BTGK, 100 + k_BTGK


def slots(parts):
    """slots_NSK of the whole ring."""
    return np.concatenate(parts, axis=1)


@pytest.mark.parametrize(("num_parts", "T"), [(1, 1), (1, 2), (2, 1), (2, 2), (4, 1)])
def test_cache_holds_the_last_positions_written(num_parts, T):
    """Two rows, several times around a ring of four slots, one position after another and two at once."""
    append, cache = jax.jit(KVCache.append), KVCache.empty(2, RING, num_parts)
    assert [part_NPK.shape for part_NPK in cache.k_parts] == [(2, 4 // num_parts, 4)] * num_parts
    for step in range(0, 12, T):
        names_BT = np.stack([np.arange(step, step + T), np.arange(step, step + T) + 50])
        cache = append(cache, *entries(names_BT))
        held_S = [max(p for p in range(-4, step + T) if p % 4 == slot) for slot in range(4)]
        for row, first in enumerate([0, 50]):
            assert slots(cache.k_parts)[row, :, 0].tolist() == [p + first if p >= 0 else 0 for p in held_S]
            assert slots(cache.v_parts)[row, :, 3].tolist() == [p + first + 100 if p >= 0 else 0 for p in held_S]


@pytest.mark.parametrize(
    ("num_written", "positions_BT", "expected"),
    [
        (3, [[0, 1, 2], [0, 0, 1]], ["100 110 111", "100 010 011"]),  # the second row began one slot later
        (2, [[1], [0]], ["11", "01"]),
        (6, [[5], [1], [2], [9]], ["1111", "1100", "1101", "1111"]),  # 6 % 4 = 2: written last was slot 1
        (6, [[2, 3], [0, 0]], ["1011 1111", "1000 0100"]),
    ],
)
def test_queries_see_their_row_up_to_themselves_and_all_once_the_ring_is_full(num_written, positions_BT, expected):
    cache = KVCache.empty(len(positions_BT), RING).replace(num_written=jnp.asarray(num_written))
    visible_BTS = cache.visible(np.array(positions_BT)).astype(int).tolist()
    drawn = [["".join(map(str, slots_S)) for slots_S in slots_TS] for slots_TS in visible_BTS]
    assert drawn == [[slots.ljust(4, "0") for slots in row.split()] for row in expected]


def test_picked_rows_take_all_their_heads_along():
    cache = KVCache.empty(3, dataclasses.replace(CONFIG, num_kv_heads=2), num_parts=2)
    heads_N11 = jnp.arange(6)[:, None, None]
    k_parts, v_parts = ([part_NPK + sign * heads_N11 for part_NPK in cache.k_parts] for sign in (1, -1))
    picked = cache.replace(k_parts=(k_parts[0], 10 * k_parts[1]), v_parts=v_parts).rows(np.array([2, 0, 0, 1]), batch_size=3)
    assert picked.k_parts[0][:, 1, 1].tolist() == [4, 5, 0, 1, 0, 1, 2, 3]
    assert picked.k_parts[1][:, 1, 1].tolist() == [40, 50, 0, 10, 0, 10, 20, 30]
    assert picked.v_parts[0][:, 0, 0].tolist() == [-4, -5, 0, -1, 0, -1, -2, -3]


@pytest.mark.parametrize("num_parts", [1, 2, 4])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("T", [1, 3])
def test_attending_to_a_cache_is_the_equation(num_kv_heads, T, num_parts):
    """However full it is. The parts that nothing has been written to hold what must not be read."""
    config = dataclasses.replace(CONFIG, num_kv_heads=num_kv_heads)
    B, H, G, S, K = 2, config.num_heads, num_kv_heads, config.context_length, config.head_size
    q_BTHK, k_BSGK, v_BSGK = normal(B, T, H, K), normal(B, S, G, K, seed=1), normal(B, S, G, K, seed=2)
    mask_BTS = np.random.default_rng(0).random((B, T, S)) < 0.6
    mask_BTS[:, :, 0] = True
    repeated = [np.repeat(each, H // G, axis=2) for each in (k_BSGK, v_BSGK)]

    def unreadable(parts, written):
        return tuple(np.nan * part if c * part.shape[1] >= written else part for c, part in enumerate(parts))

    append, attend_to_cache, cache = jax.jit(KVCache.append), jax.jit(KVCache.attend), KVCache.empty(B, config, num_parts)
    for first in range(0, 2 * S, 2):
        new_S, written = slice(first % S, first % S + 2), first + 2
        cache = append(cache, k_BSGK[:, new_S], v_BSGK[:, new_S])
        k_parts, v_parts = unreadable(cache.k_parts, written), unreadable(cache.v_parts, written)
        held_BTS = mask_BTS & (np.arange(S) < written)
        o_BTHK = attend_to_cache(cache.replace(k_parts=k_parts, v_parts=v_parts), q_BTHK, held_BTS)
        np.testing.assert_allclose(o_BTHK, attention_by_loop(q_BTHK, *repeated, held_BTS), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("device", "batch_size", "changes", "num_parts"),
    [
        (CPU, 64, {"context_length": 256}, 4),
        (CPU, 63, {"context_length": 256}, 1),
        (CPU, 64, {"context_length": 254}, 1),
        (CPU, 128, {"context_length": 384}, 4),
        (CPU, 128, {"context_length": 260}, 1),  # whose quarters have no piece of a prompt but 1, 5, 13, 65
        (CPU, 64, {"context_length": 256, "num_kv_heads": 2}, 1),
        (gpu("8.0"), 64, {"context_length": 256}, 1),
        (TPU, 64, {"context_length": 256}, 1),
    ],
)
def test_a_large_cache_has_parts_on_a_cpu(device, batch_size, changes, num_parts):
    assert suited_parts(dataclasses.replace(CONFIG, **changes), batch_size, device) == num_parts


# ---- The layer ------------------------------------------------------------------------------------------------------------


def random_params(module, *args):
    """Parameters of the right shapes, far from their initial values, without the compilation that drawing them takes."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *args)["params"]
    return jax.tree.map(lambda leaf: 0.5 * normal(*leaf.shape, seed=leaf.size), shapes)


def layer_and_inputs(**changes):
    layer = MultiHeadAttention(dataclasses.replace(CONFIG, **changes))
    inputs = (normal(2, 6, CONFIG.embed_dim), causal_mask(6), np.broadcast_to(np.arange(6), (2, 6)))
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
    assert KVCache.empty(3, layer.config).v_parts[0].shape == (3 * G, CONFIG.context_length, K)


def test_the_layer_is_its_projections_around_the_equation():
    """Without rotation and normalisation there is nothing else in it."""
    layer, params, inputs = layer_and_inputs(positions="learned", qk_norm=False, bias=True)
    x_BTD, mask_BTS, _ = inputs
    B, T, H, K = 2, 6, CONFIG.num_heads, CONFIG.head_size

    def project(x, name):
        return x @ params[name]["kernel"] + params[name]["bias"]

    q_BTHK, k_BTHK, v_BTHK = (project(x_BTD, name).reshape(B, T, H, K) for name in ("query", "key", "value"))
    o_BTHK = attention_by_loop(q_BTHK, k_BTHK, v_BTHK, np.broadcast_to(mask_BTS, (B, T, T)))
    y_BTD, _ = apply(layer, params, inputs)
    np.testing.assert_allclose(y_BTD, project(o_BTHK.reshape(B, T, H * K), "output"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_qk_norm_makes_the_size_of_queries_and_keys_irrelevant(qk_norm):
    layer, params, inputs = layer_and_inputs(qk_norm=qk_norm, bias=False)
    larger = params | {name: jax.tree.map(lambda leaf: 10 * leaf, params[name]) for name in ("query", "key")}
    run = jax.jit(layer.apply)
    empty = KVCache.empty(2, dataclasses.replace(CONFIG, context_length=6))
    (y_BTD, cache), (larger_y_BTD, _) = (run({"params": each}, *inputs, empty) for each in (params, larger))
    assert np.allclose(y_BTD, larger_y_BTD, atol=1e-3) == qk_norm
    assert np.allclose(np.square(slots(cache.k_parts)).mean(axis=-1), 1, atol=1e-3) == qk_norm
