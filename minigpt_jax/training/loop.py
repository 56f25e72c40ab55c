"""The run: where training meets the clock, the disk and the terminal, and when it evaluates, saves and prints."""

import contextlib
import dataclasses
import errno
import logging
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from minigpt_jax import machine
from minigpt_jax.config import SETTINGS, Config, differences
from minigpt_jax.errors import DataError, StoppedError, UsageError
from minigpt_jax.files import write_text
from minigpt_jax.generation.language_model import LanguageModel
from minigpt_jax.models.kernels import PLAIN, Kernels
from minigpt_jax.runtime import give_back_freed_memory, noted_signals
from minigpt_jax.training import checkpoint
from minigpt_jax.training.checkpoint import CheckpointInfo
from minigpt_jax.training.experiment import Experiment, evaluate, measures, prepare
from minigpt_jax.training.metrics import Clock, MetricsFile, import_tensorboard_writer
from minigpt_jax.training.pretrained import initial_params
from minigpt_jax.training.report import Compilations, Trace, flops_per_token
from minigpt_jax.training.schedule import learning_rate_schedule
from minigpt_jax.training.state import TrainState, init_state
from minigpt_jax.training.step import train_step

log = logging.getLogger(__name__)

SAMPLE_LENGTH = 250  # tokens


def train(
    config: Config,
    workdir: Path,
    overwrite: bool = False,
    *,
    kernels: Kernels = PLAIN,
    max_minutes: float | None = None,
    tensorboard: bool = False,
    profile: bool = False,
) -> None:
    """Trains in a run's folder, going on from its newest checkpoint where there is one, and reports on the way.

    After `max_minutes` it stops with a checkpoint; so it does at Ctrl-C and SIGTERM, and then raises StoppedError.
    With `profile` it traces some steps into the run's folder, and tells which operations took longest.
    Raises DataError where the text does not fit, the folder cannot be written, another process trains in it, or it holds a
    run of another config; FloatingPointError after `max_bad_steps` steps in a row that were not finite.
    """
    deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
    make_writer = import_tensorboard_writer() if tensorboard else None

    def is_new() -> bool:
        return overwrite or not checkpoint.steps(workdir)

    init_from = config.training.init_from
    if is_new() and init_from and Path(init_from).resolve() == workdir.resolve():
        raise UsageError(f"init_from={init_from} is the run's own folder, which would be lost: choose another --workdir")
    try:
        checkpoint.check_not_foreign(workdir)
        if not overwrite:
            checkpoint.check_owned(workdir)
        begun = begin(config, kernels) if is_new() else None  # what does not fit is told before a folder is made
        with checkpoint.locked(workdir), Compilations() as compilations:
            if is_new():
                experiment, params = begun or begin(config, kernels)
                Run(experiment, workdir, None, make_writer, params).go(compilations, deadline, profile)
                return
            experiment, newest = resume(config, workdir, kernels)
            if ended := has_ended(experiment, workdir, newest):
                log.info("%s %s", workdir, ended)
            else:
                Run(experiment, workdir, newest, make_writer).go(compilations, deadline, profile)
    except BrokenPipeError:
        raise  # that is standard output, which the samples go to
    except OSError as error:
        raise DataError(f"cannot write the run to {workdir}: {error.strerror or error}") from error


def begin(config: Config, kernels: Kernels) -> tuple[Experiment, Any]:
    """What a new run is made of, and the parameters that it begins with: None where they are to be drawn."""
    experiment = prepare(config, kernels=kernels)
    return experiment, initial_params(experiment)


def resume(config: Config, workdir: Path, kernels: Kernels) -> tuple[Experiment, int]:
    """What the run in a folder goes on with, and the step of its newest whole checkpoint; damaged ones are set aside.

    Raises DataError where the run there is another one, its text has changed, or all of its checkpoints are damaged.
    """
    before = checkpoint.read_config(workdir)
    if config.model.vocab_size is None:  # what the tokenizer has
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=before.model.vocab_size))
    changes = {name: f"{name}={a} (now {b})" for name, (a, b) in differences(before, config).items()}
    refuse(workdir, [change for name, change in changes.items() if not SETTINGS[name].field.metadata["may_change"]])
    steps = checkpoint.steps(workdir)[::-1]
    newest = checkpoint.first_whole(workdir, steps)
    experiment = prepare(config, checkpoint.read_origin(workdir, newest), kernels=kernels)
    if newest > experiment.num_steps:
        refuse(workdir, [f"{newest} steps done (now {experiment.num_steps})"])
    for damaged in steps[: steps.index(newest)]:
        checkpoint.set_aside(workdir, damaged)
    if changes:
        log.info("Changed in the run: %s.", ", ".join(changes.values()))
    made_now = checkpoint.environment()
    others = [
        f"{name} {was} (now {made_now.get(name)})"
        for name, was in checkpoint.read_info(workdir, newest).made_with.items()
        if was != made_now.get(name)
    ]
    if others:
        log.warning("The run was made with %s: from here on its bits may be others.", ", ".join(others))
    return experiment, newest


