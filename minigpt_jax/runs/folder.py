"""A run's folder: its config, and the lock that reserves it for one process."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from minigpt_jax.commands import command
from minigpt_jax.config import Config
from minigpt_jax.errors import DataError
from minigpt_jax.files import make_folder


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Reserves a run's folder for this process, until the context or the process ends. Raises DataError if it is taken."""
    make_folder(workdir)
    lock = FileLock(workdir / "train.lock")
    try:
        lock.acquire(blocking=False)
    except NotImplementedError as error:
        raise DataError(f"the file system of {workdir} has no locks: choose another --workdir") from error
    except Timeout:
        raise DataError(f"another process is training in {workdir}: wait for it, or choose another --workdir") from None
    try:
        yield
    finally:
        lock.release()


def read_config(workdir: Path) -> Config:
    """The config of a run. Raises DataError if there is none or it cannot be read."""
    try:
        return Config.from_json((workdir / "config.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(
            f"{workdir} contains neither a run nor a Hugging Face model (config.json: {error.strerror}): "
            f"train one with {command('train')}"
        ) from error
    except (DataError, UnicodeDecodeError) as error:
        raise DataError(f"{workdir / 'config.json'}: {error}") from error
