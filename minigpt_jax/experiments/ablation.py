"""An ablation: trains a base config and one change of it at a time, at equal tokens and at equal time, with several seeds.

runs/ablations/NAME/ablation.json  the base config, and checksums of the data
                    changes.json   for each change its parameters and measured step time, from which its steps follow
                    results.jsonl  one line for each finished run
"""

import dataclasses
import json
import logging
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from minigpt_jax.api import choose_kernels, first_device
from minigpt_jax.config import Config, get_setting, whole_number
from minigpt_jax.errors import DataError, UsageError
from minigpt_jax.experiments import stacked
from minigpt_jax.experiments.changes import Settings, changes
from minigpt_jax.experiments.grid import Point, key_of, named
from minigpt_jax.experiments.sweep import Folder, train
from minigpt_jax.files import local_path, write_text
from minigpt_jax.runs.folder import locked
from minigpt_jax.system import logs, streams
from minigpt_jax.system.heap import retain_heap
from minigpt_jax.tasks import prepare
from minigpt_jax.tasks.fine_tuning import num_values
from minigpt_jax.tasks.language_modelling import LanguageModelling

log = logging.getLogger(__name__)

MIN_SEEDS = 3  # fewer say nothing about chance
VARIANTS = "changes.json"
SAMPLE_SECONDS = 0.25  # time of the steps that are timed at once
# The ratios of the pairs with these indices, once sorted, contain their median with a probability of 96 % (binomial).
PAIRS, LOWER, UPPER = 15, 3, 11


