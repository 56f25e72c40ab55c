"""Samples tokens after prompts, chunk by chunk, for any length."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from minigpt_jax.generation.context import Context, padded
from minigpt_jax.generation.decode import CHUNK, Sampled, decode_chunk, prefill_and_sample
from minigpt_jax.generation.devices import shard_rows
from minigpt_jax.generation.logits import Processor


def row_keys(key: jax.Array, rows: Sequence[int]) -> jax.Array:
    """The random keys of the rows with these indices."""
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
    devices: Sequence[Any] = (),
) -> Iterator[Sampled]:
    """Samples `num_tokens` tokens after each prompt, in chunks: NumPy arrays of shape (B, up to `chunk`).

    `prompts` are B ≥ 1 arrays of token ids, each with 1 to context_length tokens. The tokens do not depend on the chunk
    size, and memory does not grow with `num_tokens`. See `Context` for texts longer than the context, and `shard_rows` for
    `devices`. Raises FloatingPointError if the model's logits are not finite.
    """
    context = Context(prompts, model)
    params, rows = shard_rows(params, (padded(prompts, context.size), context.position_B, key_B), devices)
    state, sampled = prefill_and_sample(params, *rows, processors, model=model)
    result = jax.tree.map(lambda value_B: np.asarray(value_B)[:, None], sampled)
    while True:
        # Without this check, sampling would silently return token 0. NaN in the model's logits makes the entropy NaN. If
        # the processors leave only -inf, the probability is NaN.
        if not (np.isfinite(result.entropy).all() and np.isfinite(result.prob).all()):
            raise FloatingPointError("the model's logits are not finite, so no token can be sampled")
        yield result
        num_tokens -= result.token.shape[1]
        if not num_tokens:
            return
        context.append(result.token)
        decode, num_steps = context.make_room(params, state.decode, min(chunk, num_tokens))
        state, sampled = decode_chunk(params, state.replace(decode=decode), processors, num_steps, model=model)
        result = jax.tree.map(lambda columns_BC, n=num_steps: np.asarray(columns_BC)[:, :n], sampled)
