"""The parts that blocks are made of: dense layers, norms, the feed-forward network, and the three ways to mark positions."""

import functools
import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from minigpt_jax.config import ModelConfig


def kernel_init(config: ModelConfig, scale: float = 1.0) -> nn.initializers.Initializer:
    """Normally distributed weights, `scale` times as wide as the config's `init` says.

    `gpt2` is a standard deviation of 0.02 everywhere (Radford et al. 2019), which suits GPT-2's widths, and makes the first
    loss about ln V. `fan_in` is 1/√inputs, which keeps the size of activations at any width (LeCun et al. 1998); narrow
    models learn much faster with it. Logits then have the size 1 too, and the first loss is about ln V + 1/2.
    """
    if config.init == "gpt2":
        return nn.initializers.normal(0.02 * scale)
    return nn.initializers.variance_scaling(scale**2, "fan_in", "normal")


def residual_init(config: ModelConfig) -> nn.initializers.Initializer:
    """For the layers that write into the residual stream: smaller, since 2 L of them add up (GPT-2)."""
    return kernel_init(config, scale=(2 * config.num_layers) ** -0.5)


def embedding_init(config: ModelConfig) -> nn.initializers.Initializer:
    """For tables of embeddings: 0.02 as in GPT-2, or with `fan_in` 1, as of a layer that has one input.

    But 1/√D where the same table reads logits out, and 0.02 where √D follows (`sinusoidal`): with embeddings larger than the
    waves `mini_gpt` learns more slowly (a training loss of 2.46 instead of 2.39 after 200 steps).
    """
    if config.init == "gpt2" or config.positions == "sinusoidal":
        return nn.initializers.normal(0.02)
    return nn.initializers.normal(config.embed_dim**-0.5 if config.tie_embeddings else 1.0)


@jax.custom_vjp
def matmul(x: jax.Array, kernel_DF: jax.Array) -> jax.Array:
    """x W over the last axis of x, with gradients as products of matrices that have all leading axes in one.

    JAX's own rule contracts several axes at once, for which XLA on a CPU transposes the large cotangent element by element;
    this way a training step of the 6-layer model takes about two thirds of the time.
    """
    return x @ kernel_DF


def matmul_forward(x, kernel_DF):
    return x @ kernel_DF, (x, kernel_DF)


def matmul_backward(residuals, dy):
    x, kernel_DF = residuals
    x_ND, dy_NF = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    D, F = kernel_DF.shape
    # XLA on a CPU is slower at a high product than at a wide one; the barrier keeps it from turning this one back. What that
    # means elsewhere is not measured.
    dkernel_DF = x_ND.T @ dy_NF if D <= F else jax.lax.optimization_barrier(dy_NF.T @ x_ND).T
    return (dy_NF @ kernel_DF.T).reshape(x.shape), dkernel_DF


matmul.defvjp(matmul_forward, matmul_backward)


def Dense(features: int, config: ModelConfig, name: str, init=None, bias: bool = True) -> nn.Dense:  # noqa: N802
    """x W + b over the last axis, in the config's type, with its choice of bias and, but for `init`, of initial weights."""
    return nn.Dense(
        features,
        use_bias=bias and config.bias,
        dtype=config.dtype,
        kernel_init=init or kernel_init(config),
        dot_general=lambda x, kernel_DF, *_, **__: matmul(x, kernel_DF),
        name=name,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def unit_rms(x: jax.Array, epsilon: float) -> jax.Array:
    """x / √(mean x² + ε) over the last axis, computed in float32, in the type of x.

    With a gradient of its own, which needs the result and one number a row. What JAX derives keeps that number as often as
    there are features, and Linen's norms are derived.
    """
    return unit_rms_forward(x, epsilon)[0]


def unit_rms_forward(x, epsilon):
    x_float = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x_float), axis=-1, keepdims=True) + epsilon)
    y = (x_float * inverse).astype(x.dtype)
    return y, (y, inverse)


