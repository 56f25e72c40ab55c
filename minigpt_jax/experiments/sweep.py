"""A sweep: trains every combination of the varied settings, and keeps the results in a folder.

runs/sweeps/NAME/sweep.json     the config, the varied settings, and checksums of the data
                 results.jsonl  one line for each finished run
"""

import dataclasses
import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from minigpt_jax.api import choose_kernels, first_device
from minigpt_jax.config import Config, differences, whole_number
from minigpt_jax.errors import DataError, UsageError
from minigpt_jax.experiments import stacked
from minigpt_jax.experiments.grid import Point, expand, key_of
from minigpt_jax.files import flush, local_path, write_text
from minigpt_jax.runs.folder import locked
from minigpt_jax.runs.metrics import read_metrics
from minigpt_jax.system import logs, streams
from minigpt_jax.system.heap import retain_heap, trim_heap
from minigpt_jax.tasks import prepare
from minigpt_jax.tasks.task import Task

log = logging.getLogger(__name__)

RESULTS = "results.jsonl"
# What a folder can hold, by a file that no other folder has.
CONTENTS = {"config.json": "a run", "sweep.json": "a sweep", "ablation.json": "an ablation"}
# Settings of the base config that a resumed sweep may change.
WITHOUT_EFFECT = {"checkpoint_every", "sample_every", "log_every", "keep_checkpoints", "data_dir"}


def sweep(
    config: Config, vary: Mapping[str, Sequence[Any]], workdir: str | Path, *,
    stack: int | None = None, overwrite: bool = False, kernels: str = "tuned",
) -> list[dict[str, Any]]:  # fmt: skip
    """Trains `config` with each combination of the values in `vary`. Returns the results of `stacked.train`, each with the
    `settings` that are varied.

    Runs that differ only in numbers share a compiled step. `stack` of them are trained side by side; 1 is one after another,
    and by default a measured step decides. Each run gives the same result as alone, up to rounding.

    Each finished run is a line of `results.jsonl` in the folder, and no checkpoint is written. A sweep resumes in its
    folder: finished runs are not repeated, and there may be more values than before. Raises UsageError for settings that
    cannot be varied or do not fit together, and for more runs side by side than fit into memory; DataError for unusable
    data, and if the folder has a sweep with other settings.
    """
    points = expand(config, vary)
    if stack is not None:
        stack = whole_number("stack", stack, at_least=1)
    if config.training.patience:
        raise UsageError(f"patience={config.training.patience}: the runs of a sweep do not stop early; omit it")
    values = {name: [*dict.fromkeys(point.settings[name] for point in points)] for name in points[0].settings}
    folder = Folder(local_path(workdir), config, values, overwrite)
    retain_heap()
    with streams.optional(), logs.shown():
        results = folder.read()
        if pending := [point for point in points if point.key not in results]:
            tasks = prepare_all(pending, kernels, jax.sharding.SingleDeviceSharding(first_device()))
            train(pending, tasks, folder, stack)
            results = folder.read_results()
    return [results[point.key] | {"settings": point.settings} for point in points]


def train(points: Sequence[Point], tasks: Sequence[Task], folder: "Folder", stack: int | None) -> None:
    """Trains these runs, each with its task, and adds their results to the folder. Checks everything before it writes
    anything."""
    device = first_device()
    folder.check_sources(tasks[0].sources)
    fitting = {group: stacked.num_fitting(tasks[group[0]], device, len(group), stack) for group in stacked.groups(tasks)}
    with locked(folder.workdir):
        num_before = folder.open(tasks[0].sources)
        log.info("%s in %s: %d runs, %d of them finished; groups of the same shape: %d; device: %s.",
                 folder.kind.capitalize(), folder.workdir, num_before + len(points), num_before, len(fitting),
                 device.device_kind)  # fmt: skip
        start, num_finished = time.perf_counter(), 0
        for group, most in fitting.items():
            size = min(stack, most) if stack else stacked.choose_size([tasks[index] for index in group], device, most)
            trim_heap()
            for first in range(0, len(group), size):
                part = group[first : first + size]
                filled = (part + group[:1] * size)[:size]  # the same program for all parts
                results = stacked.train([tasks[index] for index in filled], device)
                for index, result in zip(part, results, strict=False):
                    folder.append({"settings": points[index].settings} | result)
                    log.info("%s: %s", points[index].name, described_loss(result))
                num_finished += len(part)
                seconds_left = (time.perf_counter() - start) / num_finished * (len(points) - num_finished)
                log.info("%d/%d runs  %s left", num_finished, len(points), tqdm.format_interval(seconds_left))


