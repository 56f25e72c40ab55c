"""Training metrics, as rows of metrics.jsonl and as log lines."""

import logging
import math

import jax
import numpy as np
from tqdm import tqdm

from minigpt_jax.tasks.fine_tuning import describe_parameters
from minigpt_jax.training.callbacks.callback import Callback
from minigpt_jax.training.run import Run
from minigpt_jax.training.schedule import learning_rate_schedule

log = logging.getLogger(__name__)


class Log(Callback):
    """Logs the start of the run, and writes a row of metrics every `log_every` steps."""

    def begin(self, run: Run) -> None:
        self.first_step = run.step + 1
        self.learning_rate = jax.jit(learning_rate_schedule(run.settings, run.task.num_steps))  # one program, not ten
        log.info(
            "%s in %s%s: %s; %s; %d steps of %d %s; device: %s; kernels: %s; matmul precision: %s.",
            f"Resuming at step {run.step}" if run.step else "New run",
            run.workdir, f", initialised from {run.settings.init_from}" if run.settings.init_from else "",
            describe_parameters(run.task, run.state.params), run.task.describe_data(),
            run.task.num_steps, run.task.units_per_step, run.task.unit,
            run.device.device_kind, run.kernels, jax.config.jax_default_matmul_precision or "default",  # pyright: ignore[reportAttributeAccessIssue]
        )  # fmt: skip

    def after_step(self, run: Run) -> None:
        if run.step == self.first_step:
            seconds = run.clock.lap(run.step, run.state)
            log.info("The first step took %.1f s, including compilation.", seconds)
            run.clock.reset_training_time()
        if run.due(run.settings.log_every):
            self.write_row(run)

    def write_row(self, run: Run) -> None:
        """Writes the mean loss since the last row, and the learning rate and gradient norm of this step."""
        grad_norm, num_steps = float(run.unread[-1]["grad_norm"]), run.task.num_steps
        run.read_losses()
        with run.clock.stopped(run.state):  # the first call compiles
            learning_rate = float(self.learning_rate(run.step - 1 - run.info.num_skipped))
        seconds_per_step, losses = run.clock.lap(run.step, run.state), run.info.pending_losses
        units_per_second = round(run.task.units_per_step / seconds_per_step, 1)
        row = {
            "step": run.step,
            "train_loss": float(np.mean(losses)) if losses else None,  # None if no step was finite: JSON has no NaN
            "learning_rate": learning_rate,
            "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
            f"{run.task.unit}_per_second": units_per_second,
            "seconds": round(run.clock.seconds, 3),
        }
        if run.info.num_skipped:
            row["skipped_steps"] = run.info.num_skipped
        run.note(pending_losses=())
        run.metrics.append(row)
        log.info(
            "step %d/%d  loss %.4f  lr %.1e  grad norm %.2f  %s %s/s  %s left%s",
            run.step, num_steps, math.nan if row["train_loss"] is None else row["train_loss"], learning_rate,
            grad_norm, f"{units_per_second:,.0f}", run.task.unit,
            tqdm.format_interval(seconds_per_step * (num_steps - run.step)),
            f"  {run.info.num_skipped} non-finite steps skipped" if run.info.num_skipped else "",
        )  # fmt: skip
