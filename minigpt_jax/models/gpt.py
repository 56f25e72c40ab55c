"""GPT: token embeddings in, the causal transformer, next-token logits out."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from minigpt_jax.config import ModelConfig
from minigpt_jax.models.attention import CAUSAL, KVCache, causal_mask
from minigpt_jax.models.layers import Dense, TokenAndPosition
from minigpt_jax.models.transformer import Transformer


class GPT(nn.Module):
    """A decoder-only language model: logits at position t score the token at t + 1, from tokens up to t alone."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array | None = None,
        cache: tuple[KVCache, ...] | None = None,
        deterministic: bool = True,
    ) -> tuple[jax.Array, tuple[KVCache, ...] | None]:
        """Returns (logits_BTV in float32, cache).

        Without a cache the tokens stand at positions 0 to T - 1. With a cache, of one KVCache a layer, they follow what it
        holds, at `positions_BT`, and the cache returned holds them too. Sequences longer than the context are for rotary
        models only; each position then sees the last context_length ones.
        """
        config = self.config
        B, T = tokens_BT.shape
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
        mask_BTS = causal_mask(T, config.context_length) if config.context_length < T else CAUSAL

        embedding = TokenAndPosition(config, name="embedding")
        x_BTD = embedding(tokens_BT, positions_BT)
        x_BTD, cache = Transformer(config, name="transformer")(x_BTD, mask_BTS, positions_BT, cache, deterministic)
        if config.tie_embeddings:
            logits_BTV = embedding.attend(x_BTD)
        else:
            logits_BTV = Dense(config.vocab_size, config, "head", bias=False)(x_BTD)
        return logits_BTV.astype(jnp.float32), cache


def init_params(key: jax.Array, model: GPT) -> Any:
    """Freshly drawn parameters: a nested dictionary of float32 arrays."""
    return model.init(key, jnp.zeros((1, 1), jnp.int32))["params"]
