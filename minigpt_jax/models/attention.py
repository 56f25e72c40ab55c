"""Attention: the equation as a pure function, the same in blocks, what a decoder remembers, and the layer."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from minigpt_jax.config import ModelConfig
from minigpt_jax.models.layers import Dense, residual_init, rotate


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
QUERY_BLOCK = 64


def causal_attention(q_BTHK: jax.Array, k_BTHK: jax.Array, v_BTHK: jax.Array) -> jax.Array:
    """`scaled_dot_product_attention` with the causal mask, for about half the work.

    Queries go in blocks, each against no more keys than the last of them may see. For the gradient the logarithm of each
    row's sum is kept, and the weights made anew from it, as FlashAttention does (Dao 2023, "FlashAttention-2", algorithms 1
    and 2): what layers keep grows with T and not with T². (What one layer takes for a moment does, since XLA on a CPU
    works at all blocks side by side.)
    A training step of 6 layers × 256 at context 256 takes about 0.83 of the time on two cores. One block is the equation.
    """
    B, T, H, K = q_BTHK.shape
    if T <= QUERY_BLOCK:
        return scaled_dot_product_attention(q_BTHK, k_BTHK, v_BTHK, causal_mask(T))
    q_NTK, k_NTK, v_NTK = (x_BTHK.swapaxes(1, 2).reshape(B * H, T, K) for x_BTHK in (q_BTHK, k_BTHK, v_BTHK))
    return attend_in_blocks(q_NTK, k_NTK, v_NTK).reshape(B, H, T, K).swapaxes(1, 2)


@jax.custom_vjp
def attend_in_blocks(q_NTK: jax.Array, k_NTK: jax.Array, v_NTK: jax.Array) -> jax.Array:
    return attend_in_blocks_forward(q_NTK, k_NTK, v_NTK)[0]


def query_blocks(num_positions: int) -> list[tuple[int, int]]:
    """The first position of each block, and the one after its last."""
    return [(start, min(start + QUERY_BLOCK, num_positions)) for start in range(0, num_positions, QUERY_BLOCK)]


def block_scores(q_NTK, k_NTK, start, end):
    """scores_NQS of the queries of a block and all keys up to its end."""
    scores_NQS = jnp.einsum("NQK,NSK->NQS", q_NTK[:, start:end], k_NTK[:, :end]) / q_NTK.shape[-1] ** 0.5
    return jnp.where(causal_mask(end)[:, start:], scores_NQS.astype(jnp.float32), jnp.finfo(jnp.float32).min)


def attend_in_blocks_forward(q_NTK, k_NTK, v_NTK):
    outputs, log_sums = [], []
    for start, end in query_blocks(q_NTK.shape[1]):
        scores_NQS = block_scores(q_NTK, k_NTK, start, end)
        log_sum_NQ1 = jax.nn.logsumexp(scores_NQS, axis=-1, keepdims=True)
        weights_NQS = jnp.exp(scores_NQS - log_sum_NQ1).astype(v_NTK.dtype)
        outputs.append(jnp.einsum("NQS,NSK->NQK", weights_NQS, v_NTK[:, :end]))
        log_sums.append(log_sum_NQ1)
    o_NTK = jnp.concatenate(outputs, axis=1)
    return o_NTK, (q_NTK, k_NTK, v_NTK, o_NTK, jnp.concatenate(log_sums, axis=1))


def attend_in_blocks_backward(residuals, do_NTK):
    q_NTK, k_NTK, v_NTK, o_NTK, log_sum_NT1 = residuals
    do_o_NT1 = jnp.sum((do_NTK * o_NTK).astype(jnp.float32), axis=-1, keepdims=True)
    dq_blocks, dk_NTK, dv_NTK = [], jnp.zeros_like(k_NTK), jnp.zeros_like(v_NTK)
    for start, end in query_blocks(q_NTK.shape[1]):
        do_NQK = do_NTK[:, start:end]
        weights_NQS = jnp.exp(block_scores(q_NTK, k_NTK, start, end) - log_sum_NT1[:, start:end])
        dweights_NQS = jnp.einsum("NQK,NSK->NQS", do_NQK, v_NTK[:, :end])
        dscores_NQS = weights_NQS * (dweights_NQS - do_o_NT1[:, start:end])  # of a softmax
        dscores_NQS = (dscores_NQS / q_NTK.shape[-1] ** 0.5).astype(q_NTK.dtype)
        dq_blocks.append(jnp.einsum("NQS,NSK->NQK", dscores_NQS, k_NTK[:, :end]))
        dk_NTK = dk_NTK.at[:, :end].add(jnp.einsum("NQS,NQK->NSK", dscores_NQS, q_NTK[:, start:end]))
        dv_NTK = dv_NTK.at[:, :end].add(jnp.einsum("NQS,NQK->NSK", weights_NQS.astype(v_NTK.dtype), do_NQK))
    return jnp.concatenate(dq_blocks, axis=1), dk_NTK, dv_NTK


attend_in_blocks.defvjp(attend_in_blocks_forward, attend_in_blocks_backward)


@struct.dataclass
class KVCache:
    """Keys and values of one layer at the last S positions, so that they are computed once.

    A ring of S slots: what comes after the last slot takes the place of the oldest, so memory is constant. All rows write
    to the same slots, whatever positions they have reached, since XLA can then write in place.
    """

    k_NSK: jax.Array  # N = B G: rows and their heads in one axis, as the products need it; with two axes XLA copies it all
    v_NSK: jax.Array
    num_written: jax.Array  # positions written so far, a scalar; the next goes to this slot, modulo S

    @classmethod
    def empty(cls, batch_size: int, config: ModelConfig) -> "KVCache":
        """A cache for `context_length` positions."""
        shape = (batch_size * config.kv_heads, config.context_length, config.head_size)
        return cls(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype), jnp.zeros((), jnp.int32))

    def append(self, k_BTGK: jax.Array, v_BTGK: jax.Array) -> "KVCache":
        """The cache with T more positions. They must not go around the end of the ring; a T that divides S never does."""
        B, T, G, K = k_BTGK.shape
        slot = self.num_written % self.k_NSK.shape[1]

        def write(slots_NSK, new_BTGK):
            new_NTK = new_BTGK.swapaxes(1, 2).reshape(B * G, T, K)
            return jax.lax.dynamic_update_slice_in_dim(slots_NSK, new_NTK, slot, axis=1)

        return KVCache(write(self.k_NSK, k_BTGK), write(self.v_NSK, v_BTGK), self.num_written + T)

    def rows(self, rows_R: jax.Array, batch_size: int) -> "KVCache":
        """The cache that has these rows of this one, which has `batch_size` of them."""

        def pick(slots_NSK):
            return slots_NSK.reshape(batch_size, -1)[rows_R].reshape(-1, *slots_NSK.shape[1:])

        return self.replace(k_NSK=pick(self.k_NSK), v_NSK=pick(self.v_NSK))

    def visible(self, positions_BT: jax.Array) -> jax.Array:
        """mask_BTS: which slots the last T positions may see, of which row b's are called `positions_BT[b]`.

        Those that are not younger than themselves, and not so old that they belong to no position of the row. Once the ring
        is full, T has to be 1: of several positions the last would already stand where the first still has to look.
        """
        S, T = self.k_NSK.shape[1], positions_BT.shape[1]
        slots_T = self.num_written - T + jnp.arange(T)
        age_TS = (slots_T[:, None] - jnp.arange(S)[None, :]) % S
        return age_TS[None] <= positions_BT[:, :, None]

    def attend(self, q_BTHK: jax.Array, mask_BTS: jax.Array) -> jax.Array:
        """Scaled dot-product attention to what the cache holds, as o_BTHK; `mask_BTS` is True where it is allowed.

        The same equation as above in the order that suits few queries: keys stand on the left of the product, since XLA
        on a CPU transposes all that stands on the right of it, and the queries that share a head stand side by side.
        """
        B, T, H, K = q_BTHK.shape
        N = self.k_NSK.shape[0]
        G = N // B
        q_NQK = q_BTHK.reshape(B, T, G, H // G, K).swapaxes(1, 2).reshape(N, T * H // G, K)
        scores_NQS = jnp.einsum("NSK,NQK->NSQ", self.k_NSK, q_NQK).swapaxes(1, 2).astype(jnp.float32) / K**0.5
        mask_NQS = jnp.repeat(jnp.repeat(mask_BTS, G, axis=0), H // G, axis=1)
        weights_NQS = jax.nn.softmax(jnp.where(mask_NQS, scores_NQS, jnp.finfo(jnp.float32).min), axis=-1)
        o_NQK = jnp.einsum("NQS,NSK->NQK", weights_NQS.astype(self.v_NSK.dtype), self.v_NSK)
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
            q_BTHK, k_BTGK = unit_rms(q_BTHK), unit_rms(k_BTGK)
        if config.positions == "rotary":
            q_BTHK, k_BTGK = rotate(q_BTHK, positions_BT), rotate(k_BTGK, positions_BT)

        if cache is None:
            k_BTHK, v_BTHK = jnp.repeat(k_BTGK, H // G, axis=2), jnp.repeat(v_BTGK, H // G, axis=2)
            if mask_BTS is CAUSAL:
                o_BTHK = causal_attention(q_BTHK, k_BTHK, v_BTHK)
            else:
                o_BTHK = scaled_dot_product_attention(q_BTHK, k_BTHK, v_BTHK, mask_BTS)
        else:
            cache = cache.append(k_BTGK, v_BTGK)
            o_BTHK = cache.attend(q_BTHK, cache.visible(positions_BT))
        y_BTD = Dense(D, config, "output", init=residual_init(config))(o_BTHK.reshape(B, T, H * K))
        return y_BTD, cache


def unit_rms(x: jax.Array) -> jax.Array:
    """x scaled to a root mean square of 1 over its last axis."""
    return nn.RMSNorm(use_scale=False)(x)
