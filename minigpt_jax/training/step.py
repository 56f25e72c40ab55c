"""The training step: pure functions that map a state and a batch to the next state."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from minigpt_jax.training.optimizer import Optimizer
from minigpt_jax.training.state import TrainState


def accumulate_gradients(params: Any, batch: dict, key: jax.Array, loss: Callable, num_parts: int) -> tuple[jax.Array, Any]:
    """(mean loss over the batch's targets, its gradient), accumulated over `num_parts` micro-batches to save memory."""

    def add_part(sums, part_and_index):
        part, index = part_and_index
        part_key = jax.random.fold_in(key, index)
        part_sums = jax.value_and_grad(lambda params: loss(params, part, part_key)[:2], has_aux=True)(params)
        return jax.tree.map(jnp.add, sums, part_sums), None

    parts = jax.tree.map(lambda leaf: leaf.reshape(num_parts, -1, *leaf.shape[1:]), batch)
    zeros = (jnp.zeros(()), jnp.zeros(())), jax.tree.map(jnp.zeros_like, params)
    ((total, count), grads), _ = jax.lax.scan(add_part, zeros, (parts, jnp.arange(num_parts)))
    return jax.tree.map(lambda leaf: leaf / jnp.maximum(count, 1), (total, grads))


def apply_gradients(state: TrainState, grads: Any, optimizer: Optimizer, ema: jax.Array | float) -> TrainState:
    """The state after the optimizer's update. Its step number is not incremented yet."""
    updates, opt_state = optimizer.chain.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    decay = jnp.minimum(ema, (1 + state.step) / (10 + state.step))  # small at first, to forget the initial values
    # In this form the average of a parameter that never changes is exactly that parameter.
    average = state.average and jax.tree.map(lambda old, new: old + (1 - decay) * (new - old), state.average, params)
    return TrainState(state.step, params, opt_state, average)


def keep_if_finite(new: TrainState, old: TrainState, is_finite: jax.Array) -> TrainState:
    """`new` if `is_finite`, else `old`: one NaN would spread to every parameter. The step number advances either way."""
    return jax.tree.map(functools.partial(jnp.where, is_finite), new, old).replace(step=old.step + 1)


@functools.partial(jax.jit, static_argnames="grad_accumulation", donate_argnames="state")
def train_step(
    state: TrainState, batch: dict, key: jax.Array, *,
    objective: Any, optimizer: Optimizer, ema: float = 0.0, grad_accumulation: int = 1,
) -> tuple[TrainState, dict[str, jax.Array]]:  # fmt: skip
    """One optimizer step on the mean loss over the batch's targets. `key` is the run's root key; `state` is donated. The
    numbers of `objective`, `optimizer` and `ema` are pytree leaves: changing them does not recompile. Returns the next state
    and {"loss": nats per target, "grad_norm": before clipping, "is_finite": if both and the new parameters are finite}."""
    step_key = jax.random.fold_in(key, state.step)
    loss, grads = accumulate_gradients(state.params, batch, step_key, objective.loss, grad_accumulation)
    new_state, grad_norm = apply_gradients(state, grads, optimizer, ema), optax.tree.norm(grads)
    is_finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & jnp.isfinite(optax.tree.norm(new_state.params))
    return keep_if_finite(new_state, state, is_finite), {"loss": loss, "grad_norm": grad_norm, "is_finite": is_finite}
