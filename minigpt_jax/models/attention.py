"""Attention: the equation as a pure function, the same in blocks, what a decoder remembers, and the layer."""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from minigpt_jax.config import ModelConfig
from minigpt_jax.models.layers import Dense, residual_init, rotate, unit_rms


def causal_mask(num_positions: int, window: int | None = None) -> jax.Array:
    """True where query t may look at key s: not at the future and, with a window, not at what is `window` or more back.

        num_positions=4          window=2

           s 0 1 2 3             s 0 1 2 3
        t 0  ■ · · ·          t 0  ■ · · ·
          1  ■ ■ · ·            1  ■ ■ · ·
          2  ■ ■ ■ ·            2  · ■ ■ ·
          3  ■ ■ ■ ■            3  · · ■ ■

    Returns a boolean array of shape (1, T, S) with T = S = num_positions, to be broadcast over the batch.
    """
    age_TS = jnp.arange(num_positions)[:, None] - jnp.arange(num_positions)[None, :]
    mask_TS = age_TS >= 0
    if window is not None:
        mask_TS &= age_TS < window
    return mask_TS[None]


def scaled_dot_product_attention(
    q_BTHK: jax.Array, k_BSHK: jax.Array, v_BSHK: jax.Array, mask_BTS: jax.Array | None
) -> jax.Array:
    """softmax(Q Kᵀ / √K) V, "Attention Is All You Need", equation 1, for all heads at once.

    `mask_BTS` is True where attention is allowed; None allows all. Every query must be allowed at least one key.
    The softmax is computed in float32 whatever the type of the inputs. Returns o_BTHK in the type of `v_BSHK`.
    """
    head_size = q_BTHK.shape[-1]
    scores_BHTS = jnp.einsum("BTHK,BSHK->BHTS", q_BTHK, k_BSHK) / head_size**0.5
    scores_BHTS = scores_BHTS.astype(jnp.float32)
    if mask_BTS is not None:
        # The lowest finite number and not, say, -1e4: a model can learn scores that make up for that and see the future.
        scores_BHTS = jnp.where(mask_BTS[:, None], scores_BHTS, jnp.finfo(jnp.float32).min)
    weights_BHTS = jax.nn.softmax(scores_BHTS, axis=-1).astype(v_BSHK.dtype)
    return jnp.einsum("BHTS,BSHK->BTHK", weights_BHTS, v_BSHK)


CAUSAL = "causal"  # stands for the causal mask, where it need not be written out
BLOCK = 64  # positions


def suited_attention(config: ModelConfig, device: jax.Device) -> str:
    """The way in which `causal_attention` suits a device: one of two choices here that depend on it.

    On a CPU `blocks`, where there are several, else `halves`. `cudnn` on NVIDIA's GPUs since Ampere, within the limits of
    that library: 16 bits, and heads whose size is a multiple of 8 and at most 128. `whole` elsewhere: accelerators wait for
    the host at each turn of a loop whose length is not fixed.
    """
    if device.platform == "cpu":
        return "blocks" if config.context_length > BLOCK else "halves"
    capability = getattr(device, "compute_capability", "")  # as "8.0"; AMD's are called as "gfx942"
    has_cudnn = capability[:1].isdigit() and float(capability) >= 8.0
    is_within_limits = config.dtype == "bfloat16" and config.head_size <= 128 and config.head_size % 8 == 0
    return "cudnn" if has_cudnn and is_within_limits else "whole"


def suited_parts(config: ModelConfig, batch_size: int, device: jax.Device) -> int:
    """The number of parts of a KVCache that suits a device: the other choice that depends on it.

    4 on a CPU, where a cache is so large that reading parts of it in vain takes longer than choosing among them. Measured
    at 6 layers × 256 over 200 tokens: a step takes 0.86 of the time with 16 rows in a context of 256, and 0.56 with one row
    in a context of 2048; with one row in 256 it would take 1.04. Pieces of a prompt have to divide the parts.
    """
    num_keys = batch_size * config.kv_heads * config.head_size * config.context_length
    return 4 if device.platform == "cpu" and num_keys >= 2**18 and config.context_length % 128 == 0 else 1


