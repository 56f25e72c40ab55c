"""Training only a part of a model: all but the frozen parameters, or a LoRA adapter. Works with every task."""

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

import jax
from flax import struct

from minigpt_jax.config import Config, FineTuningConfig
from minigpt_jax.data.batches import Batch
from minigpt_jax.errors import UsageError
from minigpt_jax.interop.load import read_base
from minigpt_jax.models import lora
from minigpt_jax.models.patterns import frozen_mask
from minigpt_jax.tasks.task import PreviousRun, Task


@struct.dataclass
class Frozen:
    """An objective that has no gradient for some of its parameters. The optimizer leaves these unchanged."""

    objective: Any
    freeze: str = struct.field(pytree_node=False)

    def init(self, key: jax.Array) -> Any:
        return self.objective.init(key)

    def loss(self, params: Any, batch: Batch, key: jax.Array | None) -> tuple[jax.Array, jax.Array, dict]:
        is_frozen = frozen_mask(params, self.freeze)
        params = jax.tree.map(lambda stop, x: jax.lax.stop_gradient(x) if stop else x, is_frozen, params)
        return self.objective.loss(params, batch, key)

    def whole_model(self, params: Any) -> Any:
        return params

    def parameter_counts(self, params: Any) -> tuple[int, int]:
        """How many parameters are trained, and how many the model has."""
        trained = jax.tree.map(lambda stop, x: None if stop else x, frozen_mask(params, self.freeze), params)
        return num_values(trained), num_values(params)


@struct.dataclass
class Adapted:
    """An objective whose parameters are a LoRA adapter of `base`, another objective's fixed parameters."""

    objective: Any
    base: Any
    scale: float
    dropout: float | None  # of the adapter's inputs
    layers: tuple[str, ...] = struct.field(pytree_node=False)
    rank: int = struct.field(pytree_node=False)

    def init(self, key: jax.Array) -> Any:
        return lora.init(key, self.base, self.layers, self.rank)

    def loss(self, params: Any, batch: Batch, key: jax.Array | None) -> tuple[jax.Array, jax.Array, dict]:
        return self.objective.loss(lora.attach(self.base, params, self.scale, self.dropout, key), batch, key)

    def whole_model(self, params: Any) -> Any:
        return lora.merge(self.base, params, self.scale)

    def parameter_counts(self, params: Any) -> tuple[int, int]:
        return num_values(params), num_values((self.base, params))


@dataclasses.dataclass(frozen=True, eq=False)
class FineTuned:
    """A task with one of the objectives above. It is evaluated as a whole model; anything else is as in `task`."""

    task: Task
    objective: Any
    sources: Mapping[str, str]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)

    @property
    def flops_per_step(self) -> float:
        """Without the gradients of the fixed weights, which are a third of the work (but for attention's scores)."""
        return self.task.flops_per_step * (2 / 3 if isinstance(self.objective, Adapted) else 1)

    def initial_params(self, sharding: jax.sharding.Sharding) -> Any:
        return None if isinstance(self.objective, Adapted) else self.task.initial_params(sharding)

    def evaluate(self, params: Any, limit: int | None = None) -> dict[str, float]:
        return self.task.evaluate(self.objective.whole_model(params), limit)

    def measures(self, params: Any, split: str = "val", stride: int | None = None) -> dict[str, float]:
        return self.task.measures(self.objective.whole_model(params), split, stride)

    def preview(self, params: Any) -> str:
        return self.task.preview(self.objective.whole_model(params))


def check(config: Config) -> None:
    """Raises UsageError for settings of LoRA that have nothing to apply to."""
    settings = config.fine_tuning
    if settings.lora_rank and config.training.init_from is None:
        raise UsageError(
            f"lora_rank={settings.lora_rank} needs a trained model to adapt: give the folder of a run or of a Hugging Face "
            "model with init_from, or omit lora_rank"
        )
    if not settings.lora_rank:
        for field in dataclasses.fields(FineTuningConfig):
            value = getattr(settings, field.name)
            if field.name.startswith("lora_") and value != field.default:
                raise UsageError(f"{field.name}={value} has no effect without lora_rank: give both, or neither")


def fine_tuned(task: Task, previous: PreviousRun | None, sharding: jax.sharding.Sharding | None) -> Task:
    """The task that trains what the config's `fine_tuning` says. Raises UsageError for patterns that select nothing, and
    DataError if the base model of an adapter is missing, or is not that of the `previous` run."""
    config, rank = task.config.fine_tuning, task.config.fine_tuning.lora_rank
    if rank:
        assert sharding is not None
        base, sha256 = read_base(task.config, lambda: task.initial_params(sharding), previous and previous.sources["base"])
        layers = lora.target_layers(base, config.lora_targets, rank)
        objective = Adapted(task.objective, base, config.lora_scale, config.lora_dropout or None, layers, rank)
        return cast(Task, FineTuned(task, objective, {**task.sources, "base": sha256}))
    if config.freeze is not None:
        frozen_mask(jax.eval_shape(task.objective.init, jax.random.key(0)), config.freeze)  # raises now, not in training
        return cast(Task, FineTuned(task, Frozen(task.objective, config.freeze), task.sources))
    return task


def describe_parameters(task: Task, params: Any) -> str:
    """How many parameters there are and, where not all are trained, how many of them are. For the log."""
    if not isinstance(task, FineTuned):
        return f"{num_values(params):,} parameters"
    objective: Any = task.objective
    trained, total = objective.parameter_counts(params)
    return f"{trained:,} of {total:,} parameters trained ({trained / total:.2%})"


def num_values(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
