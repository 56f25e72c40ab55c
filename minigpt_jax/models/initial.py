"""The random initial weights."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from minigpt_jax.config import ModelConfig


def init_params(key: jax.Array, model: nn.Module) -> Any:
    """Randomly initialised parameters of a model of tokens: a nested dictionary of float32 arrays."""
    return model.init(key, jnp.zeros((1, 1), jnp.int32))["params"]


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
