"""Keeps a decoding loop within the model's context. Runs outside jit, where positions are concrete."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from minigpt_jax.generation.decode import DecodeState, prefill


@functools.partial(jax.jit, static_argnames="model", donate_argnames="state")
def reanchor(params: Any, state: DecodeState, windows_BS: jax.Array, full_B: jax.Array, *, model: nn.Module) -> DecodeState:
    """Moves the rows in `full_B` back to position S // 2, after a prefill with the tokens of their windows."""
    B, S = windows_BS.shape
    moved, _ = prefill(params, windows_BS, jnp.full(B, S // 2), model=model)
    cache = tuple(old.with_rows_of(new, full_B) for old, new in zip(state.cache, moved.cache, strict=True))
    return DecodeState(cache, state.token_B, jnp.where(full_B, S // 2, state.position_B))


class Context:
    """The positions of the rows in a decoding loop, and what happens when a row reaches the end of the context.

    If `can_slide`, no action is needed: the cache is a ring in which the last context_length positions remain visible. A
    model with a position table has no entries beyond its end. Its rows re-anchor: the last half of the context moves to the
    start.
    """

    def __init__(self, prompts: list[np.ndarray], model: nn.Module):
        self.model, self.size, self.can_slide = model, model.config.context_length, model.config.can_slide
        self.position_B = np.array([len(prompt) for prompt in prompts])  # of the latest token
        self.rows = prompts  # the last tokens of each row, enough to re-anchor

    def append(self, tokens_BC: np.ndarray) -> None:
        """Records sampled tokens."""
        if not self.can_slide:
            self.rows = [np.concatenate(pair)[-self.size :] for pair in zip(self.rows, tokens_BC, strict=True)]

    def make_room(self, params: Any, state: DecodeState, num_steps: int) -> tuple[DecodeState, int]:
        """Re-anchors full rows. Returns the state and how many of `num_steps` steps fit into the context, at least 1."""
        if self.can_slide:
            return state, num_steps
        full_B = self.position_B == self.size
        if full_B.any():
            # Without the latest token, which decode_step is about to run at its new position.
            windows_BS = padded([row[-1 - self.size // 2 : -1] for row in self.rows], self.size)
            state = reanchor(params, state, windows_BS, full_B, model=self.model)
            self.position_B = np.where(full_B, self.size // 2, self.position_B)
        num_steps = min(num_steps, self.size - int(self.position_B.max()))
        self.position_B = self.position_B + num_steps  # a new array: jax may still be reading the old one
        return state, num_steps


def padded(rows: list[np.ndarray], num_columns: int) -> np.ndarray:
    """Stacks rows of different lengths into one array, with zeros on the left."""
    array = np.zeros((len(rows), num_columns), np.int32)
    for target, row in zip(array, rows, strict=True):
        target[num_columns - len(row) :] = row
    return array
