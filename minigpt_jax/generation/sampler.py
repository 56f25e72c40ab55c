"""The sampling loop: prefill the prompts, then one jitted loop of decode steps with a key/value cache.

Shapes do not depend on the prompts' lengths nor on how much is generated, so it compiles once for a model, a number of rows
and a choice of processors. A row draws from its own key alone, so its text does not depend on the rows beside it.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from minigpt_jax.generation.logits import Processor, process
from minigpt_jax.models.attention import KVCache, suited_parts

CHUNK = 64  # tokens that a jitted loop makes at most before it returns to Python
PREFILL_PIECE = 32  # columns of the prompts that run through the model at once, at most


@struct.dataclass
class DecodeState:
    """What a decoding loop carries. `token_B`, chosen last, belongs at `position_B`; the model has not seen it yet."""

    cache: tuple[KVCache, ...]
    token_B: jax.Array
    position_B: jax.Array

    def rows(self, rows_R: jax.Array) -> "DecodeState":
        """The state that has these rows of this one."""
        cache = tuple(layer.rows(rows_R, len(self.token_B)) for layer in self.cache)
        return DecodeState(cache, self.token_B[rows_R], self.position_B[rows_R])


@struct.dataclass
class Sampled:
    """What is known of a sampled token. Each array has the shape (B,), or (B, C) for the tokens of a piece of text."""

    token: jax.Array
    log_prob: jax.Array  # in nats, under the model
    prob: jax.Array  # after the processors, which is what it was drawn with
    num_kept: jax.Array  # candidates that the processors left
    mass_kept: jax.Array  # their probability under the model
    entropy: jax.Array  # in nats, of the model's distribution


@functools.partial(jax.jit, static_argnames="model")
def prefill(params: Any, prompts_BS: jax.Array, lengths_B: jax.Array, *, model: nn.Module) -> tuple[DecodeState, jax.Array]:
    """Runs prompts through the model. Returns the state, without a token yet, and logits_BV of the token after each prompt.

    `prompts_BS` has S = context_length columns, of which the last `lengths_B` (at least 1) hold a row's tokens: all prompts
    end in the same column. The model runs over as many pieces of columns as the longest prompt needs, so the cost grows
    with the prompts, while the shapes do not. What padding puts into the cache lies too far back to be seen.
    """
    B, S = prompts_BS.shape
    num_parts = suited_parts(model.config, B, jax.devices()[0])
    P = S // num_parts
    T = max(size for size in range(1, min(P, PREFILL_PIECE) + 1) if P % size == 0)
    first_piece = (S - jnp.max(lengths_B)) // T

    def body(piece, carry):
        cache, _ = carry
        tokens_BT = jax.lax.dynamic_slice_in_dim(prompts_BS, piece * T, T, axis=1)
        positions_BT = (piece * T + jnp.arange(T))[None, :] - (S - lengths_B)[:, None]
        logits_BTV, cache = model.apply({"params": params}, tokens_BT, jnp.maximum(positions_BT, 0), cache)
        return cache, logits_BTV[:, -1]

    empty = (KVCache.empty(B, model.config, num_parts),) * model.config.num_layers
    nothing = (empty, jnp.zeros((B, model.config.vocab_size)))
    cache, logits_BV = jax.lax.fori_loop(first_piece, S // T, body, nothing)
    return DecodeState(cache, token_B=jnp.zeros_like(lengths_B), position_B=lengths_B - 1), logits_BV


def decode_step(params: Any, state: DecodeState, model: nn.Module) -> tuple[DecodeState, jax.Array]:
    """Runs the token chosen last through the model, at the cost of one position. Returns logits_BV of the token after it."""
    logits_B1V, cache = model.apply({"params": params}, state.token_B[:, None], state.position_B[:, None], state.cache)
    return state.replace(cache=cache), logits_B1V[:, 0]


def choose(state: DecodeState, token_B: jax.Array) -> DecodeState:
    """The state with the next token of each row."""
    return state.replace(token_B=token_B, position_B=state.position_B + 1)


@struct.dataclass
class SamplerState:
    """What sampling carries beside the decoding itself."""

    decode: DecodeState
    counts_BV: jax.Array  # how often each token stands in a row, prompt included
    key_B: jax.Array
    num_sampled: jax.Array


@jax.vmap
def count(counts_V: jax.Array, tokens: jax.Array, times: jax.Array) -> jax.Array:
    """For each row its counts and so many more of these tokens. Row by row, so that each device can do it for its own."""
    return counts_V.at[tokens].add(times)


def sample(state: SamplerState, logits_BV: jax.Array, processors: tuple[Processor, ...]) -> tuple[SamplerState, Sampled]:
    """The next token of each row, drawn from softmax(logits) after the processors."""
    processed_BV = process(processors, logits_BV, state.counts_BV)
    step_key_B = jax.vmap(jax.random.fold_in, in_axes=(0, None))(state.key_B, state.num_sampled)
    token_B = jax.vmap(jax.random.categorical)(step_key_B, processed_BV)

    def of_token(values_BV):
        return jnp.take_along_axis(values_BV, token_B[:, None], axis=1)[:, 0]

    log_probs_BV, kept_BV = jax.nn.log_softmax(logits_BV), jnp.isfinite(processed_BV)
    probs_BV = jnp.exp(log_probs_BV)
    sampled = Sampled(
        token=token_B,
        log_prob=of_token(log_probs_BV),
        prob=of_token(jax.nn.softmax(processed_BV)),
        num_kept=kept_BV.sum(axis=-1),
        mass_kept=(probs_BV * kept_BV).sum(axis=-1),
        entropy=-jnp.where(probs_BV == 0, 0.0, probs_BV * log_probs_BV).sum(axis=-1),
    )
    state = state.replace(
        decode=choose(state.decode, token_B),
        counts_BV=count(state.counts_BV, token_B, jnp.ones_like(token_B)),
        num_sampled=state.num_sampled + 1,
    )
    return state, sampled


@functools.partial(jax.jit, static_argnames="model")
def start(
    params: Any, prompts_BS: jax.Array, lengths_B: jax.Array, key_B: jax.Array, processors: tuple[Processor, ...], *, model
) -> tuple[SamplerState, Sampled]:
    """Prefills the prompts and samples the first token after each."""
    decode, logits_BV = prefill(params, prompts_BS, lengths_B, model=model)
    S = prompts_BS.shape[1]
    is_prompt_BS = jnp.arange(S)[None, :] >= (S - lengths_B)[:, None]
    counts_BV = count(jnp.zeros_like(logits_BV), prompts_BS, is_prompt_BS)
    state = SamplerState(decode, counts_BV, key_B, num_sampled=jnp.zeros((), jnp.int32))
    return sample(state, logits_BV, processors)


@functools.partial(jax.jit, static_argnames="model", donate_argnames="state")
def go_on(
    params: Any, state: SamplerState, processors: tuple[Processor, ...], num_steps: jax.Array, *, model: nn.Module
) -> tuple[SamplerState, Sampled]:
    """`num_steps` more tokens, at most CHUNK: the state and (B, CHUNK) arrays, whose first `num_steps` columns count."""

    def body(i, carry):
        state, piece = carry
        decode, logits_BV = decode_step(params, state.decode, model)
        state, sampled = sample(state.replace(decode=decode), logits_BV, processors)
        return state, jax.tree.map(lambda column_BC, value_B: column_BC.at[:, i].set(value_B), piece, sampled)

    B = len(state.decode.token_B)
    one = jax.eval_shape(lambda state: sample(state, state.counts_BV, processors)[1], state)
    nothing = jax.tree.map(lambda leaf: jnp.zeros((B, CHUNK), leaf.dtype), one)
    return jax.lax.fori_loop(0, num_steps, body, (state, nothing))


@functools.partial(jax.jit, static_argnames="model", donate_argnames="state")
def reanchor(params: Any, state: DecodeState, windows_BS: jax.Array, full_B: jax.Array, *, model: nn.Module) -> DecodeState:
    """The state with the rows in `full_B` moved back to half the context: the tokens of their windows stand before it."""
    B, S = windows_BS.shape
    anew, _ = prefill(params, windows_BS, jnp.full(B, S // 2), model=model)

    def merge(new: KVCache, old: KVCache) -> KVCache:
        turn = old.num_written - new.num_written  # what was written last has to be in the same slot

        def pick(new_parts, old_parts):
            ring_NSK = jnp.roll(jnp.concatenate(new_parts, axis=1), turn, axis=1)
            is_full_N11 = jnp.repeat(full_B, len(ring_NSK) // B)[:, None, None]
            turned_parts = jnp.split(ring_NSK, len(old_parts), axis=1)
            return tuple(jnp.where(is_full_N11, *pair) for pair in zip(turned_parts, old_parts, strict=True))

        return old.replace(k_parts=pick(new.k_parts, old.k_parts), v_parts=pick(new.v_parts, old.v_parts))

    cache = tuple(map(merge, anew.cache, state.cache))
    return state.replace(cache=cache, position_B=jnp.where(full_B, S // 2, state.position_B))


class Context:
    """Sees to it that a decoding loop never runs past the context. Lives outside jit, since positions are known there.

    A rotary model needs nothing: its cache is a ring, and the last context_length positions stay in sight. A model with a
    table of positions has no place for a token past the end of it: its rows re-anchor, which means that the last half of
    the context moves to its beginning.
    """

    def __init__(self, prompts: list[np.ndarray], model: nn.Module):
        self.model, self.size = model, model.config.context_length
        self.unlimited = model.config.positions == "rotary"
        self.position_B = np.array([len(prompt) for prompt in prompts])  # of the token chosen last
        self.rows = prompts  # the last tokens of each row, enough to re-anchor on

    def append(self, tokens_BC: np.ndarray) -> None:
        """Takes note of the tokens that were chosen."""
        if not self.unlimited:
            self.rows = [np.concatenate(pair)[-self.size :] for pair in zip(self.rows, tokens_BC, strict=True)]

    def make_room(self, params: Any, state: DecodeState, num_steps: int) -> tuple[DecodeState, int]:
        """The state, re-anchored where it must be, and how many of `num_steps` steps it has room for, at least 1."""
        if self.unlimited:
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


def on_devices(params: Any, rows: tuple) -> tuple[Any, tuple]:
    """The parameters and `rows`, arrays that have the rows on their first axis, where a CPU is split into several devices.

    Each of as many as can have equally many gets its share of the rows. Decoding, rows need nothing of each other, so the
    devices do not wait. The parameters are the same memory for all, since copies would have to be read as well.
    """
    devices, num_rows = jax.local_devices(), len(rows[0])
    devices = devices[: max(n for n in range(1, len(devices) + 1) if num_rows % n == 0)]
    if len(devices) == 1 or devices[0].platform != "cpu":
        return params, rows
    mesh = Mesh(devices, "rows")
    everywhere, by_row = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("rows"))
    return jax.device_put(jax.tree.map(np.asarray, params), everywhere), jax.device_put(rows, by_row)


def row_keys(key: jax.Array, rows: Sequence[int]) -> jax.Array:
    """The keys of rows with these numbers."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, np.array(rows))