@dataclasses.dataclass(frozen=True)
class Variant:
    """The base, whose settings are empty, or a change of it."""

    settings: Settings
    parameters: int
    relative_step_time: tuple[float, float, float]  # to the base's: lower bound, median and upper bound of the measurement
    steps: int  # that take as long as all steps of the base; as many, if 1 is within these bounds


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The results of a variant, as `stacked.train` returns them, one for each seed."""

    variant: Variant
    equal_tokens: list[dict[str, Any]]
    equal_time: list[dict[str, Any]]  # the same runs, if the step time is the same


def ablate(
    base: Config, workdir: str | Path, *,
    num_seeds: int = MIN_SEEDS, only: Sequence[str] = (), overwrite: bool = False, kernels: str = "tuned",
) -> list[Outcome]:  # fmt: skip
    """Trains a language model with the settings of `base`, and with one change of them at a time, with the seeds 0, 1, 2 and
    so on. `only` selects topics of `changes.CHANGES`. Returns an outcome for the base, then one for each change.

    At equal tokens, all runs have the same number of steps. At equal time, a change has as many steps as fit into the time
    of the base's, and its schedule ends with them. Times are measured in pairs with the base, in this process.

    Each finished run is a line of `results.jsonl` in the folder, and no checkpoint is written. An ablation resumes in its
    folder with the same numbers of steps, and there may be more seeds and topics than before. Raises UsageError for fewer
    than MIN_SEEDS seeds, an unknown topic, and a base that is not a language model trained from random weights; DataError
    for unusable data, and if the folder holds something else, such as an ablation of another base.
    """
    whole_number("seeds", num_seeds, at_least=MIN_SEEDS)
    if base.task != "language_modelling":
        raise UsageError(f"the base is of the task {base.task}: ablations are made for language_modelling")
    for name in ("init_from", "freeze"):
        if (value := get_setting(base, name)) is not None:
            raise UsageError(f"{name}={value}: an ablation trains all parameters from random weights; omit it")
    retain_heap()
    with streams.optional(), logs.shown():
        task = prepare(base, kernels=choose_kernels(base.model, kernels))
        assert isinstance(task, LanguageModelling)
        base = base.override(steps=task.num_steps, seed=0, patience=0)
        folder = Folder(local_path(workdir), base, {}, overwrite, kind="ablation")
        folder.read()  # raises if it holds something else
        folder.check_sources(task.sources)
        variants = measured([{}, *changes(task.config, only)], task, folder, kernels)
        runs = [[points(base, each, num_seeds, steps) for steps in (task.num_steps, each.steps)] for each in variants]
        results = folder.read()
        all_points = [point for both in runs for each in both for point in each]
        if pending := {point.key: point for point in all_points if point.key not in results}:
            train([*pending.values()], [task_of(point, task, kernels) for point in pending.values()], folder, None)
            results = folder.read_results()
    return [
        Outcome(variant, *([results[point.key] for point in each] for each in both))
        for variant, both in zip(variants, runs, strict=True)
    ]


def points(base: Config, variant: Variant, num_seeds: int, num_steps: int) -> list[Point]:
    """A run for each seed."""
    all_settings = [variant.settings | {"seed": seed, "steps": num_steps} for seed in range(num_seeds)]
    return [Point(settings, base.override(settings)) for settings in all_settings]


def task_of(point: Point, task: LanguageModelling, kernels: str) -> LanguageModelling:
    return task.with_settings(point.settings, choose_kernels(point.config.model, kernels))


# ---- Step times -----------------------------------------------------------------------------------------------------------


def measured(all_settings: Sequence[Settings], task: LanguageModelling, folder: Folder, kernels: str) -> list[Variant]:
    """The variants with these settings, the base first. Those that the folder does not have yet are measured and added."""
    known, device = read_variants(folder), first_device()
    if missing := [settings for settings in all_settings if key_of(settings) not in known]:
        tasks = [task_of(Point(settings, task.config.override(settings)), task, kernels) for settings in missing]
        for each in tasks:
            stacked.num_fitting(each, device, 1, None)  # raises if it is too large
        with locked(folder.workdir):
            known = read_variants(folder)
            if folder.overwrite:
                (folder.workdir / VARIANTS).unlink(missing_ok=True)
            folder.open(task.sources)
            base = stacked.Stack([task], device)
            for settings, other in zip(missing, tasks, strict=True):
                if key_of(settings) not in known:  # another process may have measured it until now
                    known[key_of(settings)] = measure(settings, other, base, device)
                    saved = [dataclasses.asdict(variant) for variant in known.values()]
                    write_text(folder.workdir / VARIANTS, json.dumps(saved, indent=2) + "\n")
    return [known[key_of(settings)] for settings in all_settings]


def read_variants(folder: Folder) -> dict[str, Variant]:
    """The measured variants, by the key of their settings. Raises DataError if their file cannot be read."""
    path = folder.workdir / VARIANTS
    if folder.overwrite or not path.exists():
        return {}
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        variants = [Variant(**row | {"relative_step_time": tuple(row["relative_step_time"])}) for row in rows]
        return {key_of(variant.settings): variant for variant in variants}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path} cannot be read: {error!r}; restart with --overwrite") from error


def measure(settings: Settings, task: LanguageModelling, base: stacked.Stack, device: Any) -> Variant:
    """The variant of this task, whose steps are timed beside those of the base unless they are the same program."""
    parameters = num_values(jax.eval_shape(task.objective.init, jax.random.key(0)))
    if stacked.program(task) == stacked.program(base.tasks[0]):
        return Variant(settings, parameters, (1.0, 1.0, 1.0), task.num_steps)
    low, ratio, high = relative_step_time(stacked.Stack([task], device), base)
    steps = task.num_steps if low <= 1 <= high else max(1, round(task.num_steps / ratio))
    log.info("%s: a step takes %.3f to %.3f of the base's time; %d steps in the time of %d.",
             named(settings), low, high, steps, task.num_steps)  # fmt: skip
    return Variant(settings, parameters, (low, ratio, high), steps)


def relative_step_time(runs: stacked.Stack, base: stacked.Stack) -> tuple[float, float, float]:
    """(lower bound, median, upper bound) of the time of a step relative to the base's, from pairs that are timed directly
    one after the other, so that a change of the machine's load affects both."""
    for each in (runs, base):
        seconds_of(each, 2)  # compiles
    num_steps, ratios = max(1, round(SAMPLE_SECONDS / seconds_of(base, 1))), []
    for pair in range(PAIRS):
        first, second = (runs, base) if pair % 2 else (base, runs)
        seconds = {first: seconds_of(first, num_steps), second: seconds_of(second, num_steps)}
        ratios.append(seconds[runs] / seconds[base])
    ratios.sort()
    return ratios[LOWER], statistics.median(ratios), ratios[UPPER]


def seconds_of(runs: stacked.Stack, num_steps: int) -> float:
    """The time of that many training steps."""
    start = time.perf_counter()
    for _ in range(num_steps):
        runs.advance()
    jax.block_until_ready(runs.state)
    return time.perf_counter() - start
