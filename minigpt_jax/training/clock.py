"""The clock of a run."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import jax


class Clock:
    """Seconds of the run over all its processes, and seconds spent in training steps alone."""

    def __init__(self, seconds_before: float, step: int):
        now = time.perf_counter()
        self.began = now - seconds_before
        self.lap_began, self.lap_step = now, step
        self.forget_laps()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.began

    def lap(self, step: int, state: Any) -> float:
        """Seconds per training step since the last call, without the time in which the clock was stopped.

        Where there was none since then, as in the row of the first step, those of the last one.
        """
        jax.block_until_ready(state)
        now = time.perf_counter()
        seconds, num_steps = now - self.lap_began, step - self.lap_step
        self.lap_began, self.lap_step = now, step
        self.training_seconds += seconds
        self.training_steps += num_steps
        if num_steps:
            self.seconds_per_step = seconds / num_steps
        return self.seconds_per_step

    def forget_laps(self) -> None:
        """Counts seconds in training steps from here on: after the first, which compiles."""
        self.training_seconds, self.training_steps = 0.0, 0
        self.seconds_waiting = 0.0  # of these, for batches

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """What happens inside is a wait for a batch."""
        began = time.perf_counter()
        yield
        self.seconds_waiting += time.perf_counter() - began

    @contextlib.contextmanager
    def stopped(self, state: Any) -> Iterator[None]:
        """Does not count what happens inside as training, once the steps up to `state` are done."""
        jax.block_until_ready(state)
        began = time.perf_counter()
        yield
        self.lap_began += time.perf_counter() - began
