"""The last log lines: the result, and where time and memory went."""

import logging

from tqdm import tqdm

from minigpt_jax.system import hardware, memory
from minigpt_jax.training.callbacks.callback import Callback
from minigpt_jax.training.run import Run

log = logging.getLogger(__name__)


class Summary(Callback):
    def finish(self, run: Run) -> None:
        if run.is_over:
            self.conclude(run)
        self.report(run)

    def conclude(self, run: Run) -> None:
        """Logs the loss over the whole validation split, and whether it agrees with the preset's reference result."""
        measures = run.task.measures(run.state.eval_params)
        log.info(
            "Validation loss over the whole split: %s, after %s.",
            run.task.describe_result(measures), tqdm.format_interval(run.clock.seconds),
        )  # fmt: skip
        known = run.task.config.reference_result
        if known is not None:
            is_normal = abs(measures[known.measure] - known.mean) <= 2 * known.spread
            log.info(
                "%s: %d seeds of this preset reached %s%.3f ± %.3f.", "As expected" if is_normal else "NOT as expected",
                known.seeds, "" if known.measure == "loss" else f"{known.measure} ", known.mean, known.spread,
            )  # fmt: skip
        log.info("%s", run.task.next_command(run.workdir))

    def report(self, run: Run) -> None:
        """Logs where the time and memory of this process went."""
        clock, task, compilations = run.clock, run.task, run.compilations
        peak, on_device = memory.peak_megabytes(), memory.device_peak_megabytes(run.device)  # before measuring takes some
        log.info(
            "Compiled %d programs in %.1f s (%d cached); %.1f s of training steps, of which %.1f s waiting for data.",
            len(compilations.programs), compilations.seconds, compilations.num_cached, clock.training_seconds,
            clock.seconds_waiting,
        )  # fmt: skip
        if clock.training_steps:
            steps_per_second, dtype = clock.training_steps / clock.training_seconds, task.config.model.dtype
            size, model_rate = hardware.matmul_size(run.device), steps_per_second * task.flops_per_step
            matmul_rate = hardware.matmul_rate(size, size, size, dtype)
            log.info(
                "Throughput: %s %s/s = %s GFLOP/s, %.0f %% of this machine's %s matmul rate (%s GFLOP/s).",
                f"{steps_per_second * task.units_per_step:,.0f}", task.unit, f"{model_rate / 1e9:,.1f}",
                100 * model_rate / matmul_rate, dtype, f"{matmul_rate / 1e9:,.1f}",
            )  # fmt: skip
        used = {"": peak, " on the device": on_device}
        if known := [f"{megabytes:.0f} MB{where}" for where, megabytes in used.items() if megabytes is not None]:
            log.info("Peak memory: %s.", ", and ".join(known))