def causal_attention(q_BTHK: jax.Array, k_BTHK: jax.Array, v_BTHK: jax.Array, way: str = "blocks") -> jax.Array:
    """`scaled_dot_product_attention` with the causal mask, `whole`, or for about half the work, in memory that grows with T.

    In `blocks` of positions, no block of queries looks at blocks of keys that lie after it.
    `cudnn` is NVIDIA's library, which does the same on its GPUs.
    `halves` is `whole` for two halves of the batch side by side: XLA works on a CPU at products of many small matrices with
    one core, but does at once what does not wait for each other. Measured at 4 layers × 128: a step takes 0.93 of the time.
    """
    B, T, H, K = q_BTHK.shape
    if way == "cudnn":
        return jax.nn.dot_product_attention(q_BTHK, k_BTHK, v_BTHK, is_causal=True, implementation="cudnn")
    if way == "whole":
        return scaled_dot_product_attention(q_BTHK, k_BTHK, v_BTHK, causal_mask(T))
    if way == "halves":
        halves = zip(*(jnp.array_split(x_BTHK, 2) for x_BTHK in (q_BTHK, k_BTHK, v_BTHK)), strict=True)
        return jnp.concatenate([causal_attention(*half, "whole") for half in halves])

    def to_blocks(x_BTHK):  # what fills up the last block lies in the future of all
        x_BTHK = jnp.pad(x_BTHK, ((0, 0), (0, -T % BLOCK), (0, 0), (0, 0)))
        return x_BTHK.reshape(B, -1, BLOCK, H, K).transpose(1, 0, 3, 2, 4).reshape(-1, B * H, BLOCK, K)

    o_blocks = attend_in_blocks(to_blocks(q_BTHK), to_blocks(k_BTHK), to_blocks(v_BTHK))
    return o_blocks.reshape(-1, B, H, BLOCK, K).transpose(1, 0, 3, 2, 4).reshape(B, -1, H, K)[:, :T]


@jax.custom_vjp
def attend_in_blocks(q, k, v):
    """Causal attention among blocks, each of shape NQK or NSK: FlashAttention (Dao 2023, "FlashAttention-2", algorithm 1).

    A block of queries meets the blocks of keys one after another. It carries the sum of weighted values so far, the largest
    score and the sum of weights relative to that, and scales them anew when a larger score comes.
    """
    return attend_in_blocks_forward(q, k, v)[0]


def block_scores(q_NQK, k_NSK, i, j):
    """scores_NQS of block i of the queries and block j ≤ i of the keys, in float32."""
    scores_NQS = (jnp.einsum("NQK,NSK->NQS", q_NQK, k_NSK) / q_NQK.shape[-1] ** 0.5).astype(jnp.float32)
    return jnp.where(causal_mask(BLOCK) | (j < i), scores_NQS, jnp.finfo(jnp.float32).min)


def attend_in_blocks_forward(q, k, v):
    def attend(i):
        def meet(j, carry):
            o_NQK, largest_NQ1, sum_NQ1 = carry
            scores_NQS = block_scores(q[i], k[j], i, j)
            new_largest_NQ1 = jnp.maximum(largest_NQ1, scores_NQS.max(axis=-1, keepdims=True))
            weights_NQS = jnp.exp(scores_NQS - new_largest_NQ1)
            shrink_NQ1 = jnp.exp(largest_NQ1 - new_largest_NQ1)
            sum_NQ1 = sum_NQ1 * shrink_NQ1 + weights_NQS.sum(axis=-1, keepdims=True)
            o_NQK = o_NQK * shrink_NQ1 + jnp.einsum("NQS,NSK->NQK", weights_NQS.astype(v.dtype), v[j])
            return o_NQK, new_largest_NQ1, sum_NQ1

        zeros_NQK = jnp.zeros(q.shape[1:], jnp.float32)
        lowest_NQ1 = jnp.full_like(zeros_NQK[..., :1], jnp.finfo(jnp.float32).min)
        carry = jax.lax.fori_loop(0, i + 1, meet, (zeros_NQK, lowest_NQ1, zeros_NQK[..., :1]))
        o_NQK, largest_NQ1, sum_NQ1 = carry
        return (o_NQK / sum_NQ1).astype(v.dtype), largest_NQ1 + jnp.log(sum_NQ1)

    o, log_sum = jax.lax.map(attend, jnp.arange(len(q)))
    return o, (q, k, v, o, log_sum)


