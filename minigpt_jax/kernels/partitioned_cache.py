"""Computes what `KVCache` does, with the ring buffer in C parts of P slots. Parts that are still empty are not read, and the
matmuls are laid out for few queries.
Saves half of a decoding step with 16 rows, 6 layers and width 256
(AMD EPYC, AVX2, two cores, 2026-11-28, `benchmark.py kernels`).
Proof: tests/test_kernels.py, test_caches_match_the_plain_ring_buffer.
"""

import functools

import jax
import jax.numpy as jnp
from flax import struct

from minigpt_jax.config import ModelConfig
from minigpt_jax.models.cache import slot_ages
from minigpt_jax.models.masks import Mask

MIN_PARTITIONED_SIZE = 2**18  # elements; reading empty parts of a smaller cache costs less than branching


@struct.dataclass
class PartitionedCache:
    """The ring buffer of `KVCache`. Each part is a separate array: XLA on a CPU would copy a slice before reading it.

    Batch and heads share one axis, N = B G: with two axes, XLA copies the cache of a single row at every step.
    """

    k_parts: tuple[jax.Array, ...]  # each NPK, the layout of the matmuls
    v_parts: tuple[jax.Array, ...]
    num_written: jax.Array  # positions written so far, a scalar; the next is written to slot num_written % (C P)
    num_kv_heads: int = struct.field(pytree_node=False)

    @property
    def append_divisor(self) -> int:
        """The number of positions in an `append` must divide this, so that each write stays within one part."""
        return self.k_parts[0].shape[1]

    def append(self, k_BTGK: jax.Array, v_BTGK: jax.Array) -> "PartitionedCache":
        B, T, G, K = k_BTGK.shape
        P = self.append_divisor
        slot = self.num_written % (P * len(self.k_parts))

        def write(parts, new_BTGK):
            new_NTK = new_BTGK.swapaxes(1, 2).reshape(B * G, T, K)

            def write_part(c, part_NPK):
                # The other parts are overwritten with their own values: to leave them unchanged, XLA would copy them.
                index = jnp.clip(slot - c * P, 0, P - T)
                old_NTK = jax.lax.dynamic_slice_in_dim(part_NPK, index, T, axis=1)
                written_NTK = jnp.where(slot // P == c, new_NTK, old_NTK)
                return jax.lax.dynamic_update_slice_in_dim(part_NPK, written_NTK, index, axis=1)

            return tuple(write_part(c, part_NPK) for c, part_NPK in enumerate(parts))

        k_parts, v_parts = write(self.k_parts, k_BTGK), write(self.v_parts, v_BTGK)
        return PartitionedCache(k_parts, v_parts, self.num_written + T, self.num_kv_heads)

    def attend(self, q_BTHK: jax.Array, mask: Mask, positions_BT: jax.Array) -> jax.Array:
        """Keys are the left operand of their matmul, since XLA on a CPU transposes the right one. Queries that share a
        key/value head are adjacent.
        """
        B, T, H, K = q_BTHK.shape
        N, P, _ = self.k_parts[0].shape
        C, G = len(self.k_parts), self.num_kv_heads
        q_NQK = q_BTHK.reshape(B, T, G, H // G, K).swapaxes(1, 2).reshape(N, T * (H // G), K)  # Q = T H / G
        age_BTS = slot_ages(self.num_written, T, C * P)
        exists_BTS = age_BTS <= positions_BT[:, :, None]

        def attend_to_first(num_parts):
            k_parts, v_parts, S = self.k_parts[:num_parts], self.v_parts[:num_parts], num_parts * P
            scores_NSQ = jnp.concatenate([jnp.einsum("NPK,NQK->NPQ", k_NPK, q_NQK) for k_NPK in k_parts], axis=1)
            scores_BHTS = scores_NSQ.reshape(B, G, S, T, H // G).transpose(0, 1, 4, 3, 2).reshape(B, H, T, S)
            scores_BHTS = scores_BHTS.astype(jnp.float32) / K**0.5
            weights_BHTS = jax.nn.softmax(mask(scores_BHTS, age_BTS[..., :S], exists_BTS[..., :S]), axis=-1)
            weights_NQS = weights_BHTS.reshape(B, G, H // G, T, S).swapaxes(2, 3).reshape(N, -1, S)
            w_parts = jnp.split(weights_NQS.astype(v_parts[0].dtype), num_parts, axis=-1)
            return sum(jnp.einsum("NQP,NPK->NQK", w_NQP, v_NPK) for w_NQP, v_NPK in zip(w_parts, v_parts, strict=True))

        num_filled = jnp.minimum(-(-self.num_written // P), C)  # parts that are not empty
        o_NQK = jax.lax.switch(num_filled - 1, [functools.partial(attend_to_first, c) for c in range(1, C + 1)])
        return o_NQK.reshape(B, G, T, H // G, K).swapaxes(1, 2).reshape(B, T, H, K)

    def rows(self, rows_R: jax.Array) -> "PartitionedCache":
        G = self.num_kv_heads

        def pick(part_NPK):
            return part_NPK.reshape(-1, G, *part_NPK.shape[1:])[rows_R].reshape(-1, *part_NPK.shape[1:])

        k_parts, v_parts = jax.tree.map(pick, (self.k_parts, self.v_parts))
        return PartitionedCache(k_parts, v_parts, self.num_written, G)

    def with_rows_of(self, other: "PartitionedCache", is_other_B: jax.Array) -> "PartitionedCache":
        """`other` may have a different number of parts."""
        shift = self.num_written - other.num_written
        is_other_N11 = jnp.repeat(is_other_B, self.num_kv_heads)[:, None, None]

        def pick(ours, theirs):
            shifted = jnp.split(jnp.roll(jnp.concatenate(theirs, axis=1), shift, axis=1), len(ours), axis=1)
            return tuple(jnp.where(is_other_N11, *pair) for pair in zip(shifted, ours, strict=True))

        k_parts, v_parts = pick(self.k_parts, other.k_parts), pick(self.v_parts, other.v_parts)
        return PartitionedCache(k_parts, v_parts, self.num_written, self.num_kv_heads)


def empty_cache(batch_size: int, config: ModelConfig) -> PartitionedCache:
    """An empty cache for `context_length` positions, in four parts if it is large."""
    size = batch_size * config.kv_heads * config.head_size * config.context_length
    return partitioned(batch_size, config, 4 if size >= MIN_PARTITIONED_SIZE and config.context_length % 128 == 0 else 1)


def partitioned(batch_size: int, config: ModelConfig, num_parts: int) -> PartitionedCache:
    shape = batch_size * config.kv_heads, config.context_length // num_parts, config.head_size
    parts = (jnp.zeros(shape, config.dtype),) * num_parts
    return PartitionedCache(parts, parts, jnp.zeros((), jnp.int32), config.kv_heads)
