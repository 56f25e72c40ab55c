"""Language modelling: a GPT is trained to predict each next token of a text."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from minigpt_jax.commands import command
from minigpt_jax.config import Config
from minigpt_jax.errors import UsageError, require_choice
from minigpt_jax.generation.language_model import LanguageModel
from minigpt_jax.models.kernels import PLAIN, Kernels
from minigpt_jax.tasks.evaluation import means
from minigpt_jax.tasks.next_token import NextToken
from minigpt_jax.tasks.task import PreviousRun
from minigpt_jax.tasks.windows import WindowTask

PREVIEW_LENGTH = 250  # tokens


@dataclasses.dataclass(frozen=True, eq=False)
class LanguageModelling(WindowTask):
    """See `tasks.Task`."""

    def measures(self, params: Any, split: str = "val", stride: int | None = None) -> dict[str, float]:
        T = self.config.model.context_length
        require_choice("split", split, self.splits)
        if stride is not None and not 1 <= stride <= T:
            raise UsageError(f"stride={stride} must be at least 1 and at most context_length={T}")
        objective = NextToken(self.objective.model, self.objective.dropout, with_accuracy=True)
        measured = means(objective, params, self.evaluation_batches(split, stride=stride))
        return {"stride": stride or T} | measured | loss_in_other_units(self, split, measured["loss"])

    def with_settings(self, settings: Mapping[str, Any], kernels: Kernels) -> "LanguageModelling":
        """The same data with other settings of the model and of training, `steps` included. Faster than reading it again."""
        config = self.config.override({"steps": self.num_steps, **settings})
        objective, num_steps = NextToken.of(config, kernels), config.training.steps
        return dataclasses.replace(self, config=config, num_steps=num_steps, objective=objective)

    def preview(self, params: Any) -> str:
        """A sample that continues the first character of the validation text."""
        tokenizer, ids = self.tokenizer, self.splits["val"].ids
        model = LanguageModel(self.config.model, tokenizer, params, self.objective.model.kernels)
        # The first character may be up to four tokens. A word tokenizer may not know it, as the split can cut a word.
        start = tokenizer.decode(ids[:4])[:1] if tokenizer.unknown is None else "\n"
        return model.generate(start, PREVIEW_LENGTH, temperature=0.8)

    def describe_result(self, measures: Mapping[str, float]) -> str:
        loss, bits = measures["loss"], measures["bits_per_char"]
        return f"{loss:.4f} nats per token, {bits:.3f} bits per character{self.unknown_tokens('val')}"

    def next_command(self, workdir: Path) -> str:
        return f"Generate text: {command('generate')} --workdir {workdir} --prompt TEXT --length 200"


def prepare(config: Config, previous: PreviousRun | None = None, kernels: Kernels = PLAIN) -> LanguageModelling:
    """Reads and tokenizes the texts, with the tokenizer of the previous run or a newly trained one."""
    return LanguageModelling.read(config, previous, lambda config: NextToken.of(config, kernels))


def loss_in_other_units(task: LanguageModelling, split: str, loss: float) -> dict[str, float]:
    """Converts a mean loss over a split, in nats per token, into units that do not depend on the tokenizer.

    The first token is not predicted, since nothing precedes it, so its characters are not counted. A word tokenizer does not
    spell out unknown words, so the bits for doing so are missing; `unknown_share` is the share of such tokens.
    """
    part, tokenizer = task.splits[split], task.tokenizer
    num_tokens, first = len(part.ids) - 1, part.ids[:1]
    num_characters = max(part.num_characters - len(tokenizer.decode(first)), 1)
    bits = loss * num_tokens / math.log(2)
    with np.errstate(over="ignore"):  # infinity is fine
        perplexity = float(np.exp(np.float64(loss)))
    return {
        "perplexity": perplexity,
        "bits_per_char": bits / num_characters,
        "bits_per_byte": bits / max(part.num_bytes - len(tokenizer.to_bytes(first)), 1),
        "tokens": num_tokens,
        "tokens_per_char": num_tokens / num_characters,
        "unknown_share": part.unknown_share,
    }
