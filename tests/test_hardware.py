"""What the machine can do: rates are work over the shortest time, by a clock that the test sets."""

import subprocess
import sys

import pytest

from minigpt_jax.system import hardware


@pytest.fixture
def half_seconds(monkeypatch):
    """A clock by which each run after the first takes longer than the one before, the shortest 0.5 s."""
    ticks = (tick for run in range(10) for tick in (100 * run, 100 * run + 0.5 * (run + 1)))
    monkeypatch.setattr(hardware.time, "perf_counter", lambda: next(ticks))


def test_best_seconds_are_the_shortest_after_a_first_run(half_seconds):
    runs = []
    assert hardware.best_seconds(lambda: runs.append(1)) == 0.5
    assert len(runs) == 11


def test_product_rate_counts_multiplications_and_additions(half_seconds):
    assert hardware.matmul_rate(3, 5, 7) == 2 * 3 * 5 * 7 / 0.5


@pytest.mark.slow
def test_copy_bandwidth_counts_what_is_read_and_written(half_seconds):
    assert hardware.copy_bandwidth() == 2 * 2**28 / 0.5


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere the system counts what it likes")
def test_peak_memory_stays_when_memory_is_freed():
    program = """
import numpy as np
from minigpt_jax.system import memory
before = memory.peak_megabytes()
np.ones(100_000_000, np.uint8)
after = memory.peak_megabytes()
print(after - before)
"""
    grown = float(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout)
    assert 90 < grown < 110
