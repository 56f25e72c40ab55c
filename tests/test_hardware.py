"""Hardware limits are work over the shortest time, by a fake clock."""

import subprocess
import sys

import pytest

from minigpt_jax.system import hardware


@pytest.fixture
def fake_clock(monkeypatch):
    """A clock by which runs take 0.5 s, 1 s, 1.5 s and so on."""
    ticks = (tick for run in range(10) for tick in (100 * run, 100 * run + 0.5 * (run + 1)))
    monkeypatch.setattr(hardware.time, "perf_counter", lambda: next(ticks))


def test_best_seconds_are_the_shortest_after_a_warm_up_run(fake_clock):
    runs = []
    assert hardware.best_seconds(lambda: runs.append(1)) == 0.5
    assert len(runs) == 11


def test_matmul_rate_counts_multiplications_and_additions(fake_clock):
    assert hardware.matmul_rate(3, 5, 7) == 2 * 3 * 5 * 7 / 0.5


@pytest.mark.slow
def test_copy_bandwidth_counts_reads_and_writes(fake_clock):
    assert hardware.copy_bandwidth() == 2 * 2**28 / 0.5


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems count memory differently")
def test_peak_memory_includes_freed_memory():
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
