"""Part `compiling`: seconds to compile a training step, and to load it from the cache in a new process."""

from collections.abc import Iterator
from typing import Any

from minigpt_jax.benchmarks.gpu.setup import PRESETS, Setup, attempt
from minigpt_jax.benchmarks.gpu.training import FILLED, Step, compile_step
from minigpt_jax.benchmarks.interleave import in_own_process
from minigpt_jax.config import Config

BATCH_SIZE = 8  # of FILLED, if its training part has not found one


def measure(setup: Setup) -> Iterator[dict[str, Any]]:
    for preset in PRESETS:
        trained, config = setup.figures.get(f"train_{preset}", {}), setup.config(preset)
        batch_size = trained.get("batch_size", BATCH_SIZE if preset == FILLED else config.training.batch_size)
        earlier = trained.get("compiled_first") or trained.get(Step.name, {})
        yield from attempt(preset, cold_and_cached, config.override({"batch_size": batch_size}), earlier)


def cold_and_cached(config: Config, earlier: dict[str, Any]) -> dict[str, Any]:
    """The benchmark's cache starts empty, so the first compilation is cold: that of the training part, if it has run."""
    cold = in_own_process(compile_step, config) if earlier.get("is_cached", True) else earlier
    cached = in_own_process(compile_step, config)
    seconds = {"cold": cold["compile_seconds"], "cached": cached["compile_seconds"]}
    return seconds | {"was_cached": [cold["is_cached"], cached["is_cached"]]}
