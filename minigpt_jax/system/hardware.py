"""What this machine can do at most: measured, to compare with.

JAX is imported where it is needed, so that the memory of processes without it can be measured as well.
"""

import time
from collections.abc import Callable

import numpy as np


def best_seconds(run: Callable[[], object], times: int = 10) -> float:
    """The shortest of several runs, after one that compiles or fills caches."""
    run()
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def matmul(rows: int, inner: int, columns: int, dtype: str = "float32") -> tuple[Callable[[], object], int]:
    """A function that computes a product of two matrices in JAX, of rows × inner and inner × columns, and its FLOPs."""
    import jax
    import jax.numpy as jnp

    left, right = jnp.ones((rows, inner), dtype), jnp.ones((inner, columns), dtype)
    multiply = jax.jit(jnp.matmul)
    return lambda: multiply(left, right).block_until_ready(), 2 * rows * inner * columns


def matmul_rate(rows: int = 2048, inner: int = 2048, columns: int = 2048, dtype: str = "float32") -> float:
    """Floating-point operations per second of such a product, at best."""
    run, flops = matmul(rows, inner, columns, dtype)
    return flops / best_seconds(run)


def copy() -> tuple[Callable[[], object], int]:
    """A function that copies 256 MB in main memory, and how many bytes it reads and writes."""
    source, target = np.ones(2**25), np.empty(2**25)
    return lambda: np.copyto(target, source), 2 * source.nbytes


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of such a copy, at best."""
    run, num_bytes = copy()
    return num_bytes / best_seconds(run)
