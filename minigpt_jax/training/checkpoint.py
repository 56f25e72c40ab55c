"""A run's folder: config, tokenizer, metrics, and checkpoints that are whole or absent.

    runs/NAME/config.json  tokenizer.json  metrics.jsonl
              checkpoints/STEP/params/       Orbax: the parameters
                               opt_state/    Orbax: the optimizer's state
                               checkpoint.json  step, losses, and what the run was trained on
                               manifest.json    size and sha256 of every other file, written last

A checkpoint is written into a folder of another name and renamed when it is complete, so a process that is killed leaves the
earlier ones as they were. Orbax restores files with flipped bits without a word; the manifest is how they are found.
"""

import dataclasses
import hashlib
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from minigpt_jax.config import Config
from minigpt_jax.data import tokenizers
from minigpt_jax.errors import DataError
from minigpt_jax.generation.language_model import LanguageModel
from minigpt_jax.models.gpt import GPT
from minigpt_jax.training.step import TrainState, init_params

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class CheckpointInfo:
    """What is known of a checkpoint without its arrays. Losses are in nats per token, on the evaluation batches."""

    step: int
    text_sha256: str
    val_loss: float | None = None  # None where this step was not evaluated
    best_val_loss: float | None = None  # the lowest up to this step
    pending_losses: tuple[float, ...] = ()  # training losses of the steps since the last row of metrics
    seconds: float = 0.0  # that the run took up to this step, over all its processes
    format: int = FORMAT


def checkpoints_dir(workdir: Path) -> Path:
    return workdir / "checkpoints"


def steps(workdir: Path) -> list[int]:
    """Steps of the checkpoints in a run's folder, in ascending order."""
    folder = checkpoints_dir(workdir)
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.is_dir() else []


def check_owned(workdir: Path) -> None:
    """Raises DataError where a folder holds a config or checkpoints of something else, which are not ours to replace."""
    if (workdir / "config.json").exists():
        read_config(workdir)
    folder = checkpoints_dir(workdir)
    strangers = [path.name for path in folder.iterdir() if not is_own(path)] if folder.is_dir() else []
    if strangers:
        raise DataError(
            f"{folder} holds {strangers[0]!r}, which is not a checkpoint of this program: choose another --workdir"
        )


def is_own(path: Path) -> bool:
    """Whether it is a checkpoint's folder, finished or left behind by a kill."""
    return path.name.removesuffix(".tmp").isdigit()


def delete_all(workdir: Path) -> None:
    """Deletes the checkpoints of a run, and nothing else. Raises OSError where that fails."""
    folder = checkpoints_dir(workdir)
    for path in filter(is_own, list(folder.iterdir()) if folder.is_dir() else []):
        shutil.rmtree(path)


def read_info(workdir: Path, step: int) -> CheckpointInfo:
    """Raises DataError where it is damaged or of another version of the format."""
    path = checkpoints_dir(workdir) / str(step) / "checkpoint.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise DataError(f"{path} has format {values['format']}; this version of minigpt_jax reads format {FORMAT}")
        return CheckpointInfo(**values)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise error if isinstance(error, DataError) else DataError(f"{path} is damaged: {error}") from error


