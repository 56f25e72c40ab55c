"""What concerns the process as a whole: its memory, its compiled programs, and the signals that ask for its end."""

import contextlib
import ctypes
import os
import platform
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from minigpt_jax.files import sha256

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # from <malloc.h>


def keep_freed_memory() -> None:
    """Lets glibc keep freed buffers in the process instead of giving them back to the system. Before JAX is first used.

    A training step on a CPU frees and takes again the same large buffers, and every page that the system hands out anew
    costs a fault. Measured at 4 layers × 128: a step of 57 ms became one of 38 ms. Does nothing elsewhere.

    In threads other than the main one glibc keeps nothing that is larger than 64 MB. So JAX is told to run programs of one
    device on a CPU in the thread that calls them. Measured at 6 × 256, batch 8: 85,000 faults a step became none, and its
    time 0.83 of it.
    """
    if (libc := glibc()) is not None:
        import jax  # here, since this module is for processes without JAX too

        jax.config.update("jax_cpu_enable_async_dispatch", False)
        libc.mallopt(M_MMAP_THRESHOLD, 2**30)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def give_back_freed_memory() -> None:
    """Gives what has been freed so far back to the system: after compiling, and before the first step.

    It lies in parts that are too small for a step's buffers. Measured with 6 layers × 256 and batches of 8: 0.19 GB less at
    the peak. Does nothing where there is no glibc.
    """
    if (libc := glibc()) is not None:
        libc.malloc_trim(0)


def glibc() -> ctypes.CDLL | None:
    """The C library of the process, if it is GNU's."""
    libc = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
    return libc if hasattr(libc, "malloc_trim") else None


def split_cpu() -> None:
    """Lets JAX see a CPU of several cores as two devices, among which sampling divides its rows. Before JAX is first used.

    XLA decodes a few rows with little more than one core. Measured at 6 layers × 256: with 16 rows a step takes 0.72 of the
    time, with 2 rows 0.59. Two and not more, since no machine was at hand to measure more on. Does nothing where the user
    has chosen (JAX_NUM_CPU_DEVICES, XLA_FLAGS).
    """
    import jax

    chosen: int = jax.config.jax_num_cpu_devices  # pyright: ignore[reportAttributeAccessIssue]
    has_chosen = chosen >= 0 or "host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if not has_chosen and num_cores() > 1:
        jax.config.update("jax_num_cpu_devices", 2)


def num_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cache_dir() -> Path:
    """$XDG_CACHE_HOME/minigpt_jax, else ~/.cache/minigpt_jax.

    Source: XDG Base Directory Specification, by which a value that is empty or relative is to be ignored.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (cache if cache.is_absolute() else Path.home() / ".cache") / "minigpt_jax"


@contextlib.contextmanager
def kept_programs() -> Iterator[None]:
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


@contextlib.contextmanager
def noted_signals() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM in here are put on a list, for the loop to end well; the second one ends the process at once."""
    received = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # only the main thread may say what becomes of signals
        return

    def note(number, frame):
        received.append(number)
        for name in before:
            signal.signal(name, signal.SIG_DFL)

    before = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    for name in before:
        signal.signal(name, note)
    try:
        yield received
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
