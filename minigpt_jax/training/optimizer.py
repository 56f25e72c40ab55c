"""The optimizer: one Optax chain of clipping, AdamW and the learning rate's schedule."""

import functools

import jax
import optax

from minigpt_jax.config import TrainingConfig
from minigpt_jax.training.schedule import learning_rate_schedule


def make_optimizer(config: TrainingConfig, num_steps: int) -> optax.GradientTransformation:
    """Clip the gradient by its global norm, then AdamW (Loshchilov & Hutter 2019), which decays matrices alone."""
    is_matrix = functools.partial(jax.tree.map, lambda leaf: leaf.ndim >= 2)
    schedule, betas = learning_rate_schedule(config, num_steps), (config.beta1, config.beta2)
    adamw = optax.adamw(schedule, *betas, weight_decay=config.weight_decay, mask=is_matrix)
    return optax.chain(optax.clip_by_global_norm(config.grad_clip), adamw)
