"""Memory: the peak of this process and of its device, and what is available."""

import contextlib
import sys
from pathlib import Path
from typing import Any


def peak_megabytes() -> float | None:
    """The peak resident memory of this process, in MB; None where the system does not report it."""
    with contextlib.suppress(OSError):  # `getrusage` can include the parent's memory at the time of the fork
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024 / 1e6
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e6


def device_peak_megabytes(device: Any) -> float | None:
    """The peak memory of an accelerator, in MB. None for a CPU, which has no memory of its own."""
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
    return None if peak is None else peak / 1e6


def available_bytes(device: Any) -> float | None:
    """The memory that is still available on an accelerator, or to this process on a CPU. None where it is not known."""
    if stats := device.memory_stats():
        return stats["bytes_limit"] - stats["bytes_in_use"] if "bytes_limit" in stats else None
    free = []
    with contextlib.suppress(OSError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    with contextlib.suppress(OSError, ValueError):  # a container's own limit; "max" without one
        free.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(free, default=None)
