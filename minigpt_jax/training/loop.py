"""The run: the only place in training that reads the clock, logs, evaluates, saves and prints."""

import contextlib
import dataclasses
import functools
import json
import logging
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from minigpt_jax.config import SETTINGS, Config, differences
from minigpt_jax.data import batches
from minigpt_jax.errors import DataError
from minigpt_jax.generation.language_model import LanguageModel
from minigpt_jax.training import checkpoint
from minigpt_jax.training.checkpoint import CheckpointInfo
from minigpt_jax.training.experiment import Experiment, evaluate, prepare
from minigpt_jax.training.optimizer import warmup_cosine
from minigpt_jax.training.step import TrainState, init_state, train_step

log = logging.getLogger(__name__)

SAMPLE_LENGTH = 250  # tokens


def train(config: Config, workdir: Path, overwrite: bool = False) -> None:
    """Trains in a run's folder, going on from its newest checkpoint where there is one, and reports on the way.

    Raises DataError where the text does not fit, the folder cannot be written, or it holds a run of another config.
    """
    experiment = prepare(config)
    newest = None if overwrite else step_to_resume(experiment, workdir)
    if newest == experiment.num_steps:
        log.info(
            "%s has finished its %d steps. Go on with --steps N, N above that; begin anew with --overwrite.", workdir, newest
        )
        return
    try:
        Run(experiment, workdir, newest).go()
    except BrokenPipeError:
        raise  # that is standard output, which the samples go to
    except OSError as error:
        raise DataError(f"cannot write the run to {workdir}: {error.strerror or error}") from error


def step_to_resume(experiment: Experiment, workdir: Path) -> int | None:
    """The newest checkpoint's step, or None where there is none. Raises DataError where the run there is another one."""
    checkpoint.check_owned(workdir)
    steps = checkpoint.steps(workdir)
    if not steps:
        return None
    changed = [
        f"{name}={before} (now {now})"
        for name, (before, now) in differences(checkpoint.read_config(workdir), experiment.config).items()
        if not SETTINGS[name].field.metadata["may_change"]
    ]
    if not changed and checkpoint.read_info(workdir, steps[-1]).text_sha256 != experiment.text_sha256:
        changed = [f"another text as {experiment.config.data.dataset}"]
    if not changed and steps[-1] > experiment.num_steps:
        changed = [f"{steps[-1]} steps done (now {experiment.num_steps})"]
    if changed:
        raise DataError(
            f"{workdir} holds a run with {', '.join(changed)}: choose another --workdir, or replace the run with --overwrite"
        )
    return steps[-1]


