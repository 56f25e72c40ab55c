"""The loop: training steps, and callbacks around them."""

import contextlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

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
from minigpt_jax.training.resume import check_folder, has_ended, resume
from minigpt_jax.training.run import Run, step_arguments
from minigpt_jax.training.state import init_state
from minigpt_jax.training.step import train_step

log = logging.getLogger(__name__)


def train(
    config: Config, workdir: Path, overwrite: bool = False, *, device: Any, kernels: Kernels = PLAIN,
    max_minutes: float | None = None, tensorboard: bool = False, profile: bool = False, callbacks: Sequence[Callback] = (),
) -> None:  # fmt: skip
    """Trains in a run's folder, going on from its newest checkpoint where there is one, and reports on the way.

    After `max_minutes` it stops with a checkpoint; so it does at Ctrl-C and SIGTERM, and then raises StoppedError. For
    `profile` see `callbacks.Profile`. Your own `callbacks` are called after the standard ones.
    Raises DataError where the data does not fit, the folder cannot be written, another process trains in it, or it holds a
    run of another config; FloatingPointError after `max_bad_steps` steps in a row that were not finite.
    """
    callbacks = [*standard(max_minutes, profile), *callbacks]
    make_writer = import_tensorboard_writer() if tensorboard else None

    def is_new() -> bool:
        return overwrite or not checkpoints.steps(workdir)

    def begin():
        task = prepare(config, kernels=kernels)
        return task, task.initial_params(SingleDeviceSharding(device))

    try:
        check_folder(config, workdir, overwrite)
        begun = begin() if is_new() else None  # what does not fit is told before a folder is made
        with locked(workdir), Compilations() as compilations:
            if is_new():
                (task, params), newest = begun or begin(), 0
            else:
                (task, newest), params = resume(config, workdir, kernels, device), None
                if ended := has_ended(task, workdir, newest):
                    log.info("%s %s", workdir, ended)
                    return
            go(Run.open(task, workdir, newest, params, device, kernels.name, compilations, make_writer), callbacks)
    except BrokenPipeError:
        raise  # that is standard output, which the samples go to
    except OSError as error:
        raise DataError(f"cannot write the run to {workdir}: {error.strerror or error}") from error


def go(run: Run, callbacks: Sequence[Callback]) -> None:
    """All steps that are left or, if something stops the run, those until then; the last one is saved."""
    task, root_key = run.task, jax.random.key(run.settings.seed)
    arguments, step_once = step_arguments(task), run.compilations.expect_one(train_step)
    with contextlib.ExitStack() as at_the_end:
        at_the_end.callback(run.metrics.close)
        for callback in callbacks:
            at_the_end.callback(callback.close)
            callback.begin(run)
        with signals.capture_signals() as received:
            while not (run.is_over or run.is_stopped):
                with run.clock.waiting():
                    batch = task.batch_at(run.step)
                if run.compiled_step is None:
                    init_state.clear_cache()  # it has served, and its program takes some 50 MB  # pyright: ignore[reportAttributeAccessIssue]
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
            log.info("Stopped and saved at step %d/%d. Resume with: python scripts/train.py --workdir %s",
                     run.step, task.num_steps, run.workdir)  # fmt: skip
            if received:
                raise StoppedError(received[0])
        for callback in callbacks:
            callback.finish(run)
