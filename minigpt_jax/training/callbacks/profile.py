"""A profile of a few steps."""

import contextlib
import logging
from collections.abc import Iterator

import jax

from minigpt_jax.training.callbacks.callback import Callback
from minigpt_jax.training.profile import operations
from minigpt_jax.training.run import Run

log = logging.getLogger(__name__)


class Profile(Callback):
    """Traces five steps, or as many as are left, into the run's folder, for Perfetto, TensorBoard and XProf. At the end it
    logs the operations that took longest."""

    def begin(self, run: Run) -> None:
        self.folder = run.workdir / "profile"
        first = min(run.step + 6, run.task.num_steps)  # skips warm-up steps
        self.planned = range(first, min(first + 5, run.task.num_steps + 1))
        self.num_steps = 0  # traced so far
        self.is_running = False

    def before_step(self, run: Run) -> None:
        """Starts and stops tracing between two steps, with the clock stopped."""
        step = run.step + 1
        if step == self.planned.start:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # a million Python calls would slow down the steps and reading the trace
            with run.clock.stopped(run.state), self.failures_logged():
                self.folder.mkdir(parents=True, exist_ok=True)  # a failure of `stop_trace` would leave JAX tracing
                jax.profiler.start_trace(self.folder, profiler_options=options)
                self.is_running = True
        elif step == self.planned.stop:
            with run.clock.stopped(run.state):
                self.close()
        self.num_steps += self.is_running

    def finish(self, run: Run) -> None:
        jax.block_until_ready(run.state)
        self.close()
        if not self.num_steps:
            return
        slowest = operations(self.folder, run.compiled_step.as_text(), self.num_steps)[:10]
        log.info("The %d slowest operations, summed over layers:\n    ms/step   share", len(slowest))
        for operation in slowest:
            log.info("%11.2f%8.1f%%   %s", operation.milliseconds, 100 * operation.share, operation.name)
        log.info("The trace, for https://ui.perfetto.dev (*.trace.json.gz) or XProf, is in %s.", self.folder)

    def close(self) -> None:
        """Writes the profile, if tracing is still running."""
        if self.is_running:
            self.is_running = False
            with self.failures_logged():
                jax.profiler.stop_trace()

    @contextlib.contextmanager
    def failures_logged(self) -> Iterator[None]:
        """Logs a failure to trace, so that training continues."""
        try:
            yield
        except (OSError, RuntimeError) as error:
            self.num_steps = 0
            log.warning("Could not write the profile to %s: %s", self.folder, str(error).splitlines()[0])
