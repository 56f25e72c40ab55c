"""This machine: its processor, and its measured limits, which are floating-point rate and memory bandwidth.

JAX is imported only inside functions, so that processes without JAX can be measured without its memory.
"""

import contextlib
import math
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def processor() -> str:
    """The name of this machine's processor, as far as the system knows it, and the number of its cores."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        name = models[0].partition(":")[2].strip() if models else name
    return f"{name}, {os.cpu_count()} cores"


def best_seconds(run: Callable[[], object], times: int = 10) -> float:
    """The shortest of several runs, after a warm-up run that compiles and fills caches."""
    run()
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def matmul(rows: int, inner: int, columns: int, dtype: str = "float32") -> tuple[Callable[[], object], int]:
    """(function, FLOPs): a matmul in JAX of rows × inner by inner × columns.

    The numbers vary: a GPU multiplies constants faster than real data, since fewer of its bits flip.
    """
    import jax
    import jax.numpy as jnp

    def operand(*shape: int) -> jax.Array:
        return jnp.sin(jnp.arange(math.prod(shape), dtype=jnp.float32)).reshape(shape).astype(dtype)

    left, right = jax.jit(lambda: (operand(rows, inner), operand(inner, columns)))()
    multiply = jax.jit(jnp.matmul)
    return lambda: multiply(left, right).block_until_ready(), 2 * rows * inner * columns


def matmul_rate(rows: int = 2048, inner: int = 2048, columns: int = 2048, dtype: str = "float32") -> float:
    """The best FLOP/s of that matmul."""
    run, flops = matmul(rows, inner, columns, dtype)
    return flops / best_seconds(run)


def matmul_size(device: Any) -> int:
    """The width of square matrices whose product takes much longer than starting it."""
    return 1024 if device.platform == "cpu" else 8192


def copy() -> tuple[Callable[[], object], int]:
    """(function, bytes): a copy of 256 MB in main memory, and the bytes that it reads and writes."""
    source, target = np.ones(2**25), np.empty(2**25)
    return lambda: np.copyto(target, source), 2 * source.nbytes


def copy_bandwidth() -> float:
    """The best bandwidth of that copy in bytes per second, read and written."""
    run, num_bytes = copy()
    return num_bytes / best_seconds(run)
