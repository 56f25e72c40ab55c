"""Tuning: searches for the settings with the lowest validation loss, with Optuna (extra tune).

runs/tune/NAME/study.db  the trials, unless they are in another database
               best.py   a preset with the best settings so far

A trial trains a run with settings that TPE chooses, given the losses of earlier ones (Bergstra et al. 2011). It is pruned,
that is ended early, if its lowest validation loss so far is above the median of the complete trials at the same step.
Hyperband would divide the trials among brackets, each of which needs ten trials before TPE learns anything, and its first
comparison favours learning rates that are good at the start: a study of tens of trials is too small for it.
"""

import dataclasses
import functools
import logging
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from minigpt_jax.api import choose_kernels, first_device
from minigpt_jax.commands import command
from minigpt_jax.config import Config, whole_number
from minigpt_jax.errors import DataError, StoppedError, UsageError
from minigpt_jax.experiments import stacked, studies
from minigpt_jax.experiments.grid import named
from minigpt_jax.experiments.ranges import Range, Space
from minigpt_jax.experiments.studies import Study
from minigpt_jax.experiments.tuning_report import preset_source
from minigpt_jax.files import local_path, make_folder, write_text
from minigpt_jax.system import hardware, logs, signals, streams
from minigpt_jax.system.heap import retain_heap, trim_heap
from minigpt_jax.tasks import prepare
from minigpt_jax.tasks.task import Task

log = logging.getLogger(__name__)

BEST = "best.py"


class FailedTrialError(Exception):
    """A trial has diverged. The study continues."""


class SurplusTrialError(Exception):
    """Another process has started the last trial at the same time."""


class TimeLimitError(Exception):
    """The time for the study is over in this process."""


def tune(
    preset: str, config: Config, ranges: Mapping[str, Range], workdir: str | Path, its_command: str, *, trials: int,
    minutes: float | None = None, storage: str | None = None, kernels: str = "tuned",
) -> list[dict[str, Any]]:  # fmt: skip
    """Searches these ranges for the settings of `config` with the lowest loss on the whole validation split, and returns
    `Study.results`. `best.py` in the folder has the best of them, as changes of the preset that `config` was made from.
    `its_command` is recorded there, as how to find them again.

    The study is complete after this number of trials, of all processes that work on it. It is in an SQLite file in the
    folder or, with the folder's name, in the database with the URL `storage`. A call ends early after `minutes`. SIGINT
    (Ctrl-C), SIGTERM and SIGHUP raise StoppedError. The same call resumes the study.

    Raises UsageError for ranges and settings that cannot be tuned, and if Optuna or the database's driver is missing;
    DataError for unusable data or an unusable database, for a study with another config, ranges or data, and if no trial is
    complete at the end.
    """
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    trials, space, workdir = whole_number("trials", trials, at_least=1), Space(config, ranges), local_path(workdir)
    if minutes is not None and not minutes > 0:
        raise UsageError(f"minutes={minutes} must be greater than 0")
    if config.training.patience:
        raise UsageError(f"patience={config.training.patience}: pruning ends trials early; omit it")
    if (workdir / "config.json").exists():
        raise DataError(f"{workdir} holds a run: choose another --workdir")
    optuna, device = studies.import_optuna(), first_device()
    retain_heap()
    with streams.optional(), logs.shown(), studies.quiet(optuna), studies.database_errors(storage or str(workdir)):
        task = prepare_on(device, config, kernels)  # reports unusable data before anything is written
        with Study.opened(workdir, storage, space, task.sources, trials) as study, signals.capture_signals() as received:
            save = functools.partial(save_best, study, task, preset, workdir, its_command)
            Worker(study, device, kernels, deadline, received, save).work()
            if not (results := study.results()):
                num_pruned = len(study.finished())
                raise DataError(f"no trial is complete, and {num_pruned} are pruned: allow more time or other ranges")
    return results


def prepare_on(device: Any, config: Config, kernels: str) -> Task:
    sharding = jax.sharding.SingleDeviceSharding(device)
    return prepare(config, kernels=choose_kernels(config.model, kernels), sharding=sharding)


def save_best(study: Study, task: Task, preset: str, workdir: Path, its_command: str) -> None:
    """Writes `best.py`, if a trial is complete. `task` is that of the config that is tuned. Raises DataError if the file
    cannot be written."""
    if not (results := study.results()):
        return
    path, best, finished = workdir / BEST, results[0], study.finished()
    num_failed = sum("failure" in trial.user_attrs for trial in finished)
    num_pruned = sum("measures" not in trial.user_attrs for trial in finished) - num_failed
    training = f"--config {shlex.quote(str(path))} --workdir runs/{shlex.quote(study.name)}_tuned"
    about = f"""{Path(preset).stem} with the best settings of {len(finished)} trials.

{command("train")} {training}

Trial {best["trial"]}, on {best["date"]} on {best["machine"]}, with seed {study.space.config.training.seed}.
Loss of the last step on the whole validation split: {task.describe_result(best["measures"])}.
Pruned: {num_pruned} trials. Failed: {num_failed}. Found by
{its_command}"""
    source = preset_source(preset, study.space.config_of(best["settings"]), best["settings"].keys(), about)
    try:
        make_folder(workdir)
        write_text(path, source)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}") from error


