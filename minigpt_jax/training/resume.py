"""Resuming: a run's newest whole checkpoint, if the config and the data are those that it was made with."""

import logging
import os
import platform
from pathlib import Path
from typing import Any

import flax
import jax
import numpy as np
import optax

from minigpt_jax.config import Config, differences
from minigpt_jax.errors import DataError, UsageError
from minigpt_jax.models.kernels import Kernels
from minigpt_jax.runs import arrays, checkpoints
from minigpt_jax.runs.folder import read_config
from minigpt_jax.tasks import prepare
from minigpt_jax.tasks.task import Earlier, Task
from minigpt_jax.training.state import TrainState

log = logging.getLogger(__name__)


def resume(config: Config, workdir: Path, kernels: Kernels, device: Any) -> tuple[Task, int]:
    """The task, and the step of the newest whole checkpoint; damaged ones are set aside.

    Raises DataError where the run there is another one, its data has changed, or all of its checkpoints are damaged.
    """
    before = read_config(workdir)
    config = config.with_data_settings_of(before)
    changes = {name: f"{name}={a} (now {b})" for name, (a, b) in differences(before, config).items()}
    may_change = {name for name, setting in config.settings.items() if setting.field.metadata["may_change"]}
    refuse(workdir, [change for name, change in changes.items() if name not in may_change])
    steps = checkpoints.steps(workdir)[::-1]
    newest = checkpoints.first_whole(workdir, steps)
    info = checkpoints.read_info(workdir, newest)
    task = prepare(config, Earlier(workdir, info.sources), kernels=kernels)
    if newest > task.num_steps:
        refuse(workdir, [f"{newest} steps done (now {task.num_steps})"])
    for damaged in steps[: steps.index(newest)]:
        checkpoints.set_aside(workdir, damaged)
    if changes:
        log.info("Changed in the run: %s.", ", ".join(changes.values()))
    now = environment(device)
    others = [f"{name} {was} (now {now.get(name)})" for name, was in info.made_with.items() if was != now.get(name)]
    if others:
        log.warning("The run was made with %s: from here on its bits may be others.", ", ".join(others))
    return task, newest


def check_folder(config: Config, workdir: Path, overwrite: bool) -> None:
    """Raises DataError or UsageError where the folder holds something that training in it would destroy."""
    is_new, init_from = overwrite or not checkpoints.steps(workdir), config.training.init_from
    if is_new and init_from and Path(init_from).resolve() == workdir.resolve():
        raise UsageError(f"init_from={init_from} is the run's own folder, which would be lost: choose another --workdir")
    if not overwrite:
        checkpoints.check_owned(workdir)


def refuse(workdir: Path, changed: list[str]) -> None:
    """Raises DataError if anything has changed that must not."""
    if changed:
        raise DataError(
            f"{workdir} holds a run with {', '.join(changed)}: choose another --workdir, or replace the run with --overwrite"
        )


def has_ended(task: Task, workdir: Path, newest: int) -> str | None:
    """What to say of a run that has nothing left to do at its newest checkpoint."""
    if newest == task.num_steps:
        return f"has finished its {newest} steps. Continue with --steps N, N above that; start over with --overwrite."
    patience = task.config.training.patience
    in_vain = checkpoints.read_info(workdir, newest).evaluations_since_best
    if 0 < patience <= in_vain:
        return (
            f"has gone {in_vain} evaluations without a lower loss, at step {newest}. "
            f"Continue with --patience N, N above {in_vain}, or 0."
        )
    return None


def restore(workdir: Path, step: int, like: TrainState, sharding: jax.sharding.Sharding) -> TrainState:
    """The state at a checkpoint that was verified; `like` is a state or its `jax.eval_shape`.

    Raises DataError where its arrays are others.
    """
    saved = checkpoints.folder_of(workdir, step)
    return TrainState(
        # Placed like the arrays: were it left to JAX where it goes, the second step would compile once more.
        step=jax.device_put(np.int32(step), sharding),
        **{name: arrays.restore(saved / name, tree, sharding) for name, tree in like.trees.items()},
    )


def environment(device: Any) -> dict[str, str]:
    """What the bits of a step depend on beside the config: versions, device and flags of the compiler."""
    return {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "flax": flax.__version__,
        "optax": optax.__version__,
        "device": f"{device.platform} {device.device_kind}",
        "machine": platform.machine(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }
