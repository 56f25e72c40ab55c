"""Tasks on windows of a text: reading and tokenizing it, batches, and evaluation on all of it."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Self

from minigpt_jax.config import Config, DataConfig
from minigpt_jax.data import batches
from minigpt_jax.data.overlap import overlap
from minigpt_jax.data.splits import read_texts, tokenize_splits, train_tokenizer
from minigpt_jax.data.token_file import Tokens
from minigpt_jax.tasks.evaluation import means
from minigpt_jax.tasks.task import PreviousRun
from minigpt_jax.tasks.text import TextTask, read_same, steps_of, tokenizer_for, warn_of_copies


@dataclasses.dataclass(frozen=True, eq=False)
class WindowTask(TextTask):
    """Base class of these tasks. See `tasks.Task`."""

    splits: dict[str, Tokens]  # train, val

    @classmethod
    def read(cls, config: Config, previous: PreviousRun | None, objective_of: Callable[[Config], Any]) -> Self:
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
        return cls(config, tokenizer, splits, sources, num_steps, objective_of(config))

    def batch_at(self, step: int) -> batches.Batch:
        settings, ids = self.config.training, self.splits["train"].ids
        return batches.batch_at(ids, self.config.model.context_length, settings.batch_size, settings.seed, step)

    def evaluate(self, params: Any, limit: int | None = None) -> dict[str, float]:
        return means(self.objective, params, self.evaluation_batches("val", limit))

    def evaluation_batches(self, split: str, limit: int | None = None, stride: int | None = None) -> Iterator[batches.Batch]:
        """See `batches.evaluation_batches`."""
        ids, T, B = self.splits[split].ids, self.config.model.context_length, self.config.training.batch_size
        return batches.evaluation_batches(ids, T, B, limit, stride)

    def describe_data(self) -> str:
        millions = len(self.splits["train"].ids) / 1e6
        return f"{data_of(self.config).dataset}, {millions:.2f} M training tokens{self.unknown_tokens('train')}"

    def data_facts(self) -> dict[str, float]:
        train, val = self.splits["train"], self.splits["val"]
        return {"unknown": val.unknown_share, "also_in_training": overlap(train.ids, val.ids)}

    def unknown_tokens(self, split: str) -> str:
        """The share of unknown words in a split, for the log. Empty if the tokenizer has no unknown token."""
        return "" if self.tokenizer.unknown is None else f" ({self.splits[split].unknown_share:.1%} of tokens unknown)"


def data_of(config: Config) -> DataConfig:
    assert isinstance(config.data, DataConfig)  # guaranteed by `config.task`, which is derived from its type
    return config.data
