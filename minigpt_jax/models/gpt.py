"""GPT: token embeddings, a causal transformer, next-token logits."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from minigpt_jax.config import ModelConfig
from minigpt_jax.models.kernels import PLAIN, Kernels
from minigpt_jax.models.layers import TokenAndPosition, vocabulary_logits
from minigpt_jax.models.masks import Mask
from minigpt_jax.models.transformer import Transformer


class GPT(nn.Module):
    """A decoder-only language model: the logits at position t predict the token at t + 1 from the tokens up to t."""

    config: ModelConfig
    kernels: Kernels = PLAIN

    @nn.compact
    def __call__(self, tokens_BT: jax.Array, positions_BT=None, cache=None, dropout=None, segments_BT=None):
        """Returns (logits_BTV in float32, cache). Each position attends to the last context_length positions.

        Without a cache the tokens are at positions 0 to T - 1; T may exceed the context only if the config `can_slide`.
        With a cache (one entry per layer) they are at `positions_BT`, attend to the cached ones and are appended to them.
        `segments_BT` numbers texts that share a row, and `positions_BT` then restart in each.
        Training passes the config's `dropout` probability, and to `apply` the random key: `rngs={"dropout": key}`.
        """
        config, kernels, (B, T) = self.config, self.kernels, tokens_BT.shape
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
        mask = Mask(True, window=config.context_length if config.context_length < T else None, segments_BS=segments_BT)
        embedding = TokenAndPosition(config, name="embedding")
        transformer, x_BTD = Transformer(config, kernels, name="transformer"), embedding(tokens_BT, positions_BT)
        x_BTD, cache = transformer(x_BTD, mask, positions_BT, cache, dropout)
        return vocabulary_logits(x_BTD, embedding, kernels), cache
