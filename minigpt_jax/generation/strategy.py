"""From the settings that a user names to the processors that carry them out."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from minigpt_jax.config import Section, setting
from minigpt_jax.errors import UsageError, did_you_mean
from minigpt_jax.generation import logits
from minigpt_jax.generation.logits import Processor

LOWEST_TEMPERATURE = 1e-30  # above 0: what is much lower is 0 in float32


@dataclasses.dataclass(frozen=True)
class DecodingConfig(Section):
    """How the next token is chosen, each setting by the function of its name in `logits`, in this order, which is that of
    Hugging Face's generation. The defaults change nothing."""

    repetition_penalty: float = setting(1.0, "above 1: tokens seen before get less probable", above=0.0)
    frequency_penalty: float = setting(0.0, "taken from a token's logit for each time it was seen")
    presence_penalty: float = setting(0.0, "taken from a token's logit if it was seen")
    temperature: float | None = setting(None, "below 1 more predictable, above 1 wilder; 0 is greedy; None: 1")
    top_k: int = setting(0, "sample from the k most probable tokens; 0: from all", at_least=0)
    top_p: float = setting(1.0, "sample from the most probable tokens with this mass together", above=0.0, at_most=1.0)
    min_p: float = setting(
        0.0, "sample from tokens at least this share as probable as the best; 0: from all", at_least=0.0, at_most=1.0
    )
    typical_p: float = setting(1.0, "sample from the most typical tokens with this mass together", above=0.0, at_most=1.0)
    greedy: bool = setting(False, "always take the most probable token")

    def __post_init__(self):
        super().__post_init__()
        if self.temperature and self.temperature < LOWEST_TEMPERATURE:
            raise UsageError(f"temperature={self.temperature} must be 0 (greedy) or a number from {LOWEST_TEMPERATURE} up")
        if self.greedy and self.temperature:
            raise UsageError(f"greedy excludes temperature={self.temperature}: give one of them")


@dataclasses.dataclass(frozen=True)
class BeamConfig(Section):
    """Beam search, which keeps the most probable continuations instead of sampling one."""

    beam_width: int | None = setting(None, "search with this many beams instead of sampling", at_least=1)
    length_penalty: float = setting(
        1.0, "with beams: 0 prefers short texts, 1 is neutral, more prefers long ones", at_least=-10.0, at_most=10.0
    )
    early_stopping: bool = setting(False, "with beams: stop as soon as as many texts have ended as there are beams")


def checked(section: type[Section], settings: Mapping[str, Any]) -> Any:
    """The section with these settings. Raises UsageError for an unknown one or a bad value."""
    known = [field.name for field in dataclasses.fields(section)]
    for name in settings.keys() - set(known):
        raise UsageError(f"unknown setting {name!r}{did_you_mean(name, known)}; allowed: {', '.join(known)}")
    return section(**settings)


SAMPLERS = "temperature", "top_k", "top_p", "min_p", "typical_p"  # which a greedy choice leaves nothing to do


def processors(**settings) -> tuple[Processor, ...]:
    """The processors for these settings of `DecodingConfig`. Raises UsageError for an unknown one or a bad value."""
    config, off = checked(DecodingConfig, settings), DecodingConfig(temperature=1.0)
    is_greedy = config.greedy or config.temperature == 0
    skipped = {"greedy"} | set(SAMPLERS if is_greedy else ())
    chosen = {name: value for name, value in dataclasses.asdict(config).items() if name not in skipped}
    # A k that fits into 32 bits, and else floats, so that 2 compiles nothing that 2.0 has not.
    found = [
        Processor(getattr(logits, name), min(number, 2**31 - 1) if name == "top_k" else float(number))
        for name, number in chosen.items()
        if number not in (None, getattr(off, name))
    ]
    return *found, *([Processor(logits.greedy)] if is_greedy else [])
