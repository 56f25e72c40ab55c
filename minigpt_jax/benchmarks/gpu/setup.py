"""What a part of the GPU benchmark is given."""

import dataclasses
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from minigpt_jax.benchmarks.interleave import Candidate, described
from minigpt_jax.config import Config, load_preset

PRESETS = "gpt2_124m", "nanogpt_gpu", "mini_gpt"
VOCAB_SIZE = 65  # characters of tiny Shakespeare, for presets whose text determines the vocabulary
TINY_MODEL = {"num_layers": 1, "num_heads": 2, "embed_dim": 32, "ff_dim": 64, "context_length": 32}
TINY = TINY_MODEL | {"vocab_size": 100, "batch_size": 4}


@dataclasses.dataclass(frozen=True)
class Setup:
    rehearse: bool  # tiny sizes
    rounds: int  # of interleaved runs
    dataset: str  # text to train on
    figures: dict[str, Any]  # of the parts before this one

    def config(self, preset: str, **changes: Any) -> Config:
        """A preset in bfloat16 with one micro-batch per step, or a tiny version of it."""
        config = load_preset(preset)
        changes = {"dtype": "bfloat16", "grad_accumulation": 1} | changes
        sizes = TINY if self.rehearse else {"vocab_size": config.model.vocab_size or VOCAB_SIZE}
        return config.override(changes | sizes)


def installed_or_skipped(candidates: Sequence[Candidate]) -> tuple[list[Candidate], dict[str, Any]]:
    """(the candidates whose packages are installed; by the names of the others, which package is missing)."""
    missing = [candidate for candidate in candidates if importlib.util.find_spec(candidate.needs) is None]
    skipped = {candidate.name: {"skipped": f"{candidate.needs} is not installed"} for candidate in missing}
    return [candidate for candidate in candidates if candidate not in missing], skipped


def attempt(name: str, function: Callable[..., Any], *arguments: Any) -> Iterator[dict[str, Any]]:
    """Yields {name: what the function returns}, or its error in one line, so that the rest of the part can run."""
    try:
        yield {name: function(*arguments)}
    except Exception as error:  # of any library
        yield {name: {"error": described(error)}}
