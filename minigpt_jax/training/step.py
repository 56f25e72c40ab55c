"""The training step: pure functions from a state and a batch to the next state."""

import functools

import jax
import jax.numpy as jnp
import optax

from minigpt_jax.training.losses import next_token_loss
from minigpt_jax.training.state import TrainState


def loss_and_count(params, batch, key, model):
    """Sum of the loss over a batch's targets, in nats, and their number. A key turns dropout on."""
    rngs = None if key is None else {"dropout": key}
    logits_BTV, _ = model.apply({"params": params}, batch["inputs_BT"], deterministic=key is None, rngs=rngs)
    return next_token_loss(logits_BTV, batch["targets_BT"], batch["mask_BT"])


def accumulate_gradients(params, batch, key, model, num_parts):
    """(mean loss, its gradient) over the batch's targets, with the memory of one of `num_parts` equal parts of it."""
    num_targets = jnp.maximum(batch["mask_BT"].sum(), 1)

    def share_of_loss(params, part, part_key):
        return loss_and_count(params, part, part_key, model)[0] / num_targets

    def add_part(sums, part_and_index):
        part, index = part_and_index
        part_key = None if key is None else jax.random.fold_in(key, index)
        return jax.tree.map(jnp.add, sums, jax.value_and_grad(share_of_loss)(params, part, part_key)), None

    parts = jax.tree.map(lambda leaf: leaf.reshape(num_parts, -1, *leaf.shape[1:]), batch)
    zeros = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
    return jax.lax.scan(add_part, zeros, (parts, jnp.arange(num_parts)))[0]


def apply_gradients(state, grads, optimizer, ema):
    """The state after the optimizer's update, with the number of the step as it was."""
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    decay = jnp.minimum(ema, (1 + state.step) / (10 + state.step))  # less at first: initial values are soon forgotten
    average = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, state.average, params) if ema else None
    return TrainState(state.step, params, opt_state, average)


def keep_if_finite(new, old, is_finite):
    """`new` if all is finite, else `old`: one NaN would spread to every parameter. The step counts either way."""
    return jax.tree.map(functools.partial(jnp.where, is_finite), new, old).replace(step=old.step + 1)


@functools.partial(jax.jit, static_argnames=("model", "optimizer", "grad_accumulation", "ema"), donate_argnames="state")
def train_step(state: TrainState, batch, key, *, model, optimizer, grad_accumulation: int = 1, ema: float = 0.0):
    """One optimizer step on the mean loss over the batch's targets. `key` is the run's root key; `state` is donated.
    Returns the next state and {"loss": nats per target, "grad_norm": before clipping, "is_finite": whether all were}."""
    step_key = jax.random.fold_in(key, state.step) if model.config.dropout else None
    loss, grads = accumulate_gradients(state.params, batch, step_key, model, grad_accumulation)
    new_state, grad_norm = apply_gradients(state, grads, optimizer, ema), optax.tree.norm(grads)
    is_finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & jnp.isfinite(optax.tree.norm(new_state.params))
    return keep_if_finite(new_state, state, is_finite), {"loss": loss, "grad_norm": grad_norm, "is_finite": is_finite}
