"""The interface of a task."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from minigpt_jax.config import Config
from minigpt_jax.data.batches import Batch
from minigpt_jax.runs import checkpoints


class Objective(Protocol):
    """What a training step minimises, as pure functions. It is a pytree that can be passed to jit and vmap: its numbers,
    such as the dropout rate, are leaves, and the model is static."""

    def init(self, key: jax.Array) -> Any:
        """Randomly initialised parameters."""
        ...

    def loss(self, params: Any, batch: Batch, key: jax.Array | None) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
        """(sum of the loss over the batch's targets, their number, sums of other measures by name). Without a key there is
        no dropout, as in evaluation. Sums over micro-batches add up to the sum over the batch; averages would not."""
        ...


class Task(Protocol):
    """An objective with its data: what `training.loop` trains, evaluates and previews."""

    @property
    def config(self) -> Config: ...  # with the settings that follow from the data filled in
    @property
    def objective(self) -> Objective: ...
    @property
    def num_steps(self) -> int: ...
    @property
    def unit(self) -> str: ...  # what throughput is measured in, as a plural: tokens
    @property
    def units_per_step(self) -> int: ...
    @property
    def flops_per_step(self) -> float: ...
    @property
    def sources(self) -> Mapping[str, str]: ...  # sha256 by name of everything that must not change when a run is resumed
    @property
    def files(self) -> Mapping[str, str]: ...  # contents by name of text files to write into the run's folder

    def initial_params(self, sharding: jax.sharding.Sharding) -> Any:
        """Pretrained parameters to start from, or None for the objective's randomly initialised ones. Raises DataError if
        they do not fit the model."""
        ...

    def batch_at(self, step: int) -> Batch:
        """The batch of step number `step`, counted from 0: a pure function."""
        ...

    def evaluate(self, params: Any, limit: int | None = None) -> dict[str, float]:
        """Mean loss and other measures on the validation data, or on `limit` batches of it, which are always the same."""
        ...

    def preview(self, params: Any) -> str:
        """A short sample of the model's output. Deterministic: it depends only on the parameters."""
        ...

    def describe_data(self) -> str: ...

    def data_facts(self) -> dict[str, float]:
        """Shares from 0 to 1 that may explain an unusual validation loss, where the task knows them: "unknown" tokens of the
        validation text, and how much of it is "also_in_training"."""
        ...

    def measures(self, params: Any, split: str = "val", stride: int | None = None) -> dict[str, float]:
        """What `evaluate` returns and more, on all data of a split. `stride` is the distance between the starts of adjacent
        windows. Raises UsageError for a split or stride that the task does not support."""
        ...

    def describe_result(self, measures: Mapping[str, float]) -> str:
        """One line for the log: the measures on all validation data, with units."""
        ...

    def next_command(self, workdir: Path) -> str:
        """One line for the log: the command to run next on the trained run."""
        ...


@runtime_checkable
class Classifier(Protocol):
    """What a task has in addition if its model chooses one of several classes."""

    @property
    def classes(self) -> Sequence[str]: ...  # their names

    def confusion(self, params: Any, split: str = "val") -> np.ndarray:
        """counts_CC: how many examples of each class (row) the model takes for each class (column), in a whole split."""
        ...


def trained_params(task: Task, workdir: Path, step: int, sharding: jax.sharding.Sharding) -> Any:
    """The parameters of a verified checkpoint, for evaluation: with `ema`, their average. Raises DataError if they do not
    match the task's model."""
    like = jax.eval_shape(task.objective.init, jax.random.key(0))
    return checkpoints.restore_eval_params(workdir, step, task.config.training.ema > 0, like, sharding)


@dataclasses.dataclass(frozen=True)
class PreviousRun:
    """What a run to be resumed was trained on: its folder, and the `sources` recorded in its checkpoint."""

    workdir: Path
    sources: Mapping[str, str]