@dataclasses.dataclass
class Worker:
    """Runs trials of a study in this process. `save` is called after each one."""

    study: Study
    device: Any
    kernels: str
    deadline: float | None  # as `time.monotonic`
    received: Sequence[int]  # the signals that ask for an end
    save: Callable[[], None]
    is_lost: bool = False  # whether another process has given up the last trial of this one

    def work(self) -> None:
        """Runs trials until the study is complete or the time is over. Raises StoppedError after a signal."""
        study, is_waiting = self.study, False
        log.info("Study %s: %s; device: %s.", study.name, study.progress(), self.device.device_kind)
        try:
            while (num_finished := len(study.finished())) < study.num_trials:
                self.check()
                if num_finished + (num_running := study.num_running()) < study.num_trials:
                    self.run_trial()
                    is_waiting = False
                    continue
                if not is_waiting:
                    log.info("Waiting for trials of other processes: %d.", num_running)
                is_waiting = True
                time.sleep(studies.POLL)
        except (TimeLimitError, StoppedError) as error:
            log.info("Stopped: %s. The same command resumes the study.", study.progress())
            if isinstance(error, StoppedError):
                raise
        self.save()  # the last trials may be those of other processes

    def check(self) -> None:
        """Called after each training step. Raises what ends the work after a signal, or when the time is over."""
        if self.received:
            raise StoppedError(self.received[0])
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise TimeLimitError

    def run_trial(self) -> None:
        """Runs one more trial. Optuna records it as interrupted if an error is raised."""
        try:
            self.study.study.optimize(
                self.objective, n_trials=1, catch=(SurplusTrialError,), callbacks=[self.after_trial]
            )  # fmt: skip
        except Exception:
            if not self.is_lost:
                raise
            log.warning("Another process has given up this trial, since there was no sign of it for %d s.", studies.GRACE)
        trim_heap()

    def objective(self, trial: Any) -> float:
        """The loss of a new trial. Raises TrialPruned if it is pruned or has failed."""
        try:
            return self.loss(trial)
        finally:
            self.is_lost = self.study.trials()[trial.number].state.is_finished()

    def loss(self, trial: Any) -> float:
        study, optuna = self.study, self.study.optuna
        if study.is_surplus(trial.number):
            raise SurplusTrialError
        # Seeded by the number: one process makes the same trials again, and two processes never make the same ones.
        study.study.sampler = optuna.samplers.TPESampler(seed=trial.number)
        settings = study.space.suggest(trial)
        log.info("Trial %d: %s", trial.number, named(settings))
        if earlier := study.with_settings(settings):  # as often happens with lists of values
            for name, value in earlier.user_attrs.items():
                trial.set_user_attr(name, value)
            if earlier.state == optuna.trial.TrialState.PRUNED:
                raise optuna.TrialPruned
            return earlier.value
        try:
            result = self.train(trial, settings)
            if result["diverged"]:
                raise FailedTrialError(f"diverged, at step {result['step']}")
        except (FailedTrialError, UsageError, DataError) as error:
            trial.set_user_attr("failure", str(error))
            raise optuna.TrialPruned from error  # from which TPE learns, unlike from Optuna's failed trials
        trial.set_user_attr("measures", result["measures"])
        trial.set_user_attr("machine", hardware.processor())
        return result["loss"]

    def train(self, trial: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The result of a run, see `stacked.train`. Raises TrialPruned if it is pruned, FailedTrialError if its loss is not
        finite, UsageError or DataError if the settings do not fit together or not into memory."""
        with logs.quiet():
            task = prepare_on(self.device, self.study.space.config_of(settings), self.kernels)
        stacked.num_fitting(task, self.device, 1, None)

        def after_evaluation(runs: Sequence[stacked.Progress]) -> None:
            step, loss = runs[0].evaluations[-1]["step"], runs[0].evaluations[-1]["val_loss"]
            if loss is None:
                raise FailedTrialError(f"diverged, at step {step}")
            trial.report(loss, step)
            if step < task.num_steps and trial.should_prune():
                raise self.study.optuna.TrialPruned

        [result] = stacked.train([task], self.device, after_step=self.check, after_evaluation=after_evaluation)
        return result

    def after_trial(self, study: Any, trial: Any) -> None:
        """Logs how a trial ended, and saves. Optuna calls it."""
        if trial.state == self.study.optuna.trial.TrialState.FAIL:  # it was surplus
            return
        pruned = trial.user_attrs.get("failure", f"pruned at step {trial.last_step}")
        end = f"loss {trial.value:.4f}" if "measures" in trial.user_attrs else pruned
        lowest = [f", lowest loss {result['loss']:.4f}" for result in self.study.results()[:1]]
        log.info("Trial %d: %s; %s%s", trial.number, end, self.study.progress(), *(lowest or [""]))
        self.save()
