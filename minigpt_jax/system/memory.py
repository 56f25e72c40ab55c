"""How much memory a process and its device have used at most."""

import contextlib
import importlib
import sys
from pathlib import Path
from typing import Any


def peak_megabytes() -> float | None:
    """The most memory that this process has held; None where the system does not say."""
    with contextlib.suppress(OSError):  # `getrusage` would count what the parent held when it started this process
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024 / 1e6
    try:
        resource = importlib.import_module("resource")
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e6


def device_peak_megabytes(device: Any) -> float | None:
    """The most memory of its own that an accelerator has held; None of a CPU, which has none of its own."""
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
    return None if peak is None else peak / 1e6