def stream(
    params: Any,
    prompts: list[np.ndarray],
    num_tokens: int,
    key_B: jax.Array,
    processors: tuple[Processor, ...] = (),
    *,
    model: nn.Module,
    chunk: int = CHUNK,
) -> Iterator[Sampled]:
    """Samples `num_tokens` tokens after each prompt, in pieces: NumPy arrays of shape (B, up to `chunk`).

    `prompts` are B ≥ 1 arrays of token ids, each with at least one and at most context_length of them. Where the pieces
    are cut changes nothing in what comes, and memory does not grow with `num_tokens`; see Context for what happens past
    the context. Raises FloatingPointError where the model's logits are not finite.
    """
    context = Context(prompts, model)
    params, rows = on_devices(params, (padded(prompts, context.size), context.position_B, key_B))
    state, sampled = start(params, *rows, processors, model=model)
    piece = jax.tree.map(lambda value_B: np.asarray(value_B)[:, None], sampled)
    while True:
        # Without this the draw returns token 0 without a word. NaN in the model's logits makes the entropy NaN, logits
        # that are all -inf after the processors make the probability so.
        if not (np.isfinite(piece.entropy).all() and np.isfinite(piece.prob).all()):
            raise FloatingPointError("the model's logits are not finite, so there is nothing to sample from")
        yield piece
        num_tokens -= piece.token.shape[1]
        if not num_tokens:
            return
        context.append(piece.token)
        decode, num_steps = context.make_room(params, state.decode, min(chunk, num_tokens))
        state, sampled = go_on(params, state.replace(decode=decode), processors, num_steps, model=model)
        piece = jax.tree.map(lambda columns_BC, n=num_steps: np.asarray(columns_BC)[:, :n], sampled)
