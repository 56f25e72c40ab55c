"""All that a training step changes, and how it begins."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct


@struct.dataclass
class TrainState:
    """Together with the config and the data it determines the rest of the run."""

    step: jax.Array
    params: Any
    opt_state: optax.OptState
    average: Any = None  # the exponential moving average of the parameters, where there is one

    @property
    def eval_params(self) -> Any:
        """What evaluation and generation use: the average where there is one."""
        return self.params if self.average is None else self.average

    @property
    def trees(self) -> dict[str, Any]:
        """What a checkpoint holds beside the number of the step, by name."""
        trees = {"params": self.params, "opt_state": self.opt_state, "average": self.average}
        return {name: tree for name, tree in trees.items() if tree is not None}


@functools.partial(jax.jit, static_argnames="has_average", donate_argnames="params")
def init_state(key: jax.Array, params: Any = None, *, objective: Any, optimizer: Any, has_average=False) -> TrainState:
    """A state at step 0, with these parameters, which are donated, or the objective's randomly initialised ones."""
    params = objective.init(key) if params is None else params
    average = jax.tree.map(jnp.copy, params) if has_average else None
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.chain.init(params), average)
