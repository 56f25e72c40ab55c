"""A training step: this project's, with tuned and with plain kernels, and the PyTorch twin's, eager and compiled."""

import dataclasses
import statistics
from typing import Any

import jax

from minigpt_jax.api import choose_kernels
from minigpt_jax.benchmarks.baselines import TorchCompiledStep, TorchStep, random_batch
from minigpt_jax.benchmarks.interleave import With, interleave, milliseconds, present, with_spread
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
SETTINGS = {"nanogpt_cpu": (12, 20), "mini_gpt": (8, 2)}  # preset: sequences in a batch, steps in a run


def kernels_called(name: str, config: ModelConfig) -> Kernels:
    """ "tuned" or "plain", or "plain attention", say: the tuned ones, but for this one op."""
    op = name.removeprefix("plain ")
    if op == name:
        return choose_kernels(config, name)
    return dataclasses.replace(choose_kernels(config), name=name, **{op: getattr(PLAIN, op)})


def compiled_step(config: Config, kernels: str = "tuned") -> tuple[Any, TrainState, dict, dict]:
    """The training step, compiled, with a first state, a random batch, and the arguments by name."""
    objective = NextToken.of(config, kernels_called(kernels, config.model))
    parts = {"objective": objective, "optimizer": make_optimizer(config.training, 1000)}
    batch, key = random_batch(config), jax.random.key(0)
    state = init_state(key, **parts)
    init_state.clear_cache()  # as the run does  # pyright: ignore[reportAttributeAccessIssue]
    arguments = jax.device_put(parts) | {"key": key}
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
    """The same with blocks that are recomputed in the backward pass."""

    name = "with --remat"

    def __init__(self, config: Config, num_steps: int, kernels: str = "tuned"):
        super().__init__(config.override({"remat": True}), num_steps, kernels)


class PlainStep(Step):
    """The same with plain kernels, and freed memory returned to the system."""

    name = "plain Linen step"

    def __init__(self, config: Config, num_steps: int):
        super().__init__(config, num_steps, "plain")

    def prepare(self) -> None:
        pass


def measure(rounds: int, kernels: str = "tuned") -> dict:
    """Prints a table for each preset, with the machine's limits above, and returns the figures."""
    chosen = [With(step, step.name, {"kernels": kernels}) for step in (Step, RematStep)]
    candidates = present((LargeMatmul, ShapedMatmul, *chosen, PlainStep, TorchStep, TorchCompiledStep))
    print("float32, no dropout, all in turn; of the rate: FLOPs of a step per second, over those of large products")
    figures = {}
    for preset, (batch_size, num_steps) in SETTINGS.items():
        changes = {"vocab_size": VOCAB_SIZE, "batch_size": batch_size, "dropout": 0.0}
        config = load_preset(preset).override(changes)
        num_tokens = batch_size * config.model.context_length
        flops = num_tokens * flops_per_token(config.model)
        answers = interleave(candidates, (config, num_steps), rounds)
        large, shaped = (rates(answers.pop(limit.name)) for limit in (LargeMatmul, ShapedMatmul))
        rate = statistics.median(large)
        print(f"\n{preset}, {batch_size} sequences of {config.model.context_length}; "
              f"GFLOP/s of {LargeMatmul.name} {in_giga(large)}, of {ShapedMatmul.name} {in_giga(shaped)}\n"
              f"{'':<20}{'ms a step':<28}of ours   tokens/s   of the rate       start   peak memory")  # fmt: skip
        ours = statistics.median(milliseconds(answers[Step.name], num_steps))
        for name, told in answers.items():
            values = milliseconds(told, num_steps)
            median = statistics.median(values)
            share = 1000 * flops / median / rate
            print(f"{name:<20}{with_spread(values):<28}{median / ours:7.2f}{1000 * num_tokens / median:11.0f}{share:14.0%}"
                  f"{told[0]['since_start']:10.1f} s{told[-1]['peak_mb']:11.0f} MB")  # fmt: skip
        figures[preset] = {"answers": answers, "flops_per_step": flops, "num_steps": num_steps}
        figures[preset] |= {"large_matmul_rates": large, "shaped_matmul_rates": shaped}
    return figures


def draw(figures: dict, axes_of: Any) -> None:
    from minigpt_jax.benchmarks.plots import bars

    for preset in SETTINGS:
        found = figures[preset]
        values = {name: milliseconds(told, found["num_steps"]) for name, told in found["answers"].items()}
        bound = 1000 * found["flops_per_step"] / statistics.median(found["large_matmul_rates"])
        bars(axes_of(f"A training step of {preset}, ms"), values, bound, "its FLOPs at the rate of large products")
