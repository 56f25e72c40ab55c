"""Part `learning`: how long `nanogpt_gpu` trains until its validation loss reaches what nanoGPT publishes for it."""

import time
from collections.abc import Iterator
from typing import Any

from minigpt_jax.api import choose_kernels
from minigpt_jax.benchmarks import loss
from minigpt_jax.benchmarks.gpu.setup import TINY_MODEL, Setup
from minigpt_jax.config import load_preset
from minigpt_jax.tasks.language_modelling import prepare

PRESET = "nanogpt_gpu"
TARGETS = 1.50, 1.47  # nats per character over the whole validation split


def measure(setup: Setup) -> Iterator[dict[str, Any]]:
    """Seconds of training, compilation included and evaluation excluded, as `benchmark.py loss` counts them."""
    changes = {"dataset": setup.dataset} | (TINY_MODEL | {"steps": 2 * loss.STEPS_PER_ROUND} if setup.rehearse else {})
    config = load_preset(PRESET).override(changes)
    task = prepare(config, kernels=choose_kernels(config.model))
    run, results, start = loss.TaskRun(task), [], time.perf_counter()
    while run.step < task.num_steps and not (results and results[-1]["val_loss"] <= TARGETS[-1]):
        round_start = time.perf_counter()
        run.run()
        results.append({"step": run.step, "seconds": time.perf_counter() - round_start} | run.report())
        yield {
            "seconds_to": {f"{target:.2f}": loss.seconds_to(target, results) for target in TARGETS},
            "seconds_with_evaluation": time.perf_counter() - start,
            "runs": results,
        }
