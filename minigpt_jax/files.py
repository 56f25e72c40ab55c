"""Files and folders that are whole or not there at all, and the checksums by which they are known again."""

import contextlib
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
def replaced(path: Path) -> Iterator[Path]:
    """A new path beside `path` for a file or a folder, which takes the name at the end; if anything fails it is deleted.

    What was at `path` is there until then, whatever happens in between. Several processes may do this at once. OSError where
    it cannot be written, or a folder is in the way.
    """
    aside = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield aside
        os.replace(aside, path)
    except BaseException:
        if aside.is_dir():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.unlink(missing_ok=True)
        raise


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
