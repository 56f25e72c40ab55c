"""The learning-rate schedule."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

DECAYS = {  # fraction of (peak - minimum) that is left, as a function of progress from 0 to 1
    "cosine": lambda progress: 0.5 * (1 + jnp.cos(jnp.pi * progress)),
    "linear": lambda progress: 1 - progress,
    "constant": jnp.ones_like,  # stays at the peak and ignores the minimum
}


def learning_rate_schedule(config: Any, num_steps: int) -> Callable[[ArrayLike], jax.Array]:
    """Linear warmup from peak / warmup_steps to the peak, then `config.schedule` down to the minimum at the last step.
    A warmup longer than the run is shortened to it. `config` is a TrainingConfig or has fields of the same names."""
    peak, lowest, warmup_steps = config.learning_rate, config.min_learning_rate, jnp.minimum(config.warmup_steps, num_steps)

    def learning_rate(step: ArrayLike) -> jax.Array:
        progress = jnp.clip((step - warmup_steps) / jnp.maximum(1, num_steps - 1 - warmup_steps), 0.0, 1.0)
        decayed = lowest + (peak - lowest) * DECAYS[config.schedule](progress)
        return jnp.where(step < warmup_steps, peak * (step + 1) / jnp.maximum(1, warmup_steps), decayed)

    return learning_rate
