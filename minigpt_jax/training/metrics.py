"""What a run records of itself: the rows of metrics.jsonl, and the clock that they are timed with."""

import contextlib
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from minigpt_jax.errors import UsageError
from minigpt_jax.files import write_text
from minigpt_jax.training.state import TrainState

log = logging.getLogger(__name__)


class MetricsFile:
    """Rows of metrics, one JSON object a line. Opening it drops rows after `last_step` and a line cut off by a kill.

    `make_writer`, if given, is tensorboardX's SummaryWriter: the rows go there too.
    """

    def __init__(self, workdir: Path, last_step: int, make_writer: type | None = None):
        self.path = path = workdir / "metrics.jsonl"
        # What earlier processes wrote there of later steps is hidden.
        self.tensorboard = make_writer and make_writer(str(workdir / "tensorboard"), purge_step=last_step + 1)
        rows = read_metrics(path) if path.exists() and last_step else []
        kept = [json.dumps(row) + "\n" for row in rows if row["step"] <= last_step]
        write_text(path, "".join(kept))

    def append(self, row: dict[str, float]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if self.tensorboard is not None:
            for name in row.keys() - {"step"}:
                if row[name] is not None:
                    self.tensorboard.add_scalar(name, row[name], row["step"])
            self.tensorboard.flush()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl. A last line without its end is left out, since a kill has cut it off; so is, with a line
    in the log, one that is damaged.
    """
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            row = json.loads(line)
            if not (isinstance(row, dict) and isinstance(row.get("step"), int)):
                raise ValueError("no row of metrics")
            rows.append(row)
        except ValueError as error:
            log.warning("DAMAGED: line %d of %s is left out: %s.", number, path, error)
    return rows


def import_tensorboard_writer() -> type:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise UsageError("--tensorboard needs tensorboardX: python -m pip install -e '.[tensorboard]'") from error
    return SummaryWriter


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

    def lap(self, step: int, state: TrainState) -> float:
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

    @contextlib.contextmanager
    def stopped(self, state: TrainState) -> Iterator[None]:
        """Does not count what happens inside as training, once the steps up to `state` are done."""
        jax.block_until_ready(state)
        began = time.perf_counter()
        yield
        self.lap_began += time.perf_counter() - began
