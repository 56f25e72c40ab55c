"""Language modelling: a GPT is trained to predict each next token of a text."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from minigpt_jax.commands import command
from minigpt_jax.config import Config, DataConfig
from minigpt_jax.data import batches
from minigpt_jax.data.overlap import overlap
from minigpt_jax.data.splits import read_texts, tokenize_splits, train_tokenizer
from minigpt_jax.data.token_file import Tokens
from minigpt_jax.errors import UsageError, require_choice
from minigpt_jax.generation.language_model import LanguageModel
from minigpt_jax.models.kernels import PLAIN, Kernels
from minigpt_jax.tasks.evaluation import means
from minigpt_jax.tasks.next_token import NextToken
from minigpt_jax.tasks.task import PreviousRun
from minigpt_jax.tasks.text import TextTask, read_same, steps_of, tokenizer_for, warn_of_copies

PREVIEW_LENGTH = 250  # tokens


@dataclasses.dataclass(frozen=True, eq=False)
class LanguageModelling(TextTask):
    """See `tasks.Task`."""

    splits: dict[str, Tokens]  # train, val

    def batch_at(self, step: int) -> batches.Batch:
        settings, ids = self.config.training, self.splits["train"].ids
        return batches.batch_at(ids, self.config.model.context_length, settings.batch_size, settings.seed, step)

    def evaluate(self, params: Any, limit: int | None = None) -> dict[str, float]:
        return self.means_over("val", params, limit, stride=None)

    def measures(self, params: Any, split: str = "val", stride: int | None = None) -> dict[str, float]:
        T = self.config.model.context_length
        require_choice("split", split, self.splits)
        if stride is not None and not 1 <= stride <= T:
            raise UsageError(f"stride={stride} must be at least 1 and at most context_length={T}")
        measured = self.means_over(split, params, None, stride)
        return {"stride": stride or T} | measured | loss_in_other_units(self, split, measured["loss"])

    def means_over(self, split: str, params: Any, limit: int | None, stride: int | None) -> dict[str, float]:
        """See `batches.evaluation_batches`."""
        ids, T, B = self.splits[split].ids, self.config.model.context_length, self.config.training.batch_size
        return means(self.objective, params, batches.evaluation_batches(ids, T, B, limit, stride))

    def preview(self, params: Any) -> str:
        """A sample that continues the first character of the validation text."""
        tokenizer, ids = self.tokenizer, self.splits["val"].ids
        model = LanguageModel(self.config.model, tokenizer, params, self.objective.model.kernels)
        # The first character may be up to four tokens. A word tokenizer may not know it, as the split can cut a word.
        start = tokenizer.decode(ids[:4])[:1] if tokenizer.unknown is None else "\n"
        return model.generate(start, PREVIEW_LENGTH, temperature=0.8)

    def describe_data(self) -> str:
        millions = len(self.splits["train"].ids) / 1e6
        return f"{data_of(self.config).dataset}, {millions:.2f} M training tokens{self.unknown_tokens('train')}"

    def describe_result(self, measures: Mapping[str, float]) -> str:
        loss, bits = measures["loss"], measures["bits_per_char"]
        return f"{loss:.4f} nats per token, {bits:.3f} bits per character{self.unknown_tokens('val')}"

    def next_command(self, workdir: Path) -> str:
        return f"Generate text: {command('generate')} --workdir {workdir} --prompt TEXT --length 200"

    def unknown_tokens(self, split: str) -> str:
        """The share of unknown words in a split, for the log. Empty if the tokenizer has no unknown token."""
        return "" if self.tokenizer.unknown is None else f" ({self.splits[split].unknown_share:.1%} of tokens unknown)"


def data_of(config: Config) -> DataConfig:
    assert isinstance(config.data, DataConfig)  # guaranteed by `config.task`, which is derived from its type
    return config.data


def prepare(config: Config, previous: PreviousRun | None = None, kernels: Kernels = PLAIN) -> LanguageModelling:
    """Reads and tokenizes the texts, with the tokenizer of the previous run or a newly trained one."""
    data = data_of(config)
    texts = read_same(lambda: read_texts(data), config, previous)
    tokenizer = tokenizer_for(previous, lambda: train_tokenizer(data, config.model.vocab_size, texts))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=tokenizer.vocab_size))
    splits = tokenize_splits(texts, tokenizer, config.model.context_length)
    shares = [] if previous else [overlap(splits["train"].ids, splits["val"].ids), texts.shared_documents()]
    warn_of_copies(max(shares, default=0.0), data.dataset)
    num_steps = steps_of(config.training, batches.num_windows(splits["train"].ids, config.model.context_length))
    sources = {"text": texts.sha256, "tokenizer": tokenizer.sha256}
    return LanguageModelling(config, tokenizer, splits, sources, num_steps, NextToken.of(config, kernels))


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
