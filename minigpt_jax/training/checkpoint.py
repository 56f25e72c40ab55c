"""A run's folder: config, tokenizer, metrics, and checkpoints that are whole or absent.

    runs/NAME/config.json  tokenizer.json  metrics.jsonl
              checkpoints/STEP/params/       Orbax: the parameters
                               opt_state/    Orbax: the optimizer's state
                               average/      Orbax: the moving average of the parameters, with --ema
                               checkpoint.json  step, losses, and what the run was trained on
                               manifest.json    size and sha256 of every other file, written last
              train.lock                     locked as long as a process trains here

A checkpoint is written into a folder of another name and renamed when it is complete, so a process that is killed leaves the
earlier ones as they were. Orbax restores files with flipped bits without a word; the manifest is how they are found. A
damaged checkpoint that a run passes over is set aside as STEP.damaged.
"""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import logging
import math
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax
import jax
import optax
import orbax.checkpoint as ocp

from minigpt_jax.config import Config
from minigpt_jax.data import tokenizers
from minigpt_jax.errors import DataError
from minigpt_jax.generation.language_model import LanguageModel
from minigpt_jax.interop import hf_reader as huggingface
from minigpt_jax.models.gpt import GPT, init_params
from minigpt_jax.training.experiment import Origin
from minigpt_jax.training.state import TrainState

log = logging.getLogger(__name__)

FORMAT = 2
ARRAYS = ("params", "opt_state", "average")  # parts of the state, each a folder of its own


@dataclasses.dataclass(frozen=True)
class CheckpointInfo:
    """What is known of a checkpoint without its arrays. Losses are in nats per token, on the evaluation batches."""

    step: int
    text_sha256: str
    tokenizer_sha256: str
    val_loss: float | None = None  # None where this step was not evaluated
    best_val_loss: float | None = None  # the lowest up to this step
    pending_losses: tuple[float, ...] = ()  # training losses of the steps since the last row of metrics
    seconds: float = 0.0  # that the run took up to this step, over all its processes
    num_skipped: int = 0  # steps whose loss or gradient was not finite, which changed nothing
    bad_steps: int = 0  # how many of them were the last ones
    last_loss: float | None = None  # the last training loss that was finite
    evaluations_since_best: int = 0
    made_with: dict[str, str] = dataclasses.field(default_factory=dict)  # see `environment`
    format: int = FORMAT


