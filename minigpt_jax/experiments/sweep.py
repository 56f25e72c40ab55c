"""A sweep: trains every combination of the varied settings, and keeps the results in a folder.

runs/sweeps/NAME/sweep.json     the config, the varied settings, and checksums of the data
                 results.jsonl  one line for each finished run
"""

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

SETTINGS, RESULTS = "sweep.json", "results.jsonl"
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
    points, workdir = expand(config, vary), local_path(workdir)
    if stack is not None:
        whole_number("stack", stack, at_least=1)
    if config.training.patience:
        raise UsageError(f"patience={config.training.patience}: the runs of a sweep do not stop early; omit it")
    retain_heap()
    with streams.optional(), logs.shown():
        results = {} if overwrite else finished_results(workdir, config, vary)
        if pending := [point for point in points if point.key not in results]:
            train_points(pending, config, vary, workdir, results, stack, kernels)
    return [results[point.key] | {"settings": point.settings} for point in points]


def train_points(
    points: Sequence[Point], config: Config, vary: Mapping[str, Sequence[Any]], workdir: Path, results: dict[str, Any],
    stack: int | None, kernels: str,
) -> None:  # fmt: skip
    """Trains these runs, and adds their results to the dictionary and to the folder. Checks everything before it writes."""
    device, tasks = first_device(), prepare_all(points, kernels)
    check_sources(workdir, tasks[0].sources if results else None)
    fitting = {group: stacked.num_fitting(tasks[group[0]], device, len(group), stack) for group in stacked.groups(tasks)}
    described = {"config": json.loads(config.to_json()), "vary": {name: list(values) for name, values in vary.items()}}
    described["sources"] = dict(tasks[0].sources)
    with locked(workdir):
        write_text(workdir / SETTINGS, json.dumps(described, indent=2) + "\n")
        write_text(workdir / RESULTS, "".join(json.dumps(result) + "\n" for result in results.values()))
        log.info("Sweep in %s: %d runs, of which %d are finished; programs for the others: %d; device: %s.", workdir,
                 len(results) + len(points), len(results), len(fitting), device.device_kind)  # fmt: skip
        start, num_finished = time.perf_counter(), 0
        for group, most in fitting.items():
            size = min(stack, most) if stack else stacked.choose_size([tasks[index] for index in group], device, most)
            trim_heap()
            for first in range(0, len(group), size):
                part = group[first : first + size]
                padded = [tasks[index] for index in (part + group[:1] * size)[:size]]  # the same program for all parts
                trained = stacked.train(padded, device)[: len(part)]
                num_finished += len(part)
                seconds_left = (time.perf_counter() - start) / num_finished * (len(points) - num_finished)
                for index, result in zip(part, trained, strict=True):
                    results[points[index].key] = result = {"settings": points[index].settings} | result
                    append(workdir / RESULTS, result)
                    log.info("%s: %s", points[index].name, described_loss(result))
                log.info("%d/%d runs  %s left", num_finished, len(points), tqdm.format_interval(seconds_left))


def prepare_all(points: Sequence[Point], kernels: str) -> list[Task]:
    """The task of each run. They share their data, so what is worth a log line is logged once."""
    sharding = jax.sharding.SingleDeviceSharding(first_device())

    def task_of(point: Point) -> Task:
        return prepare(point.config, kernels=choose_kernels(point.config.model, kernels), sharding=sharding)

    first = task_of(points[0])
    with logs.quiet():
        return [first, *map(task_of, points[1:])]


def described_loss(result: Mapping[str, Any]) -> str:
    """For the log: `loss 1.6437`, or that the run has diverged."""
    loss = "not finite" if result["loss"] is None else f"{result['loss']:.4f}"
    return f"loss {loss}{', diverged' if result['diverged'] else ''}"


# ---- Its folder -----------------------------------------------------------------------------------------------------------


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Adds a line of JSON to a file, and waits until it is on the disk."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, allow_nan=False) + "\n")
    flush(path)


def finished_results(workdir: Path, config: Config, vary: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """The results of the sweep in this folder, if there is one, by `Point.key`. Raises DataError, naming the differences,
    if that is another sweep or a run."""
    saved = read_settings(workdir)
    if saved is None:
        if (workdir / "config.json").exists():
            raise DataError(f"{workdir} holds a run: choose another --workdir")
        return {}
    changed = [
        f"{name}={before} (now {now})"
        for name, (before, now) in differences(Config.from_json(json.dumps(saved["config"])), config).items()
        if name not in WITHOUT_EFFECT | set(vary)
    ]
    for name in dict.fromkeys([*saved["vary"], *vary]):
        before, now = (None if name not in lists else list(lists[name]) for lists in (saved["vary"], vary))
        if before is None or now is None or not set(before) <= set(now):
            changed.append(f"vary {name}: {before} (now {now})")
    if changed:
        raise DataError(
            f"{workdir} holds a sweep with {', '.join(changed)}: choose another --workdir, or replace it with --overwrite"
        )
    path = workdir / RESULTS
    rows = read_metrics(path) if path.exists() else []
    return {key_of(row["settings"]): row for row in rows if "settings" in row}


def read_settings(workdir: Path) -> dict[str, Any] | None:
    """The contents of `sweep.json`. None if there is no such file. Raises DataError if it cannot be read."""
    try:
        saved = json.loads((workdir / SETTINGS).read_text(encoding="utf-8"))
        Config.from_json(json.dumps(saved["config"]))
        return {name: saved[name] for name in ("config", "vary", "sources")}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{workdir / SETTINGS} cannot be read: {error!r}; restart with --overwrite") from error


def check_sources(workdir: Path, sources: Mapping[str, str] | None) -> None:
    """Raises DataError if the finished runs were trained on other data than these checksums are of."""
    saved = read_settings(workdir) if sources is not None else None
    if saved is not None and saved["sources"] != sources:
        raise DataError(
            f"the data of {workdir} has changed since its finished runs: restore it, choose another --workdir, or restart "
            "with --overwrite"
        )
