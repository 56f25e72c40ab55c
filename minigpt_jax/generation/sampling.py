"""Sampling from prompts to tokens, chunk by chunk, for as long as one likes."""

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
    devices: Sequence[Any] = (),
) -> Iterator[Sampled]:
    """Samples `num_tokens` tokens after each prompt, in chunks: NumPy arrays of shape (B, up to `chunk`).

    `prompts` are B ≥ 1 arrays of token ids, each with at least one and at most context_length of them. Where the chunks are
    cut does not change what they hold, and memory does not grow with `num_tokens`; see Context for what happens past the
    context, and `shard_rows` for `devices`. Raises FloatingPointError where the model's logits are not finite.
    """
    context = Context(prompts, model)
    params, rows = shard_rows(params, (padded(prompts, context.size), context.position_B, key_B), devices)
    state, sampled = prefill_and_sample(params, *rows, processors, model=model)
    found = jax.tree.map(lambda value_B: np.asarray(value_B)[:, None], sampled)
    while True:
        # Without this the draw returns token 0 without a word. NaN in the model's logits makes the entropy NaN, logits
        # that are all -inf after the processors make the probability so.
        if not (np.isfinite(found.entropy).all() and np.isfinite(found.prob).all()):
            raise FloatingPointError("the model's logits are not finite, so there is nothing to sample from")
        yield found
        num_tokens -= found.token.shape[1]
        if not num_tokens:
            return
        context.append(found.token)
        decode, num_steps = context.make_room(params, state.decode, min(chunk, num_tokens))
        state, sampled = decode_chunk(params, state.replace(decode=decode), processors, num_steps, model=model)
        found = jax.tree.map(lambda columns_BC, n=num_steps: np.asarray(columns_BC)[:, :n], sampled)
