"""Runs the parts of the GPU benchmark within a time budget. Each result is in the file as soon as it exists."""

import contextlib
import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from minigpt_jax.benchmarks.gpu.goals import goals
from minigpt_jax.benchmarks.gpu.setup import PRESETS, Setup
from minigpt_jax.benchmarks.interleave import with_spread
from minigpt_jax.errors import DataError, one_line
from minigpt_jax.files import write_text

ROUNDS = 5
# In the order of the run: the seconds that a part needs at least to measure anything, and those that it may take of every 8
# minutes, so that one that hangs leaves time for the others.
PARTS = {
    "device": (10, 60), "correctness": (30, 120), "limits": (15, 60), **{f"train_{preset}": (60, 180) for preset in PRESETS},
    "learning": (40, 120), "decoding": (45, 180), "compiling": (20, 120),
}  # fmt: skip

Results = Iterator[dict[str, Any]]


def measure(setup: Setup, skip: Collection[str], minutes: float, path: Path | None) -> dict[str, Any]:
    """Runs the parts; see `run`. They share a cache of compiled programs, which starts empty."""
    with tempfile.TemporaryDirectory(prefix="minigpt_jax-") as cache:
        # A process that reserved most of the memory at its start would leave none for the other candidates.
        variables = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | os.environ
        variables |= {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        return run(setup, skip, minutes, path, functools.partial(in_own_process, variables))


def run(
    setup: Setup, skip: Collection[str], minutes: float, path: Path | None, start: Callable[[str, Setup, float], Results]
) -> dict[str, Any]:
    """Runs the parts and returns their figures by name, which are also written to `path` after every result.

    `start` takes a part's name, its setup and the seconds that it may take. A part that is not wanted, or for which too
    little of the `minutes` is left, is recorded as skipped. In a rehearsal every part may take all that is left. Raises
    DataError if the device turns out not to be a GPU.
    """
    figures: dict[str, Any] = {"setup": {"minutes": minutes, "rehearse": setup.rehearse, "rounds": setup.rounds}}
    deadline = time.monotonic() + 60 * minutes

    def record(name: str, result: dict[str, Any]) -> None:
        figures[name] = figures.get(name, {}) | result
        figures["goals"] = goals(figures)
        if path is not None:
            write_text(path, json.dumps({"gpu": figures}, indent=2) + "\n")

    for name, (needed, at_most) in PARTS.items():
        print(f"\n---- {name}", flush=True)
        start_time = time.monotonic()
        left = deadline - start_time
        if name in skip:
            record(name, {"skipped": "not wanted (--skip)"})
        elif left < needed:
            record(name, {"skipped": f"{max(left, 0):.0f} s are left, and it needs at least {needed} s"})
        else:
            seconds = left if setup.rehearse else min(left, at_most * minutes / 8)
            for result in start(name, dataclasses.replace(setup, figures=dict(figures)), seconds):
                record(name, result)
            record(name, {"seconds": time.monotonic() - start_time})
        for key, value in figures[name].items():
            print(f"{key}: {one_line(brief(value))}", flush=True)
        platform = figures["device"].get("platform", "gpu")
        if platform != "gpu" and not setup.rehearse:
            raise DataError(f"JAX finds no GPU here, only a {platform}: --rehearse runs every part on it, with tiny sizes")
    print("\n---- goals" + ", which a rehearsal's tiny sizes say nothing about" * setup.rehearse)
    for name, goal in figures["goals"].items():
        print(f"{name:<66}{brief(goal['measured']):>10}   {goal['target']:<7}{STATES[goal['reached']]}")
    return figures


STATES = {True: "reached", False: "MISSED", None: "not measured"}


def brief(value: Any) -> str:
    """A figure, or a dictionary of figures, for a line of output."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {brief(inner)}" for key, inner in value.items())
    if isinstance(value, list) and value and all(isinstance(number, float) for number in value):
        return with_spread(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def in_own_process(variables: dict[str, str], name: str, setup: Setup, seconds: float) -> Results:
    """The results of a part from a process of its own, which is killed with its children when the seconds are over."""
    command, is_over = [sys.executable, "-m", "minigpt_jax.benchmarks.gpu", name], threading.Event()
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=variables, start_new_session=True
    ) as process:
        timer = threading.Timer(seconds, lambda: (is_over.set(), kill(process)))
        timer.start()
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            with contextlib.suppress(BrokenPipeError), process.stdin:  # it may have died at its start
                json.dump(dataclasses.asdict(setup), process.stdin)
            for line in process.stdout:
                yield json.loads(line, parse_constant=lambda name: None)  # NaN and infinity are not JSON
        except BaseException:  # such as Ctrl-C, which does not reach a process in another session
            kill(process)
            raise
        finally:
            timer.cancel()
    if is_over.is_set():
        yield {"error": f"stopped after {seconds:.0f} s, when the time was over"}
    elif process.returncode:
        yield {"error": f"its process exited with status {process.returncode}; its output is above"}


def kill(process: subprocess.Popen) -> None:
    """Kills a process that was started in a session of its own, and its children."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # it has ended
    except AttributeError:  # Windows has no process groups
        process.kill()
