"""Decoding strategies: frozen values that turn the logits of the next token into others, to be composed in a tuple.

Which processors run is structure, so it is static under jit; their numbers are leaves, so another temperature does not
compile again. They run in the order in which Hugging Face's generation runs its own, which `processors` below fixes:
penalties, temperature, top-k, top-p, min-p, typical-p. A token that a processor removes has the logit -inf from there on,
and each processor keeps at least one token, so there is always one to sample.
"""

import dataclasses
import functools
import math
from typing import Protocol

import jax
import jax.numpy as jnp

from minigpt_jax.errors import UsageError

LOWEST_TEMPERATURE = 1e-30  # above 0: what is much lower is 0 in float32


class Processor(Protocol):
    """`counts_BV` says how often each token stands in the row so far, prompt included; only the penalties read it."""

    def __call__(self, logits_BV: jax.Array, counts_BV: jax.Array | None = None) -> jax.Array: ...


def processor(cls: type) -> type:
    """A frozen dataclass that is a pytree, with its numbers as leaves.

    What `flax.struct.dataclass` and `jax.tree_util.register_dataclass` make will not do here: to JAX 0.10 the structures of
    two dataclasses with equally many fields are equal, so that jit now and then runs one processor in place of another.
    """
    cls = dataclasses.dataclass(frozen=True)(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    jax.tree_util.register_pytree_node(
        cls, lambda value: ([getattr(value, name) for name in names], None), lambda _, numbers: cls(*numbers)
    )
    return cls


@processor
class RepetitionPenalty:
    """Divides positive logits of tokens seen before by `penalty`, multiplies negative ones by it (Keskar et al. 2019)."""

    penalty: float

    def __call__(self, logits_BV, counts_BV=None):
        penalised_BV = jnp.where(logits_BV > 0, logits_BV / self.penalty, logits_BV * self.penalty)
        return jnp.where(counts_BV > 0, penalised_BV, logits_BV)


@processor
class FrequencyPenalty:
    """Takes `penalty` from a token's logit for each time that it has been seen."""

    penalty: float

    def __call__(self, logits_BV, counts_BV=None):
        return logits_BV - self.penalty * counts_BV


@processor
class PresencePenalty:
    """Takes `penalty` from the logit of each token that has been seen at all."""

    penalty: float

    def __call__(self, logits_BV, counts_BV=None):
        return logits_BV - self.penalty * (counts_BV > 0)


@processor
class Temperature:
    """Divides logits by the temperature: below 1 the distribution gets sharper, above 1 flatter."""

    temperature: float

    def __call__(self, logits_BV, counts_BV=None):
        # Below their largest first: of a large quotient XLA's softmax would take its rounding error for a difference.
        return (logits_BV - logits_BV.max(axis=-1, keepdims=True)) / self.temperature


@processor
class TopK:
    """Keeps the k tokens with the highest logits, and those that tie with the last of them (Fan et al. 2018)."""

    k: int

    def __call__(self, logits_BV, counts_BV=None):
        V = logits_BV.shape[-1]
        ascending_BV = jnp.sort(logits_BV, axis=-1)
        lowest_kept_B1 = jax.lax.dynamic_slice_in_dim(ascending_BV, V - jnp.clip(self.k, 1, V), 1, axis=-1)
        return jnp.where(logits_BV >= lowest_kept_B1, logits_BV, -jnp.inf)


@processor
class TopP:
    """Keeps the most probable tokens until their mass reaches p, the one that reaches it included (Holtzman et al. 2020)."""

    p: float

    def __call__(self, logits_BV, counts_BV=None):
        return keep_until_mass(logits_BV, -jax.nn.log_softmax(logits_BV), self.p)


@processor
class MinP:
    """Keeps the tokens that are at least p times as probable as the most probable one (Nguyen et al. 2024)."""

    p: float

    def __call__(self, logits_BV, counts_BV=None):
        # In logits the ratio is a difference, so that there is nothing to normalise.
        lowest_kept_B1 = logits_BV.max(axis=-1, keepdims=True) + jnp.log(self.p)
        return jnp.where(logits_BV >= lowest_kept_B1, logits_BV, -jnp.inf)


@processor
class TypicalP:
    """Keeps the tokens whose surprise is nearest to the entropy, until their mass reaches p (Meister et al. 2023)."""

    p: float

    def __call__(self, logits_BV, counts_BV=None):
        surprise_BV = -jax.nn.log_softmax(logits_BV)
        mean_B1 = jnp.where(jnp.isfinite(surprise_BV), jnp.exp(-surprise_BV) * surprise_BV, 0.0).sum(axis=-1, keepdims=True)
        return keep_until_mass(logits_BV, jnp.abs(surprise_BV - mean_B1), self.p)


@processor
class Greedy:
    """Keeps the most probable token alone; of several, the one with the lowest id."""

    def __call__(self, logits_BV, counts_BV=None):
        best_B1 = jnp.argmax(logits_BV, axis=-1, keepdims=True)
        return jnp.where(jnp.arange(logits_BV.shape[-1])[None, :] == best_B1, logits_BV, -jnp.inf)


def keep_until_mass(logits_BV: jax.Array, cost_BV: jax.Array, mass: jax.Array | float) -> jax.Array:
    """Keeps tokens from the lowest cost upwards until their probability adds up to `mass`, with what ties with the last."""
    order_BV = jnp.argsort(cost_BV, axis=-1)
    probs_BV = jnp.take_along_axis(jax.nn.softmax(logits_BV), order_BV, axis=-1)
    before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV
    # Rounding can bring the sum up to 1 before the last token, so that a mass of 1 needs saying.
    num_kept_B1 = jnp.where(mass >= 1, probs_BV.shape[-1], (before_BV < mass).sum(axis=-1, keepdims=True))
    last_kept_B1 = jnp.take_along_axis(order_BV, jnp.maximum(num_kept_B1, 1) - 1, axis=-1)
    return jnp.where(cost_BV <= jnp.take_along_axis(cost_BV, last_kept_B1, axis=-1), logits_BV, -jnp.inf)


def process(processors: tuple[Processor, ...], logits_BV: jax.Array, counts_BV: jax.Array) -> jax.Array:
    """The logits after all processors, one after another."""
    return functools.reduce(lambda logits, processor: processor(logits, counts_BV), processors, logits_BV)


def processors(
    *,
    temperature: float | None = None,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    typical_p: float = 1.0,
    repetition_penalty: float = 1.0,
    frequency_penalty: float = 0.0,
    presence_penalty: float = 0.0,
    greedy: bool = False,
) -> tuple[Processor, ...]:
    """The processors for these settings, in their fixed order. Each default means "not at all"; temperature 0 means greedy.

    Raises UsageError for values that make no sense, and for those that contradict each other.
    """

    def require(condition: bool, message: str) -> None:
        if not condition:
            raise UsageError(message)

    require(not (greedy and temperature), f"greedy excludes temperature={temperature}: give one of them")
    temperature = 1.0 if temperature is None else temperature
    require(
        temperature == 0 or (temperature >= LOWEST_TEMPERATURE and math.isfinite(temperature)),
        f"temperature={temperature} must be 0 (greedy) or a number from {LOWEST_TEMPERATURE} up",
    )
    require(0 <= top_k < math.inf and top_k == int(top_k), f"top_k={top_k} must be 0 (off) or a whole number above")
    require(0 < top_p <= 1, f"top_p={top_p} must be above 0 and at most 1 (off)")
    require(0 <= min_p <= 1, f"min_p={min_p} must be between 0 (off) and 1")
    require(0 < typical_p <= 1, f"typical_p={typical_p} must be above 0 and at most 1 (off)")
    require(
        repetition_penalty > 0 and math.isfinite(repetition_penalty),
        f"repetition_penalty={repetition_penalty} must be above 0",
    )
    require(math.isfinite(frequency_penalty), f"frequency_penalty={frequency_penalty} must be a finite number")
    require(math.isfinite(presence_penalty), f"presence_penalty={presence_penalty} must be a finite number")

    # Always the same types, so that 1 compiles nothing that 1.0 has not; and a k that fits into 32 bits.
    chosen = [
        (repetition_penalty != 1, lambda: RepetitionPenalty(float(repetition_penalty))),
        (frequency_penalty != 0, lambda: FrequencyPenalty(float(frequency_penalty))),
        (presence_penalty != 0, lambda: PresencePenalty(float(presence_penalty))),
    ]
    if greedy or temperature == 0:  # there is nothing left to sample, so the samplers' settings say nothing
        chosen.append((True, Greedy))
    else:
        chosen += [
            (temperature != 1, lambda: Temperature(float(temperature))),
            (top_k != 0, lambda: TopK(min(int(top_k), 2**31 - 1))),
            (top_p != 1, lambda: TopP(float(top_p))),
            (min_p != 0, lambda: MinP(float(min_p))),
            (typical_p != 1, lambda: TypicalP(float(typical_p))),
        ]
    return tuple(make() for wanted, make in chosen if wanted)
