"""How a decoding loop never runs past the context. Lives outside jit, since positions are known there."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from minigpt_jax.generation.decode import DecodeState, prefill


@functools.partial(jax.jit, static_argnames="model", donate_argnames="state")
def reanchor(params: Any, state: DecodeState, windows_BS: jax.Array, full_B: jax.Array, *, model: nn.Module) -> DecodeState:
    """The state with the rows in `full_B` moved back to half the context: the tokens of their windows come before it."""
    B, S = windows_BS.shape
    moved, _ = prefill(params, windows_BS, jnp.full(B, S // 2), model=model)
    cache = tuple(old.with_rows_of(new, full_B) for old, new in zip(state.cache, moved.cache, strict=True))
    return DecodeState(cache, state.token_B, jnp.where(full_B, S // 2, state.position_B))


class Context:
    """The positions that the rows of a decoding loop have reached.

    A model that can slide needs nothing: its cache is a ring, and the last context_length positions remain visible. A model
    with a table of positions has no entry for a token past the end of it: its rows re-anchor, which means that the last half
    of the context moves to its beginning.
    """

    def __init__(self, prompts: list[np.ndarray], model: nn.Module):
        self.model, self.size, self.can_slide = model, model.config.context_length, model.config.can_slide
        self.position_B = np.array([len(prompt) for prompt in prompts])  # of the token chosen last
        self.rows = prompts  # the last tokens of each row, enough to re-anchor on

    def append(self, tokens_BC: np.ndarray) -> None:
        """Records the tokens that were chosen."""
        if not self.can_slide:
            self.rows = [np.concatenate(pair)[-self.size :] for pair in zip(self.rows, tokens_BC, strict=True)]

    def make_room(self, params: Any, state: DecodeState, num_steps: int) -> tuple[DecodeState, int]:
        """The state, re-anchored where it must be, and how many of `num_steps` steps it has room for, at least 1."""
        if self.can_slide:
            return state, num_steps
        full_B = self.position_B == self.size
        if full_B.any():
            # The token chosen last is left out: decode_step is about to put it at its new position.
            windows_BS = padded([row[-1 - self.size // 2 : -1] for row in self.rows], self.size)
            state = reanchor(params, state, windows_BS, full_B, model=self.model)
            self.position_B = np.where(full_B, self.size // 2, self.position_B)
        num_steps = min(num_steps, self.size - int(self.position_B.max()))
        self.position_B = self.position_B + num_steps  # a new array: jax may still be reading the old one
        return state, num_steps


def padded(rows: list[np.ndarray], num_columns: int) -> np.ndarray:
    """Rows of different lengths in one array, filled up with zeros on the left."""
    array = np.zeros((len(rows), num_columns), np.int32)
    for target, row in zip(array, rows, strict=True):
        target[num_columns - len(row) :] = row
    return array
