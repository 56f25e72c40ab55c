"""The optimizer: one Optax chain of clipping, AdamW and the warmup-cosine schedule."""

import jax
import jax.numpy as jnp
import optax

from minigpt_jax.config import TrainingConfig


def warmup_cosine(config: TrainingConfig, num_steps: int) -> optax.Schedule:
    """Learning rate by optimizer step: up in a line over `warmup_steps`, then half a cosine down to `min_learning_rate`.

    Counted so that the first step already learns (rate peak / warmup, not 0) and the last of `num_steps` has the minimum,
    if two or more follow the warmup. A warmup as long as the run or longer is cut to it.
    """
    warmup_steps = min(config.warmup_steps, num_steps)
    decay_steps = max(1, num_steps - 1 - warmup_steps)

    def learning_rate(step: jax.Array) -> jax.Array:
        rising = config.learning_rate * (step + 1) / max(1, warmup_steps)
        progress = jnp.clip((step - warmup_steps) / decay_steps, 0.0, 1.0)
        cosine = 0.5 * (1 + jnp.cos(jnp.pi * progress))
        falling = config.min_learning_rate + (config.learning_rate - config.min_learning_rate) * cosine
        return jnp.where(step < warmup_steps, rising, falling)

    return learning_rate


def decay_mask(params):
    """True for what weight decay applies to: matrices (and embeddings), not biases and the scales of norms."""
    return jax.tree.map(lambda leaf: leaf.ndim >= 2, params)


def make_optimizer(config: TrainingConfig, num_steps: int) -> optax.GradientTransformation:
    """Clip the gradient by its global norm, then AdamW (Loshchilov & Hutter 2019)."""
    return optax.chain(
        optax.clip_by_global_norm(config.grad_clip),
        optax.adamw(
            warmup_cosine(config, num_steps), config.beta1, config.beta2, weight_decay=config.weight_decay, mask=decay_mask
        ),
    )
