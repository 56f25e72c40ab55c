"""BERT (Devlin et al. 2019): the transformer of the GPT without its causal mask, so that every token sees both sides.

The GPT predicts the next token. BERT predicts tokens that are hidden from it: their ids are replaced with [MASK].
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from minigpt_jax.config import ModelConfig
from minigpt_jax.models.initial import embedding_init
from minigpt_jax.models.kernels import PLAIN, Kernels
from minigpt_jax.models.layers import Dense, Norm, TokenAndPosition, vocabulary_logits
from minigpt_jax.models.masks import Mask
from minigpt_jax.models.transformer import Transformer


def mask_token(config: ModelConfig) -> int:
    """The id of [MASK]. It follows the vocabulary, so that tokenizers need not know it, and has no logit."""
    return config.num_embeddings


def positions_like(tokens_BT: jax.Array) -> jax.Array:
    """positions_BT: 0 to T - 1 in every row."""
    return jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)


def encode(config: ModelConfig, kernels: Kernels, x_BTD: jax.Array, is_token_BT=None, dropout=None) -> jax.Array:
    """Hidden states x_BTD from embeddings. `is_token_BT` is False at padding, which no token attends to; every row needs at
    least one token. Call it inside a module, which then owns the transformer."""
    transformer, positions_BT = Transformer(config, kernels, name="transformer"), positions_like(x_BTD[..., 0])
    return transformer(x_BTD, Mask(padding_BS=is_token_BT), positions_BT, None, dropout)[0]


def mean_over_tokens(x_BTD: jax.Array, is_token_BT: jax.Array) -> jax.Array:
    """x_BD: the mean hidden state of each row, without padding."""
    return jnp.einsum("BTD,BT->BD", x_BTD, is_token_BT.astype(x_BTD.dtype)) / is_token_BT.sum(axis=1, keepdims=True)


class BERT(nn.Module):
    """A masked language model: the logits at position t predict the token at t from all the others."""

    config: ModelConfig
    kernels: Kernels = PLAIN

    @nn.compact
    def __call__(self, tokens_BT: jax.Array, is_token_BT: jax.Array | None = None, dropout=None) -> jax.Array:
        """logits_BTV in float32, from T tokens of which some may be `mask_token`. T is at most the context length."""
        embedding = TokenAndPosition(self.config, num_special=1, name="embedding")
        x_BTD = embedding(tokens_BT, positions_like(tokens_BT))
        x_BTD = encode(self.config, self.kernels, x_BTD, is_token_BT, dropout)
        return vocabulary_logits(x_BTD, embedding, self.kernels)


class TextClassifier(nn.Module):
    """The same encoder, with a class for each row instead of a token for each position."""

    config: ModelConfig
    num_classes: int
    kernels: Kernels = PLAIN

    @nn.compact
    def __call__(self, tokens_BT: jax.Array, is_token_BT: jax.Array | None = None, dropout=None) -> jax.Array:
        """logits_BC in float32, for C classes, from the mean hidden state of the tokens."""
        is_token_BT = jnp.ones(tokens_BT.shape, bool) if is_token_BT is None else is_token_BT
        embedding = TokenAndPosition(self.config, num_special=1, name="embedding")
        x_BTD = embedding(tokens_BT, positions_like(tokens_BT))
        x_BTD = encode(self.config, self.kernels, x_BTD, is_token_BT, dropout)
        mean_B1D = mean_over_tokens(x_BTD, is_token_BT)[:, None]
        return Dense(self.num_classes, self.config, self.kernels, "classes")(mean_B1D)[:, 0].astype(jnp.float32)


# ---- The original ---------------------------------------------------------------------------------------------------------

NUM_TYPES = 2  # the first and the second of two texts


class OriginalEmbedding(TokenAndPosition):
    """Plus an embedding of each token's type, the number of its text; then a norm."""

    kernels: Kernels = PLAIN

    def setup(self):
        super().setup()
        self.types = nn.Embed(NUM_TYPES, self.config.embed_dim, embedding_init=embedding_init(self.config))
        self.norm = Norm(self.config, self.kernels)

    def __call__(self, tokens_BT: jax.Array, positions_BT: jax.Array, types_BT: jax.Array | None = None) -> jax.Array:
        types_BT = jnp.zeros_like(tokens_BT) if types_BT is None else types_BT
        return self.norm(super().__call__(tokens_BT, positions_BT) + self.types(types_BT))


class Encoder(nn.Module):
    """BERT as published, up to its hidden states. `interop.hf_reader.read_encoder` reads its config (post-norm, exact GELU,
    learned positions) and parameters from a Hugging Face folder."""

    config: ModelConfig
    kernels: Kernels = PLAIN

    @nn.compact
    def __call__(self, tokens_BT: jax.Array, is_token_BT=None, types_BT: jax.Array | None = None, dropout=None) -> jax.Array:
        """Hidden states x_BTD. `types_BT` is 0 or 1, by default 0."""
        embedding = OriginalEmbedding(self.config, kernels=self.kernels, name="embedding")
        x_BTD = embedding(tokens_BT, positions_like(tokens_BT), types_BT)
        return encode(self.config, self.kernels, x_BTD, is_token_BT, dropout)
