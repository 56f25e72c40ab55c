"""GPT: token embeddings in, the causal transformer, next-token logits out."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from minigpt_jax.config import ModelConfig
from minigpt_jax.models.kernels import PLAIN, Kernels
from minigpt_jax.models.layers import Dense, TokenAndPosition
from minigpt_jax.models.masks import Mask
from minigpt_jax.models.transformer import Transformer


class GPT(nn.Module):
    """A decoder-only language model: logits at position t score the token at t + 1, from tokens up to t alone."""

    config: ModelConfig
    kernels: Kernels = PLAIN

    @nn.compact
    def __call__(self, tokens_BT: jax.Array, positions_BT: jax.Array | None = None, cache=None, dropout=None):
        """(logits_BTV in float32, cache). Each position sees the last context_length ones.

        Without a cache the tokens are at positions 0 to T - 1, which exceed the context only where the config `can_slide`.
        With a cache, of one entry a layer, they follow what it holds, at `positions_BT`, and are then part of it. Training
        passes the config's rate of `dropout`, and an rng of that name.
        """
        config, kernels, (B, T) = self.config, self.kernels, tokens_BT.shape
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
        mask = Mask(causal=True, window=config.context_length if config.context_length < T else None)
        embedding = TokenAndPosition(config, name="embedding")
        x_BTD = embedding(tokens_BT, positions_BT)
        x_BTD, cache = Transformer(config, kernels, name="transformer")(x_BTD, mask, positions_BT, cache, dropout)
        if config.tie_embeddings:  # Press & Wolf 2017
            return embedding.tokens.attend(x_BTD).astype(jnp.float32), cache
        return Dense(config.known_vocab_size, config, kernels, "head", bias=False)(x_BTD).astype(jnp.float32), cache
