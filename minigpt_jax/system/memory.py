"""Peak memory of this process and of its device."""

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
