"""Computes what `KVCache` does, with the ring in C parts of P slots, of which those that hold nothing yet are not read, and
with products in the order that suits few queries.
Saves half of a decoding step with 16 rows at 6 × 256
(AMD EPYC, AVX2, two cores, 2026-11-28, `benchmark.py kernels`).
Proof: tests/test_kernels.py, test_caches_are_the_plain_ring.
"""

import functools

import jax
import jax.numpy as jnp
from flax import struct

from minigpt_jax.config import ModelConfig
from minigpt_jax.models.cache import slot_ages
from minigpt_jax.models.masks import Mask

WORTHWHILE = 2**18  # keys, from which reading empty parts takes longer than choosing among them


@struct.dataclass
class PartitionedCache:
    """The ring of `KVCache`. Each part is an array of its own: XLA on a CPU would copy what is read of a larger one.

    Rows and their heads share one axis, N = B G: with two, XLA copies the cache of a single row at every step.
    """

    k_parts: tuple[jax.Array, ...]  # each NPK, as the products need it
    v_parts: tuple[jax.Array, ...]
    num_written: jax.Array  # positions written so far, a scalar; the next goes to this slot, modulo C P
    num_kv_heads: int = struct.field(pytree_node=False)

    @property
    def append_unit(self) -> int:
        """The number of positions in an `append` has to divide this, so that all of them go to one part."""
        return self.k_parts[0].shape[1]

    def append(self, k_BTGK: jax.Array, v_BTGK: jax.Array) -> "PartitionedCache":
        B, T, G, K = k_BTGK.shape
        P = self.append_unit
        slot = self.num_written % (P * len(self.k_parts))

        def write(parts, new_BTGK):
            new_NTK = new_BTGK.swapaxes(1, 2).reshape(B * G, T, K)

            def into(c, part_NPK):
                # The other parts are given what they hold: XLA would copy them in order to leave them alone.
                index = jnp.clip(slot - c * P, 0, P - T)
                old_NTK = jax.lax.dynamic_slice_in_dim(part_NPK, index, T, axis=1)
                written_NTK = jnp.where(slot // P == c, new_NTK, old_NTK)
                return jax.lax.dynamic_update_slice_in_dim(part_NPK, written_NTK, index, axis=1)

            return tuple(into(c, part_NPK) for c, part_NPK in enumerate(parts))

        k_parts, v_parts = write(self.k_parts, k_BTGK), write(self.v_parts, v_BTGK)
        return PartitionedCache(k_parts, v_parts, self.num_written + T, self.num_kv_heads)

    def attend(self, q_BTHK: jax.Array, mask: Mask, positions_BT: jax.Array) -> jax.Array:
        """Keys are on the left of their product, since XLA on a CPU transposes all that is on the right of one, and the
        queries that share a head are side by side.
        """
        B, T, H, K = q_BTHK.shape
        N, P, _ = self.k_parts[0].shape
        C, G = len(self.k_parts), self.num_kv_heads
        q_NQK = q_BTHK.reshape(B, T, G, H // G, K).swapaxes(1, 2).reshape(N, T * (H // G), K)  # Q = T H / G
        age_BTS = slot_ages(self.num_written, T, C * P)
        exists_BTS = age_BTS <= positions_BT[:, :, None]

        def attend_to(num_parts):
            k_parts, v_parts, S = self.k_parts[:num_parts], self.v_parts[:num_parts], num_parts * P
            scores_NSQ = jnp.concatenate([jnp.einsum("NPK,NQK->NPQ", k_NPK, q_NQK) for k_NPK in k_parts], axis=1)
            scores_BHTS = scores_NSQ.reshape(B, G, S, T, H // G).transpose(0, 1, 4, 3, 2).reshape(B, H, T, S)
            scores_BHTS = scores_BHTS.astype(jnp.float32) / K**0.5
            weights_BHTS = jax.nn.softmax(mask(scores_BHTS, age_BTS[..., :S], exists_BTS[..., :S]), axis=-1)
            weights_NQS = weights_BHTS.reshape(B, G, H // G, T, S).swapaxes(2, 3).reshape(N, -1, S)
            w_parts = jnp.split(weights_NQS.astype(v_parts[0].dtype), num_parts, axis=-1)
            return sum(jnp.einsum("NQP,NPK->NQK", *pair) for pair in zip(w_parts, v_parts, strict=True))

        num_begun = jnp.minimum(-(-self.num_written // P), C)  # parts that hold something
        o_NQK = jax.lax.switch(num_begun - 1, [functools.partial(attend_to, c) for c in range(1, C + 1)])
        return o_NQK.reshape(B, G, T, H // G, K).swapaxes(1, 2).reshape(B, T, H, K)

    def rows(self, rows_R: jax.Array) -> "PartitionedCache":
        G = self.num_kv_heads

        def pick(part_NPK):
            return part_NPK.reshape(-1, G, *part_NPK.shape[1:])[rows_R].reshape(-1, *part_NPK.shape[1:])

        k_parts, v_parts = jax.tree.map(pick, (self.k_parts, self.v_parts))
        return PartitionedCache(k_parts, v_parts, self.num_written, G)

    def with_rows_of(self, other: "PartitionedCache", is_other_B: jax.Array) -> "PartitionedCache":
        """`other` may have another number of parts."""
        turn = self.num_written - other.num_written
        is_other_N11 = jnp.repeat(is_other_B, self.num_kv_heads)[:, None, None]

        def pick(ours, theirs):
            turned = jnp.split(jnp.roll(jnp.concatenate(theirs, axis=1), turn, axis=1), len(ours), axis=1)
            return tuple(jnp.where(is_other_N11, *pair) for pair in zip(turned, ours, strict=True))

        k_parts, v_parts = pick(self.k_parts, other.k_parts), pick(self.v_parts, other.v_parts)
        return PartitionedCache(k_parts, v_parts, self.num_written, self.num_kv_heads)


def empty_cache(batch_size: int, config: ModelConfig) -> PartitionedCache:
    """A cache for `context_length` positions, in four parts where it is large."""
    num_keys = batch_size * config.kv_heads * config.head_size * config.context_length
    return partitioned(batch_size, config, 4 if num_keys >= WORTHWHILE and config.context_length % 128 == 0 else 1)


def partitioned(batch_size: int, config: ModelConfig, num_parts: int) -> PartitionedCache:
    shape = batch_size * config.kv_heads, config.context_length // num_parts, config.head_size
    parts = (jnp.zeros(shape, config.dtype),) * num_parts
    return PartitionedCache(parts, parts, jnp.zeros((), jnp.int32), config.kv_heads)
