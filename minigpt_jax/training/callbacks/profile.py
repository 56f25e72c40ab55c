"""A profile of some steps."""

import logging

import jax

from minigpt_jax.training.callbacks.callback import Callback
from minigpt_jax.training.profile import operations
from minigpt_jax.training.run import Run

log = logging.getLogger(__name__)


class Profile(Callback):
    """Traces five steps, or those that are left, into the run's folder: for Perfetto, TensorBoard and XProf. At the end it
    tells which operations took longest."""

    def begin(self, run: Run) -> None:
        self.folder = run.workdir / "profile"
        first = min(run.step + 6, run.task.num_steps)  # the first steps still warm up
        self.planned = range(first, min(first + 5, run.task.num_steps + 1))
        self.num_steps = 0  # traced so far
        self.is_running = False

    def before_step(self, run: Run) -> None:
        """Tracing begins and ends once the steps so far are done, and is not on the clock."""
        step = run.step + 1
        if step == self.planned.start:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # a million calls of Python's would slow down the steps and the reading
            with run.clock.stopped(run.state):
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
        found = operations(self.folder, run.compiled_step.as_text(), self.num_steps)
        log.info("The ten operations that took longest, those of all layers together:\n    ms/step   share")
        for operation in found[:10]:
            log.info("%11.2f%8.1f%%   %s", operation.milliseconds, 100 * operation.share, operation.name)
        log.info("A trace for https://ui.perfetto.dev (*.trace.json.gz) and XProf is in %s.", self.folder)

    def close(self) -> None:
        """Writes the profile, unless that has been done. A failure is logged, and training continues."""
        if self.is_running:
            self.is_running = False
            try:
                jax.profiler.stop_trace()
            except (OSError, RuntimeError) as error:
                self.num_steps = 0
                log.warning("No profile could be written to %s: %s", self.folder, str(error).splitlines()[0])
