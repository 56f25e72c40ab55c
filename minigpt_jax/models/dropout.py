"""Dropout (Srivastava et al. 2014)."""

import jax
import jax.numpy as jnp
from flax import linen as nn


def drop(x: jax.Array, rate: jax.Array | float, key: jax.Array) -> jax.Array:
    """Zero with probability `rate`, else x / (1 - rate)."""
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0).astype(x.dtype)


class Dropout(nn.Module):
    """`drop` with a key from Flax. Unlike in Linen, `rate` can be traced."""

    @nn.compact
    def __call__(self, x: jax.Array, rate: jax.Array | float | None) -> jax.Array:
        return x if rate is None else drop(x, rate, self.make_rng("dropout"))