def unit_rms_backward(epsilon, residuals, dy):
    y, inverse = residuals
    y_float, dy_float = y.astype(jnp.float32), dy.astype(jnp.float32)
    dx = inverse * (dy_float - y_float * jnp.mean(dy_float * y_float, axis=-1, keepdims=True))
    return (dx.astype(y.dtype),)


unit_rms.defvjp(unit_rms_forward, unit_rms_backward)


@jax.custom_vjp
def centered(x: jax.Array) -> jax.Array:
    """x - mean x over the last axis: a symmetric linear map, which is its own gradient.

    JAX's gradient has two parts, each added to what comes along the residual stream, and XLA then computes the sum of all
    later blocks anew in each block. As one part it is computed once: a training step takes 0.91 of the time at 6 × 256.
    """
    return x - jnp.mean(x, axis=-1, keepdims=True)


centered.defvjp(lambda x: (centered(x), None), lambda _, dy: (centered(dy),))


class Norm(nn.Module):
    """LayerNorm (Ba et al. 2016), or RMSNorm (Zhang & Sennrich 2019), which leaves the mean alone; each feature then scaled.

    Epsilon 1e-5 as in GPT-2, Llama and PyTorch, where Linen's default is 1e-6; and the variance as the mean of squared
    deviations, where Linen's default is the less accurate E[x²] - E[x]².
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """y_BTD in the config's type."""
        config, shape = self.config, x_BTD.shape[-1:]
        if config.norm == "layernorm":
            x_BTD = centered(x_BTD.astype(jnp.float32))
        y_BTD = unit_rms(x_BTD, 1e-5) * self.param("scale", nn.initializers.ones, shape)[None, None]
        if config.norm == "layernorm" and config.bias:
            y_BTD += self.param("bias", nn.initializers.zeros, shape)[None, None]
        return y_BTD.astype(config.dtype)


def gelu(x: jax.Array) -> jax.Array:
    """GELU (Hendrycks & Gimpel 2016) in GPT-2's form: x (1 + tanh u) / 2 with u = √(2/π) (x + 0.044715 x³).

    Written with the sigmoid, since (1 + tanh u) / 2 = sigmoid(2u), and that is the faster one on a CPU.
    """
    return x * jax.nn.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))


ACTIVATIONS = {
    "gelu": gelu,
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
        h_BTF = Dense(config.ff_dim, config, "up")(x_BTD)
        if config.activation == "swiglu":
            h_BTF = jax.nn.silu(Dense(config.ff_dim, config, "gate")(x_BTD)) * h_BTF
        else:  # computed anew for its gradient, which saves memory and no time
            h_BTF = jax.checkpoint(ACTIVATIONS[config.activation])(h_BTF)
        return Dense(config.embed_dim, config, "down", init=residual_init(config))(h_BTF)


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
        def table(rows: int) -> nn.Embed:
            config = self.config
            return nn.Embed(rows, config.embed_dim, dtype=config.dtype, embedding_init=embedding_init(config))

        self.tokens = table(self.config.vocab_size)
        if self.config.positions == "learned":
            self.positions = table(self.config.context_length)

    def __call__(self, tokens_BT: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """x_BTD from token ids in [0, V) and positions in [0, context_length). Ids out of range give NaN, not an error."""
        config = self.config
        x_BTD = self.tokens(tokens_BT)
        if config.positions == "learned":
            x_BTD += self.positions(positions_BT)
        if config.positions == "sinusoidal":
            # √D (section 3.4 of the paper) brings the embeddings nearer to the size of sines and cosines.
            table_TD = sinusoidal_positions(config.context_length, config.embed_dim)
            waves_BTD = table_TD.at[positions_BT].get(mode="fill", fill_value=jnp.nan)
            x_BTD = x_BTD * config.embed_dim**0.5 + waves_BTD.astype(x_BTD.dtype)
        return x_BTD

    def attend(self, x_BTD: jax.Array) -> jax.Array:
        """logits_BTV: the product of x with every token's embedding (Press & Wolf 2017)."""
        return self.tokens.attend(x_BTD)
