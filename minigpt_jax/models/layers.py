"""The parts that blocks are made of: dense layers, norms, the feed-forward network, and the three ways to mark positions."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from minigpt_jax.config import ModelConfig

INIT_STDDEV = 0.02  # GPT-2's (Radford et al. 2019); Linen's defaults differ from layer to layer
default_init = nn.initializers.normal(INIT_STDDEV)


def residual_init(config: ModelConfig) -> nn.initializers.Initializer:
    """Initialiser of the layers that write into the residual stream: smaller, since 2 L of them add up (GPT-2)."""
    return nn.initializers.normal(INIT_STDDEV / (2 * config.num_layers) ** 0.5)


def Dense(features: int, config: ModelConfig, name: str, kernel_init=default_init) -> nn.Dense:  # noqa: N802
    """x W + b over the last axis, in the config's type, with its choice of bias."""
    return nn.Dense(features, use_bias=config.bias, dtype=config.dtype, kernel_init=kernel_init, name=name)


def Norm(config: ModelConfig, name: str) -> nn.Module:  # noqa: N802
    """LayerNorm (Ba et al. 2016), or RMSNorm (Zhang & Sennrich 2019), which leaves the mean alone.

    Epsilon 1e-5 as in GPT-2, Llama and PyTorch, where Linen's default is 1e-6; and the variance as the mean of squared
    deviations, where Linen's default is the less accurate E[x²] - E[x]².
    """
    if config.norm == "rmsnorm":
        return nn.RMSNorm(epsilon=1e-5, dtype=config.dtype, name=name)
    return nn.LayerNorm(epsilon=1e-5, use_bias=config.bias, use_fast_variance=False, dtype=config.dtype, name=name)


ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=True),  # the tanh form, as in GPT-2
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),  # So et al. 2021, "Primer"
}


class FeedForward(nn.Module):
    """The same two-layer network at every position: max(0, x W₁ + b₁) W₂ + b₂ ("Attention Is All You Need", equation 2).

    The non-linearity is the config's choice. SwiGLU (Shazeer 2020) has a third matrix, whose output gates the second's.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        config = self.config
        h_BTF = Dense(config.ff_dim, config, name="up")(x_BTD)
        if config.activation == "swiglu":
            h_BTF = jax.nn.silu(Dense(config.ff_dim, config, name="gate")(x_BTD)) * h_BTF
        else:
            h_BTF = ACTIVATIONS[config.activation](h_BTF)
        return Dense(config.embed_dim, config, kernel_init=residual_init(config), name="down")(h_BTF)


def sinusoidal_positions(num_positions: int, dim: int) -> jax.Array:
    """PE[t, 2i] = sin(t / 10000^(2i/D)), PE[t, 2i+1] = cos of the same ("Attention Is All You Need", section 3.5).

    Returns an array of shape (T, D).
    """
    even_features = jnp.arange(0, dim, 2)
    angles = jnp.arange(num_positions)[:, None] / 10000.0 ** (even_features / dim)[None, :]
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(num_positions, -1)[:, :dim]


def rotate(x_BTHK: jax.Array, positions_BT: jax.Array) -> jax.Array:
    """Rotary positions (Su et al. 2021): turns feature pair (i, i + K/2) of each head by the angle position / 10000^(2i/K).

    The product of a query and a key then depends on their positions only through the distance between them.
    Pairs are halves apart, as in GPT-NeoX and Llama, and not neighbours as in the paper.
    """
    half = x_BTHK.shape[-1] // 2
    frequencies = 10000.0 ** (-jnp.arange(half) / half)
    angles_BT1h = (positions_BT[:, :, None] * frequencies[None, None, :])[:, :, None, :]
    cos, sin = jnp.cos(angles_BT1h).astype(x_BTHK.dtype), jnp.sin(angles_BT1h).astype(x_BTHK.dtype)
    first, second = x_BTHK[..., :half], x_BTHK[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


class TokenAndPosition(nn.Module):
    """Token embedding plus, where the config has a table of them, position embedding; the same table reads logits out."""

    config: ModelConfig

    def setup(self):
        config, init = self.config, default_init
        self.tokens = nn.Embed(config.vocab_size, config.embed_dim, dtype=config.dtype, embedding_init=init)
        if config.positions == "learned":
            self.positions = nn.Embed(config.context_length, config.embed_dim, dtype=config.dtype, embedding_init=init)

    def __call__(self, tokens_BT: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """x_BTD from token ids in [0, V) and positions in [0, context_length). Ids out of range give NaN, not an error."""
        config = self.config
        x_BTD = self.tokens(tokens_BT)
        if config.positions == "learned":
            x_BTD += self.positions(positions_BT)
        if config.positions == "sinusoidal":
            # √D (section 3.4 of the paper) brings the small embeddings up to the size of sines and cosines.
            table_TD = sinusoidal_positions(config.context_length, config.embed_dim)
            x_BTD = x_BTD * config.embed_dim**0.5 + table_TD[positions_BT].astype(x_BTD.dtype)
        return x_BTD

    def attend(self, x_BTD: jax.Array) -> jax.Array:
        """logits_BTV: the product of x with every token's embedding (Press & Wolf 2017)."""
        return self.tokens.attend(x_BTD)
