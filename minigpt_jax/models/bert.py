"""BERT (Devlin et al. 2019): the transformer of the GPT without its causal mask, so that every token sees both sides.

The GPT predicts the next token. BERT predicts tokens that are hidden from it: their ids are replaced with [MASK].
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from minigpt_jax.config import ModelConfig
from minigpt_jax.models.kernels import PLAIN, Kernels
from minigpt_jax.models.layers import TokenAndPosition, vocabulary_logits
from minigpt_jax.models.masks import Mask
from minigpt_jax.models.transformer import Transformer


def mask_token(config: ModelConfig) -> int:
    """The id of [MASK]. It follows the vocabulary, so that tokenizers need not know it, and has no logit."""
    return config.num_embeddings


def encode(
    embedding: TokenAndPosition, kernels: Kernels, tokens_BT: jax.Array, is_token_BT: jax.Array | None, dropout=None
) -> jax.Array:
    """Hidden states x_BTD of all tokens. `is_token_BT` is False at padding, which no token attends to; every row needs at
    least one token. Call it inside a module, which then owns the transformer."""
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    x_BTD, mask = embedding(tokens_BT, positions_BT), Mask(padding_BS=is_token_BT)
    return Transformer(embedding.config, kernels, name="transformer")(x_BTD, mask, positions_BT, None, dropout)[0]


class BERT(nn.Module):
    """A masked language model: the logits at position t predict the token at t from all the others."""

    config: ModelConfig
    kernels: Kernels = PLAIN

    @nn.compact
    def __call__(self, tokens_BT: jax.Array, is_token_BT: jax.Array | None = None, dropout=None) -> jax.Array:
        """logits_BTV in float32, from T tokens of which some may be `mask_token`. T is at most the context length."""
        embedding = TokenAndPosition(self.config, num_special=1, name="embedding")
        x_BTD = encode(embedding, self.kernels, tokens_BT, is_token_BT, dropout)
        return vocabulary_logits(x_BTD, embedding, self.kernels)
