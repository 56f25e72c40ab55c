"""Training several runs side by side: their states are stacked, and one program makes a step of each."""

import collections
import dataclasses
import functools
import logging
import math
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from minigpt_jax.errors import UsageError
from minigpt_jax.system import hardware, memory
from minigpt_jax.tasks.task import Task
from minigpt_jax.training.compilations import Compilations
from minigpt_jax.training.run import new_state, train_step_kwargs
from minigpt_jax.training.step import train_step

log = logging.getLogger(__name__)

MEMORY_SHARE = 0.7  # of the available memory; XLA plans 0.85 to 1.15 times the bytes that `bytes_per_run` estimates
REMAT_FACTOR = 2.5  # recomputing a block takes memory that the shapes of what is stored do not show
SHOWN = 8  # losses in a log line
DIVERGED = 1.1  # times the loss before the first step


@functools.partial(jax.jit, static_argnames="grad_accumulation", donate_argnames="states")
def stacked_step(
    states: Any, batches: Any, keys: jax.Array, *, grad_accumulation: int, **arguments: Any
) -> tuple[Any, dict[str, jax.Array]]:
    """`train_step` for several runs. All arrays, including the numbers of `arguments`, have the runs as their first axis.
    `states` is donated."""

    def step(state: Any, batch: Any, key: jax.Array, arguments: Any) -> Any:
        return train_step(state, batch, key, grad_accumulation=grad_accumulation, **arguments)

    return jax.vmap(step)(states, batches, keys, arguments)