def attend_in_blocks_backward(residuals, do):
    """The gradient, with the weights made anew from the logarithms of their sums (algorithm 2 of the same)."""
    q, k, v, o, log_sum = residuals
    do_o = jnp.sum((do * o).astype(jnp.float32), axis=-1, keepdims=True)

    def attended(dq, j):
        def meet(i, carry):
            dq, dk_NSK, dv_NSK = carry
            weights_NQS = jnp.exp(block_scores(q[i], k[j], i, j) - log_sum[i])
            dweights_NQS = jnp.einsum("NQK,NSK->NQS", do[i], v[j])
            dscores_NQS = weights_NQS * (dweights_NQS - do_o[i])  # of a softmax
            dscores_NQS = (dscores_NQS / q.shape[-1] ** 0.5).astype(q.dtype)
            dk_NSK += jnp.einsum("NQS,NQK->NSK", dscores_NQS, q[i])
            dv_NSK += jnp.einsum("NQS,NQK->NSK", weights_NQS.astype(v.dtype), do[i])
            return dq.at[i].add(jnp.einsum("NQS,NSK->NQK", dscores_NQS, k[j])), dk_NSK, dv_NSK

        zeros_NSK = jnp.zeros(k.shape[1:], jnp.float32)
        dq, dk_NSK, dv_NSK = jax.lax.fori_loop(j, len(q), meet, (dq, zeros_NSK, zeros_NSK))
        return dq, (dk_NSK, dv_NSK)

    dq, (dk, dv) = jax.lax.scan(attended, jnp.zeros(q.shape, jnp.float32), jnp.arange(len(k)))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


attend_in_blocks.defvjp(attend_in_blocks_forward, attend_in_blocks_backward)


