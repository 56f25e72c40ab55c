"""The key/value cache: a ring buffer, and which queries see which of its slots."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import allowed_and_bias, attention_by_loop, masks, normal

from minigpt_jax.config import ModelConfig
from minigpt_jax.models.cache import KVCache, LayerCache, slot_ages

pytestmark = pytest.mark.slow

CONFIG = ModelConfig(num_layers=1, num_heads=4, embed_dim=16, ff_dim=16, context_length=8, vocab_size=5)
RING = dataclasses.replace(CONFIG, num_heads=1, embed_dim=4, context_length=4)


def entries(labels_BT):
    """Keys and values of one head of size 4, filled with these numbers."""
    k_BTGK = jnp.asarray(np.broadcast_to(np.asarray(labels_BT)[:, :, None, None], (*np.shape(labels_BT), 1, 4)), jnp.float32)
    return k_BTGK, 100 + k_BTGK


@pytest.mark.parametrize("T", [1, 2, 4])
def test_cache_holds_the_last_positions_written(T):
    """Two rows, several times around a ring of four slots, with one or several positions per append."""
    append, cache = jax.jit(KVCache.append), KVCache.empty(2, RING)
    assert cache.append_divisor == 4
    for step in range(0, 12, T):
        labels_BT = np.stack([np.arange(step, step + T), np.arange(step, step + T) + 50])
        cache = append(cache, *entries(labels_BT))
        held_S = [max(p for p in range(-4, step + T) if p % 4 == slot) for slot in range(4)]
        for row, first in enumerate([0, 50]):
            assert cache.k_BSGK[row, :, 0, 0].tolist() == [p + first if p >= 0 else 0 for p in held_S]
            assert cache.v_BSGK[row, :, 0, 3].tolist() == [p + first + 100 if p >= 0 else 0 for p in held_S]


@pytest.mark.parametrize(
    ("num_written", "positions_BT", "expected"),
    [
        (3, [[0, 1, 2], [0, 0, 1]], ["100 110 111", "100 010 011"]),  # the second row starts one slot later
        (2, [[1], [0]], ["11", "01"]),
        (6, [[5], [1], [2], [9]], ["1111", "1100", "1101", "1111"]),  # 6 % 4 = 2, so slot 1 was written last
        (6, [[2, 3], [0, 0]], ["1011 1111", "1000 0100"]),
    ],
)
def test_queries_see_their_row_up_to_themselves_and_all_slots_once_the_ring_is_full(num_written, positions_BT, expected):
    age_BTS = slot_ages(jnp.asarray(num_written), len(positions_BT[0]), 4)
    visible_BTS = (age_BTS <= np.array(positions_BT)[:, :, None]).astype(int).tolist()
    drawing = [["".join(map(str, slots_S)) for slots_S in slots_TS] for slots_TS in visible_BTS]
    assert drawing == [[slots.ljust(4, "0") for slots in row.split()] for row in expected]


def test_selected_rows_keep_all_their_heads():
    cache = KVCache.empty(3, dataclasses.replace(CONFIG, num_kv_heads=2))
    heads_BSGK = jnp.arange(6.0).reshape(3, 1, 2, 1)
    picked = cache.replace(k_BSGK=cache.k_BSGK + heads_BSGK, v_BSGK=cache.v_BSGK - heads_BSGK).rows(np.array([2, 0, 0, 1]))
    assert picked.k_BSGK[:, 1, :, 1].tolist() == [[4, 5], [0, 1], [0, 1], [2, 3]]
    assert picked.v_BSGK[:, 0, :, 0].tolist() == [[-4, -5], [0, -1], [0, -1], [-2, -3]]


def test_rows_of_another_cache_are_shifted_to_the_slot_where_this_one_writes():
    ours, theirs = KVCache.empty(2, RING), KVCache.empty(2, RING)
    for step in range(6):
        ours = ours.append(*entries([[step], [step]]))
    for step in range(3):
        theirs = theirs.append(*entries([[10 + step], [20 + step]]))
    merged = ours.with_rows_of(theirs, jnp.array([False, True]))
    assert merged.num_written == 6
    assert merged.k_BSGK[:, :, 0, 0].tolist() == [[4, 5, 2, 3], [21, 22, 0, 20]]  # 6 % 4 = 2, so slot 1 was written last
    assert merged.v_BSGK[1, :, 0, 0].tolist() == [121, 122, 0, 120]


def test_rows_of_a_layers_cache_keep_their_latest_inputs():
    def cache_of(number):
        latest = jnp.array([[number], [number + 1]]), jnp.array([[number + 2], [number + 3]])
        return LayerCache(KVCache.empty(2, RING).append(*entries([[number], [number + 1]])), latest)

    def numbers(cache):
        return [cache.kv.k_BSGK[:, 0, 0, 0].tolist(), *(x_BD[:, 0].tolist() for x_BD in cache.latest)]

    assert numbers(cache_of(10).rows(np.array([1, 1, 0]))) == [[11, 11, 10], [11, 11, 10], [13, 13, 12]]
    assert numbers(cache_of(10).with_rows_of(cache_of(20), jnp.array([False, True]))) == [[10, 21], [10, 21], [12, 23]]


MASKS = {kind: mask for kind, mask in masks(2, CONFIG.context_length, CONFIG.num_heads).items() if mask.only_past}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("T", [1, 2])
def test_attending_to_a_cache_matches_the_equation(num_kv_heads, T, mask):
    """At every fill level. The second row starts three positions later. With T = 2, only until the ring is full."""
    config = dataclasses.replace(CONFIG, num_kv_heads=num_kv_heads)
    H, G, S, K, N = config.num_heads, num_kv_heads, config.context_length, config.head_size, 20 if T == 1 else 8
    q_BNHK, k_BNGK, v_BNGK = normal(2, N, H, K), normal(2, N, G, K, seed=1), normal(2, N, G, K, seed=2)
    append, attend, cache = jax.jit(KVCache.append), jax.jit(KVCache.attend), KVCache.empty(2, config)
    age_NN = np.arange(N)[:, None] - np.arange(N)[None, :]
    start_B11 = np.array([0, 3])[:, None, None]
    allowed_BNN, bias_HNN = allowed_and_bias(mask, 2, N, N)
    allowed_BNN &= (age_NN < S) & (np.arange(N)[None, None] >= start_B11)
    allowed_BNN |= np.eye(N, dtype=bool)  # outputs before the start of a row are not compared
    k_BNHK, v_BNHK = (np.repeat(each, H // G, axis=2) for each in (k_BNGK, v_BNGK))
    expected_BNHK = attention_by_loop(q_BNHK, k_BNHK, v_BNHK, allowed_BNN, bias_HNN)
    for first in range(0, N, T):
        new = slice(first, first + T)
        cache = append(cache, k_BNGK[:, new], v_BNGK[:, new])
        positions_BT = np.arange(first, first + T)[None, :] - start_B11[:, 0]
        o_BTHK = np.asarray(attend(cache, q_BNHK[:, new], mask, np.maximum(positions_BT, 0)))
        started_BT = positions_BT >= 0
        np.testing.assert_allclose(o_BTHK[started_BT], expected_BNHK[:, new][started_BT], rtol=1e-4, atol=1e-5)