class Run:
    """One process's share of a run: what it trains, its files and its clock."""

    def __init__(self, experiment: Experiment, workdir: Path, newest: int | None):
        self.experiment, self.workdir = experiment, workdir
        self.settings, self.num_steps = experiment.config.training, experiment.num_steps
        self.tokens_per_step = self.settings.batch_size * experiment.config.model.context_length
        new_state = functools.partial(
            init_state, experiment.root_key, model=experiment.model, optimizer=experiment.optimizer
        )
        if newest is None:
            checkpoint.delete_all(workdir)
            self.info = CheckpointInfo(step=0, text_sha256=experiment.text_sha256)
            self.state: TrainState = new_state()
        else:
            self.info = checkpoint.read_info(workdir, newest)
            self.state = checkpoint.restore(workdir, newest, jax.eval_shape(new_state))
        self.losses = list(self.info.pending_losses)
        workdir.mkdir(parents=True, exist_ok=True)
        checkpoint.write_text(workdir / "config.json", experiment.config.to_json())
        checkpoint.write_text(workdir / "tokenizer.json", experiment.tokenizer.to_json())
        self.metrics = MetricsFile(workdir / "metrics.jsonl", last_step=self.info.step)
        self.clock = Clock(self.info.seconds, self.info.step)

    def go(self) -> None:
        """All steps that are left, then a report on the whole."""
        experiment, settings = self.experiment, self.settings
        self.announce()
        step_once = functools.partial(
            train_step, model=experiment.model, optimizer=experiment.optimizer, grad_accumulation=settings.grad_accumulation
        )
        start = self.info.step
        with tqdm(
            total=self.num_steps, initial=start, unit="step", disable=not sys.stderr.isatty(), leave=False
        ) as progress:
            for step in range(start + 1, self.num_steps + 1):
                batch = batches.batch_at(
                    experiment.splits["train"],
                    experiment.model.config.context_length,
                    settings.batch_size,
                    settings.seed,
                    step - 1,
                )
                self.state, step_metrics = step_once(self.state, batch, experiment.root_key)
                self.losses.append(step_metrics["loss"])
                progress.update()
                if step == start + 1:
                    log.info("The first step, with its compilation, took %.1f s.", self.clock.lap(step, self.state))
                self.after_step(step, step_metrics)
        self.conclude()

    def after_step(self, step: int, step_metrics: dict[str, jax.Array]) -> None:
        """Logs, evaluates, saves and samples, each when it is due; all are due after the last step."""

        def due(every: int) -> bool:
            return step % every == 0 or step == self.num_steps

        if due(self.settings.log_every):
            self.log_training(step, step_metrics)
        val_loss = self.evaluate(step) if due(self.settings.eval_every) else None
        improved = val_loss is not None and (self.info.best_val_loss is None or val_loss < self.info.best_val_loss)
        if improved or due(self.settings.checkpoint_every):
            self.save(step, val_loss)
        if self.settings.sample_every and due(self.settings.sample_every):
            self.print_sample()

    def log_training(self, step: int, step_metrics: dict[str, jax.Array]) -> None:
        """A row of metrics: the mean loss since the last one, rate and gradient norm of this step."""
        losses = self.finite_losses(step)
        seconds_per_step = self.clock.lap(step, self.state)
        row = {
            "step": step,
            "train_loss": float(np.mean(losses)),
            "learning_rate": float(warmup_cosine(self.settings, self.num_steps)(step - 1)),
            "grad_norm": float(step_metrics["grad_norm"]),
            "tokens_per_second": round(self.tokens_per_step / seconds_per_step, 1),
            "seconds": round(self.clock.seconds, 3),
        }
        self.losses = []
        self.metrics.append(row)
        log.info(
            "step %d/%d  loss %.4f  rate %.1e  gradient %.2f  %.0f tokens/s  %s left",
            step, self.num_steps, row["train_loss"], row["learning_rate"], row["grad_norm"], row["tokens_per_second"],
            tqdm.format_interval(seconds_per_step * (self.num_steps - step)),
        )  # fmt: skip

    def finite_losses(self, step: int) -> list[float]:
        """The losses since the last row. Raises FloatingPointError where one is not finite, before such a state is saved."""
        losses = [float(loss) for loss in self.losses]
        if not np.isfinite(losses).all():
            raise FloatingPointError(
                f"the loss is no longer finite at step {step}: try a lower --learning_rate or more --warmup_steps "
                f"(what is saved is as of step {self.info.step})"
            )
        return losses

    def evaluate(self, step: int) -> float:
        """Loss on the fixed batches of validation text, in nats per token."""
        with self.clock.stopped(self.state):
            val_loss = evaluate(self.experiment, self.state.params, limit=self.settings.eval_batches)
        self.metrics.append({"step": step, "val_loss": val_loss, "seconds": round(self.clock.seconds, 3)})
        log.info("step %d/%d  validation loss %.4f", step, self.num_steps, val_loss)
        return val_loss

    def save(self, step: int, val_loss: float | None) -> None:
        known = [loss for loss in (val_loss, self.info.best_val_loss) if loss is not None and math.isfinite(loss)]
        with self.clock.stopped(self.state):
            self.info = dataclasses.replace(
                self.info,
                step=step,
                val_loss=val_loss,
                best_val_loss=min(known, default=None),
                pending_losses=tuple(self.finite_losses(step)),
                seconds=self.clock.seconds,
            )
            checkpoint.save(self.workdir, self.state, self.info)
            checkpoint.prune(self.workdir, self.settings.keep_checkpoints)

    def print_sample(self) -> None:
        """A short text, with the same randomness each time, so that what changes is the model."""
        with self.clock.stopped(self.state):
            model = LanguageModel(self.experiment.config.model, self.experiment.tokenizer, self.state.params)
            start = self.experiment.tokenizer.decode(self.experiment.splits["val"][:1])
            tqdm.write(f"\n{model.generate(start, SAMPLE_LENGTH, temperature=0.8)}\n", file=sys.stdout)
            sys.stdout.flush()

    def announce(self) -> None:
        data = self.experiment.config.data
        log.info(
            "%s in %s: %.2f M parameters; %s, %.2f M training tokens; %d steps of %d tokens; on %s.",
            f"Resuming at step {self.info.step}" if self.info.step else "New run",
            self.workdir, sum(leaf.size for leaf in jax.tree.leaves(self.state.params)) / 1e6,
            data.dataset, len(self.experiment.splits["train"]) / 1e6, self.num_steps, self.tokens_per_step,
            jax.devices()[0].device_kind,
        )  # fmt: skip

    def conclude(self) -> None:
        """The loss over the whole validation split, and whether it is what the preset is known to reach."""
        val_loss = evaluate(self.experiment, self.state.params)
        log.info("Validation loss over the whole split: %.4f nats per token, after %s.", val_loss,
                 tqdm.format_interval(self.clock.seconds))  # fmt: skip
        known = self.experiment.config.expectation
        if known is not None:
            verdict = "as expected" if abs(val_loss - known.val_loss) <= 2 * known.spread else "NOT as expected"
            log.info("That is %s: %d seeds gave %.3f ± %.3f.", verdict, known.seeds, known.val_loss, known.spread)
        log.info("Sample from it: python scripts/generate.py --workdir %s --prompt TEXT --length 200", self.workdir)


class MetricsFile:
    """Rows of metrics, one JSON object a line. Opening it drops rows after `last_step` and a line cut off by a kill."""

    def __init__(self, path: Path, last_step: int):
        self.path = path
        rows = []
        if path.exists() and last_step:
            with contextlib.suppress(ValueError):  # the line that a kill cut off is the last one
                rows.extend(json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
        kept = [json.dumps(row) + "\n" for row in rows if row["step"] <= last_step]
        checkpoint.write_text(path, "".join(kept))

    def append(self, row: dict[str, float]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


class Clock:
    """Seconds of the run over all its processes, and seconds spent in training steps alone."""

    def __init__(self, seconds_before: float, step: int):
        now = time.perf_counter()
        self.began = now - seconds_before
        self.lap_began, self.lap_step = now, step

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.began

    def lap(self, step: int, state: TrainState) -> float:
        """Seconds per training step since the last call, without the time in which the clock was stopped."""
        jax.block_until_ready(state)
        now = time.perf_counter()
        seconds_per_step = (now - self.lap_began) / max(1, step - self.lap_step)
        self.lap_began, self.lap_step = now, step
        return seconds_per_step

    @contextlib.contextmanager
    def stopped(self, state: TrainState) -> Iterator[None]:
        """Does not count what happens inside as training, once the steps up to `state` are done."""
        jax.block_until_ready(state)
        began = time.perf_counter()
        yield
        self.lap_began += time.perf_counter() - began
