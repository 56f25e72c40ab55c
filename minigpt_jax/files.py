"""Paths that users give, atomic writes of files and folders, checksums, and the cache folder."""

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from minigpt_jax.errors import DataError, UsageError, shortened


def local_path(path: str | os.PathLike) -> Path:
    """A path as users write it: `~` is the home directory, which a shell leaves alone in `--workdir=~/run`.

    Raises UsageError for what is not a path, and for a remote address: `gs://bucket/run`, or what `Path` makes of it,
    `gs:/bucket/run`, or `user@host:run`. One letter before the colon is a drive of Windows.
    """
    if not isinstance(path, str | os.PathLike) or not (text := str(path)) or "\0" in text:
        raise UsageError(f"{shortened(path)} must be the path of a folder or file")
    address = text
    if match := re.match(r"([A-Za-z][\w+.-]+):[/\\]+", text):
        address = f"{match[1]}:{'///' if match[1] == 'file' else '//'}{text[match.end() :]}"
    if match or re.match(r"[\w.-]+@[\w.-]+:", text):
        raise UsageError(f"{address} is a remote address: use a local path, and copy the files yourself")
    text = os.path.expanduser(text)
    return Path(text if os.name == "nt" else re.sub("^//+", "/", text))  # POSIX gives two slashes a meaning of their own


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def file_sha256(path: Path) -> str:
    """The sha256 of a file, which need not fit into memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def atomic_path(path: Path, aside: Path | None = None) -> Iterator[Path]:
    """Yields a temporary path for a new file or folder, which is renamed to `path` at the end, or deleted after an error.

    Until then `path` itself is unchanged. The new content is flushed to the disk before it is renamed, so that a power cut
    leaves either the old or the new one. Several processes may do this at once. Raises OSError if the file or folder cannot
    be written, or another folder is already there.
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


def make_folder(path: Path) -> None:
    """Creates a folder and its missing parents, and flushes their names to the disk."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        flush(folder.parent, recursive=False)


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
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):  # as on some network file systems
            raise
    finally:
        os.close(descriptor)


def write_bytes(path: Path, data: bytes) -> None:
    with atomic_path(path) as aside:
        aside.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode("utf-8"))


def cache_dir() -> Path:
    """$XDG_CACHE_HOME/minigpt_jax, else ~/.cache/minigpt_jax.

    Source: XDG Base Directory Specification, which says to ignore an empty or relative value.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not cache.is_absolute():
        try:
            cache = Path.home() / ".cache"
        except RuntimeError as error:
            raise DataError("there is no home directory for downloads and tokens: set XDG_CACHE_HOME") from error
    return cache / "minigpt_jax"
