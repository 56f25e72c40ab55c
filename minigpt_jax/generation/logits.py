"""Decoding strategies: functions that transform the logits of the next token. Removed tokens get -inf; at least one token is
kept. `seen` holds the tokens of the row so far."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from minigpt_jax.generation.seen import Seen

Number = jax.Array | float


@struct.dataclass
class Processor:
    """A strategy with its number, which is a leaf under jit: changing the temperature does not recompile."""

    function: Callable = struct.field(pytree_node=False)
    number: float | None = None

    def __call__(self, logits_BV: jax.Array, seen: Seen | None = None) -> jax.Array:
        return self.function(logits_BV, seen, self.number)


def process(processors: tuple[Processor, ...], logits_BV: jax.Array, seen: Seen | None = None) -> jax.Array:
    return functools.reduce(lambda logits_BV, processor: processor(logits_BV, seen), processors, logits_BV)


def repetition_penalty(logits_BV: jax.Array, seen: Seen, penalty: Number) -> jax.Array:
    """Divides positive logits of seen tokens by the penalty and multiplies negative ones by it (Keskar et al. 2019)."""
    return jnp.where(seen.counts_BV > 0, jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty), logits_BV)


def frequency_penalty(logits_BV: jax.Array, seen: Seen, penalty: Number) -> jax.Array:
    """Subtracts the penalty from a token's logit once per occurrence in the row."""
    return logits_BV - penalty * seen.counts_BV


def presence_penalty(logits_BV: jax.Array, seen: Seen, penalty: Number) -> jax.Array:
    """Subtracts the penalty once from the logit of each token that occurs in the row."""
    return logits_BV - penalty * (seen.counts_BV > 0)


def temperature(logits_BV: jax.Array, seen: Seen, temperature: Number) -> jax.Array:
    """Divides the logits by the temperature: below 1 sharpens the distribution, above 1 flattens it."""
    # Subtract the maximum first: in XLA's softmax the rounding errors of huge quotients would count as differences.
    return (logits_BV - logits_BV.max(axis=-1, keepdims=True)) / temperature


def top_k(logits_BV: jax.Array, seen: Seen, k: Number) -> jax.Array:
    """Keeps the k tokens with the highest logits, including ties with the last of them (Fan et al. 2018)."""
    lowest_B1 = jax.lax.dynamic_slice_in_dim(jnp.sort(logits_BV), -jnp.clip(k, 1, logits_BV.shape[-1]), 1, axis=-1)
    return jnp.where(logits_BV >= lowest_B1, logits_BV, -jnp.inf)


def top_p(logits_BV: jax.Array, seen: Seen, p: Number) -> jax.Array:
    """Keeps the most probable tokens up to and including the one whose cumulative mass reaches p (Holtzman et al. 2020)."""
    return keep_until_mass(logits_BV, -jax.nn.log_softmax(logits_BV), p)


def min_p(logits_BV: jax.Array, seen: Seen, p: Number) -> jax.Array:
    """Keeps the tokens at least p times as probable as the most probable one (Nguyen et al. 2024)."""
    return jnp.where(logits_BV >= logits_BV.max(axis=-1, keepdims=True) + jnp.log(p), logits_BV, -jnp.inf)


def typical_p(logits_BV: jax.Array, seen: Seen, p: Number) -> jax.Array:
    """Keeps the tokens whose surprisal is closest to the entropy, until their mass reaches p (Meister et al. 2023)."""
    surprisal_BV = -jax.nn.log_softmax(logits_BV)
    terms_BV = jnp.where(jnp.isfinite(surprisal_BV), jnp.exp(-surprisal_BV) * surprisal_BV, 0.0)  # their sum is the entropy
    return keep_until_mass(logits_BV, jnp.abs(surprisal_BV - terms_BV.sum(axis=-1, keepdims=True)), p)


def greedy(logits_BV: jax.Array, seen: Seen, number: None) -> jax.Array:
    """Keeps only the most probable token. Ties go to the lowest id."""
    best_B1 = jnp.argmax(logits_BV, axis=-1, keepdims=True)
    return jnp.where(jnp.arange(logits_BV.shape[-1])[None, :] == best_B1, logits_BV, -jnp.inf)


def keep_until_mass(logits_BV: jax.Array, cost_BV: jax.Array, mass: Number) -> jax.Array:
    """Keeps tokens in order of increasing cost until their probability sums to `mass`, including ties with the last."""
    order_BV = jnp.argsort(cost_BV, axis=-1)
    probs_BV = jnp.take_along_axis(jax.nn.softmax(logits_BV), order_BV, axis=-1)
    before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV
    below_BV = (before_BV < mass) | (mass >= 1)  # the sum may round to 1 before the last token
    last_kept_B1 = jnp.take_along_axis(order_BV, jnp.maximum(below_BV.sum(axis=-1, keepdims=True), 1) - 1, axis=-1)
    return jnp.where(cost_BV <= jnp.take_along_axis(cost_BV, last_kept_B1, axis=-1), logits_BV, -jnp.inf)
