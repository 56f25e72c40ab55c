"""What the tasks on text share: sizes, files, initial parameters, and checks of the text and the settings."""

import dataclasses
import logging
import math
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import jax

from minigpt_jax.config import Config, TrainingConfig, get_setting
from minigpt_jax.data.tokenizers import Tokenizer
from minigpt_jax.errors import DataError, UsageError
from minigpt_jax.interop import load
from minigpt_jax.models.flops import flops_per_token
from minigpt_jax.tasks.task import PreviousRun

log = logging.getLogger(__name__)

T = TypeVar("T")
MAX_OVERLAP = 0.03  # share of the validation text; more is reported


@dataclasses.dataclass(frozen=True, eq=False)
class TextTask:
    """Base class of tasks on text. See `tasks.Task`."""

    config: Config  # with vocab_size filled in
    tokenizer: Tokenizer
    splits: dict[str, Any]  # train, val
    sources: dict[str, str]
    num_steps: int
    objective: Any

    unit = "tokens"
    causal: ClassVar[bool] = True  # whether tokens attend only to earlier ones

    @property
    def units_per_step(self) -> int:
        return self.config.training.batch_size * self.config.model.context_length

    @property
    def flops_per_step(self) -> float:
        return self.units_per_step * flops_per_token(self.config.model, self.causal)

    @property
    def files(self) -> dict[str, str]:
        return {"tokenizer.json": self.tokenizer.to_json()}

    def data_facts(self) -> dict[str, float]:
        return {}

    def initial_params(self, sharding: jax.sharding.Sharding) -> Any:
        return load.initial_params(self.config, self.tokenizer, sharding)


def read_same(read: Callable[[], T], config: Config, previous: PreviousRun | None) -> T:
    """What `read` returns, which has a `sha256`. Raises DataError if it is not what the previous run was trained on."""
    try:
        texts = read()
    except DataError as error:
        if previous is None:
            raise
        moved = "if the run's text has moved, set --dataset (or --val_dataset, --data_dir) to where it is now"
        raise DataError(f"{error}; {moved}") from error
    dataset, val_dataset = get_setting(config, "dataset"), get_setting(config, "val_dataset")
    if previous is not None and previous.sources["text"] != texts.sha256:  # pyright: ignore[reportAttributeAccessIssue]
        names = dataset if val_dataset is None else f"{dataset} with {val_dataset} for validation"
        raise DataError(
            f"{names} is not the text that this run was trained on: restore it, set --dataset to where that text is now, "
            "choose another --workdir, or restart with --overwrite"
        )
    return texts


def tokenizer_for(previous: PreviousRun | None, train: Callable[[], Tokenizer]) -> Tokenizer:
    """The tokenizer of the previous run or, for a new run, the one that `train` returns."""
    return train() if previous is None else load.read_tokenizer(previous.workdir, previous.sources["tokenizer"])


def warn_of_copies(share: float, dataset: str) -> None:
    """Logs the share of the validation text that is also in the training text, if it is large."""
    if share > MAX_OVERLAP:
        log.warning(
            "%.0f%% of the validation text is also in the training text, so the validation loss will look too good: "
            "remove copies from %s, or set another --val_dataset.", 100 * share, dataset,
        )  # fmt: skip


def steps_of(training: TrainingConfig, rows_per_epoch: int) -> int:
    """The number of steps of a run: `steps`, or those of `epochs`, by default one."""
    if training.steps is not None:
        return training.steps
    num_steps = (training.epochs or 1) * rows_per_epoch / training.batch_size
    if num_steps >= 2**31:  # JAX counts steps in 32 bits
        raise UsageError(f"epochs={training.epochs} is too large: a run has at most {2**31 - 1} steps")
    return math.ceil(num_steps)
