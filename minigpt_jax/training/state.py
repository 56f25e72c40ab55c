"""All that a training step changes, and how it begins."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct

from minigpt_jax.models.gpt import init_params


@struct.dataclass
class TrainState:
    """Together with the config and the text it determines the rest of the run."""

    step: jax.Array
    params: Any
    opt_state: optax.OptState
    average: Any = None  # the exponential moving average of the parameters, where there is one

    @property
    def eval_params(self) -> Any:
        """What evaluation and generation use: the average where there is one."""
        return self.params if self.average is None else self.average


@functools.partial(jax.jit, static_argnames=("model", "optimizer", "ema"), donate_argnames="params")
def init_state(
    key: jax.Array, params: Any = None, *, model: nn.Module, optimizer: optax.GradientTransformation, ema: float = 0.0
) -> TrainState:
    """A state at step 0, with these parameters, which are donated, or randomly initialised ones."""
    params = init_params(key, model) if params is None else params
    average = jax.tree.map(jnp.copy, params) if ema else None
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), average)