@struct.dataclass
class KVCache:
    """Keys and values of one layer at the last S positions, so that they are computed once.

    A ring of S slots: what comes after the last slot takes the place of the oldest, so memory is constant. All rows write
    to the same slots, whatever positions they have reached, since XLA can then write in place.

    The slots lie in C parts of P slots, one after another, and parts to which nothing has been written yet are not read.
    Each is an array of its own, since XLA on a CPU would copy what it is to read of a larger one.
    """

    k_parts: tuple[jax.Array, ...]  # each NPK, N = B G: rows and their heads in one axis, as the products need it
    v_parts: tuple[jax.Array, ...]
    num_written: jax.Array  # positions written so far, a scalar; the next goes to this slot, modulo S

    @classmethod
    def empty(cls, batch_size: int, config: ModelConfig, num_parts: int = 1) -> "KVCache":
        """A cache for `context_length` positions, which `num_parts` divides."""
        shape = (batch_size * config.kv_heads, config.context_length // num_parts, config.head_size)
        parts = (jnp.zeros(shape, config.dtype),) * num_parts
        return cls(parts, parts, jnp.zeros((), jnp.int32))

    @property
    def part_size(self) -> int:
        return self.k_parts[0].shape[1]

    @property
    def num_slots(self) -> int:
        return len(self.k_parts) * self.part_size

    def append(self, k_BTGK: jax.Array, v_BTGK: jax.Array) -> "KVCache":
        """The cache with T more positions.

        They must all go to the same part of the ring, as pieces of one T that divides P always do.
        """
        B, T, G, K = k_BTGK.shape
        slot, P = self.num_written % self.num_slots, self.part_size

        def write(parts, new_BTGK):
            new_NTK = new_BTGK.swapaxes(1, 2).reshape(B * G, T, K)

            def into(c, part_NPK):
                # A part whose turn it is not gets what it holds: XLA would copy it to leave it alone.
                place = jnp.clip(slot - c * P, 0, P - T)
                old_NTK = jax.lax.dynamic_slice_in_dim(part_NPK, place, T, axis=1)
                written_NTK = jnp.where(slot // P == c, new_NTK, old_NTK)
                return jax.lax.dynamic_update_slice_in_dim(part_NPK, written_NTK, place, axis=1)

            return tuple(into(c, part_NPK) for c, part_NPK in enumerate(parts))

        return KVCache(write(self.k_parts, k_BTGK), write(self.v_parts, v_BTGK), self.num_written + T)

    def rows(self, rows_R: jax.Array, batch_size: int) -> "KVCache":
        """The cache that has these rows of this one, which has `batch_size` of them."""

        def pick(part_NPK):
            return part_NPK.reshape(batch_size, -1)[rows_R].reshape(-1, *part_NPK.shape[1:])

        k_parts, v_parts = jax.tree.map(pick, (self.k_parts, self.v_parts))
        return KVCache(k_parts, v_parts, self.num_written)

    def visible(self, positions_BT: jax.Array) -> jax.Array:
        """mask_BTS: which slots the last T positions may see, of which row b's are called `positions_BT[b]`.

        Those that are not younger than themselves, and not so old that they belong to no position of the row. Once the ring
        is full, T has to be 1: of several positions the last would already stand where the first still has to look.
        """
        S, T = self.num_slots, positions_BT.shape[1]
        slots_T = self.num_written - T + jnp.arange(T)
        age_TS = (slots_T[:, None] - jnp.arange(S)[None, :]) % S
        return age_TS[None] <= positions_BT[:, :, None]

    def attend(self, q_BTHK: jax.Array, mask_BTS: jax.Array) -> jax.Array:
        """Scaled dot-product attention to what the cache holds, as o_BTHK; `mask_BTS` is True where it is allowed.

        The same equation as above in the order that suits few queries: keys stand on the left of the product, since XLA
        on a CPU transposes all that stands on the right of it, and the queries that share a head stand side by side.
        """
        B, T, H, K = q_BTHK.shape
        N, P, _ = self.k_parts[0].shape
        C, G = len(self.k_parts), N // B
        q_NQK = q_BTHK.reshape(B, T, G, H // G, K).swapaxes(1, 2).reshape(N, T * H // G, K)
        mask_NQS = jnp.repeat(jnp.repeat(mask_BTS, G, axis=0), H // G, axis=1)

        def attend_to(num_parts):
            k_parts, v_parts = self.k_parts[:num_parts], self.v_parts[:num_parts]
            scores_NSQ = jnp.concatenate([jnp.einsum("NPK,NQK->NPQ", k_NPK, q_NQK) for k_NPK in k_parts], axis=1)
            scores_NQS = scores_NSQ.swapaxes(1, 2).astype(jnp.float32) / K**0.5
            scores_NQS = jnp.where(mask_NQS[:, :, : num_parts * P], scores_NQS, jnp.finfo(jnp.float32).min)
            weights_NQS = jax.nn.softmax(scores_NQS, axis=-1).astype(v_parts[0].dtype)
            w_parts = jnp.split(weights_NQS, num_parts, axis=-1)
            return sum(jnp.einsum("NQP,NPK->NQK", *pair) for pair in zip(w_parts, v_parts, strict=True))

        num_begun = jnp.minimum(-(-self.num_written // P), C)  # parts that hold something
        o_NQK = jax.lax.switch(num_begun - 1, [functools.partial(attend_to, c) for c in range(1, C + 1)])
        return o_NQK.reshape(B, G, T, H // G, K).swapaxes(1, 2).reshape(B, T, H, K)


class MultiHeadAttention(nn.Module):
    """Attention in H subspaces of size K = D / H, concatenated and projected ("Attention Is All You Need", section 3.2.2).

    With fewer key/value heads than query heads, each is shared by H / G query heads (grouped-query attention,
    Ainslie et al. 2023): a smaller cache for nearly the same quality.
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, mask_BTS: jax.Array | str | None, positions_BT: jax.Array, cache: KVCache | None = None
    ) -> tuple[jax.Array, KVCache | None]:
        """Attends within x or, with a cache, from x to the cache with x appended to it; `mask_BTS` is then ignored.

        `mask_BTS` is True where attention is allowed; None allows all, and CAUSAL stands for the causal mask. Returns
        (y_BTD, cache), the cache None where none was given.
        """
        config = self.config
        H, G, K = config.num_heads, config.kv_heads, config.head_size
        B, T, D = x_BTD.shape

        q_BTHK = Dense(H * K, config, "query")(x_BTD).reshape(B, T, H, K)
        k_BTGK = Dense(G * K, config, "key")(x_BTD).reshape(B, T, G, K)
        v_BTGK = Dense(G * K, config, "value")(x_BTD).reshape(B, T, G, K)
        if config.qk_norm:  # bounds the scores by √K, which keeps high learning rates stable (Henry et al. 2020)
            q_BTHK, k_BTGK = unit_rms(q_BTHK, 1e-6), unit_rms(k_BTGK, 1e-6)
        if config.positions == "rotary":
            q_BTHK, k_BTGK = rotate(q_BTHK, positions_BT), rotate(k_BTGK, positions_BT)

        if cache is None:
            k_BTHK, v_BTHK = jnp.repeat(k_BTGK, H // G, axis=2), jnp.repeat(v_BTGK, H // G, axis=2)
            if mask_BTS is CAUSAL:
                way = suited_attention(config, jax.devices()[0])
                o_BTHK = causal_attention(q_BTHK, k_BTHK, v_BTHK, way)
            else:
                o_BTHK = scaled_dot_product_attention(q_BTHK, k_BTHK, v_BTHK, mask_BTS)
        else:
            cache = cache.append(k_BTGK, v_BTGK)
            o_BTHK = cache.attend(q_BTHK, cache.visible(positions_BT))
        y_BTD = Dense(D, config, "output", init=residual_init(config))(o_BTHK.reshape(B, T, H * K))
        return y_BTD, cache