def refuse(workdir: Path, changed: list[str]) -> None:
    """Raises DataError if anything has changed that must not."""
    if changed:
        raise DataError(
            f"{workdir} holds a run with {', '.join(changed)}: choose another --workdir, or replace the run with --overwrite"
        )


def has_ended(experiment: Experiment, workdir: Path, newest: int) -> str | None:
    """What to say of a run that has nothing left to do at its newest checkpoint."""
    if newest == experiment.num_steps:
        return f"has finished its {newest} steps. Go on with --steps N, N above that; begin anew with --overwrite."
    patience = experiment.config.training.patience
    in_vain = checkpoint.read_info(workdir, newest).evaluations_since_best
    if 0 < patience <= in_vain:
        return (
            f"has gone {in_vain} evaluations without a lower loss, at step {newest}. "
            f"Go on with --patience N, N above {in_vain}, or 0."
        )
    return None


class Run:
    """One process's share of a run: what it trains, its files and its clock."""

    def __init__(
        self, experiment: Experiment, workdir: Path, newest: int | None, make_writer: type | None = None, params: Any = None
    ):
        self.experiment, self.workdir = experiment, workdir
        self.settings, self.num_steps = experiment.config.training, experiment.num_steps
        self.tokens_per_step = self.settings.batch_size * experiment.config.model.context_length
        if newest is None:
            self.info = CheckpointInfo(0, experiment.text_sha256, experiment.tokenizer.sha256)
            self.state: TrainState = experiment.new_state(params)
            checkpoint.delete_all(workdir)
        else:
            self.info = checkpoint.read_info(workdir, newest)
            self.state = checkpoint.restore(workdir, newest, jax.eval_shape(experiment.new_state))
            checkpoint.delete_leftovers(workdir)
        self.info = dataclasses.replace(self.info, made_with=checkpoint.environment())
        self.losses = list(self.info.pending_losses)  # since the last row of metrics, those that were finite
        self.unread = []  # metrics of the steps that nobody has waited for yet
        self.evaluated = (0, None)  # the step that was evaluated last, and its loss
        write_text(workdir / "config.json", experiment.config.to_json())
        write_text(workdir / "tokenizer.json", experiment.tokenizer.to_json())
        self.metrics = MetricsFile(workdir, last_step=self.info.step, make_writer=make_writer)
        self.clock = Clock(self.info.seconds, self.info.step)
        self.seconds_waiting = 0.0  # for batches, after the first

    def go(self, compilations: Compilations, deadline: float | None = None, profile: bool = False) -> None:
        """All steps that are left, then a report on the whole; or those until the `deadline` on the monotonic clock."""
        experiment, settings = self.experiment, self.settings
        self.announce()
        step_once, static = compilations.expect_one(train_step), experiment.train_step_kwargs
        start = self.info.step
        trace = Trace(self.workdir / "profile", start, self.num_steps) if profile else None
        with (
            noted_signals() as received,
            tqdm(total=self.num_steps, initial=start, unit="step", disable=not sys.stderr.isatty(), leave=False) as progress,
            contextlib.ExitStack() as at_the_end,
        ):
            if trace:
                at_the_end.callback(trace.end)
            for step in range(start + 1, self.num_steps + 1):
                began = time.perf_counter()
                batch = experiment.batch(step - 1)
                self.seconds_waiting += time.perf_counter() - began
                if step == start + 1:
                    init_state.clear_cache()  # it has served, and its program takes some 50 MB
                    compiled = train_step.lower(self.state, batch, experiment.root_key, **static).compile()
                    give_back_freed_memory()
                if trace:
                    trace.step_begins(step, self.clock, self.state)
                self.state, step_metrics = step_once(self.state, batch, experiment.root_key, **static)
                self.unread.append(step_metrics)
                progress.update()
                if step == start + 1:
                    log.info("The first step, with its compilation, took %.1f s.", self.clock.lap(step, self.state))
                    self.clock.forget_laps()
                    self.seconds_waiting = 0.0
                self.after_step(step)
                is_late = deadline is not None and time.monotonic() > deadline
                if received or (is_late and step < self.num_steps):
                    self.save(step)
                    log.info("Stopped and saved at step %d/%d. Go on with: python scripts/train.py --workdir %s",
                             step, self.num_steps, self.workdir)  # fmt: skip
                    if received:
                        raise StoppedError(received[0])
                    self.report(compilations)
                    return
                if self.is_out_of_patience:
                    log.info("No lower validation loss in %d evaluations: ending early.", settings.patience)
                    break
        self.conclude()
        self.report(compilations)
        if trace:
            trace.report(compiled.as_text())

    @property
    def is_out_of_patience(self) -> bool:
        return 0 < self.settings.patience <= self.info.evaluations_since_best

    def after_step(self, step: int) -> None:
        """Logs, evaluates, saves and samples, each when it is due; all are due after the last step."""

        def due(every: int) -> bool:
            return step % every == 0 or step == self.num_steps

        if due(self.settings.log_every):
            self.log_training(step)
        val_loss = self.evaluate(step) if due(self.settings.eval_every) else None
        improved = val_loss is not None and val_loss == self.info.best_val_loss
        if improved or due(self.settings.checkpoint_every) or self.is_out_of_patience:
            self.save(step)
        if self.settings.sample_every and due(self.settings.sample_every):
            self.print_sample()

    def log_training(self, step: int) -> None:
        """A row of metrics: the mean loss since the last one, rate and gradient norm of this step."""
        grad_norm = float(self.unread[-1]["grad_norm"])
        self.read_losses(step)
        with self.clock.stopped(self.state):  # it compiles at first
            learning_rate = float(learning_rate_schedule(self.settings, self.num_steps)(step - 1 - self.info.num_skipped))
        seconds_per_step = self.clock.lap(step, self.state)
        row = {
            "step": step,
            "train_loss": float(np.mean(self.losses)) if self.losses else None,  # no step was finite; JSON knows no NaN
            "learning_rate": learning_rate,
            "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
            "tokens_per_second": round(self.tokens_per_step / seconds_per_step, 1),
            "seconds": round(self.clock.seconds, 3),
        }
        if self.info.num_skipped:
            row["skipped_steps"] = self.info.num_skipped
        self.losses = []
        self.metrics.append(row)
        log.info(
            "step %d/%d  loss %.4f  rate %.1e  gradient %.2f  %.0f tokens/s  %s left%s",
            step, self.num_steps, math.nan if row["train_loss"] is None else row["train_loss"], row["learning_rate"],
            grad_norm, row["tokens_per_second"],
            tqdm.format_interval(seconds_per_step * (self.num_steps - step)),
            f"  {self.info.num_skipped} steps skipped, not finite" if self.info.num_skipped else "",
        )  # fmt: skip

    def read_losses(self, step: int) -> None:
        """Waits for the losses of the steps up to this one. Raises FloatingPointError after too many that are not finite."""
        info, first = self.info, step - len(self.unread) + 1
        for number, metrics in enumerate(jax.device_get(self.unread), first):
            if metrics["is_finite"]:
                self.losses.append(float(metrics["loss"]))
                info = dataclasses.replace(info, bad_steps=0, last_loss=self.losses[-1])
                continue
            info = dataclasses.replace(info, num_skipped=info.num_skipped + 1, bad_steps=info.bad_steps + 1)
            if info.bad_steps >= self.settings.max_bad_steps:
                raise FloatingPointError(
                    f"loss or gradient were not finite in {info.bad_steps} steps in a row, up to step {number}; the last "
                    f"finite loss was {info.last_loss}. Likely causes: --learning_rate too high, --warmup_steps too few, "
                    f"--dtype bfloat16. "
                    + (f"Saved is step {info.step}, which is finite" if info.step else "Nothing has been saved yet")
                )
        self.info, self.unread = info, []

    def evaluate(self, step: int) -> float | None:
        """Loss on the fixed batches of validation text, in nats per token; None where it is not finite."""
        with self.clock.stopped(self.state):
            val_loss = evaluate(self.experiment, self.state.eval_params, limit=self.settings.eval_batches)
        val_loss = val_loss if math.isfinite(val_loss) else None
        self.evaluated = (step, val_loss)
        self.metrics.append({"step": step, "val_loss": val_loss, "seconds": round(self.clock.seconds, 3)})
        log.info("step %d/%d  validation loss %.4f%s", step, self.num_steps, math.nan if val_loss is None else val_loss,
                 self.unknown_tokens("val"))  # fmt: skip
        best = self.info.best_val_loss
        if val_loss is not None and (best is None or val_loss < best):
            self.info = dataclasses.replace(self.info, best_val_loss=val_loss, evaluations_since_best=0)
        else:
            self.info = dataclasses.replace(self.info, evaluations_since_best=self.info.evaluations_since_best + 1)
        return val_loss

    def save(self, step: int) -> None:
        """Unless this step has been saved already. Raises FileNotFoundError where the run's folder has gone."""
        if step == self.info.step:
            return
        if not self.metrics.path.exists():  # saving would make the folder anew, without what belongs to it
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        self.read_losses(step)
        val_loss = self.evaluated[1] if self.evaluated[0] == step else None
        with self.clock.stopped(self.state):
            self.info = dataclasses.replace(
                self.info, step=step, val_loss=val_loss, pending_losses=tuple(self.losses), seconds=self.clock.seconds
            )
            checkpoint.save(self.workdir, self.state, self.info)
            checkpoint.prune(self.workdir, self.settings.keep_checkpoints)

    def print_sample(self) -> None:
        """A short text, with the same randomness each time, so that what changes is the model."""
        with self.clock.stopped(self.state):
            parts, tokenizer = self.experiment, self.experiment.tokenizer
            model = LanguageModel(parts.config.model, tokenizer, self.state.eval_params, parts.model.kernels)
            ids = parts.splits["val"].ids
            # The first character, which may be four tokens; words need not know the one with which the text was cut.
            start = tokenizer.decode(ids[:4])[:1] if tokenizer.unknown is None else "\n"
            tqdm.write(f"\n{model.generate(start, SAMPLE_LENGTH, temperature=0.8)}\n", file=sys.stdout)
            sys.stdout.flush()

    def unknown_tokens(self, split: str) -> str:
        """How many tokens of a split are unknown words, with a tokenizer that may have such."""
        share = self.experiment.splits[split].unknown_share
        return "" if self.experiment.tokenizer.unknown is None else f" ({share:.1%} of the tokens unknown)"

    def announce(self) -> None:
        data = self.experiment.config.data
        log.info(
            "%s in %s%s: %.2f M parameters; %s, %.2f M training tokens%s; %d steps of %d tokens; on %s, kernels: %s.",
            f"Resuming at step {self.info.step}" if self.info.step else "New run",
            self.workdir, f", begun from {self.settings.init_from}" if self.settings.init_from else "",
            sum(leaf.size for leaf in jax.tree.leaves(self.state.params)) / 1e6,
            data.dataset, len(self.experiment.splits["train"].ids) / 1e6, self.unknown_tokens("train"),
            self.num_steps, self.tokens_per_step, jax.devices()[0].device_kind,
            self.experiment.model.kernels.name,
        )  # fmt: skip

    def conclude(self) -> None:
        """The loss over the whole validation split, and whether it is what the preset is known to reach."""
        val_loss = evaluate(self.experiment, self.state.eval_params)
        log.info(
            "Validation loss over the whole split: %.4f nats per token, %.3f bits per character%s, after %s.",
            val_loss, measures(self.experiment, "val", val_loss)["bits_per_char"], self.unknown_tokens("val"),
            tqdm.format_interval(self.clock.seconds),
        )  # fmt: skip
        known = self.experiment.config.expectation
        if known is not None:
            verdict = "as expected" if abs(val_loss - known.val_loss) <= 2 * known.spread else "NOT as expected"
            log.info("That is %s: %d seeds gave %.3f ± %.3f.", verdict, known.seeds, known.val_loss, known.spread)
        log.info("Sample from it: python scripts/generate.py --workdir %s --prompt TEXT --length 200", self.workdir)

    def report(self, compilations: Compilations) -> None:
        """Where the time and the memory of this process went."""
        clock, model = self.clock, self.experiment.config.model
        peak, on_device = machine.peak_megabytes(), machine.device_peak_megabytes()  # before any is taken here
        log.info(
            "Time: %.1f s for compiling %d programs (%d were found), %.1f s in training steps, %.2f of them for batches.",
            compilations.seconds, len(compilations.programs), compilations.num_found, clock.training_seconds,
            self.seconds_waiting,
        )  # fmt: skip
        if clock.training_steps:
            tokens_per_second = self.tokens_per_step * clock.training_steps / clock.training_seconds
            rate, most = tokens_per_second * flops_per_token(model), machine.product_rate(1024, 1024, 1024, model.dtype)
            log.info(
                "Rate: %.0f tokens/s, %.4g GFLOP/s in the model: %.0f%% of the %.4g of a large product of matrices in %s.",
                tokens_per_second, rate / 1e9, 100 * rate / most, most / 1e9, model.dtype,
            )  # fmt: skip
        log.info("Memory at its peak: %.0f MB%s.", peak,
                 "" if on_device is None else f", and {on_device:.0f} MB on the device")  # fmt: skip
