"""A persistent cache of compiled programs, shared between processes."""

import contextlib
import platform
from collections.abc import Iterator
from pathlib import Path

from minigpt_jax.errors import DataError
from minigpt_jax.files import cache_dir, sha256


@contextlib.contextmanager
def compilation_cache() -> Iterator[None]:
    """Caches the programs that JAX compiles in this context in the user's cache folder, and reuses them at the next start.

    JAX runs any file that it reads from its cache. So each program gets a checksum when the context exits, and programs
    without a matching checksum are deleted on entry. Programs use the instructions of one kind of processor, so each kind
    has its own folder. Does nothing if the user has set JAX's cache folder, or if ours is not writable.
    """
    import jax

    if jax.config.jax_compilation_cache_dir:  # pyright: ignore[reportAttributeAccessIssue]
        yield
        return
    try:
        folder = cache_dir() / f"programs-{processor()}"
        folder.mkdir(parents=True, exist_ok=True)
        prune(folder)
        cached = set(folder.glob("*-cache"))
    except (OSError, DataError):
        yield
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            for path in set(folder.glob("*-cache")) - cached:
                checksum_path(path).write_text(sha256(path.read_bytes()))


def prune(folder: Path, max_bytes: int = 2**29) -> None:
    """Deletes programs without a matching checksum, then the oldest until at most `max_bytes` remain."""
    programs = sorted(folder.glob("*-cache"), key=lambda path: path.stat().st_mtime, reverse=True)
    total = 0
    for path in programs:
        total += path.stat().st_size
        checksum = checksum_path(path)
        if total > max_bytes or not checksum.exists() or checksum.read_bytes() != sha256(path.read_bytes()).encode():
            path.unlink(missing_ok=True)
            checksum.unlink(missing_ok=True)


def checksum_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def processor() -> str:
    """A short hash of this processor's instruction set extensions, or of its name where they are not listed."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return sha256(line.encode())[:8]
    return sha256(f"{platform.machine()} {platform.processor()}".encode())[:8]