def prepare_all(points: Sequence[Point], kernels: str, sharding: jax.sharding.Sharding) -> list[Task]:
    """The task of each run. They share their data, so what is worth a log line is logged once."""

    def task_of(point: Point) -> Task:
        return prepare(point.config, kernels=choose_kernels(point.config.model, kernels), sharding=sharding)

    first = task_of(points[0])
    with logs.quiet():
        return [first, *map(task_of, points[1:])]


def described_loss(result: Mapping[str, Any]) -> str:
    """For the log: `loss 1.6437`, or that the run has diverged."""
    loss = "not finite" if result["loss"] is None else f"{result['loss']:.4f}"
    return f"loss {loss}{', diverged' if result['diverged'] else ''}"


@dataclasses.dataclass(frozen=True)
class Folder:
    """The folder of a sweep of `config` that varies these settings, or of another `kind` of experiment. With `overwrite`,
    what is in it before `open` does not count."""

    workdir: Path
    config: Config
    vary: Mapping[str, list[Any]]
    overwrite: bool
    kind: str = "sweep"

    @property
    def settings_path(self) -> Path:
        return self.workdir / f"{self.kind}.json"

    def read(self) -> dict[str, Any]:
        """The results in the folder, by `Point.key`. Raises DataError, naming the differences, if they are those of another
        sweep, and if the folder holds something else."""
        for name, content in CONTENTS.items():
            if name != self.settings_path.name and (self.workdir / name).exists():
                raise DataError(f"{self.workdir} holds {content}: choose another --workdir")
        saved = None if self.overwrite else self.read_settings()
        if saved is None:
            return {}
        before = Config.from_json(json.dumps(saved["config"]))
        changed = [
            f"{name}={old} (now {new})"
            for name, (old, new) in differences(before, self.config).items()
            if name not in WITHOUT_EFFECT | set(self.vary)
        ]
        for name in dict.fromkeys([*saved["vary"], *self.vary]):
            old, new = saved["vary"].get(name), self.vary.get(name)
            if old is None or new is None or not set(old) <= set(new):
                changed.append(f"vary {name}: {old} (now {new})")
        if changed:
            raise DataError(
                f"{self.workdir} holds {CONTENTS[self.settings_path.name]} with {', '.join(changed)}: choose another "
                "--workdir, or replace it with --overwrite"
            )
        return self.read_results()

    def read_settings(self) -> dict[str, Any] | None:
        """The contents of `sweep.json`. None if there is no such file. Raises DataError if it cannot be read."""
        path = self.settings_path
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            Config.from_json(json.dumps(saved["config"]))
            return {name: saved[name] for name in ("config", "vary", "sources")}
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise DataError(f"{path} cannot be read: {error!r}; restart with --overwrite") from error

    def read_results(self) -> dict[str, Any]:
        path = self.workdir / RESULTS
        rows = read_metrics(path) if path.exists() else []
        return {key_of(row["settings"]): row for row in rows if "settings" in row}

    def check_sources(self, sources: Mapping[str, str]) -> None:
        """Raises DataError if these are not the checksums of the data that the finished runs were trained on."""
        saved = self.read_settings()
        if saved is not None and self.read() and saved["sources"] != sources:
            raise DataError(
                f"the data of {self.workdir} has changed since its finished runs: restore it, choose another --workdir, or "
                "restart with --overwrite"
            )

    def open(self, sources: Mapping[str, str]) -> int:
        """Writes the settings, and the results without a line that a killed process left incomplete. Returns the number of
        finished runs. The folder must be locked."""
        results = self.read()
        saved = {"config": json.loads(self.config.to_json()), "vary": self.vary, "sources": dict(sources)}
        write_text(self.workdir / RESULTS, "".join(json.dumps(result) + "\n" for result in results.values()))
        write_text(self.settings_path, json.dumps(saved, indent=2) + "\n")
        return len(results)

    def append(self, result: Mapping[str, Any]) -> None:
        """Adds a line to the results, and waits until it is on the disk."""
        path = self.workdir / RESULTS
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result, allow_nan=False) + "\n")
        flush(path)
