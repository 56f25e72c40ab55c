"""A run in one process: what is trained, and its progress."""

import dataclasses
import errno
import os
from pathlib import Path
from typing import Any

import jax

from minigpt_jax.config import TrainingConfig
from minigpt_jax.files import flush, write_text
from minigpt_jax.runs import checkpoints
from minigpt_jax.runs.checkpoints import CheckpointInfo
from minigpt_jax.runs.metrics import MetricsFile
from minigpt_jax.runs.references import Reference
from minigpt_jax.tasks.task import Task
from minigpt_jax.training.clock import Clock
from minigpt_jax.training.compilations import Compilations
from minigpt_jax.training.optimizer import make_optimizer
from minigpt_jax.training.resume import environment, restore
from minigpt_jax.training.state import TrainState, init_state


def train_step_kwargs(task: Task) -> dict[str, Any]:
    """The keyword arguments of `train_step`, already on the device, so that they are not transferred again at each step."""
    settings = task.config.training
    optimizer = make_optimizer(settings, task.num_steps, task.config.fine_tuning.freeze)
    leaves = jax.device_put({"objective": task.objective, "optimizer": optimizer, "ema": settings.ema})
    return leaves | {"grad_accumulation": settings.grad_accumulation}


def new_state(task: Task, params: Any = None) -> TrainState:
    """The state before the first step, with the given parameters or randomly initialised ones.

    `resume.restore` takes its `jax.eval_shape`.
    """
    settings, key = task.config.training, jax.random.key(task.config.training.seed)
    optimizer = make_optimizer(settings, task.num_steps, task.config.fine_tuning.freeze)
    return init_state(key, params, objective=task.objective, optimizer=optimizer, has_average=settings.ema > 0)


@dataclasses.dataclass
class Run:
    """What the loop and its callbacks share. `step` is the number of completed steps."""

    task: Task
    workdir: Path
    device: Any  # to train on
    kernels: str  # name of the kernels
    state: TrainState
    info: CheckpointInfo  # for the next checkpoint
    metrics: MetricsFile
    clock: Clock
    compilations: Compilations
    step: int
    saved_step: int  # step of the newest checkpoint; 0 if there is none
    means: dict[str, float | None] | None = None  # from the evaluation after this step, if there was one
    unread: list[dict[str, jax.Array]] = dataclasses.field(default_factory=list)  # metrics of steps not waited for yet
    reference: Reference | None = None  # what seeds of the same settings and data reached
    compiled_step: Any = None
    has_ended_early: bool = False  # complete before its last step
    is_stopped: bool = False  # before its last step, to be resumed later

    @classmethod
    def open(
        cls, task: Task, workdir: Path, newest: int, params: Any, device: Any, kernels: str, compilations: Compilations,
        make_writer: type | None = None,
    ) -> "Run":  # fmt: skip
        """The run at the checkpoint of step `newest`. 0 starts from scratch and replaces any other run in the folder."""
        sharding = jax.sharding.SingleDeviceSharding(device)
        if newest:
            info = checkpoints.read_info(workdir, newest)
            state = restore(workdir, newest, jax.eval_shape(lambda: new_state(task)), sharding)
            checkpoints.delete_leftovers(workdir)
        else:
            # Placed like a restored state, so that both use the same compiled step.
            info, state = CheckpointInfo(0, dict(task.sources)), jax.device_put(new_state(task, params), sharding)
            checkpoints.delete_all(workdir)
        info = dataclasses.replace(info, made_with=environment(device))
        for name, text in {"config.json": task.config.to_json(), **task.files}.items():
            write_text(workdir / name, text)
        metrics, clock = MetricsFile(workdir, newest, make_writer), Clock(info.seconds, newest)
        return cls(task, workdir, device, kernels, state, info, metrics, clock, compilations, newest, newest)

    @property
    def settings(self) -> TrainingConfig:
        return self.task.config.training

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to do."""
        return self.step >= self.task.num_steps or self.has_ended_early

    def due(self, every: int) -> bool:
        """Whether an action that is taken every `every` steps is due now. After the last step all of them are."""
        return self.step % every == 0 or self.step == self.task.num_steps

    def count_step(self, metrics: dict[str, jax.Array]) -> None:
        """Records one more completed step and the metrics that it returned."""
        self.step, self.means = self.step + 1, None
        self.unread.append(metrics)

    def note(self, **values: Any) -> None:
        """Updates what the next checkpoint will record."""
        self.info = dataclasses.replace(self.info, **values)

    def read_losses(self) -> None:
        """Waits for the losses of all steps so far. Raises FloatingPointError after too many non-finite steps in a row."""
        first = self.step - len(self.unread) + 1
        for number, metrics in enumerate(jax.device_get(self.unread), first):
            info = self.info
            if metrics["is_finite"]:
                loss = float(metrics["loss"])
                self.note(pending_losses=(*info.pending_losses, loss), bad_steps=0, last_loss=loss)
                continue
            self.note(num_skipped=info.num_skipped + 1, bad_steps=info.bad_steps + 1)
            if self.info.bad_steps >= self.settings.max_bad_steps:
                saved = f"Checkpoint {self.saved_step} is finite" if self.saved_step else "There is no checkpoint yet"
                raise FloatingPointError(
                    f"loss or gradient not finite in {self.info.bad_steps} steps in a row, up to step {number}; the last "
                    f"finite loss was {info.last_loss}. Likely causes: --learning_rate too high, --warmup_steps too low, "
                    f"--dtype bfloat16. {saved}"
                )
        self.unread = []

    def save(self) -> None:
        """Saves a checkpoint, unless this step has one. Raises FileNotFoundError if the run's folder no longer exists."""
        if self.step == self.saved_step:
            return
        if not self.metrics.path.exists():  # saving would recreate the folder without its other files
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        self.read_losses()
        with self.clock.stopped(self.state):
            val_loss = self.means and self.means["loss"]
            self.note(step=self.step, val_loss=val_loss, seconds=self.clock.seconds)
            flush(self.metrics.path)  # a checkpoint that survives a power cut has its rows
            checkpoints.save(self.workdir, self.state.trees, self.info)
            checkpoints.prune(self.workdir, self.settings.keep_checkpoints)
        self.saved_step = self.step
