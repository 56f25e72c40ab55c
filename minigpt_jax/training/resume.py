"""Resuming a run from its newest intact checkpoint, if its config and data still match."""

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
from minigpt_jax.files import local_path
from minigpt_jax.models.kernels import Kernels
from minigpt_jax.runs import arrays, checkpoints
from minigpt_jax.runs.folder import read_config
from minigpt_jax.tasks import prepare
from minigpt_jax.tasks.task import PreviousRun, Task
from minigpt_jax.training.state import TrainState

log = logging.getLogger(__name__)


def resume(config: Config, workdir: Path, kernels: Kernels, device: Any) -> tuple[Task, int]:
    """The task, and the step of the newest intact checkpoint. Corrupt checkpoints newer than it are set aside.

    Raises DataError if the folder holds a run with another config, its data has changed, or no checkpoint is intact.
    """
    before = read_config(workdir)
    config = config.with_data_settings_of(before)
    changes = {name: f"{name}={a} (now {b})" for name, (a, b) in differences(before, config).items()}
    may_change = {name for name, setting in config.settings.items() if setting.field.metadata["may_change"]}
    require_unchanged(workdir, [change for name, change in changes.items() if name not in may_change])
    steps = checkpoints.steps(workdir)[::-1]
    newest = checkpoints.first_intact(workdir, steps)
    info = checkpoints.read_info(workdir, newest)
    sharding = jax.sharding.SingleDeviceSharding(device)
    task = prepare(config, PreviousRun(workdir, info.sources), kernels=kernels, sharding=sharding)
    if newest > task.num_steps:
        require_unchanged(workdir, [f"{newest} completed steps (more than {task.num_steps})"])
    for corrupt in steps[: steps.index(newest)]:
        checkpoints.set_aside(workdir, corrupt)
    if changes:
        log.info("Changed settings: %s.", ", ".join(changes.values()))
    now = environment(device)
    updates = [f"{name} {old} (now {now.get(name)})" for name, old in info.made_with.items() if old != now.get(name)]
    if updates and not finished_message(task, workdir, newest):
        log.warning("This run was trained with %s: results may no longer be bit-identical.", ", ".join(updates))
    return task, newest


def check_folder(config: Config, workdir: Path, overwrite: bool) -> None:
    """Raises DataError or UsageError if training in the folder would destroy something in it, or could not be saved."""
    arrays.check_path(workdir)
    is_new, init_from = overwrite or not checkpoints.steps(workdir), config.training.init_from
    if is_new and init_from and local_path(init_from).resolve() == workdir.resolve():
        raise UsageError(f"init_from={init_from} is the run's own folder and would be overwritten: choose another --workdir")
    if not overwrite:
        checkpoints.check_owned(workdir)


def require_unchanged(workdir: Path, changed: list[str]) -> None:
    """Raises DataError if `changed` lists anything that must stay the same within a run."""
    if changed:
        raise DataError(
            f"{workdir} holds a run with {', '.join(changed)}: choose another --workdir, or replace the run with --overwrite"
        )


def finished_message(task: Task, workdir: Path, newest: int) -> str | None:
    """The log message for a run with nothing left to do at its newest checkpoint; None if there is something to do."""
    if newest == task.num_steps:
        return f"is complete ({newest} steps). Train longer with --steps N (N > {newest}), or restart with --overwrite."
    info = checkpoints.read_info(workdir, newest)
    if info.is_out_of_patience(task.config.training.patience):
        evaluations = info.evaluations_since_best
        return (
            f"stopped early at step {newest}: no lower validation loss in {evaluations} evaluations. "
            f"Train longer with --patience N (N > {evaluations}, or 0 for no limit)."
        )
    return None


def restore(workdir: Path, step: int, like: TrainState, sharding: jax.sharding.Sharding) -> TrainState:
    """The state saved in a verified checkpoint. `like` is a state, or its `jax.eval_shape`.

    Raises DataError if the saved arrays do not match `like`.
    """
    saved = checkpoints.checkpoint_dir(workdir, step)
    return TrainState(
        # Placed on the same device as the arrays; otherwise the second step would be recompiled.
        step=jax.device_put(np.int32(step), sharding),
        **{name: arrays.restore(saved / name, tree, sharding) for name, tree in like.trees.items()},
    )


# JAX's own settings that change the result of a step: random numbers, precision, compilation.
JAX_SETTINGS = (
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
    "jax_random_seed_offset",
    "jax_default_matmul_precision",
    "jax_disable_jit",
)


def environment(device: Any) -> dict[str, str]:
    """What the exact result of a step depends on besides the config: versions, device, compiler flags, JAX's settings."""
    return {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "flax": flax.__version__,
        "optax": optax.__version__,
        "device": f"{device.platform} {device.device_kind}",
        "machine": platform.machine(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        **{name: str(getattr(jax.config, name)) for name in JAX_SETTINGS},
        "jax_disable_most_optimizations": str(jax.config.read("jax_disable_most_optimizations")),
    }
