"""Part `limits`: what the device can do: matmuls in each precision, and copies of its memory."""

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from minigpt_jax.benchmarks.gpu.setup import Setup, attempt

SIZE, TINY_SIZE = 8192, 64  # of square matrices
PRECISIONS = {  # name → dtype of the matrices, precision of their product
    "bfloat16": ("bfloat16", None),
    "tensorfloat32": ("float32", "tensorfloat32"),
    "float32": ("float32", "float32"),
}
SECONDS = 0.3  # of enqueued work per timed run


def measure(setup: Setup) -> Iterator[dict[str, Any]]:
    """Operations or bytes per second: the median of several runs, each with enough work that starting it does not count."""
    size = TINY_SIZE if setup.rehearse else SIZE
    for name, (dtype, precision) in PRECISIONS.items():
        yield from attempt(name, matmul_rate, size, dtype, precision, setup.rounds)
    yield from attempt("copy", copy_bandwidth, size, setup.rounds)


def matmul_rate(size: int, dtype: str, precision: str | None, rounds: int) -> float:
    """FLOP/s of a product of random matrices. Constant ones are faster on a GPU, since fewer bits flip."""
    with jax.default_matmul_precision(precision):
        left, right = (jax.random.normal(jax.random.key(i), (size, size), dtype) for i in range(2))
        multiply = jax.jit(jnp.matmul)
        return 2 * size**3 / seconds_per_call(lambda: multiply(left, right), rounds)


def copy_bandwidth(size: int, rounds: int) -> float:
    """Bytes read and written per second, by a function that does one operation per element of 2 GB."""
    source = jax.random.normal(jax.random.key(0), (8, size, size))
    negate = jax.jit(jnp.negative)
    return 2 * source.nbytes / seconds_per_call(lambda: negate(source), rounds)


def seconds_per_call(enqueue: Callable[[], jax.Array], rounds: int) -> float:
    """Of a function that returns before its work is done, as JAX's do on a GPU: many calls, then one wait."""
    enqueue().block_until_ready()  # compiles

    def run(times: int) -> float:
        start = time.perf_counter()
        for _ in range(times):
            result = enqueue()
        result.block_until_ready()
        return (time.perf_counter() - start) / times

    times = max(1, round(SECONDS / run(3)))
    return statistics.median(run(times) for _ in range(rounds))