def environment() -> dict[str, str]:
    """What the bits of a step depend on beside the config: versions, device and flags of the compiler."""
    return {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "flax": flax.__version__,
        "optax": optax.__version__,
        "device": f"{jax.devices()[0].platform} {jax.devices()[0].device_kind}",
        "machine": platform.machine(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Holds a run's folder for one process, until it leaves or dies. Raises DataError where another one holds it."""
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / "train.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"another process trains in {workdir}: wait for it, or choose another --workdir") from None
        yield


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


def check_not_foreign(workdir: Path) -> None:
    """Raises DataError where a folder is no run's but a model of Hugging Face."""
    if huggingface.is_one(workdir):
        raise DataError(
            f"{workdir} is a model of Hugging Face and not a run: begin one in another folder, with --init_from {workdir}"
        )


def is_own(path: Path) -> bool:
    """Whether it is a checkpoint's folder: whole, set aside, or left behind by a kill while it was written or deleted."""
    step, _, state = path.name.partition(".")
    return step.isdigit() and state in ("", "damaged", "tmp", "gone")


def delete_all(workdir: Path) -> None:
    """Deletes the checkpoints of a run, and nothing else. Raises OSError where that fails."""
    folder = checkpoints_dir(workdir)
    for path in filter(is_own, list(folder.iterdir()) if folder.is_dir() else []):
        delete(path)


def delete_leftovers(workdir: Path) -> None:
    """Deletes what was being written or deleted when a process was killed."""
    for path in [path for state in ("tmp", "gone") for path in checkpoints_dir(workdir).glob(f"*.{state}")]:
        if is_own(path):
            shutil.rmtree(path)


def delete(path: Path) -> None:
    """Takes a checkpoint's name away first, so that one that is killed half-way leaves nothing that looks whole."""
    gone = path.with_name(path.name.partition(".")[0] + ".gone")
    if gone != path:
        shutil.rmtree(gone, ignore_errors=True)
        os.replace(path, gone)
    shutil.rmtree(gone)


def set_aside(workdir: Path, step: int) -> None:
    """Renames a damaged checkpoint to STEP.damaged, in place of an earlier one of that name."""
    path = checkpoints_dir(workdir) / str(step)
    aside = path.with_name(f"{step}.damaged")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(path, aside)


def read_info(workdir: Path, step: int) -> CheckpointInfo:
    """Raises DataError where it is damaged or of another version of the format."""
    path = checkpoints_dir(workdir) / str(step) / "checkpoint.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise DataError(f"{path} has format {values['format']}; this version of minigpt_jax reads format {FORMAT}")
        if values["step"] != step:
            raise ValueError(f"it is that of step {values['step']}")
        return CheckpointInfo(**values | {"pending_losses": tuple(values["pending_losses"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise error if isinstance(error, DataError) else DataError(f"{path} is damaged: {error}") from error


def save(workdir: Path, state: TrainState, info: CheckpointInfo) -> None:
    """Writes the checkpoint of `info.step`, or leaves the folder as it was. Raises OSError."""
    final = checkpoints_dir(workdir) / str(info.step)
    aside = final.with_name(f"{info.step}.tmp").absolute()
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        require_room(aside, 2**20 + sum(leaf.nbytes for leaf in jax.tree.leaves(state)))  # and what Orbax adds
        with ocp.StandardCheckpointer() as checkpointer:
            for name in ARRAYS:
                if getattr(state, name) is not None:
                    checkpointer.save(aside / name, getattr(state, name))
                    checkpointer.wait_until_finished()  # a save that fails in the background says so only here
        (aside / "checkpoint.json").write_text(json.dumps(dataclasses.asdict(info), indent=2) + "\n", encoding="utf-8")
        (aside / "manifest.json").write_text(manifest_text(checksums(aside)), encoding="utf-8")
    except (OSError, ValueError) as error:
        shutil.rmtree(aside, ignore_errors=True)  # what fills a full disk is worth nothing
        if isinstance(error, OSError):
            raise
        raise OSError(f"Orbax could not save: {str(error).splitlines()[0]}") from error  # its way to tell of a full disk
    if final.exists():
        delete(final)
    os.replace(aside, final)


def require_room(folder: Path, num_bytes: int) -> None:
    """Raises OSError where so much cannot be written. Orbax's threads meet a full disk with a page of tracebacks each."""
    path = folder / "room"
    with path.open("wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, num_bytes)
        elif shutil.disk_usage(folder).free < num_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    path.unlink()


def manifest_text(sums: dict[str, dict[str, Any]]) -> str:
    return json.dumps(sums, indent=2) + "\n"


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
        text = (folder / "manifest.json").read_text(encoding="utf-8")
        written = json.loads(text)
        if not isinstance(written, dict) or text != manifest_text(written):
            raise ValueError("it is not as it was written")
    except (OSError, ValueError) as error:
        raise DataError(f"{folder} has no readable manifest.json: {error}") from error
    try:
        found = checksums(folder)
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error}") from error
    problems = [f"{name} is missing" for name in sorted(set(written) - set(found))]
    problems += [f"{name} does not belong there" for name in sorted(set(found) - set(written))]
    problems += [f"{name} has changed" for name in sorted(set(found) & set(written)) if found[name] != written[name]]
    if problems:
        raise DataError(f"{folder} is damaged: {', '.join(problems)}")


def prune(workdir: Path, keep: int) -> None:
    """Deletes all checkpoints but the newest `keep`, the best, and damaged ones that call themselves better than that."""
    kept = set(steps(workdir)[-keep:])
    for step in best_first(workdir):
        kept.add(step)
        with contextlib.suppress(DataError):
            verify(workdir, step)
            break
    for step in set(steps(workdir)) - kept:
        delete(checkpoints_dir(workdir) / str(step))


def best_first(workdir: Path) -> list[int]:
    """Steps by validation loss, the lowest first; then those not evaluated, the newest first.

    Before them all come those of which that cannot be read, for `first_whole` to name them.
    """

    def rank(step: int) -> tuple:
        try:
            val_loss = read_info(workdir, step).val_loss
        except DataError:
            return -1, -step
        return (0, val_loss) if val_loss is not None and math.isfinite(val_loss) else (1, -step)

    return sorted(steps(workdir), key=rank)


def first_whole(workdir: Path, candidates: list[int]) -> int:
    """The first of some steps whose checkpoint is as it was written, with a line for each that is not.

    Raises DataError where none is.
    """
    for place, step in enumerate(candidates):
        try:
            verify(workdir, step)
            read_info(workdir, step)
        except DataError as error:
            if place + 1 == len(candidates):
                raise DataError(f"no checkpoint of {workdir} can be used: {error}") from error
            log.warning("DAMAGED: %s. Trying step %d instead.", error, candidates[place + 1])
        else:
            return step
    raise DataError(f"{workdir} has no checkpoint yet; go on training it with scripts/train.py --workdir {workdir}")


def restore_arrays(folder: Path, like: Any) -> Any:
    """The pytree that Orbax saved in a folder, with the structure, shapes and types of `like`, on the default device."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])  # and not where it was saved, which may be a GPU
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), like)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(folder.absolute(), like)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).split(". ")[0].split("\n")[0]
        raise DataError(f"the arrays in {folder} are not those of the model that config.json describes: {reason}") from error


def restore(workdir: Path, step: int, like: TrainState) -> TrainState:
    """The state at a checkpoint that was verified; `like` is a state or its `jax.eval_shape`.

    Raises DataError where its arrays are others.
    """
    folder = checkpoints_dir(workdir) / str(step)
    return TrainState(
        # Placed like the arrays: were it left to JAX where it goes, the second step would compile once more.
        step=jax.device_put(jax.numpy.asarray(step, jax.numpy.int32), jax.devices()[0]),
        **{name: restore_arrays(folder / name, getattr(like, name)) for name in ARRAYS if getattr(like, name) is not None},
    )


def read_config(workdir: Path) -> Config:
    """The config of a run. Raises DataError where there is none."""
    check_not_foreign(workdir)
    try:
        return Config.from_json((workdir / "config.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(
            f"{workdir} holds no run, nor a model of Hugging Face (config.json: {error.strerror}); "
            "train one with scripts/train.py"
        ) from error
    except (DataError, UnicodeDecodeError) as error:
        raise DataError(f"{workdir / 'config.json'}: {error}") from error


def load(workdir: str | Path) -> LanguageModel:
    """The language model of a run: the parameters with the lowest validation loss, and the run's tokenizer.

    Of a run with `ema` it has the average of the parameters. Raises DataError where the folder holds no run, no checkpoint
    yet, or only damaged ones.
    """
    workdir = Path(workdir)
    config = read_config(workdir)
    step = first_whole(workdir, best_first(workdir))
    return load_step(workdir, config, step, read_origin(workdir, step).tokenizer)


def load_step(workdir: Path, config: Config, step: int, tokenizer: tokenizers.Tokenizer) -> LanguageModel:
    """The language model of a checkpoint that was verified, with its tokenizer. Raises DataError as `load` does."""
    model = GPT(config.model)
    like = jax.eval_shape(lambda: init_params(jax.random.key(0), model))
    folder = checkpoints_dir(workdir) / str(step)
    params = restore_arrays(folder / ("average" if config.training.ema else "params"), like)
    return LanguageModel(config.model, tokenizer, params)


def read_origin(workdir: Path, step: int) -> Origin:
    """The run's tokenizer and the sum of its text. Raises DataError where the tokenizer is not that of the checkpoint."""
    path, info = workdir / "tokenizer.json", read_info(workdir, step)
    try:
        tokenizer = tokenizers.from_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, DataError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if tokenizer.sha256 != info.tokenizer_sha256:
        raise DataError(f"{path} is not the tokenizer that checkpoint {step} was trained with")
    return Origin(tokenizer, info.text_sha256)
