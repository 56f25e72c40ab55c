"""Decoding: prefill (run the prompts to fill the cache), then a jitted loop of cached decode steps, compiled once per model,
number of rows and processors (logits.py). Each row has its own random key. sampling.py and context.py drive the loop."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from minigpt_jax.generation.logits import process
from minigpt_jax.generation.seen import Seen
from minigpt_jax.models.cache import LayerCache

CHUNK, PREFILL_CHUNK = 64, 32  # maximum number of tokens per decode chunk, and of prompt columns per prefill chunk


@struct.dataclass
class DecodeState:
    """`token_B` is the latest token of each row, at `position_B`. The model has not processed it yet."""

    cache: Any  # one entry per layer
    token_B: jax.Array
    position_B: jax.Array

    def rows(self, rows_R: jax.Array) -> "DecodeState":
        return DecodeState(tuple(layer.rows(rows_R) for layer in self.cache), self.token_B[rows_R], self.position_B[rows_R])


@functools.partial(jax.jit, static_argnames="model")
def prefill(params: Any, prompts_BS: jax.Array, lengths_B: jax.Array, *, model: nn.Module) -> tuple[DecodeState, jax.Array]:
    """Runs prompts through the model in chunks of columns. Returns the state, without a token yet, and the next logits_BV.
    Rows are padded on the left to S = context_length columns: `lengths_B` tokens at the end. The cache masks the padding."""
    (B, S), V = prompts_BS.shape, model.config.vocab_size
    cache = (LayerCache.empty(model.kernels.empty_cache(B, model.config), B, model.config),) * model.config.num_layers
    T = max(size for size in range(1, min(S, PREFILL_CHUNK) + 1) if cache[0].kv.append_divisor % size == 0)

    def body(chunk, carry):
        tokens_BT = jax.lax.dynamic_slice_in_dim(prompts_BS, chunk * T, T, axis=1)
        positions_BT = (chunk * T + jnp.arange(T))[None, :] - (S - lengths_B)[:, None]
        logits_BTV, cache = model.apply({"params": params}, tokens_BT, jnp.maximum(positions_BT, 0), carry[0])
        return cache, logits_BTV[:, -1]

    cache, logits_BV = jax.lax.fori_loop((S - jnp.max(lengths_B)) // T, S // T, body, (cache, jnp.zeros((B, V))))
    return DecodeState(cache, token_B=jnp.zeros_like(lengths_B), position_B=lengths_B - 1), logits_BV


def decode_step(params: Any, state: DecodeState, model: nn.Module) -> tuple[DecodeState, jax.Array]:
    """Runs the latest tokens through the model. Returns the state and the next logits_BV."""
    logits_B1V, cache = model.apply({"params": params}, state.token_B[:, None], state.position_B[:, None], state.cache)
    return DecodeState(cache, state.token_B, state.position_B), logits_B1V[:, 0]


def append_token(state: DecodeState, token_B: jax.Array) -> DecodeState:
    return DecodeState(state.cache, token_B, state.position_B + 1)


@struct.dataclass
class SamplerState:
    decode: DecodeState
    seen: Seen
    key_B: jax.Array
    num_sampled: jax.Array


@struct.dataclass
class Sampled:
    """Statistics of a sampled token. Each array has shape (B,), or (B, C) for a chunk of C tokens."""

    token: jax.Array
    log_prob: jax.Array  # in nats, under the model
    prob: jax.Array  # after the processors: the probability it was sampled with
    num_kept: jax.Array  # candidates left by the processors
    mass_kept: jax.Array  # their total probability under the model
    entropy: jax.Array  # in nats, of the model's distribution


def sample(state: SamplerState, logits_BV: jax.Array, processors: tuple) -> tuple[SamplerState, Sampled]:
    """Samples the next token of each row from softmax(logits) after the processors."""
    processed_BV = process(processors, logits_BV, state.seen)
    draw = jax.vmap(lambda key, logits_V: jax.random.categorical(jax.random.fold_in(key, state.num_sampled), logits_V))
    token_B = draw(state.key_B, processed_BV)

    def of_token(values_BV):
        return jnp.take_along_axis(values_BV, token_B[:, None], axis=1)[:, 0]

    log_probs_BV, kept_BV = jax.nn.log_softmax(logits_BV), jnp.isfinite(processed_BV)
    probs_BV, log_prob_B, prob_B = jnp.exp(log_probs_BV), of_token(log_probs_BV), of_token(jax.nn.softmax(processed_BV))
    entropy_B = -jnp.where(probs_BV == 0, 0.0, probs_BV * log_probs_BV).sum(axis=-1)
    sampled = Sampled(token_B, log_prob_B, prob_B, kept_BV.sum(axis=-1), (probs_BV * kept_BV).sum(axis=-1), entropy_B)
    decode, seen = append_token(state.decode, token_B), state.seen.append(token_B)
    return SamplerState(decode, seen, state.key_B, state.num_sampled + 1), sampled


@functools.partial(jax.jit, static_argnames="model")
def prefill_and_sample(
    params: Any, prompts_BS: jax.Array, lengths_B: jax.Array, key_B: jax.Array, processors: tuple, *, model: nn.Module
) -> tuple[SamplerState, Sampled]:
    """Prefills the prompts and samples the first token after each."""
    decode, logits_BV = prefill(params, prompts_BS, lengths_B, model=model)
    seen = Seen.of(prompts_BS, lengths_B, model.config.vocab_size)
    return sample(SamplerState(decode, seen, key_B, jnp.zeros((), jnp.int32)), logits_BV, processors)


@functools.partial(jax.jit, static_argnames="model", donate_argnames="state")
def decode_chunk(
    params: Any, state: SamplerState, processors: tuple, num_steps: jax.Array, *, model: nn.Module
) -> tuple[SamplerState, Sampled]:
    """Samples `num_steps` ≤ CHUNK tokens. Returns the state and (B, CHUNK) arrays with `num_steps` columns filled."""

    def body(i, carry):
        state, chunk = carry
        decode, logits_BV = decode_step(params, state.decode, model)
        state, sampled = sample(state.replace(decode=decode), logits_BV, processors)
        return state, jax.tree.map(lambda column_BC, value_B: column_BC.at[:, i].set(value_B), chunk, sampled)

    one = jax.eval_shape(lambda state: sample(state, state.seen.counts_BV, processors)[1], state)
    empty = jax.tree.map(lambda leaf: jnp.zeros((*leaf.shape, CHUNK), leaf.dtype), one)
    return jax.lax.fori_loop(0, num_steps, body, (state, empty))
