"""Wall-clock time of a run."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import jax


class Clock:
    """Seconds of the run, summed over all its processes, and seconds spent in training steps alone."""

    def __init__(self, seconds_before: float, step: int):
        now = time.perf_counter()
        self.start = now - seconds_before
        self.lap_start, self.lap_step = now, step
        self.reset_training_time()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start

    def lap(self, step: int, state: Any) -> float:
        """Seconds per training step since the last call, excluding the time in which the clock was stopped.

        If no step was made since then, as in the metrics row of the first step, returns the previous value.
        """
        jax.block_until_ready(state)
        now = time.perf_counter()
        seconds, num_steps = now - self.lap_start, step - self.lap_step
        self.lap_start, self.lap_step = now, step
        self.training_seconds += seconds
        self.training_steps += num_steps
        if num_steps:
            self.seconds_per_step = seconds / num_steps
        return self.seconds_per_step

    def reset_training_time(self) -> None:
        """Sets the totals to zero: called after the first step, so that its compilation does not count."""
        self.training_seconds, self.training_steps = 0.0, 0
        self.seconds_waiting = 0.0  # the part of training_seconds spent waiting for batches

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside this context as waiting for a batch."""
        start = time.perf_counter()
        yield
        self.seconds_waiting += time.perf_counter() - start

    @contextlib.contextmanager
    def stopped(self, state: Any) -> Iterator[None]:
        """Waits for `state`, then excludes the time inside this context from the training time."""
        jax.block_until_ready(state)
        start = time.perf_counter()
        yield
        self.lap_start += time.perf_counter() - start
