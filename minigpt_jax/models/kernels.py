"""The implementations that the modules call, as one value. The defaults are the equations; `kernels/` has faster ones."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from minigpt_jax.config import ModelConfig
from minigpt_jax.models import ops
from minigpt_jax.models.attention import attention
from minigpt_jax.models.cache import KVCache


def recompute(block: nn.Module, x_BTD: jax.Array, *inputs: Any) -> jax.Array:
    """block(x_BTD, *inputs), recomputed in the backward pass instead of storing its activations (Chen et al. 2016)."""
    return nn.remat(lambda block, x_BTD: block(x_BTD, *inputs)[0])(block, x_BTD)


def activate(x: jax.Array, activation: str) -> jax.Array:
    return ops.ACTIVATIONS[activation](x)


@dataclasses.dataclass(frozen=True)
class Kernels:
    """One implementation per op. Hashable, so that a model that holds it can be a static argument of jit.

    Every implementation has the signature of the default and, up to rounding, its values and gradients.
    """

    name: str = "plain"
    matmul: Callable[[jax.Array, jax.Array], jax.Array] = jnp.matmul
    center: Callable[[jax.Array], jax.Array] = ops.center
    unit_rms: Callable[[jax.Array, float], jax.Array] = ops.unit_rms
    activate: Callable[[jax.Array, str], jax.Array] = activate
    attention: Callable[..., jax.Array] = attention
    empty_cache: Callable[[int, ModelConfig], Any] = KVCache.empty
    recompute: Callable[..., jax.Array] = recompute


PLAIN = Kernels()