@jax.jit
def stack(trees: Sequence[Any]) -> Any:
    """One tree of arrays from several of the same structure, which become the first axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@jax.jit
def pick(tree: Any, index: int) -> Any:
    """The tree at an index of the first axis of its arrays."""
    return jax.tree.map(lambda leaf: leaf[index], tree)


def program(task: Task) -> Hashable:
    """Equal for two tasks whose steps are one program and as many: they can be stacked."""
    arguments = train_step_kwargs(task) | {"batch": task.batch_at(0)}
    has_average, num_parts = task.config.training.ema > 0, arguments.pop("grad_accumulation")
    leaves, structure = jax.tree.flatten(arguments)
    return structure, tuple(map(jax.typeof, leaves)), has_average, num_parts, task.num_steps


class Stack:
    """Runs of the same program before their first step, on one device. A single run is trained by `train_step` itself."""

    def __init__(self, tasks: Sequence[Task], device: Any):
        self.tasks, self.step = tasks, 0
        sharding = jax.sharding.SingleDeviceSharding(device)
        # Placed like the results of a step, which would otherwise be compiled again for them.
        states = [jax.device_put(new_state(task, task.initial_params(sharding)), sharding) for task in tasks]
        keys = [jax.random.key(task.config.training.seed) for task in tasks]
        arguments = [train_step_kwargs(task) for task in tasks]
        [self.grad_accumulation] = {each.pop("grad_accumulation") for each in arguments}
        if len(tasks) == 1:
            self.state, self.key, self.arguments = states[0], keys[0], arguments[0]
        else:
            self.state, self.key, self.arguments = stack(states), stack(keys), stack(arguments)

    def advance(self) -> dict[str, jax.Array]:
        """Makes a step of each run. Returns its metrics; in those of several runs, the runs are the first axis."""
        batches = [task.batch_at(self.step) for task in self.tasks]
        if len(batches) == 1:
            function, batch = train_step, batches[0]
        else:
            function, batch = stacked_step, jax.tree.map(lambda *arrays: np.stack(arrays), *batches)
        self.state, metrics = function(
            self.state, batch, self.key, grad_accumulation=self.grad_accumulation, **self.arguments
        )
        self.step += 1
        return metrics

    def eval_params(self, index: int) -> Any:
        """The parameters of one of the runs, for evaluation."""
        return self.state.eval_params if len(self.tasks) == 1 else pick(self.state.eval_params, index)


@dataclasses.dataclass
class Progress:
    """What is known about a run while it is trained."""

    task: Task
    evaluations: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    bad_steps: int = 0  # in a row, until now
    num_skipped: int = 0
    ended_at: int | None = None  # the step at which it had too many non-finite ones in a row

    def evaluate(self, params: Any, step: int, losses: Sequence[float] = ()) -> None:
        """Adds a row with the mean of the training losses since the last row, and the validation loss."""
        row = {"step": step, "train_loss": float(np.mean(losses))} if losses else {"step": step}
        loss = self.task.evaluate(params, limit=self.task.config.training.eval_batches)["loss"]
        self.evaluations.append(row | {"val_loss": finite(loss)})

    def count(self, first: int, losses: Sequence[float], are_finite: Sequence[bool]) -> list[float]:
        """Notes the results of the steps from number `first` on. Returns the finite losses."""
        kept = []
        for step, (loss, is_finite) in enumerate(zip(losses, are_finite, strict=True), first):
            self.bad_steps = 0 if is_finite else self.bad_steps + 1
            self.num_skipped += not is_finite
            kept += [loss] if is_finite else []
            if self.bad_steps >= self.task.config.training.max_bad_steps:
                self.ended_at = step
                break
        return kept

    def result(self, params: Any, step: int) -> dict[str, Any]:
        """The result of the run, as JSON can hold it. A run has diverged if it had too many non-finite steps in a row, or
        ends with a loss that is not finite or clearly above that before its first step."""
        measures = {} if self.ended_at else self.task.measures(params)
        loss, before = finite(measures.get("loss")), self.evaluations[0]["val_loss"]
        return {
            "step": self.ended_at or step,
            "diverged": loss is None or (before is not None and loss > DIVERGED * before),
            "loss": loss,
            "measures": {name: finite(value) for name, value in measures.items()},
            "evaluations": self.evaluations,
            "skipped_steps": self.num_skipped,
        }


def finite(value: Any) -> Any:
    """The value, or None where it is not finite, which JSON does not have."""
    return None if value is None or not math.isfinite(value) else value


def train(
    tasks: Sequence[Task], device: Any, *, after_step: Callable[[], None] = lambda: None,
    after_evaluation: Callable[[Sequence[Progress]], None] = lambda runs: None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Trains runs of the same program side by side, without writing files. Returns a result for each.

    `loss` and `measures` are those of the last step, on all validation data; `evaluations` are on the usual part of it.
    `seconds` are those of the training steps, without compilation and evaluation, in equal shares for all runs. The two
    functions may raise an exception to end the training.
    """
    runs, settings, num_steps, seconds = Stack(tasks, device), tasks[0].config.training, tasks[0].num_steps, 0.0
    progress = [Progress(task) for task in tasks]
    for index, run in enumerate(progress):
        run.evaluate(runs.eval_params(index), 0)
    while runs.step < num_steps and not all(run.ended_at for run in progress):
        first, start = runs.step + 1, time.perf_counter()
        last = min(runs.step + settings.eval_every - runs.step % settings.eval_every, num_steps)
        with Compilations() as compilations:
            metrics = []
            for _ in range(first, last + 1):
                metrics.append(runs.advance())
                after_step()
            metrics = jax.device_get(metrics)
        seconds += time.perf_counter() - start - compilations.seconds
        losses, are_finite = (np.reshape([row[name] for row in metrics], (-1, len(tasks))) for name in ("loss", "is_finite"))
        for index, run in enumerate(progress):
            if not run.ended_at:
                kept = run.count(first, losses[:, index].tolist(), are_finite[:, index].tolist())
                run.evaluate(runs.eval_params(index), run.ended_at or last, kept)
        shown = [f"{run.evaluations[-1]['val_loss'] or math.nan:.4f}" for run in progress[:SHOWN]]
        log.info("step %d/%d  validation loss %s", runs.step, num_steps,
                 ", ".join(shown) + (", …" if len(progress) > SHOWN else ""))  # fmt: skip
        after_evaluation(progress)
    speed = {"seconds": seconds / len(tasks), "steps_per_second": len(tasks) * runs.step / seconds, "stacked": len(tasks)}
    return [run.result(runs.eval_params(index), num_steps) | speed for index, run in enumerate(progress)]


