"""The checkpoints of a run: written atomically, verified, ranked and pruned."""

import contextlib
import dataclasses
import json
import logging
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minigpt_jax.commands import command
from minigpt_jax.errors import DataError
from minigpt_jax.files import atomic_path, flush, make_folder
from minigpt_jax.runs import arrays, manifest
from minigpt_jax.runs.folder import read_config

log = logging.getLogger(__name__)

FORMAT = 3


@dataclasses.dataclass(frozen=True)
class CheckpointInfo:
    """A checkpoint's metadata: everything but its arrays. Validation losses are measured on the evaluation batches."""

    step: int
    sources: dict[str, str]  # sha256 by name of the data it was trained on
    val_loss: float | None = None  # None if this step was not evaluated
    best_val_loss: float | None = None  # the lowest up to this step
    pending_losses: tuple[float, ...] = ()  # training losses of the steps since the last row of metrics
    seconds: float = 0.0  # run time up to this step, over all processes
    num_skipped: int = 0  # skipped steps, whose loss or gradient was not finite
    bad_steps: int = 0  # consecutive skipped steps up to this one
    last_loss: float | None = None  # the last finite training loss
    evaluations_since_best: int = 0
    made_with: dict[str, str] = dataclasses.field(default_factory=dict)  # versions, device, flags: decide the exact bits
    format: int = FORMAT

    def is_out_of_patience(self, patience: int) -> bool:
        """Whether this many evaluations in a row had no lower loss. Never for 0."""
        return 0 < patience <= self.evaluations_since_best


def from_format_2(values: dict[str, Any]) -> dict[str, Any]:
    """Format 2 had only one task, and stored the checksums of its text and tokenizer as two separate entries."""
    sources = {name: values[f"{name}_sha256"] for name in ("text", "tokenizer")}
    kept = {name: value for name, value in values.items() if name not in ("text_sha256", "tokenizer_sha256")}
    return kept | {"sources": sources, "format": 3}


def checkpoints_dir(workdir: Path) -> Path:
    return workdir / "checkpoints"


def checkpoint_dir(workdir: Path, step: int) -> Path:
    return checkpoints_dir(workdir) / str(step)


def steps(workdir: Path) -> list[int]:
    """The steps that have a checkpoint in a run's folder, in ascending order."""
    folder = checkpoints_dir(workdir)
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.is_dir() else []


def check_owned(workdir: Path) -> None:
    """Raises DataError if the folder holds a config or checkpoints of another program, which must not be overwritten."""
    if (workdir / "config.json").exists():
        read_config(workdir)
    folder = checkpoints_dir(workdir)
    strangers = [path.name for path in folder.iterdir() if not is_checkpoint_folder(path)] if folder.is_dir() else []
    if strangers:
        raise DataError(
            f"{folder} contains {strangers[0]!r}, which is not a minigpt_jax checkpoint: choose another --workdir"
        )


def is_checkpoint_folder(path: Path) -> bool:
    """Whether this is a checkpoint's folder: complete, set aside as corrupt, or left by an interrupted save or delete."""
    step, _, state = path.name.partition(".")
    return step.isdigit() and state in ("", "damaged", "tmp", "gone")


def delete_all(workdir: Path) -> None:
    """Deletes the checkpoints of a run, and nothing else. Raises OSError if that fails."""
    folder = checkpoints_dir(workdir)
    for path in filter(is_checkpoint_folder, list(folder.iterdir()) if folder.is_dir() else []):
        delete(path)


def delete_leftovers(workdir: Path) -> None:
    """Deletes what an interrupted save or delete left behind."""
    for path in [path for state in ("tmp", "gone") for path in checkpoints_dir(workdir).glob(f"*.{state}")]:
        if is_checkpoint_folder(path):
            shutil.rmtree(path)


def delete(path: Path) -> None:
    """Renames a checkpoint before deleting it, so that an interrupted delete leaves nothing that looks like a checkpoint."""
    gone = path.with_name(path.name.partition(".")[0] + ".gone")
    if gone != path:
        shutil.rmtree(gone, ignore_errors=True)
        os.replace(path, gone)
    shutil.rmtree(gone)


def set_aside(workdir: Path, step: int) -> None:
    """Renames a corrupt checkpoint to STEP.damaged, replacing any earlier one of that name."""
    path = checkpoint_dir(workdir, step)
    aside = path.with_name(f"{step}.damaged")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(path, aside)


