"""The training step: pure functions from a state and a batch to the next state, jitted here and nowhere else."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct

from minigpt_jax.models.gpt import init_params
from minigpt_jax.training.losses import next_token_loss

Batch = dict[str, jax.Array]  # inputs_BT, targets_BT: token ids; mask_BT: True where the target counts


@struct.dataclass
class TrainState:
    """All that a step changes. Together with the config and the text it determines the rest of the run."""

    step: jax.Array
    params: Any
    opt_state: optax.OptState
    average: Any = None  # the exponential moving average of the parameters, where there is one

    @property
    def eval_params(self) -> Any:
        """What evaluation and generation take: the average where there is one."""
        return self.params if self.average is None else self.average


@functools.partial(jax.jit, static_argnames=("model", "optimizer", "ema"), donate_argnames="params")
def init_state(
    key: jax.Array, params: Any = None, *, model: nn.Module, optimizer: optax.GradientTransformation, ema: float = 0.0
) -> TrainState:
    """A state at step 0, with these parameters, which are donated, or freshly drawn ones."""
    params = init_params(key, model) if params is None else params
    average = jax.tree.map(jnp.copy, params) if ema else None
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), average)


def loss_and_count(params: Any, batch: Batch, key: jax.Array | None, model: nn.Module) -> tuple[jax.Array, jax.Array]:
    """Sum of the loss over a batch, in nats, and the number of its targets. Drops out if there is a key."""
    rngs = None if key is None else {"dropout": key}
    logits_BTV, _ = model.apply({"params": params}, batch["inputs_BT"], deterministic=key is None, rngs=rngs)
    return next_token_loss(logits_BTV, batch["targets_BT"], batch["mask_BT"])


@functools.partial(jax.jit, static_argnames=("model", "optimizer", "grad_accumulation", "ema"), donate_argnames="state")
def train_step(
    state: TrainState,
    batch: Batch,
    key: jax.Array,
    *,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    grad_accumulation: int = 1,
    ema: float = 0.0,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimizer step on the mean loss over the batch's targets.

    With `grad_accumulation` of A the batch is worked through in A equal parts, one after another, for the memory of one.
    Each part's sum is divided by the number of targets in the whole batch, and clipping follows the last, so the result is
    that of the undivided batch (up to the order of additions; dropout draws a mask for each part).

    Where loss, gradient or new parameters are not finite nothing but the step's number changes: one NaN would spread to
    every parameter.

    `key` is the run's root key: the step folds in its own number. `state` is donated: use the returned one. `ema` is the
    decay of the average of parameters, 0 for none.
    Returns the next state and {"loss": nats per target, "grad_norm": before clipping, "is_finite": whether all are}.
    """
    step_key = jax.random.fold_in(key, state.step) if model.config.dropout else None
    num_targets = jnp.maximum(batch["mask_BT"].sum(), 1)

    def share_of_loss(params, part, part_key):
        return loss_and_count(params, part, part_key, model)[0] / num_targets

    def add_part(sums, part_and_index):
        part, index = part_and_index
        part_key = None if step_key is None else jax.random.fold_in(step_key, index)
        return jax.tree.map(jnp.add, sums, jax.value_and_grad(share_of_loss)(state.params, part, part_key)), None

    A = grad_accumulation
    parts = jax.tree.map(lambda leaf: leaf.reshape(A, leaf.shape[0] // A, *leaf.shape[1:]), batch)
    zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.params))
    (loss, grads), _ = jax.lax.scan(add_part, zeros, (parts, jnp.arange(A)))

    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    average = moving_average(state.average, params, ema, state.step) if ema else None
    next_state = TrainState(state.step, params, opt_state, average)

    grad_norm = optax.tree.norm(grads)
    is_finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & jnp.isfinite(optax.tree.norm(params))
    next_state = jax.tree.map(functools.partial(jnp.where, is_finite), next_state, state)
    metrics = {"loss": loss, "grad_norm": grad_norm, "is_finite": is_finite}
    return next_state.replace(step=state.step + 1), metrics


def moving_average(average: Any, params: Any, ema: float, step: jax.Array) -> Any:
    """ema · average + (1 - ema) · params, with a smaller decay at first, so that initial values are soon forgotten."""
    decay = jnp.minimum(ema, (1 + step) / (10 + step))
    return jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, average, params)


@functools.partial(jax.jit, static_argnames="model")
def eval_step(params: Any, batch: Batch, *, model: nn.Module) -> tuple[jax.Array, jax.Array]:
    """Sum of the loss over a batch without dropout, in nats, and the number of its targets."""
    return loss_and_count(params, batch, None, model)
