"""The rows of metrics.jsonl, which a run appends while it trains."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minigpt_jax.commands import install_command
from minigpt_jax.errors import UsageError
from minigpt_jax.files import write_text

log = logging.getLogger(__name__)


class MetricsFile:
    """Rows of metrics, one JSON object per line. Opening it drops rows after `last_step`, and a truncated last line.

    `make_writer`, if given, is tensorboardX's SummaryWriter, which then gets the rows too.
    """

    def __init__(self, workdir: Path, last_step: int, make_writer: type | None = None):
        self.path = path = workdir / "metrics.jsonl"
        # purge_step hides what earlier processes wrote for later steps.
        self.tensorboard = make_writer and make_writer(str(workdir / "tensorboard"), purge_step=last_step + 1)
        rows = read_metrics(path) if path.exists() and last_step else []
        kept = [json.dumps(row) + "\n" for row in rows if row["step"] <= last_step]
        write_text(path, "".join(kept))

    def append(self, row: Mapping[str, float | None]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if self.tensorboard is not None:
            for name in row.keys() - {"step"}:
                if row[name] is not None:
                    self.tensorboard.add_scalar(name, row[name], row["step"])
            self.tensorboard.flush()

    def close(self) -> None:
        """Waits for TensorBoard's writer thread, which may not have written the last row yet."""
        if self.tensorboard is not None:
            self.tensorboard.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl. Skips a last line without a line break, which a killed process left incomplete. Also
    skips corrupt lines, with a warning.
    """
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            row = json.loads(line)
            if not (isinstance(row, dict) and isinstance(row.get("step"), int)):
                raise ValueError("not an object with an integer step")
            rows.append(row)
        except ValueError as error:
            log.warning("Skipping corrupt line %d of %s: %s.", number, path, error)
    return rows


def import_tensorboard_writer() -> type:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise UsageError(f"--tensorboard needs tensorboardX: {install_command('tensorboard')}") from error
    return SummaryWriter