def read_info(workdir: Path, step: int) -> CheckpointInfo:
    """A checkpoint's metadata. Raises DataError if it is corrupt or has an unsupported format version."""
    path = checkpoint_dir(workdir, step) / "checkpoint.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] == 2:
            values = from_format_2(values)
        if values["format"] != FORMAT:
            raise DataError(f"{path} has format {values['format']}; this version of minigpt_jax reads 2 and {FORMAT}")
        if values["step"] != step:
            raise ValueError(f"it belongs to step {values['step']}")
        values["pending_losses"] = tuple(values["pending_losses"])
        return CheckpointInfo(**values)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise error if isinstance(error, DataError) else DataError(f"{path} is corrupt: {error}") from error


def save(workdir: Path, trees: Mapping[str, Any], info: CheckpointInfo) -> None:
    """Writes the checkpoint of `info.step`, a tree of arrays under each name. On OSError the others stay intact."""
    final = checkpoint_dir(workdir, info.step).absolute()
    tmp = final.with_name(f"{info.step}.tmp")
    shutil.rmtree(tmp, ignore_errors=True)
    make_folder(tmp)
    with atomic_path(final, tmp):
        arrays.save(tmp, trees)
        (tmp / "checkpoint.json").write_text(json.dumps(dataclasses.asdict(info), indent=2) + "\n", encoding="utf-8")
        manifest.write(tmp)
        if final.exists():
            flush(tmp)
            delete(final)


def restore_eval_params(workdir: Path, step: int, has_average: bool, like: Any, sharding: Any) -> Any:
    """The parameters of a verified checkpoint that evaluation and generation use: their average if the run has one.

    See `arrays.restore` for `like`, `sharding` and the errors.
    """
    return arrays.restore(checkpoint_dir(workdir, step) / ("average" if has_average else "params"), like, sharding)


def verify(workdir: Path, step: int) -> None:
    """Raises DataError naming every file of a checkpoint that is missing, unexpected or changed."""
    manifest.verify(checkpoint_dir(workdir, step))


def prune(workdir: Path, keep: int) -> None:
    """Deletes all checkpoints but the newest `keep`, the best intact one, and corrupt ones that claim a lower loss."""
    kept = set(steps(workdir)[-keep:])
    for step in best_first(workdir):
        kept.add(step)
        with contextlib.suppress(DataError):
            verify(workdir, step)
            break
    for step in set(steps(workdir)) - kept:
        delete(checkpoint_dir(workdir, step))


def best_first(workdir: Path) -> list[int]:
    """Steps by validation loss, lowest first, then steps without a finite one, newest first.

    Checkpoints with unreadable metadata precede them all, so that `first_intact` reports them.
    """

    def rank(step: int) -> tuple[int, float]:
        try:
            val_loss = read_info(workdir, step).val_loss
        except DataError:
            return -1, -step
        return (0, val_loss) if val_loss is not None and math.isfinite(val_loss) else (1, -step)

    return sorted(steps(workdir), key=rank)


def check(workdir: Path, step: int) -> None:
    """Raises DataError if the checkpoint is corrupt or its metadata cannot be read."""
    verify(workdir, step)
    read_info(workdir, step)


def best_intact(workdir: Path) -> int:
    """The step of the intact checkpoint with the lowest validation loss. Raises DataError if there is none."""
    return first_intact(workdir, best_first(workdir))


def first_intact(workdir: Path, candidates: list[int]) -> int:
    """The first of the candidate steps whose checkpoint is intact. Logs a warning for each corrupt one before it.

    Raises DataError if there is none.
    """
    for index, step in enumerate(candidates):
        try:
            check(workdir, step)
        except DataError as error:
            if index + 1 == len(candidates):
                raise DataError(f"{workdir} has no intact checkpoint: {error}") from error
            log.warning("Skipping a checkpoint: %s. Trying step %d instead.", error, candidates[index + 1])
        else:
            return step
    raise DataError(f"{workdir} has no checkpoint yet: train it with {command('train')} --workdir {workdir}")


def all_intact(workdir: Path) -> list[int]:
    """The steps of all intact checkpoints, in ascending order. Logs a warning for each corrupt one. Raises DataError if none
    is intact.
    """
    errors = {}
    for step in steps(workdir):
        try:
            check(workdir, step)
        except DataError as error:
            errors[step] = error
    intact = [step for step in steps(workdir) if step not in errors]
    if not intact:
        first_intact(workdir, [*errors])  # raises
    for error in errors.values():
        log.warning("Skipping a checkpoint: %s.", error)
    return intact
