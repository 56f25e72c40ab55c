"""Attention as pure functions of queries, keys and values; layers.py makes a layer of it."""

import jax
import jax.numpy as jnp

from minigpt_jax.models.masks import Mask


def ages(num_queries: int, num_keys: int) -> jax.Array:
    """age_BTS of keys at positions 0 to S - 1 for queries at positions 0 to T - 1, with B = 1."""
    return (jnp.arange(num_queries)[:, None] - jnp.arange(num_keys)[None, :])[None]


def attention_weights(
    q_BTHK: jax.Array, k_BSHK: jax.Array, mask: Mask, age_BTS: jax.Array, exists_BTS: jax.Array | bool = True
) -> jax.Array:
    """weights_BHTS = softmax(Q Kᵀ / √K) under the mask. The softmax is in float32 whatever the type of the inputs."""
    scores_BHTS = jnp.einsum("BTHK,BSHK->BHTS", q_BTHK, k_BSHK) / q_BTHK.shape[-1] ** 0.5
    return jax.nn.softmax(mask(scores_BHTS, age_BTS, exists_BTS), axis=-1)


def attention(q_BTHK: jax.Array, k_BSHK: jax.Array, v_BSHK: jax.Array, mask: Mask) -> jax.Array:
    """softmax(Q Kᵀ / √K) V, "Attention Is All You Need", equation 1, for all heads at once. o_BTHK in the type of v."""
    weights_BHTS = attention_weights(q_BTHK, k_BSHK, mask, ages(q_BTHK.shape[1], k_BSHK.shape[1]))
    return jnp.einsum("BHTS,BSHK->BTHK", weights_BHTS.astype(v_BSHK.dtype), v_BSHK)
