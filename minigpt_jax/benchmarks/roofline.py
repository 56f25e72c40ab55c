"""What the machine itself can do at most, as candidates: a limit that was measured in other weather is none."""

import abc
from collections.abc import Callable
from typing import Any

from minigpt_jax.benchmarks.interleave import with_spread
from minigpt_jax.system import hardware
from minigpt_jax.system.heap import retain_heap


class Roofline(abc.ABC):
    """Does `work` again and again, about `amount_of_run` of it in a run, and tells how much that was."""

    needs = "jax"
    amount_of_run: float

    def __init__(self, *setup: Any):
        retain_heap()
        self.work, self.amount = self.prepare(*setup)
        self.times = max(1, round(self.amount_of_run / self.amount))

    @abc.abstractmethod
    def prepare(self, *setup: Any) -> tuple[Callable[[], object], int]:
        """(work, how much that is)."""

    def run(self) -> None:
        for _ in range(self.times):
            self.work()

    def tell(self) -> dict[str, int]:
        return {"amount": self.times * self.amount}


class LargeMatmul(Roofline):
    """Products of two 2048 × 2048 matrices, which JAX computes as fast as any."""

    name, amount_of_run = "large products", 1e11  # FLOPs

    def prepare(self, *setup: Any) -> tuple[Callable[[], object], int]:
        return hardware.matmul(2048, 2048, 2048)


class ShapedMatmul(Roofline):
    """The same in the shape of a feed-forward layer's product."""

    name, amount_of_run = "its own products", 1e11  # FLOPs

    def prepare(self, *setup: Any) -> tuple[Callable[[], object], int]:
        model, training = setup[0].model, setup[0].training  # of a Config
        return hardware.matmul(training.batch_size * model.context_length, model.embed_dim, model.ff_dim)


class Copy(Roofline):
    """Copies of 256 MB in main memory."""

    name, amount_of_run = "copying", 1e10  # bytes

    def prepare(self, *setup: Any) -> tuple[Callable[[], object], int]:
        return hardware.copy()


def rates(answers: list[dict]) -> list[float]:
    """FLOPs or bytes per second in each run but the first."""
    return [answer["amount"] / answer["seconds"] for answer in answers[1:]]


def in_giga(found: list[float]) -> str:
    """Median, least and largest, in GFLOP/s or GB/s."""
    return with_spread([rate / 1e9 for rate in found])
