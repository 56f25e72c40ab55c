"""What the tasks on a text share: reading it, its tokenizer, and batches of windows."""

import dataclasses
import logging
import math
from collections.abc import Callable
from typing import Any, Self

from minigpt_jax.config import Config, DataConfig, TrainingConfig
from minigpt_jax.data import batches
from minigpt_jax.data.overlap import overlap
from minigpt_jax.data.splits import Texts, read_texts, tokenize_splits, train_tokenizer
from minigpt_jax.data.token_file import Tokens
from minigpt_jax.data.tokenizers import Tokenizer
from minigpt_jax.errors import DataError, UsageError
from minigpt_jax.interop import load
from minigpt_jax.tasks.evaluation import means
from minigpt_jax.tasks.task import PreviousRun

log = logging.getLogger(__name__)

MAX_OVERLAP = 0.03  # share of the validation text; more is reported


@dataclasses.dataclass(frozen=True, eq=False)
class TextTask:
    """Base class of tasks on windows of a text. See `tasks.Task`."""

    config: Config  # with vocab_size filled in
    tokenizer: Tokenizer
    splits: dict[str, Tokens]  # train, val
    sources: dict[str, str]
    num_steps: int
    objective: Any

    unit = "tokens"

    @classmethod
    def read(cls, config: Config, previous: PreviousRun | None, objective_of: Callable[[Config], Any]) -> Self:
        """Reads and tokenizes the texts, with the tokenizer of the previous run or a newly trained one."""
        data, training = data_of(config), config.training
        texts = read_same_texts(data, previous)
        if previous is None:
            tokenizer = train_tokenizer(data, config.model.vocab_size, texts)
        else:
            tokenizer = load.read_tokenizer(previous.workdir, previous.sources["tokenizer"])
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=tokenizer.vocab_size))
        splits = tokenize_splits(texts, tokenizer, config.model.context_length)
        shares = [] if previous else [overlap(splits["train"].ids, splits["val"].ids), texts.shared_documents()]
        if (share := max(shares, default=0.0)) > MAX_OVERLAP:
            log.warning(
                "%.0f%% of the validation text is also in the training text, so the validation loss will look too good: "
                "remove copies from %s, or set another --val_dataset.", 100 * share, data.dataset,
            )  # fmt: skip
        num_steps = steps_of(training, batches.num_windows(splits["train"].ids, config.model.context_length))
        sources = {"text": texts.sha256, "tokenizer": tokenizer.sha256}
        return cls(config, tokenizer, splits, sources, num_steps, objective_of(config))

    @property
    def units_per_step(self) -> int:
        return self.config.training.batch_size * self.config.model.context_length

    @property
    def files(self) -> dict[str, str]:
        return {"tokenizer.json": self.tokenizer.to_json()}

    def batch_at(self, step: int) -> batches.Batch:
        settings, ids = self.config.training, self.splits["train"].ids
        return batches.batch_at(ids, self.config.model.context_length, settings.batch_size, settings.seed, step)

    def evaluate(self, params: Any, limit: int | None = None) -> dict[str, float]:
        return self.means_over("val", params, limit)

    def means_over(self, split: str, params: Any, limit: int | None = None, stride: int | None = None) -> dict[str, float]:
        """See `batches.evaluation_batches`."""
        ids, T, B = self.splits[split].ids, self.config.model.context_length, self.config.training.batch_size
        return means(self.objective, params, batches.evaluation_batches(ids, T, B, limit, stride))

    def describe_data(self) -> str:
        millions = len(self.splits["train"].ids) / 1e6
        return f"{data_of(self.config).dataset}, {millions:.2f} M training tokens{self.unknown_tokens('train')}"

    def unknown_tokens(self, split: str) -> str:
        """The share of unknown words in a split, for the log. Empty if the tokenizer has no unknown token."""
        return "" if self.tokenizer.unknown is None else f" ({self.splits[split].unknown_share:.1%} of tokens unknown)"


def data_of(config: Config) -> DataConfig:
    assert isinstance(config.data, DataConfig)  # guaranteed by `config.task`, which is derived from its type
    return config.data


def read_same_texts(data: DataConfig, previous: PreviousRun | None) -> Texts:
    """The texts. Raises DataError if they cannot be read or are not those of the previous run."""
    try:
        texts = read_texts(data)
    except DataError as error:
        if previous is None:
            raise
        moved = "if the run's text has moved, set --dataset (or --val_dataset, --data_dir) to where it is now"
        raise DataError(f"{error}; {moved}") from error
    if previous is not None and previous.sources["text"] != texts.sha256:
        names = data.dataset if data.val_dataset is None else f"{data.dataset} with {data.val_dataset} for validation"
        raise DataError(
            f"{names} is not the text that this run was trained on: restore it, set --dataset to where that text is now, "
            "choose another --workdir, or restart with --overwrite"
        )
    return texts


def steps_of(training: TrainingConfig, rows_per_epoch: int) -> int:
    """The number of steps of a run: `steps`, or those of `epochs`, by default one."""
    if training.steps is not None:
        return training.steps
    num_steps = (training.epochs or 1) * rows_per_epoch / training.batch_size
    if num_steps >= 2**31:  # JAX counts steps in 32 bits
        raise UsageError(f"epochs={training.epochs} is too large: a run has at most {2**31 - 1} steps")
    return math.ceil(num_steps)