# ---- How many side by side ------------------------------------------------------------------------------------------------


def bytes_per_run(task: Task) -> float:
    """An estimate of the memory that training takes, from shapes alone: the state, the batch, the gradients, and what the
    forward pass of a micro-batch stores for them."""

    def forward(params: Any, batch: Any, key: jax.Array) -> Any:
        return jax.vjp(lambda params: task.objective.loss(params, batch, key)[0], params)

    num_parts, batch = task.config.training.grad_accumulation, task.batch_at(0)
    part = jax.tree.map(lambda array: array[: len(array) // num_parts], batch)
    state = jax.eval_shape(lambda: new_state(task))
    stored = jax.eval_shape(forward, state.params, part, jax.random.key(0))
    arrays = [leaf for leaf in jax.tree.leaves((state, state.params, stored, batch)) if hasattr(leaf, "dtype")]
    return sum(leaf.size * leaf.dtype.itemsize for leaf in arrays) * (REMAT_FACTOR if task.config.model.remat else 1)


def num_fitting(task: Task, device: Any, num_runs: int, stacked: int | None) -> int:
    """How many of `num_runs` runs fit into the device's memory side by side. Raises UsageError if that is none, or fewer
    than `stacked`."""
    available = memory.available_bytes(device)
    if available is None:
        return num_runs
    needed = bytes_per_run(task)
    fitting = int(MEMORY_SHARE * available / needed)
    if fitting < min(stacked or 1, num_runs):
        advice = f"use stack={fitting}" if fitting else "use a smaller batch_size or model, or remat"
        raise UsageError(
            f"{f'stack={stacked}: ' if stacked else ''}each of these runs takes about {needed / 1e6:,.0f} MB of memory, and "
            f"{available / 1e6:,.0f} MB are available: {fitting} fit; {advice}"
        )
    return min(fitting, num_runs)


def choose_size(tasks: Sequence[Task], device: Any, fitting: int) -> int:
    """How many of these runs to train side by side: 1 or, if a measured step is then faster, as many as fit, in parts of
    equal size. Logs why."""
    num_runs, num_steps = len(tasks), tasks[0].num_steps
    size = -(-num_runs // -(-num_runs // fitting))
    if size == 1:
        return 1
    alone, compile_seconds = time_step(tasks[:1], device)
    if (remaining := num_runs * num_steps * alone) < compile_seconds:
        log.info("One after another: %d × %d steps take about %.0f s, less than compiling a stacked step.",
                 num_runs, num_steps, remaining)  # fmt: skip
        return 1
    stacked = time_step(tasks[:size], device)[0] / size
    log.info("A step takes %.2f ms alone and %.2f ms in a stack of %d: training %s.",
             1000 * alone, 1000 * stacked, size, "stacked" if stacked < alone else "one after another")  # fmt: skip
    return size if stacked < alone else 1


def time_step(tasks: Sequence[Task], device: Any) -> tuple[float, float]:
    """(seconds that a step of these runs takes, seconds for compiling it)."""
    runs = Stack(tasks, device)

    def step() -> None:
        runs.advance()
        jax.block_until_ready(runs.state)

    with Compilations() as compilations:
        seconds = hardware.best_seconds(step, times=5)
    return seconds, compilations.seconds


def groups(tasks: Sequence[Task]) -> list[tuple[int, ...]]:
    """The indices of tasks with the same program, in the order of the first of each."""
    indices = collections.defaultdict[Hashable, list[int]](list)
    for index, task in enumerate(tasks):
        indices[program(task)].append(index)
    return [tuple(group) for group in indices.values()]
