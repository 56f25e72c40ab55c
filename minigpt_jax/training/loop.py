"""The training loop: steps, with callbacks around them."""

import contextlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from minigpt_jax.commands import command
from minigpt_jax.config import Config
from minigpt_jax.errors import DataError, StoppedError
from minigpt_jax.models.kernels import PLAIN, Kernels
from minigpt_jax.runs import checkpoints
from minigpt_jax.runs.folder import locked
from minigpt_jax.runs.metrics import import_tensorboard_writer
from minigpt_jax.system import heap, signals
from minigpt_jax.tasks import prepare
from minigpt_jax.training.callbacks import Callback, standard
from minigpt_jax.training.compilations import Compilations
from minigpt_jax.training.resume import check_folder, finished_message, resume
from minigpt_jax.training.run import Run, train_step_kwargs
from minigpt_jax.training.state import init_state
from minigpt_jax.training.step import train_step

log = logging.getLogger(__name__)


def train(
    config: Config, workdir: Path, overwrite: bool = False, *, device: Any, kernels: Kernels = PLAIN,
    max_minutes: float | None = None, tensorboard: bool = False, profile: bool = False, callbacks: Sequence[Callback] = (),
) -> None:  # fmt: skip
    """Trains in the folder `workdir`, resuming from its newest checkpoint if there is one, and logs progress.

    Saves a checkpoint and stops after `max_minutes`. SIGINT (Ctrl-C), SIGTERM and SIGHUP do the same and raise StoppedError.
    For `profile` see `callbacks.Profile`. Your own `callbacks` are called after the standard ones.
    Raises DataError if the data does not fit the config, the folder cannot be written, another process is training in it, or
    it holds a run with another config; FloatingPointError after `max_bad_steps` non-finite steps in a row.
    """
    callbacks = [*standard(max_minutes, profile), *callbacks]
    make_writer = import_tensorboard_writer() if tensorboard else None

    def is_new() -> bool:
        return overwrite or not checkpoints.steps(workdir)

    def new_task():
        sharding = jax.sharding.SingleDeviceSharding(device)
        task = prepare(config, kernels=kernels, sharding=sharding)
        return task, task.initial_params(sharding)

    try:
        check_folder(config, workdir, overwrite)
        prepared = new_task() if is_new() else None  # reports data errors before the folder is created
        with locked(workdir), Compilations() as compilations:
            if is_new():
                (task, params), newest = prepared or new_task(), 0
            else:
                (task, newest), params = resume(config, workdir, kernels, device), None
                if message := finished_message(task, workdir, newest):
                    log.info("%s %s", workdir, message)
                    return
            run_loop(Run.open(task, workdir, newest, params, device, kernels.name, compilations, make_writer), callbacks)
    except OSError as error:
        raise DataError(f"cannot write the run to {workdir}: {error.strerror or error}") from error


def run_loop(run: Run, callbacks: Sequence[Callback]) -> None:
    """Runs the remaining steps, or those until something stops the run, and saves a checkpoint of the last one."""
    task, root_key = run.task, jax.random.key(run.settings.seed)
    arguments, step_once = train_step_kwargs(task), run.compilations.warn_on_recompilation(train_step)
    with contextlib.ExitStack() as cleanup:
        cleanup.callback(run.metrics.close)
        for callback in callbacks:
            cleanup.callback(callback.close)
            callback.begin(run)
        with signals.capture_signals() as received:
            while not (run.is_over or run.is_stopped):
                with run.clock.waiting():
                    batch = task.batch_at(run.step)
                if run.compiled_step is None:
                    init_state.clear_cache()  # no longer needed, and its program takes about 50 MB  # pyright: ignore[reportAttributeAccessIssue]
                    run.compiled_step = train_step.lower(run.state, batch, root_key, **arguments).compile()
                    heap.trim_heap()
                for callback in callbacks:
                    callback.before_step(run)
                run.state, metrics = step_once(run.state, batch, root_key, **arguments)
                run.count_step(metrics)
                for callback in callbacks:
                    callback.after_step(run)
                run.is_stopped |= bool(received)
            run.save()
        if run.is_stopped:
            log.info("Stopped and saved at step %d/%d. Resume with: %s --workdir %s",
                     run.step, task.num_steps, command("train"), run.workdir)  # fmt: skip
            if received:
                raise StoppedError(received[0])
        for callback in callbacks:
            callback.finish(run)
