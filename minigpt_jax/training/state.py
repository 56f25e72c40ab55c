"""The training state: everything that a training step updates."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct


@struct.dataclass
class TrainState:
    """Together with the config and the data, this determines the rest of the run."""

    step: jax.Array
    params: Any
    opt_state: optax.OptState
    average: Any = None  # exponential moving average of the parameters; None without `ema`

    @property
    def eval_params(self) -> Any:
        """The parameters for evaluation and generation: the average, if there is one."""
        return self.params if self.average is None else self.average

    @property
    def trees(self) -> dict[str, Any]:
        """The arrays that a checkpoint holds, by name. The step number is stored separately."""
        trees = {"params": self.params, "opt_state": self.opt_state, "average": self.average}
        return {name: tree for name, tree in trees.items() if tree is not None}


@functools.partial(jax.jit, static_argnames="has_average", donate_argnames="params")
def init_state(
    key: jax.Array, params: Any = None, *, objective: Any, optimizer: Any, has_average: bool = False
) -> TrainState:
    """The state at step 0, with the given parameters (donated) or the objective's randomly initialised ones."""
    params = objective.init(key) if params is None else params
    average = jax.tree.map(jnp.copy, params) if has_average else None
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.chain.init(params), average)
