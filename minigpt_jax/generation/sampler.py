"""The sampling loop: prefill the prompts, then one jitted loop of decode steps with a key/value cache.

Shapes do not depend on the prompts' lengths nor on how much is generated, so it compiles once for a model, a batch size and
a choice of processors. Row i of a batch draws from `fold_in(key, i)` alone, so its text does not depend on other rows.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct

from minigpt_jax.generation.logits import Processor, process
from minigpt_jax.models.attention import KVCache

CHUNK = 64  # tokens that the jitted loop makes at most before it returns to Python


@struct.dataclass
class DecodeState:
    """What the loop carries. `token_B`, just sampled, belongs at `position_B` and has not been through the model yet."""

    cache: tuple[KVCache, ...]
    token_B: jax.Array
    position_B: jax.Array
    counts_BV: jax.Array  # how often each token stands in a row, prompt included
    key_B: jax.Array  # one key a row
    num_sampled: jax.Array
    finite: jax.Array  # whether all logits so far were finite, and left a token to sample


def sample(state: DecodeState, logits_BV: jax.Array, processors: tuple[Processor, ...]) -> DecodeState:
    """The state with the next token of each row, drawn from softmax(logits) after the processors."""
    processed_BV = process(processors, logits_BV, state.counts_BV)
    step_key_B = jax.vmap(jax.random.fold_in, in_axes=(0, None))(state.key_B, state.num_sampled)
    token_B = jax.vmap(jax.random.categorical)(step_key_B, processed_BV)
    return state.replace(
        token_B=token_B,
        position_B=state.position_B + 1,
        counts_BV=state.counts_BV.at[jnp.arange(len(token_B)), token_B].add(1),
        num_sampled=state.num_sampled + 1,
        # With NaN or nothing but -inf the draw above returns token 0 without a word, and processors may hide a NaN.
        finite=state.finite & jnp.isfinite(logits_BV).all() & jnp.isfinite(processed_BV.max(axis=-1)).all(),
    )


@functools.partial(jax.jit, static_argnames="model")
def prefill(
    params: Any,
    prompts_BS: jax.Array,
    lengths_B: jax.Array,
    key: jax.Array,
    processors: tuple[Processor, ...],
    *,
    model: nn.Module,
) -> DecodeState:
    """Runs the prompts through the model and samples the first token after each.

    `prompts_BS` has S = context_length columns, of which the first `lengths_B` (at least 1) hold a row's tokens. What
    the padding puts into the cache is never seen: each slot is overwritten before its position comes into sight.
    """
    B, S = prompts_BS.shape
    logits_BSV, cache = model.apply({"params": params}, prompts_BS)
    is_prompt_BS = jnp.arange(S)[None, :] < lengths_B[:, None]
    rows_B = jnp.arange(B)
    state = DecodeState(
        cache=cache,
        token_B=jnp.zeros(B, jnp.int32),
        position_B=lengths_B - 1,
        counts_BV=jnp.zeros((B, logits_BSV.shape[-1])).at[rows_B[:, None], prompts_BS].add(is_prompt_BS),
        key_B=jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, rows_B),
        num_sampled=jnp.zeros((), jnp.int32),
        finite=jnp.array(True),
    )
    return sample(state, logits_BSV[rows_B, lengths_B - 1], processors)


def decode_step(params: Any, state: DecodeState, processors: tuple[Processor, ...], model: nn.Module) -> DecodeState:
    """Runs the token sampled last through the model, at the cost of one position, and samples the next."""
    logits_B1V, cache = model.apply({"params": params}, state.token_B[:, None], state.position_B[:, None], state.cache)
    return sample(state.replace(cache=cache), logits_B1V[:, 0], processors)


@functools.partial(jax.jit, static_argnames="model", donate_argnames="state")
def decode(
    params: Any, state: DecodeState, processors: tuple[Processor, ...], num_steps: jax.Array, *, model: nn.Module
) -> tuple[DecodeState, jax.Array]:
    """`num_steps` decode steps, at most CHUNK. Returns the state and tokens_BC, whose first `num_steps` columns count."""

    def body(i, carry):
        state, tokens_BC = carry
        state = decode_step(params, state, processors, model)
        return state, tokens_BC.at[:, i].set(state.token_B)

    tokens_BC = jnp.zeros((len(state.token_B), CHUNK), jnp.int32)
    return jax.lax.fori_loop(0, num_steps, body, (state, tokens_BC))


@functools.partial(jax.jit, static_argnames="model", donate_argnames="state")
def reanchor(params: Any, state: DecodeState, windows_BS: jax.Array, full_B: jax.Array, *, model: nn.Module) -> DecodeState:
    """The state with the rows in `full_B` moved back to half the context: their windows stand at the first places."""

    def choose(new, old):
        return jnp.where(full_B.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    _, cache = model.apply({"params": params}, windows_BS)
    half = windows_BS.shape[1] // 2
    return state.replace(
        cache=jax.tree.map(choose, cache, state.cache), position_B=jnp.where(full_B, half, state.position_B)
    )


def padded(rows: list[np.ndarray], num_columns: int) -> np.ndarray:
    """Rows of different lengths in one array, filled up with zeros on the right."""
    array = np.zeros((len(rows), num_columns), np.int32)
    for target, row in zip(array, rows, strict=True):
        target[: len(row)] = row
    return array


def stream(
    params: Any,
    prompts: list[np.ndarray],
    num_tokens: int,
    key: jax.Array,
    processors: tuple[Processor, ...] = (),
    *,
    model: nn.Module,
    chunk: int = CHUNK,
) -> Iterator[np.ndarray]:
    """Generates `num_tokens` tokens after each prompt, in pieces: arrays of shape (B, up to `chunk`).

    `prompts` are B ≥ 1 arrays of token ids, each with at least one and at most context_length of them. Where the pieces
    are cut changes nothing in what comes. Past the context a rotary model goes on with the last context_length positions in
    sight, and memory stays as it is. A model with a table of positions has no place for the next token then: the last half
    of the context moves to its beginning. Raises FloatingPointError where the model's logits are not finite.
    """
    S = model.config.context_length
    positions_end = model.config.positions != "rotary"
    state = prefill(params, padded(prompts, S), np.array([len(row) for row in prompts]), key, processors, model=model)
    piece_BC = np.asarray(state.token_B)[:, None]
    recent = prompts  # the last tokens of each row, enough to re-anchor on
    while True:
        if not state.finite:
            raise FloatingPointError("the model's logits are not finite, so there is nothing to sample from")
        yield piece_BC
        num_tokens -= piece_BC.shape[1]
        if not num_tokens:
            return
        num_steps = min(chunk, num_tokens)
        if positions_end:
            recent = [np.concatenate(pair)[-S:] for pair in zip(recent, piece_BC, strict=True)]
            position_B = np.asarray(state.position_B)
            if position_B.max() == S:
                # The token sampled last is left out: decode_step is about to put it at its new position.
                windows = padded([row[-1 - S // 2 : -1] for row in recent], S)
                state = reanchor(params, state, windows, position_B == S, model=model)
            num_steps = min(num_steps, S - int(state.position_B.max()))
        state, tokens_BC = decode(params, state, processors, num_steps, model=model)
        piece_BC = np.asarray(tokens_BC)[:, :num_steps]


def generate(params, prompts, num_tokens, key, processors=(), *, model) -> np.ndarray:
    """All that `stream` yields in one array of shape (B, num_tokens)."""
    return np.concatenate(list(stream(params, prompts, num_tokens, key, processors, model=model)), axis=1)
