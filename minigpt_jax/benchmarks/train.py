"""Training steps of this project, with tuned and plain kernels, and of the PyTorch twin, eager and compiled."""

import dataclasses
import statistics
from typing import Any

import jax

from minigpt_jax.api import choose_kernels
from minigpt_jax.benchmarks.baselines import TorchCompiledStep, TorchStep, random_batch
from minigpt_jax.benchmarks.interleave import Variant, installed, interleave, milliseconds, with_spread
from minigpt_jax.benchmarks.roofline import LargeMatmul, ShapedMatmul, in_giga, rates
from minigpt_jax.config import Config, ModelConfig, load_preset
from minigpt_jax.models.flops import flops_per_token
from minigpt_jax.models.kernels import PLAIN, Kernels
from minigpt_jax.system.heap import retain_heap, trim_heap
from minigpt_jax.tasks.next_token import NextToken
from minigpt_jax.training.optimizer import make_optimizer
from minigpt_jax.training.state import TrainState, init_state
from minigpt_jax.training.step import train_step

ROUNDS = 7
VOCAB_SIZE = 65  # characters of tiny Shakespeare
SETTINGS = {"nanogpt_cpu": (12, 20), "mini_gpt": (8, 2)}  # preset: (batch size, steps per run)


def kernels_by_name(name: str, config: ModelConfig) -> Kernels:
    """Kernels "tuned" or "plain"; "plain attention", for example, is the tuned kernels without the one for attention."""
    op = name.removeprefix("plain ")
    if op == name:
        return choose_kernels(config, name)
    return dataclasses.replace(choose_kernels(config), name=name, **{op: getattr(PLAIN, op)})


def step_inputs(config: Config, kernels: str = "tuned") -> tuple[TrainState, dict, dict]:
    """(initial state, random batch, keyword arguments) of a training step."""
    objective = NextToken.of(config, kernels_by_name(kernels, config.model))
    parts = {"objective": objective, "optimizer": make_optimizer(config.training, 1000)}
    batch, key = random_batch(config), jax.random.key(0)
    state = init_state(key, **parts)
    init_state.clear_cache()  # as a training run does  # pyright: ignore[reportAttributeAccessIssue]
    return state, batch, jax.device_put(parts) | {"key": key}


def compiled_step(config: Config, kernels: str = "tuned") -> tuple[Any, TrainState, dict, dict]:
    """(compiled training step, initial state, random batch, keyword arguments)."""
    state, batch, arguments = step_inputs(config, kernels)
    return train_step.lower(state, batch, **arguments).compile(), state, batch, arguments


class Step:
    """This project's training step."""

    name, needs = "minigpt_jax", "jax"

    def __init__(self, config: Config, num_steps: int, kernels: str = "tuned"):
        self.prepare()
        step, state, batch, arguments = compiled_step(config, kernels)
        trim_heap()

        def run():
            nonlocal state
            for _ in range(num_steps):
                state, _ = step(state, batch, **arguments)
            jax.block_until_ready(state)

        self.run = run

    def prepare(self) -> None:
        retain_heap()


class RematStep(Step):
    """The same step with blocks recomputed in the backward pass."""

    name = "with --remat"

    def __init__(self, config: Config, num_steps: int, kernels: str = "tuned"):
        super().__init__(config.override({"remat": True}), num_steps, kernels)


class PlainStep(Step):
    """The same step with plain kernels, and without keeping freed memory."""

    name = "plain Linen step"

    def __init__(self, config: Config, num_steps: int):
        super().__init__(config, num_steps, "plain")

    def prepare(self) -> None:
        pass


def measure(rounds: int, kernels: str = "tuned") -> dict:
    """Prints the machine's limits and a table for each preset, and returns the figures."""
    ours = [Variant(step, step.name, {"kernels": kernels}) for step in (Step, RematStep)]
    candidates = installed((LargeMatmul, ShapedMatmul, *ours, PlainStep, TorchStep, TorchCompiledStep))
    print(f"float32, no dropout, interleaved runs; ms/step: median (min–max); speed-up: of {Step.name} over each row;\n"
          f"of matmul rate: FLOP/s of the step relative to a {LargeMatmul.name}")  # fmt: skip
    figures = {}
    for preset, (batch_size, num_steps) in SETTINGS.items():
        changes = {"vocab_size": VOCAB_SIZE, "batch_size": batch_size, "dropout": 0.0}
        config = load_preset(preset).override(changes)
        num_tokens = batch_size * config.model.context_length
        flops = num_tokens * flops_per_token(config.model)
        results = interleave(candidates, (config, num_steps), rounds)
        large, shaped = (rates(results.pop(limit.name)) for limit in (LargeMatmul, ShapedMatmul))
        rate = statistics.median(large)
        print(f"\n{preset}, batch {batch_size} × {config.model.context_length} tokens; "
              f"GFLOP/s: {LargeMatmul.name} {in_giga(large)}, {ShapedMatmul.name} {in_giga(shaped)}\n"
              f"{'':<20}{'ms/step':<28}speed-up   tokens/s   of matmul rate   startup   peak memory")  # fmt: skip
        our_ms = statistics.median(milliseconds(results[Step.name], num_steps))
        for name, runs in results.items():
            values = milliseconds(runs, num_steps)
            median = statistics.median(values)
            share = 1000 * flops / median / rate
            print(f"{name:<20}{with_spread(values):<28}{median / our_ms:8.2f}{1000 * num_tokens / median:11.0f}"
                  f"{share:17.0%}{runs[0]['since_start']:8.1f} s{runs[-1]['peak_mb']:11.0f} MB")  # fmt: skip
        figures[preset] = {"answers": results, "flops_per_step": flops, "num_steps": num_steps}
        figures[preset] |= {"large_matmul_rates": large, "shaped_matmul_rates": shaped}
    return figures


def draw(figures: dict, axes_of: Any) -> None:
    from minigpt_jax.benchmarks.plots import bars

    for preset in SETTINGS:
        measured = figures[preset]
        values = {name: milliseconds(runs, measured["num_steps"]) for name, runs in measured["answers"].items()}
        bound = 1000 * measured["flops_per_step"] / statistics.median(measured["large_matmul_rates"])
        bars(axes_of(f"Training step, {preset}, ms"), values, bound, f"its FLOPs at the rate of a {LargeMatmul.name}")
