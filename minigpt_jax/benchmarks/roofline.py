"""The machine's limits as candidates, so that they are measured under the same load as what they are compared with."""

import abc
from collections.abc import Callable
from typing import Any

from minigpt_jax.benchmarks.interleave import with_spread
from minigpt_jax.system import hardware
from minigpt_jax.system.heap import retain_heap


class Roofline(abc.ABC):
    """Repeats `work` until a run has about `amount_per_run` FLOPs or bytes, and reports their exact number."""

    needs = "jax"
    amount_per_run: float

    def __init__(self, *setup: Any):
        retain_heap()
        self.work, self.amount = self.prepare(*setup)
        self.times = max(1, round(self.amount_per_run / self.amount))

    @abc.abstractmethod
    def prepare(self, *setup: Any) -> tuple[Callable[[], object], int]:
        """(work, its FLOPs or bytes)."""

    def run(self) -> None:
        for _ in range(self.times):
            self.work()

    def report(self) -> dict[str, int]:
        return {"amount": self.times * self.amount}


class LargeMatmul(Roofline):
    """Matmuls of two 2048 × 2048 matrices, large enough for JAX's best rate."""

    name, amount_per_run = "large matmul", 1e11  # FLOPs

    def prepare(self, *setup: Any) -> tuple[Callable[[], object], int]:
        return hardware.matmul(2048, 2048, 2048)


class ShapedMatmul(Roofline):
    """Matmuls in the shape of the model's feed-forward layer."""

    name, amount_per_run = "feed-forward matmul", 1e11  # FLOPs

    def prepare(self, *setup: Any) -> tuple[Callable[[], object], int]:
        model, training = setup[0].model, setup[0].training  # of a Config
        return hardware.matmul(training.batch_size * model.context_length, model.embed_dim, model.ff_dim)


class Copy(Roofline):
    """Copies of 256 MB in main memory."""

    name, amount_per_run = "copy", 1e10  # bytes

    def prepare(self, *setup: Any) -> tuple[Callable[[], object], int]:
        return hardware.copy()


def rates(results: list[dict]) -> list[float]:
    """FLOPs or bytes per second of each run, without the warm-up run."""
    return [result["amount"] / result["seconds"] for result in results[1:]]


def in_giga(values: list[float]) -> str:
    """FLOP/s or bytes/s as `median (min–max)` in GFLOP/s or GB/s."""
    return with_spread([value / 1e9 for value in values])
