"""A time limit."""

import time

from minigpt_jax.training.callbacks.callback import Callback
from minigpt_jax.training.run import Run


class TimeLimit(Callback):
    """Stops the run a number of minutes after this callback was created, unless the run is complete by then."""

    def __init__(self, minutes: float):
        self.deadline = time.monotonic() + 60 * minutes

    def after_step(self, run: Run) -> None:
        if time.monotonic() > self.deadline and not run.is_over:
            run.is_stopped = True
