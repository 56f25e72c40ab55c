"""Parts `train_PRESET`: training steps of this project and of compiled PyTorch, in bfloat16, in interleaved runs."""

import functools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from minigpt_jax.benchmarks.baselines import TorchMixedStep
from minigpt_jax.benchmarks.gpu.setup import Setup, installed_or_skipped
from minigpt_jax.benchmarks.interleave import Guarded, Variant, in_own_process, interleaved, milliseconds
from minigpt_jax.benchmarks.train import step_inputs
from minigpt_jax.config import Config, ModelConfig
from minigpt_jax.models.flops import flops_per_token
from minigpt_jax.system import memory
from minigpt_jax.system.heap import retain_heap
from minigpt_jax.training.compilations import Compilations
from minigpt_jax.training.step import train_step

MEMORY_SHARE = "0.45"  # of the device for each of two processes, unless XLA_PYTHON_CLIENT_MEM_FRACTION is set
TINY_MEMORY = 3e6  # bytes, in place of a device's in a rehearsal
FILLED = "gpt2_124m"  # the preset whose batch is as large as fits
STEPS_PER_RUN = {"gpt2_124m": 10, "nanogpt_gpu": 96, "mini_gpt": 304}
STEPS_PER_DISPATCH = 8


def measure(setup: Setup, preset: str) -> Iterator[dict[str, Any]]:
    """Milliseconds per step, tokens and FLOPs per second, memory and compile time of each candidate."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", MEMORY_SHARE)
    config, num_steps = setup.config(preset), STEPS_PER_DISPATCH if setup.rehearse else STEPS_PER_RUN[preset]
    candidates, compiled_first = [Step, SEVERAL_STEPS, TorchMixedStep], {}
    if preset == FILLED:
        candidates.remove(SEVERAL_STEPS)  # starting a program takes much less time than such a step
        batch_size, compiled_first = in_own_process(find_batch, config, TINY_MEMORY if setup.rehearse else None)
        config = config.override({"batch_size": batch_size})
    tokens = config.training.batch_size * config.model.context_length
    yield {
        "batch_size": config.training.batch_size, "tokens_per_step": tokens, "dtype": config.model.dtype,
        "flops_per_step": tokens * flops_per_token(config.model), "dropout": config.model.dropout,
        "steps_per_run": num_steps, "compiled_first": compiled_first,
    }  # fmt: skip
    available, skipped = installed_or_skipped(candidates)
    yield skipped
    guarded = [Guarded(candidate) for candidate in available]
    for results in interleaved(guarded, (config, num_steps), setup.rounds, start_together=True):
        yield {name: row(runs, config, num_steps, setup.figures.get("limits", {})) for name, runs in results.items()}


def row(runs: list[dict], config: Config, num_steps: int, limits: dict[str, Any]) -> dict[str, Any]:
    """The figures of one candidate from its runs so far, the first of which is the warm-up run."""
    if "error" in runs[-1]:
        return {"error": runs[-1]["error"]}
    reported = {name: value for name, value in runs[-1].items() if name not in ("seconds", "since_start")}
    figures = {"startup_seconds": runs[0]["since_start"]} | reported
    if ms := milliseconds(runs, num_steps):
        tokens_per_second = 1000 * config.training.batch_size * config.model.context_length / statistics.median(ms)
        flops_per_second = tokens_per_second * flops_per_token(config.model)
        figures |= {"ms": ms, "tokens_per_second": tokens_per_second, "flops_per_second": flops_per_second}
        if isinstance(rate := limits.get("bfloat16"), float):  # not an error's message
            figures["share_of_matmul_rate"] = flops_per_second / rate
    return figures


@functools.partial(jax.jit, donate_argnames="state")
def several_steps(state: Any, batches: Any, key: jax.Array, **arguments: Any) -> tuple[Any, dict[str, jax.Array]]:
    """`train_step` for each of several batches, which are stacked: one program, started once, with the same results."""
    return jax.lax.scan(lambda state, batch: train_step(state, batch, key, **arguments), state, batches)


class Step:
    """This project's training step, or several of them per dispatch."""

    name, needs = "minigpt_jax", "jax"

    def __init__(self, config: Config, num_steps: int, per_dispatch: int = 1):
        retain_heap()
        state, batch, arguments = step_inputs(config)
        function = train_step if per_dispatch == 1 else several_steps
        if per_dispatch > 1:
            batch = {name: np.stack([array] * per_dispatch) for name, array in batch.items()}
        self.compiled = compilation(function, state, batch, arguments)

        def run():
            nonlocal state
            for _ in range(num_steps // per_dispatch):
                state, _ = function(state, batch, **arguments)
            jax.block_until_ready(state)

        self.run = run

    def report(self) -> dict[str, Any]:
        return self.compiled | {"device_mb": memory.device_peak_megabytes(jax.devices()[0])}


SEVERAL_STEPS = Variant(Step, f"{Step.name}, {STEPS_PER_DISPATCH} steps per dispatch", {"per_dispatch": STEPS_PER_DISPATCH})


def compilation(function: Any, state: Any, batch: Any, arguments: dict) -> dict[str, Any]:
    """Compiles a step. Returns the seconds, whether it came from the persistent cache, and the bytes that it plans for."""
    start = time.perf_counter()
    with Compilations() as compilations:
        compiled = function.lower(state, batch, **arguments).compile()
    seconds, plan = time.perf_counter() - start, compiled.memory_analysis()
    fixed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    planned = plan.argument_size_in_bytes + plan.temp_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
    return {
        "compile_seconds": seconds, "is_cached": compilations.num_cached > 0, "planned_bytes": planned, "state_bytes": fixed,
    }  # fmt: skip


def compile_step(config: Config) -> dict[str, Any]:
    """Compiles the training step; see `compilation`."""
    return compilation(train_step, *step_inputs(config))


def find_batch(config: Config, limit: float | None) -> tuple[int, dict[str, Any]]:
    """(the largest batch whose step needs at most `limit` bytes, by default nine tenths of the device's memory; what was
    compiled first to find it)."""
    limit = 0.9 * jax.devices()[0].memory_stats()["bytes_limit"] if limit is None else limit
    compiled = []

    def plan(batch_size: int) -> tuple[float, float]:
        compiled.append({"batch_size": batch_size} | compile_step(config.override({"batch_size": batch_size})))
        return compiled[-1]["planned_bytes"], compiled[-1]["state_bytes"]

    return largest_batch(plan, int(limit / bytes_per_row(config.model)), limit), compiled[0]


def bytes_per_row(config: ModelConfig) -> float:
    """A first guess: logits in bfloat16 and twice in float32, and 30 numbers of 2 bytes per feature and layer."""
    return config.context_length * (10 * config.num_embeddings + 60 * config.num_layers * config.embed_dim)


def largest_batch(plan: Callable[[int], tuple[float, float]], first: int, limit: float, multiple: int = 8) -> int:
    """The largest batch whose step fits into `limit` bytes, rounded down to a multiple.

    `plan(batch_size)` compiles a step, which takes long, and returns (the bytes it needs, those of the state alone).
    The rest is proportional to the batch, so one or two plans are enough to find the answer.
    """
    batch_size = max(multiple, first // multiple * multiple)
    for _ in range(2):
        planned, state = plan(batch_size)
        fits = int((limit - state) / (planned - state) * batch_size) // multiple * multiple
        if planned <= limit and fits < 1.5 * batch_size:
            return batch_size
        batch_size = max(multiple, fits)
    return batch_size
