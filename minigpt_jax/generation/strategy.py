"""Turns the user's decoding settings into logit processors."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from minigpt_jax.config import Section, setting
from minigpt_jax.errors import OUR_NAMES, UsageError, did_you_mean
from minigpt_jax.generation import logits
from minigpt_jax.generation.logits import Processor

LOWEST_TEMPERATURE = 1e-30  # above 0; much smaller values are 0 in float32


@dataclasses.dataclass(frozen=True)
class DecodingConfig(Section):
    """How the next token is chosen. Each setting is applied by the function of its name in `logits`, in this order, which
    is that of Hugging Face's `generate`. The defaults change nothing."""

    repetition_penalty: float = setting(1.0, "above 1: makes tokens seen before less probable", above=0.0)
    frequency_penalty: float = setting(0.0, "subtracted from a token's logit for each time it was seen")
    presence_penalty: float = setting(0.0, "subtracted from a token's logit if it was seen")
    temperature: float | None = setting(None, "below 1: more predictable, above 1: more random; 0: greedy; None: 1")
    top_k: int = setting(0, "sample from the k most probable tokens; 0: from all", at_least=0)
    top_p: float = setting(1.0, "sample from the most probable tokens with this total probability", above=0.0, at_most=1.0)
    min_p: float = setting(
        0.0, "sample from tokens at least this fraction as probable as the best; 0: from all", at_least=0.0, at_most=1.0
    )
    typical_p: float = setting(1.0, "like top_p, but starting with the most typical tokens", above=0.0, at_most=1.0)
    greedy: bool = setting(False, "always pick the most probable token")

    def __post_init__(self):
        super().__post_init__()
        if self.temperature and self.temperature < LOWEST_TEMPERATURE:
            raise UsageError(f"temperature={self.temperature} must be 0 (greedy) or at least {LOWEST_TEMPERATURE}")
        if self.greedy and self.temperature:
            raise UsageError(f"greedy cannot be combined with temperature={self.temperature}: give only one of them")


@dataclasses.dataclass(frozen=True)
class BeamConfig(Section):
    """Beam search, which keeps the most probable continuations instead of sampling one."""

    beam_width: int | None = setting(None, "search with this many beams instead of sampling", at_least=1)
    length_penalty: float = setting(
        1.0, "beam search: 0 favours short texts, 1 is neutral, higher favours long ones", at_least=-10.0, at_most=10.0
    )
    early_stopping: bool = setting(False, "beam search: stop once as many texts have ended as there are beams")


def checked(section: type[Section], settings: Mapping[str, Any], also: Iterable[str] = ()) -> Any:
    """A section with these settings, where None stands for the default. Raises UsageError for unknown settings, naming the
    allowed ones and `also`, the caller's own arguments, and for invalid values."""
    fields = [field.name for field in dataclasses.fields(section)]
    known = [*also, *fields]
    for name in sorted(settings.keys() - set(fields)):
        is_beam_setting = OUR_NAMES.get(name, name) in {field.name for field in dataclasses.fields(BeamConfig)}
        hint = " (see beam_search, which does not sample)" if is_beam_setting else did_you_mean(name, known)
        raise UsageError(f"unknown setting {name!r}{hint}; allowed: {', '.join(known)}")
    return section(**{name: value for name, value in settings.items() if value is not None})


SAMPLERS = "temperature", "top_k", "top_p", "min_p", "typical_p"  # have no effect with greedy decoding


def processors(**settings) -> tuple[Processor, ...]:
    """The processors for these settings of `DecodingConfig`. Raises UsageError for unknown settings and invalid values."""
    config, neutral = checked(DecodingConfig, settings), DecodingConfig(temperature=1.0)
    is_greedy = config.greedy or config.temperature == 0
    skipped = {"greedy"} | set(SAMPLERS if is_greedy else ())
    chosen = {name: value for name, value in dataclasses.asdict(config).items() if name not in skipped}
    # k is capped to fit into 32 bits. The other numbers become floats, so that 2 and 2.0 share one compiled program.
    active = [
        Processor(getattr(logits, name), min(number, 2**31 - 1) if name == "top_k" else float(number))
        for name, number in chosen.items()
        if number not in (None, getattr(neutral, name))
    ]
    return *active, *([Processor(logits.greedy)] if is_greedy else [])
