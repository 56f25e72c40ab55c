"""The optimizer: one Optax chain of clipping, AdamW and the warmup-cosine schedule."""

import functools

import jax
import jax.numpy as jnp
import optax

from minigpt_jax.config import TrainingConfig


def warmup_cosine(config: TrainingConfig, num_steps: int) -> optax.Schedule:
    """Learning rate by step: a line up to the peak, from peak / warmup, then half a cosine to the minimum, at the last step.
    A warmup longer than the run is cut to it."""
    peak, lowest, warmup_steps = config.learning_rate, config.min_learning_rate, min(config.warmup_steps, num_steps)

    def learning_rate(step: jax.Array) -> jax.Array:
        progress = jnp.clip((step - warmup_steps) / max(1, num_steps - 1 - warmup_steps), 0.0, 1.0)
        cosine = lowest + (peak - lowest) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        return jnp.where(step < warmup_steps, peak * (step + 1) / max(1, warmup_steps), cosine)

    return learning_rate


def make_optimizer(config: TrainingConfig, num_steps: int) -> optax.GradientTransformation:
    """Clip the gradient by its global norm, then AdamW (Loshchilov & Hutter 2019), which decays matrices alone."""
    is_matrix = functools.partial(jax.tree.map, lambda leaf: leaf.ndim >= 2)
    schedule, betas = warmup_cosine(config, num_steps), (config.beta1, config.beta2)
    adamw = optax.adamw(schedule, *betas, weight_decay=config.weight_decay, mask=is_matrix)
    return optax.chain(optax.clip_by_global_norm(config.grad_clip), adamw)
