"""What a task is."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import jax

from minigpt_jax.config import Config
from minigpt_jax.data.batches import Batch
from minigpt_jax.runs import arrays, checkpoints


class Objective(Protocol):
    """What a training step minimises: pure functions. It is a pytree whose numbers, such as a rate of dropout, are leaves;
    the model is static. So it goes into jit and vmap as an argument."""

    def init(self, key: jax.Array) -> Any:
        """Randomly initialised parameters."""
        ...

    def loss(self, params: Any, batch: Batch, key: jax.Array | None) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
        """(sum of the loss over the batch's targets, their number, sums of other measures by name). Without a key nothing is
        random, as in evaluation. Sums of parts add up to that of the batch, which means would not."""
        ...


class Task(Protocol):
    """An objective with its data: what `training.loop` trains, evaluates and shows."""

    @property
    def config(self) -> Config: ...  # with what follows from the data filled in
    @property
    def objective(self) -> Objective: ...
    @property
    def num_steps(self) -> int: ...
    @property
    def unit(self) -> str: ...  # what a rate counts, in the plural: tokens
    @property
    def units_per_step(self) -> int: ...
    @property
    def flops_per_step(self) -> float: ...
    @property
    def sources(self) -> Mapping[str, str]: ...  # sha256 by name of what a resumed run must find unchanged
    @property
    def files(self) -> Mapping[str, str]: ...  # texts by name that go into the run's folder

    def initial_params(self, sharding: jax.sharding.Sharding) -> Any:
        """Trained parameters to begin with; None where the objective draws them. Raises DataError if they do not fit."""
        ...

    def batch_at(self, step: int) -> Batch:
        """What a step trains on: a pure function of the number of steps before it."""
        ...

    def evaluate(self, params: Any, limit: int | None = None) -> dict[str, float]:
        """Mean loss and other measures on the validation data, or on `limit` batches of it, always the same ones."""
        ...

    def preview(self, params: Any) -> str:
        """Something short to look at, the same for the same parameters."""
        ...

    def describe_data(self) -> str: ...

    def measures(self, params: Any, split: str = "val", stride: int | None = None) -> dict[str, float]:
        """What `evaluate` returns and more, on all data of a split. `stride` is the distance between the starts of two
        windows. Raises UsageError for a split or stride that the task does not have."""
        ...

    def describe_result(self, measures: Mapping[str, float]) -> str:
        """The measures of all validation data in words, with their units."""
        ...

    def next_command(self, workdir: Path) -> str:
        """What to do with the trained run: a sentence that ends in a command."""
        ...


def trained_params(task: Task, workdir: Path, step: int, sharding: jax.sharding.Sharding) -> Any:
    """The parameters of a verified checkpoint that evaluation uses: with `ema` their average. Raises DataError."""
    saved = checkpoints.folder_of(workdir, step) / ("average" if task.config.training.ema else "params")
    return arrays.restore(saved, jax.eval_shape(task.objective.init, jax.random.key(0)), sharding)


@dataclasses.dataclass(frozen=True)
class Earlier:
    """What a run was trained on before: its folder, and the `sources` that its checkpoint names."""

    workdir: Path
    sources: Mapping[str, str]
