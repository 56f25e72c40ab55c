"""Compiled programs, kept from one process to the next."""

import contextlib
import platform
from collections.abc import Iterator
from pathlib import Path

from minigpt_jax.files import cache_dir, sha256


@contextlib.contextmanager
def compilation_cache() -> Iterator[None]:
    """Lets JAX keep in the user's cache folder what it compiles in here, and find it there at the next start.

    JAX would run what it finds, whatever it is: so each program gets a checksum when the process ends well, and one that
    does not have its own is deleted at the start. A folder is for one kind of processor, whose instructions they use. Does
    nothing where the user has chosen a folder for JAX, or this one cannot be written.
    """
    import jax

    if jax.config.jax_compilation_cache_dir:  # pyright: ignore[reportAttributeAccessIssue]
        yield
        return
    folder = cache_dir() / f"programs-{processor()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        delete_unchecked(folder)
        found = set(folder.glob("*-cache"))
    except OSError:
        yield
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            for path in set(folder.glob("*-cache")) - found:
                checksum_of(path).write_text(sha256(path.read_bytes()))


def delete_unchecked(folder: Path, most: int = 2**29) -> None:
    """Deletes programs without their own checksum and, where all of them are more than `most` bytes, those made first."""
    programs = sorted(folder.glob("*-cache"), key=lambda path: path.stat().st_mtime, reverse=True)
    total = 0
    for path in programs:
        total += path.stat().st_size
        checksum = checksum_of(path)
        if total > most or not checksum.exists() or checksum.read_bytes() != sha256(path.read_bytes()).encode():
            path.unlink(missing_ok=True)
            checksum.unlink(missing_ok=True)


def checksum_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def processor() -> str:
    """A short name for the kind of processor that this is, with all of its extensions."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return sha256(line.encode())[:8]
    return sha256(f"{platform.machine()} {platform.processor()}".encode())[:8]
