"""Part `decoding`: tokens per second of `gpt2_124m`, beside the twin without a cache and transformers with one."""

import statistics
import time
from collections.abc import Iterator
from typing import Any

from minigpt_jax.benchmarks.baselines import TOP_K, HuggingFace, TorchRecompute
from minigpt_jax.benchmarks.generate import MiniGPT
from minigpt_jax.benchmarks.gpu.setup import Setup, installed_or_skipped
from minigpt_jax.benchmarks.interleave import Guarded, Variant, interleaved
from minigpt_jax.config import ModelConfig

PRESET = "gpt2_124m"
BATCH_SIZES, NUM_TOKENS, TINY_NUM_TOKENS = (1, 16, 64), 200, 5


class EverySize:
    """Decodes with one batch size after the other in each run, in one process, since importing and starting take longer."""

    needs = "jax"

    def __init__(self, config: ModelConfig, batch_sizes: tuple[int, ...], num_tokens: int, candidate: type):
        self.runners = {size: candidate(config, size, num_tokens) for size in batch_sizes}

    def run(self) -> None:
        self.seconds = {}
        for size, runner in self.runners.items():
            start = time.perf_counter()
            runner.run()
            self.seconds[size] = time.perf_counter() - start

    def report(self) -> dict[str, dict[int, float]]:
        return {"seconds_by_size": self.seconds}


def measure(setup: Setup) -> Iterator[dict[str, Any]]:
    config, num_tokens = setup.config(PRESET).model, TINY_NUM_TOKENS if setup.rehearse else NUM_TOKENS
    yield {"num_tokens": num_tokens, "dtype": config.dtype, "top_k": TOP_K}
    available, skipped = installed_or_skipped([MiniGPT, TorchRecompute, HuggingFace])
    yield skipped
    candidates = [Guarded(Variant(EverySize, candidate.name, {"candidate": candidate})) for candidate in available]
    for results in interleaved(candidates, (config, BATCH_SIZES, num_tokens), setup.rounds, start_together=True):
        yield {name: row(runs, num_tokens) for name, runs in results.items()}


def row(runs: list[dict], num_tokens: int) -> dict[str, Any]:
    """The figures of one candidate from its runs so far, the first of which is the warm-up run."""
    if "error" in runs[-1]:
        return {"error": runs[-1]["error"]}
    figures: dict[str, Any] = {"startup_seconds": runs[0]["since_start"]}
    if measured := [run["seconds_by_size"] for run in runs[1:]]:
        for size in measured[0]:
            ms = [1000 * seconds[size] / num_tokens for seconds in measured]
            figures[f"batch_{size}"] = {"ms": ms, "tokens_per_second": 1000 * size / statistics.median(ms)}
    return figures
