"""Attention as pure functions of queries, keys and values. The layer is in layers.py."""

import jax
import jax.numpy as jnp

from minigpt_jax.models.masks import Mask


def ages(num_queries: int, num_keys: int) -> jax.Array:
    """age_BTS: query position minus key position, for queries 0 to T - 1 and keys 0 to S - 1, with B = 1."""
    return (jnp.arange(num_queries)[:, None] - jnp.arange(num_keys)[None, :])[None]


def attention_weights(
    q_BTHK: jax.Array, k_BSHK: jax.Array, mask: Mask, age_BTS: jax.Array, exists_BTS: jax.Array | bool = True
) -> jax.Array:
    """weights_BHTS = softmax(Q Kᵀ / √K) under the mask. The softmax is in float32 for any input dtype."""
    scores_BHTS = jnp.einsum("BTHK,BSHK->BHTS", q_BTHK, k_BSHK) / q_BTHK.shape[-1] ** 0.5
    return jax.nn.softmax(mask(scores_BHTS, age_BTS, exists_BTS), axis=-1)


def attention(q_BTHK: jax.Array, k_BSHK: jax.Array, v_BSHK: jax.Array, mask: Mask) -> jax.Array:
    """o_BTHK = softmax(Q Kᵀ / √K) V for all heads, in the dtype of v ("Attention Is All You Need", equation 1)."""
    weights_BHTS = attention_weights(q_BTHK, k_BSHK, mask, ages(q_BTHK.shape[1], k_BSHK.shape[1]))
    return jnp.einsum("BHTS,BSHK->BTHK", weights_BHTS.astype(v_BSHK.dtype), v_BSHK)
