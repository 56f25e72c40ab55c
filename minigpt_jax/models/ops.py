"""One function per equation: norms, activations, positions. Attention has its own file."""

import math

import jax
import jax.numpy as jnp


def center(x: jax.Array) -> jax.Array:
    """x - mean x over the last axis."""
    return x - jnp.mean(x, axis=-1, keepdims=True)


def unit_rms(x: jax.Array, epsilon: float) -> jax.Array:
    """x / √(mean x² + ε) over the last axis, computed in float32 and returned in the dtype of x."""
    x_float = x.astype(jnp.float32)
    return (x_float * jax.lax.rsqrt(jnp.mean(jnp.square(x_float), axis=-1, keepdims=True) + epsilon)).astype(x.dtype)


def gelu(x: jax.Array) -> jax.Array:
    """GELU (Hendrycks & Gimpel 2016) in GPT-2's form: x (1 + tanh u) / 2 with u = √(2/π) (x + 0.044715 x³)."""
    return x * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


ACTIVATIONS = {
    "gelu": gelu,
    "gelu_exact": lambda x: jax.nn.gelu(x, approximate=False),  # x Φ(x), as in BERT
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),  # So et al. 2021, "Primer"
    "swiglu": jax.nn.silu,  # applied to the gate (Shazeer 2020)
}


def sinusoidal_positions(num_positions: int, dim: int) -> jax.Array:
    """PE_TD: PE[t, 2i] = sin(t / 10000^(2i/D)), PE[t, 2i+1] = cos of the same ("Attention Is All You Need", section 3.5)."""
    angles = jnp.arange(num_positions)[:, None] / 10000.0 ** (jnp.arange(0, dim, 2) / dim)[None, :]
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(num_positions, -1)[:, :dim]


def rotate(x_BTHK: jax.Array, positions_BT: jax.Array) -> jax.Array:
    """Rotary positions (Su et al. 2021): rotates each head's feature pair (i, i + K/2) by position / 10000^(2i/K)."""
    half = x_BTHK.shape[-1] // 2
    frequencies = 10000.0 ** (-jnp.arange(half) / half)
    angles_BT1h = (positions_BT[:, :, None] * frequencies[None, None, :])[:, :, None, :]
    cos, sin = jnp.cos(angles_BT1h).astype(x_BTHK.dtype), jnp.sin(angles_BT1h).astype(x_BTHK.dtype)
    first, second = x_BTHK[..., :half], x_BTHK[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
