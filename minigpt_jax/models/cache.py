"""The cache of the decoder, with which each key and value is computed only once."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from minigpt_jax.config import ModelConfig
from minigpt_jax.models.attention import attention_weights
from minigpt_jax.models.masks import Mask


def slot_ages(num_written: jax.Array, num_queries: int, num_slots: int) -> jax.Array:
    """age_BTS of the keys in a ring buffer's slots, as seen from the last T positions written, with B = 1.

    Once the ring is full, T must be 1: the last of several new positions would overwrite a key that the first should see.
    """
    slots_T = num_written - num_queries + jnp.arange(num_queries)
    return ((slots_T[:, None] - jnp.arange(num_slots)[None, :]) % num_slots)[None]


@struct.dataclass
class KVCache:
    """Keys and values of one layer at the last S positions: a ring buffer, where the newest position overwrites the oldest.

    All rows write to the same slot, whatever their own positions, so that XLA can update the arrays in place.
    """

    k_BSGK: jax.Array
    v_BSGK: jax.Array
    num_written: jax.Array  # positions written so far, a scalar; the next is written to slot num_written % S

    @classmethod
    def empty(cls, batch_size: int, config: ModelConfig) -> "KVCache":
        """An empty cache for `context_length` positions."""
        zeros_BSGK = jnp.zeros((batch_size, config.context_length, config.kv_heads, config.head_size), config.dtype)
        return cls(zeros_BSGK, zeros_BSGK, jnp.zeros((), jnp.int32))

    @property
    def append_divisor(self) -> int:
        """The number of positions in an `append` must divide this, so that no write wraps around."""
        return self.k_BSGK.shape[1]

    def append(self, k_BTGK: jax.Array, v_BTGK: jax.Array) -> "KVCache":
        """The cache with T more positions appended."""
        T, S = k_BTGK.shape[1], self.k_BSGK.shape[1]
        at = (0, self.num_written % S, 0, 0)
        k_BSGK, v_BSGK = (
            jax.lax.dynamic_update_slice(old_BSGK, new_BTGK, at)
            for old_BSGK, new_BTGK in ((self.k_BSGK, k_BTGK), (self.v_BSGK, v_BTGK))
        )
        return KVCache(k_BSGK, v_BSGK, self.num_written + T)

    def attend(self, q_BTHK: jax.Array, mask: Mask, positions_BT: jax.Array) -> jax.Array:
        """o_BTHK: attention from the last T positions, `positions_BT` within their rows, to themselves and earlier ones."""
        age_BTS = slot_ages(self.num_written, q_BTHK.shape[1], self.k_BSGK.shape[1])
        exists_BTS = age_BTS <= positions_BT[:, :, None]  # older slots are padding or empty
        heads_per_key = q_BTHK.shape[2] // self.k_BSGK.shape[2]
        k_BSHK, v_BSHK = (jnp.repeat(x_BSGK, heads_per_key, axis=2) for x_BSGK in (self.k_BSGK, self.v_BSGK))
        weights_BHTS = attention_weights(q_BTHK, k_BSHK, mask, age_BTS, exists_BTS)
        return jnp.einsum("BHTS,BSHK->BTHK", weights_BHTS.astype(v_BSHK.dtype), v_BSHK)

    def rows(self, rows_R: jax.Array) -> "KVCache":
        """A cache with the selected rows of this one."""
        return KVCache(self.k_BSGK[rows_R], self.v_BSGK[rows_R], self.num_written)

    def with_rows_of(self, other: "KVCache", is_other_B: jax.Array) -> "KVCache":
        """This cache with some rows replaced by those of `other`, shifted so that both wrote last to the same slot."""
        shift = self.num_written - other.num_written

        def pick(ours_BSGK, theirs_BSGK):
            return jnp.where(is_other_B[:, None, None, None], jnp.roll(theirs_BSGK, shift, axis=1), ours_BSGK)

        return KVCache(pick(self.k_BSGK, other.k_BSGK), pick(self.v_BSGK, other.v_BSGK), self.num_written)


@struct.dataclass
class LayerCache:
    """What a block keeps of the positions so far: attention's keys and values, and the latest inputs of its two sub-layers
    for the token shift."""

    kv: Any
    latest: tuple[jax.Array, jax.Array]  # x_BD of attention, of the feed-forward network

    @classmethod
    def empty(cls, kv: Any, batch_size: int, config: ModelConfig) -> "LayerCache":
        zeros_BD = jnp.zeros((batch_size, config.embed_dim), config.dtype)
        return cls(kv, (zeros_BD, zeros_BD))

    def rows(self, rows_R: jax.Array) -> "LayerCache":
        """A cache with the selected rows of this one."""
        return LayerCache(self.kv.rows(rows_R), jax.tree.map(lambda x_BD: x_BD[rows_R], self.latest))

    def with_rows_of(self, other: "LayerCache", is_other_B: jax.Array) -> "LayerCache":
        """This cache with some rows replaced by those of `other`."""
        latest = jax.tree.map(lambda *pair_BD: jnp.where(is_other_B[:, None], *pair_BD), other.latest, self.latest)
        return LayerCache(self.kv.with_rows_of(other.kv, is_other_B), latest)
