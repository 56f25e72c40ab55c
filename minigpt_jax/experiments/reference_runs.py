"""Makes a reference: trains several seeds of a preset, one after another, and collects their losses."""

import datetime
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minigpt_jax.api import choose_kernels, default_sharding, train
from minigpt_jax.config import Config, differences
from minigpt_jax.errors import DataError, UsageError
from minigpt_jax.runs import checkpoints
from minigpt_jax.runs.folder import read_config
from minigpt_jax.runs.metrics import read_metrics
from minigpt_jax.runs.references import MIN_SEEDS, Evaluation, Reference
from minigpt_jax.system.hardware import processor
from minigpt_jax.tasks import prepare
from minigpt_jax.tasks.task import Task, trained_params

log = logging.getLogger(__name__)

MEASURES = "loss", "accuracy"  # on all validation data, of those that the task has


def make_reference(
    preset: str, config: Config, workdir: Path, num_seeds: int, command: str, overwrite: bool = False
) -> Reference:
    """Trains the seeds 0, 1, 2 and so on in `workdir/SEED`, and collects their losses.

    Complete runs are kept, interrupted ones resumed. `command` is recorded, as how to make the reference again.

    Raises UsageError for fewer than MIN_SEEDS seeds, DataError if a folder holds a run with other settings, or if the runs
    differ in their data, versions, device or evaluated steps.
    """
    if num_seeds < MIN_SEEDS:
        raise UsageError(f"seeds={num_seeds} must be at least {MIN_SEEDS}")
    config = config.override(sample_every=0, patience=0)
    runs = {workdir / str(seed): config.override(seed=seed) for seed in range(num_seeds)}
    if not overwrite:
        for folder, config_of_seed in runs.items():
            require_same_settings(config_of_seed, folder)
    for number, (folder, config_of_seed) in enumerate(runs.items(), 1):
        log.info("Run %d of %d, in %s:", number, num_seeds, folder)
        train(config_of_seed, folder, overwrite)
    return collect(preset, config, list(runs), command)


def require_same_settings(config: Config, folder: Path) -> None:
    """Raises DataError if the folder holds a run with other settings. Training would resume it even with other `steps`."""
    if not checkpoints.steps(folder):
        return
    before = read_config(folder)
    changes = differences(before, config.with_data_settings_of(before))
    neutral = config.neutral_settings - {"seed", "eval_every", "log_every"}  # the last two decide what is measured
    if changed := [f"{name}={a} (now {b})" for name, (a, b) in changes.items() if name not in neutral]:
        raise DataError(
            f"{folder} holds a run with {', '.join(changed)}: choose another --workdir, or restart with --overwrite"
        )


def collect(preset: str, config: Config, folders: Sequence[Path], command: str) -> Reference:
    """The reference of complete runs of this config, which differ only in their seeds."""
    task = prepare(config, kernels=choose_kernels(config.model), sharding=default_sharding())
    infos = [checkpoints.read_info(folder, task.num_steps) for folder in folders]
    for folder, info in zip(folders, infos, strict=True):
        if info.sources != dict(task.sources):
            raise DataError(f"{folder} was trained on other data: restart with --overwrite")
        if info.made_with != infos[0].made_with:
            names = [name for name, value in infos[0].made_with.items() if info.made_with.get(name) != value]
            raise DataError(
                f"{folder} was trained with another {', '.join(names)} than {folders[0]}: restart with --overwrite"
            )
    measured = [measures_at_the_end(task, folder) for folder in folders]
    return Reference(
        preset=preset, command=command, date=datetime.date.today().isoformat(), machine=processor(),
        made_with=infos[0].made_with, sources=dict(task.sources), data_facts=task.data_facts(),
        seeds=tuple(range(len(folders))), evaluations=evaluations(folders),
        final={name: tuple(measures[name] for measures in measured) for name in MEASURES if name in measured[0]},
        config=task.config.override(data_dir=None),
    )  # fmt: skip


def measures_at_the_end(task: Task, folder: Path) -> dict[str, float]:
    """The measures of a complete run's last checkpoint, on all validation data, to five decimals."""
    checkpoints.verify(folder, task.num_steps)
    measures = task.measures(trained_params(task, folder, task.num_steps, default_sharding()))
    return {name: round(float(value), 5) for name, value in measures.items()}


def evaluations(folders: Sequence[Path]) -> tuple[Evaluation, ...]:
    """What the runs measured at each step that was evaluated. Raises DataError if these steps differ."""
    runs = [evaluated_rows(folder) for folder in folders]
    if any(list(rows) != list(runs[0]) for rows in runs):
        raise DataError(f"the runs in {folders[0].parent} were evaluated at different steps: restart with --overwrite")

    def values(step: int, name: str) -> tuple[float, ...]:
        """Of all runs. Empty if this step was not logged."""
        return tuple(round(rows[step][name], 5) for rows in runs) if name in runs[0][step] else ()

    def learning_rate(step: int) -> float | None:
        row = runs[0][step]
        return float(f"{row['learning_rate']:.6g}") if "learning_rate" in row else None

    return tuple(
        Evaluation(
            step, values(step, "val_loss"), values(step, "train_loss"), values(step, "grad_norm"), learning_rate(step)
        )
        for step in runs[0]
    )


def evaluated_rows(folder: Path) -> dict[int, dict[str, Any]]:
    """The metrics of each step that was evaluated, those of training included. Raises DataError if one is not finite."""
    by_step: dict[int, dict[str, Any]] = {}
    for row in read_metrics(folder / "metrics.jsonl"):
        by_step.setdefault(row["step"], {}).update(row)
    evaluated = {step: row for step, row in by_step.items() if "val_loss" in row}
    for step, row in evaluated.items():
        if None in row.values():
            raise DataError(f"{folder} has a loss or gradient at step {step} that is not finite, so it is not a reference")
    return evaluated
