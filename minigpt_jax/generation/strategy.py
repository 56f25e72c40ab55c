"""From the settings that a user names to the processors that carry them out."""

import math

from minigpt_jax.errors import UsageError
from minigpt_jax.generation import logits
from minigpt_jax.generation.logits import Processor

LOWEST_TEMPERATURE = 1e-30  # above 0: what is much lower is 0 in float32


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
    """The processors for these settings, in the order of Hugging Face's generation. Each default means "not at all";
    temperature 0 means greedy.

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

    # Numbers always of the same type, so that 1 compiles nothing that 1.0 has not; and a k that fits into 32 bits.
    chosen = [
        (logits.repetition_penalty, float(repetition_penalty), 1),
        (logits.frequency_penalty, float(frequency_penalty), 0),
        (logits.presence_penalty, float(presence_penalty), 0),
    ]
    if greedy or temperature == 0:  # there is nothing left to sample, so the samplers' settings say nothing
        chosen.append((logits.greedy, None, 0))
    else:
        chosen += [
            (logits.temperature, float(temperature), 1),
            (logits.top_k, min(int(top_k), 2**31 - 1), 0),
            (logits.top_p, float(top_p), 1),
            (logits.min_p, float(min_p), 0),
            (logits.typical_p, float(typical_p), 1),
        ]
    return tuple(Processor(function, number) for function, number, off in chosen if number != off)
