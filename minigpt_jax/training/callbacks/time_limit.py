"""An end before the last step. Patience needs no callback: see `Run.is_over`."""

import time

from minigpt_jax.training.callbacks.callback import Callback
from minigpt_jax.training.run import Run


class TimeLimit(Callback):
    """Stops after so many minutes from when it was made, unless nothing is left to do then."""

    def __init__(self, minutes: float):
        self.deadline = time.monotonic() + 60 * minutes

    def after_step(self, run: Run) -> None:
        if time.monotonic() > self.deadline and not run.is_over:
            run.is_stopped = True
