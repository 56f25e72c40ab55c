"""What is said at the end: the result, and where time and memory went."""

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
        """The loss over all validation data, and whether it is what the preset is known to reach."""
        measures = run.task.measures(run.state.eval_params)
        log.info(
            "Validation loss over the whole split: %s, after %s.",
            run.task.describe_result(measures), tqdm.format_interval(run.clock.seconds),
        )  # fmt: skip
        known = run.task.config.reference_result
        if known is not None:
            verdict = "as expected" if abs(measures["loss"] - known.val_loss) <= 2 * known.spread else "NOT as expected"
            log.info("That is %s: %d seeds gave %.3f ± %.3f.", verdict, known.seeds, known.val_loss, known.spread)
        log.info("%s", run.task.next_command(run.workdir))

    def report(self, run: Run) -> None:
        """Where the time and the memory of this process went."""
        clock, task, compilations = run.clock, run.task, run.compilations
        peak, on_device = memory.peak_megabytes(), memory.device_peak_megabytes(run.device)  # before any is taken here
        log.info(
            "Time: %.1f s for compiling %d programs (%d were found), %.1f s in training steps, %.2f of them for batches.",
            compilations.seconds, len(compilations.programs), compilations.num_found, clock.training_seconds,
            clock.seconds_waiting,
        )  # fmt: skip
        if clock.training_steps:
            steps_per_second, dtype = clock.training_steps / clock.training_seconds, task.config.model.dtype
            rate, most = steps_per_second * task.flops_per_step, hardware.matmul_rate(1024, 1024, 1024, dtype)
            log.info(
                "Rate: %.0f %s/s, %.4g GFLOP/s in the model: %.0f%% of the %.4g of a large product of matrices in %s.",
                steps_per_second * task.units_per_step, task.unit, rate / 1e9, 100 * rate / most, most / 1e9, dtype,
            )  # fmt: skip
        used = {"": peak, " on the device": on_device}
        if known := [f"{megabytes:.0f} MB{where}" for where, megabytes in used.items() if megabytes is not None]:
            log.info("Memory at its peak: %s.", ", and ".join(known))
