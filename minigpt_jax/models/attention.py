"""Attention: the equation as a pure function, then the layer with its projections, and what a decoder remembers."""

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


@struct.dataclass
class KVCache:
    """Keys and values of one layer at the positions seen so far, so that they are computed once.

    A ring of S slots: position p lives in slot p mod S, so position S takes the place of position 0 and memory is constant.
    """

    k_BGSK: jax.Array  # heads before slots, which is the order in which attention reads them
    v_BGSK: jax.Array

    def write(self, k_BTGK: jax.Array, v_BTGK: jax.Array, positions_BT: jax.Array) -> "KVCache":
        """The cache with these T positions in their slots. No two of them may share a slot."""
        num_slots = self.k_BGSK.shape[2]
        rows_B1 = jnp.arange(positions_BT.shape[0])[:, None]
        slots_BT = positions_BT % num_slots
        return KVCache(self.k_BGSK.at[rows_B1, :, slots_BT].set(k_BTGK), self.v_BGSK.at[rows_B1, :, slots_BT].set(v_BTGK))

    def visible(self, positions_BT: jax.Array) -> jax.Array:
        """mask_BTS: which slots a query at each position may see, when all positions up to its own have been written.

        Before the ring is full those are the slots up to its own. Afterwards all: they hold the last S positions.
        """
        num_slots = self.k_BGSK.shape[2]
        return jnp.arange(num_slots)[None, None] <= positions_BT[:, :, None]


class MultiHeadAttention(nn.Module):
    """Attention in H subspaces of size K = D / H, concatenated and projected ("Attention Is All You Need", section 3.2.2).

    With fewer key/value heads than query heads, each is shared by H / G query heads (grouped-query attention,
    Ainslie et al. 2023): a smaller cache for nearly the same quality.
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, mask_BTS: jax.Array | None, positions_BT: jax.Array, cache: KVCache | None = None
    ) -> tuple[jax.Array, KVCache]:
        """Attends within x or, with a cache, from x to the cache with x written into it; `mask_BTS` is then ignored.

        Returns (y_BTD, cache). Without a cache given, the one returned holds just the positions of x.
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
            cache = KVCache(k_BTGK.swapaxes(1, 2), v_BTGK.swapaxes(1, 2))
        else:
            cache = cache.write(k_BTGK, v_BTGK, positions_BT)
            mask_BTS = cache.visible(positions_BT)
        k_BSHK = jnp.repeat(cache.k_BGSK, H // G, axis=1).swapaxes(1, 2)
        v_BSHK = jnp.repeat(cache.v_BGSK, H // G, axis=1).swapaxes(1, 2)

        o_BTHK = scaled_dot_product_attention(q_BTHK, k_BSHK, v_BSHK, mask_BTS)
        y_BTD = Dense(D, config, "output", init=residual_init(config))(o_BTHK.reshape(B, T, H * K))
        return y_BTD, cache


def unit_rms(x: jax.Array) -> jax.Array:
    """x scaled to a root mean square of 1 over its last axis."""
    return nn.RMSNorm(use_scale=False)(x)
