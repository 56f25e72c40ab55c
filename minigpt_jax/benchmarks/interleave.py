"""Interleaved timing: each candidate has its own process, and they run in the order A B C A B C …, under the same load.

A shared machine gets slower and faster as its load changes. So benchmarks compare medians of alternating runs and show
their range. A candidate is a class with a `name`, the module that it `needs`, and `run()`, or a `Variant` of such a class.
If it has `report()`, which returns a dictionary, that is added to the result of each run.
"""

import dataclasses
import importlib.util
import multiprocessing
import os
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

from minigpt_jax.errors import DataError, one_line
from minigpt_jax.system import memory
from minigpt_jax.system.heap import retain_heap


@dataclasses.dataclass(frozen=True)
class Variant:
    """A candidate with settings of its own, shown as `name`."""

    candidate: type
    name: str
    settings: dict[str, Any]

    @property
    def needs(self) -> str:
        return self.candidate.needs

    def __call__(self, *setup: Any) -> Any:
        return self.candidate(*setup, **self.settings)


@dataclasses.dataclass(frozen=True)
class Guarded:
    """A candidate whose failure does not end the others: the results of its runs then have its `error`, in one line."""

    candidate: "Candidate"

    @property
    def name(self) -> str:
        return self.candidate.name

    @property
    def needs(self) -> str:
        return self.candidate.needs

    def __call__(self, *setup: Any) -> "GuardedRunner":
        return GuardedRunner(self.candidate, setup)


class GuardedRunner:
    def __init__(self, candidate: "Candidate", setup: tuple):
        self.error: str | None = None
        self.runner: Any = self.attempt(lambda: candidate(*setup))

    def attempt(self, function: Callable[[], Any]) -> Any:
        if self.error is None:
            try:
                return function()
            except Exception as error:  # of any library
                traceback.print_exc()
                self.error = described(error)
        return None

    def run(self) -> None:
        self.attempt(lambda: self.runner.run())

    def report(self) -> dict[str, Any]:
        report = self.attempt(lambda: self.runner.report() if hasattr(self.runner, "report") else {})
        return report if self.error is None else {"error": self.error}


def described(error: Exception) -> str:
    """The class and message of an error, in one line."""
    return one_line(f"{type(error).__name__}: {error}")


Candidate = type | Variant | Guarded


def serve(candidate: Candidate, setup: Any, start: float, connection: Connection) -> None:
    """A candidate's process: runs once to warm up, then once per request, and sends a result after each run.

    `since_start` of the first result covers imports, compilation and the first run. `report()` is not timed.
    """
    runner = candidate(*setup)
    while True:
        run_start = time.perf_counter()
        runner.run()
        seconds = time.perf_counter() - run_start
        result = {"seconds": seconds, "since_start": time.time() - start, "peak_mb": memory.peak_megabytes()}
        connection.send(result | (runner.report() if hasattr(runner, "report") else {}))
        if not connection.recv():
            return


def installed(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates whose packages are installed. Prints which ones are skipped."""
    available = [candidate for candidate in candidates if importlib.util.find_spec(candidate.needs)]
    for candidate in candidates:
        if candidate not in available:
            print(f"Skipping {candidate.name}: {candidate.needs} is not installed")
    return available


def interleave(candidates: Sequence[Candidate], setup: tuple, rounds: int) -> dict[str, list[dict]]:
    """The results of each candidate's runs, by name. All candidates get the same `setup`.

    Each candidate first does a warm-up run, which compiles. It is not interleaved. Its result comes first.
    Raises DataError if a candidate's process exits.
    """
    *_, results = interleaved(candidates, setup, rounds)
    return results


def interleaved(
    candidates: Sequence[Candidate], setup: tuple, rounds: int, start_together: bool = False
) -> Iterator[dict[str, list[dict]]]:
    """Yields the results so far, after the warm-up runs and after each round. Otherwise as `interleave`.

    With `start_together` the candidates warm up, which includes compiling, at the same time.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # candidates share a GPU
    spawn = multiprocessing.get_context("spawn")

    def next_result(name: str, connection: Connection, request: bool = True) -> dict:
        try:
            if request:
                connection.send(True)
            return connection.recv()
        except (EOFError, OSError) as error:
            raise DataError(f"{name} exited without a result; its output is above") from error

    workers, results = [], {candidate.name: [] for candidate in candidates}

    def warm_up(workers: list) -> None:
        for name, connection, _ in workers:
            results[name].append(next_result(name, connection, request=False))

    for candidate in candidates:
        connection, remote = spawn.Pipe()
        process = spawn.Process(target=serve, args=(candidate, setup, time.time(), remote), daemon=True)
        process.start()
        remote.close()  # so that `recv` raises if the process dies
        workers.append((candidate.name, connection, process))
        if not start_together:
            warm_up(workers[-1:])
    if start_together:
        warm_up(workers)
    yield results
    for _ in range(rounds):
        for name, connection, _ in workers:
            results[name].append(next_result(name, connection))
        yield results
    for _, connection, process in workers:
        connection.send(False)
        process.join()


def in_own_process(function: Callable, *arguments) -> Any:
    """Calls the function in a fresh process and returns its result."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=retain_heap) as pool:
        return pool.submit(function, *arguments).result()


def milliseconds(results: list[dict], num_steps: int) -> list[float]:
    """Milliseconds per step of each run, without the warm-up run."""
    return [1000 * result["seconds"] / num_steps for result in results[1:]]


def with_spread(values: Sequence[float]) -> str:
    """The values as `median (min–max)`."""
    return f"{statistics.median(values):.4g} ({min(values):.4g}–{max(values):.4g})"