def write_text(path: Path, text: str) -> None:
    """Writes aside and renames: the file is the old one or the new one, never half of it."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def save(workdir: Path, state: TrainState, info: CheckpointInfo) -> None:
    """Writes the checkpoint of `info.step`, or leaves the folder as it was. Raises OSError."""
    final = checkpoints_dir(workdir) / str(info.step)
    aside = final.with_name(f"{info.step}.tmp").absolute()
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            for name in ("params", "opt_state"):
                checkpointer.save(aside / name, getattr(state, name))
                checkpointer.wait_until_finished()  # a save that fails in the background says so only here
    except ValueError as error:  # what Orbax makes of a full disk
        raise OSError(f"Orbax could not save: {error}") from error
    (aside / "checkpoint.json").write_text(json.dumps(dataclasses.asdict(info), indent=2) + "\n", encoding="utf-8")
    (aside / "manifest.json").write_text(json.dumps(checksums(aside), indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(final, ignore_errors=True)
    os.replace(aside, final)


def checksums(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and sha256 of every file below a folder but its manifest, by relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / "manifest.json")
    sums = {}
    for path in files:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        sums[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": digest}
    return sums


def verify(workdir: Path, step: int) -> None:
    """Raises DataError that names every file of a checkpoint that is not as it was written."""
    folder = checkpoints_dir(workdir) / str(step)
    try:
        written = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder} has no readable manifest.json: {error}") from error
    found = checksums(folder)
    problems = [f"{name} is missing" for name in sorted(set(written) - set(found))]
    problems += [f"{name} does not belong there" for name in sorted(set(found) - set(written))]
    problems += [f"{name} has changed" for name in sorted(set(found) & set(written)) if found[name] != written[name]]
    if problems:
        raise DataError(f"{folder} is damaged: {', '.join(problems)}")


def prune(workdir: Path, keep: int) -> None:
    """Deletes all checkpoints but the newest `keep` and the best."""
    for step in set(steps(workdir)) - set(steps(workdir)[-keep:]) - {best_step(workdir)}:
        shutil.rmtree(checkpoints_dir(workdir) / str(step))


def best_step(workdir: Path) -> int | None:
    """The checkpoint with the lowest validation loss; where none was evaluated, the newest."""
    infos = [read_info(workdir, step) for step in steps(workdir)]
    evaluated = [info for info in infos if info.val_loss is not None and math.isfinite(info.val_loss)]
    if evaluated:
        return min(evaluated, key=lambda info: info.val_loss).step
    return infos[-1].step if infos else None


def restore_arrays(folder: Path, like: Any) -> Any:
    """The pytree that Orbax saved in a folder, with the structure, shapes and types of `like`, on the default device."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])  # and not where it was saved, which may be a GPU
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), like)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(folder.absolute(), like)
    except (ValueError, KeyError) as error:
        reason = str(error).split(". ")[0].split("\n")[0]
        raise DataError(f"the arrays in {folder} are not those of the model that config.json describes: {reason}") from error


def restore(workdir: Path, step: int, like: TrainState) -> TrainState:
    """The state at a checkpoint; `like` is a state or its `jax.eval_shape`. Raises DataError where it is damaged."""
    verify(workdir, step)
    folder = checkpoints_dir(workdir) / str(step)
    return TrainState(
        # Placed like the arrays: were it left to JAX where it goes, the second step would compile once more.
        step=jax.device_put(jax.numpy.asarray(step, jax.numpy.int32), jax.devices()[0]),
        params=restore_arrays(folder / "params", like.params),
        opt_state=restore_arrays(folder / "opt_state", like.opt_state),
    )


def read_config(workdir: Path) -> Config:
    """The config of a run. Raises DataError where there is none."""
    try:
        return Config.from_json((workdir / "config.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(
            f"{workdir} holds no run (config.json: {error.strerror}); train one with scripts/train.py"
        ) from error
    except DataError as error:
        raise DataError(f"{workdir / 'config.json'}: {error}") from error


def load(workdir: str | Path) -> LanguageModel:
    """The language model of a run: the parameters with the lowest validation loss, and the run's tokenizer.

    Raises DataError where the folder holds no run, no checkpoint yet, or a damaged one.
    """
    workdir = Path(workdir)
    config = read_config(workdir)
    step = best_step(workdir)
    if step is None:
        raise DataError(f"{workdir} has no checkpoint yet; go on training it with scripts/train.py --workdir {workdir}")
    verify(workdir, step)
    try:
        tokenizer = tokenizers.from_json((workdir / "tokenizer.json").read_text(encoding="utf-8"))
    except (OSError, DataError) as error:
        raise DataError(f"{workdir / 'tokenizer.json'} cannot be read: {error}") from error
    model = GPT(config.model)
    like = jax.eval_shape(lambda: init_params(jax.random.key(0), model))
    return LanguageModel(config.model, tokenizer, restore_arrays(checkpoints_dir(workdir) / str(step) / "params", like))
