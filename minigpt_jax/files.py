"""Files and folders that are whole or not there at all, and the checksums by which they are known again."""

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def file_sha256(path: Path) -> str:
    """The same of a file, which need not fit into memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def replaced(path: Path, aside: Path | None = None) -> Iterator[Path]:
    """A new path for a file or a folder, which is renamed to `path` at the end; if anything fails it is deleted.

    What was at `path` stays there until then, and after a power cut there is either the old or the new content: the new one
    is flushed to the disk before it is renamed, and then the rename. Several processes may do this at once. Raises OSError
    where it cannot be written, or a folder is in the way.
    """
    aside = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp") if aside is None else aside
    try:
        yield aside
        flush(aside)
        os.replace(aside, path)
        flush(path.parent, recursive=False)
    except BaseException:
        if aside.is_dir():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.unlink(missing_ok=True)
        raise


def flush(path: Path, recursive: bool = True) -> None:
    """Waits until a file, or a folder with all that is in it, is on the disk."""
    if path.is_dir():
        for inside in path.iterdir() if recursive else ():
            flush(inside)
        if os.name == "nt":  # where folders cannot be opened
            return
    # Windows flushes only what was opened for writing.
    descriptor = os.open(path, os.O_RDWR if path.is_file() and os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems cannot flush folders
            raise
    finally:
        os.close(descriptor)


def write_bytes(path: Path, data: bytes) -> None:
    with replaced(path) as aside:
        aside.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode("utf-8"))


def cache_dir() -> Path:
    """$XDG_CACHE_HOME/minigpt_jax, else ~/.cache/minigpt_jax.

    Source: XDG Base Directory Specification, by which a value that is empty or relative is to be ignored.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (cache if cache.is_absolute() else Path.home() / ".cache") / "minigpt_jax"
