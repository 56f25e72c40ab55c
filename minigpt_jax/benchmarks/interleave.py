"""Taking turns: each candidate in a process of its own, asked A B C A B C …, so that all meet the same weather.

A machine gets slower and faster as its other guests come and go. What is compared are therefore medians of runs that
alternate; the spread is given beside. A candidate is a class with a `name`, the module that it `needs`, and `run()`, or
such a class `With` settings of its own.
"""

import dataclasses
import importlib.util
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from minigpt_jax.errors import DataError
from minigpt_jax.system import memory
from minigpt_jax.system.heap import retain_heap


@dataclasses.dataclass(frozen=True)
class With:
    """A candidate, made with a setting that the others do not have; `name` is what the tables call it."""

    candidate: type
    name: str
    settings: dict[str, Any]

    @property
    def needs(self) -> str:
        return self.candidate.needs

    def __call__(self, *setup: Any) -> Any:
        return self.candidate(*setup, **self.settings)


Candidate = type | With


def serve(candidate: Candidate, setup: Any, began: float, connection) -> None:
    """A candidate's process: gets ready, then runs once for each request and answers with what that took.

    `since_start` of the first answer is what it took to import, to compile and to run once. What the candidate can `tell()`
    of itself after a run is not timed, and goes with the answer.
    """
    runner = candidate(*setup)
    while True:
        run_began = time.perf_counter()
        runner.run()
        seconds = time.perf_counter() - run_began
        answer = {"seconds": seconds, "since_start": time.time() - began, "peak_mb": memory.peak_megabytes()}
        connection.send(answer | (runner.tell() if hasattr(runner, "tell") else {}))
        if not connection.recv():
            return


def present(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those of them whose packages are installed; says which are left out."""
    installed = [candidate for candidate in candidates if importlib.util.find_spec(candidate.needs)]
    for candidate in candidates:
        if candidate not in installed:
            print(f"{candidate.name} is left out: {candidate.needs} is not installed")
    return installed


def interleave(candidates: Sequence[Candidate], setup: tuple, rounds: int) -> dict[str, list[dict]]:
    """By name, what each candidate answers to its runs, which are taken in turn. All are made with the same `setup`.

    The first run, which compiles what there is to compile, comes before the `rounds`, of each candidate on its own. Raises
    DataError where one ends by itself.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # where there is a GPU they share it
    spawn = multiprocessing.get_context("spawn")

    def answer_of(name: str, here, asked: bool = True) -> dict:
        try:
            if asked:
                here.send(True)
            return here.recv()
        except (EOFError, OSError) as error:
            raise DataError(f"{name} ended without an answer; what it said stands above") from error

    lanes, answers = [], {}
    for candidate in candidates:
        here, there = spawn.Pipe()
        process = spawn.Process(target=serve, args=(candidate, setup, time.time(), there), daemon=True)
        process.start()
        there.close()  # so that a candidate that dies ends the wait for it
        answers[candidate.name] = [answer_of(candidate.name, here, asked=False)]
        lanes.append((candidate.name, here, process))
    for _ in range(rounds):
        for name, here, _ in lanes:
            answers[name].append(answer_of(name, here))
    for _, here, process in lanes:
        here.send(False)
        process.join()
    return answers


def in_own_process(function: Callable, *arguments) -> Any:
    """What the function returns in a process that has done nothing else."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=retain_heap) as pool:
        return pool.submit(function, *arguments).result()


def milliseconds(answers: list[dict], parts: int) -> list[float]:
    """Of one of so many equal parts of each run, without the first run."""
    return [1000 * answer["seconds"] / parts for answer in answers[1:]]


def with_spread(values: Sequence[float]) -> str:
    """Median, least and largest."""
    return f"{statistics.median(values):.4g} ({min(values):.4g} to {max(values):.4g})"
