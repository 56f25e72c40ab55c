"""What each kernel saves: training and decoding steps with tuned kernels, and with one of them at a time replaced by its
equation.
"""

import dataclasses
import statistics
from typing import Any

from minigpt_jax.api import choose_kernels
from minigpt_jax.benchmarks.generate import MODEL, NUM_TOKENS, MiniGPT
from minigpt_jax.benchmarks.train import SETTINGS, VOCAB_SIZE, Step
from minigpt_jax.benchmarks.turns import milliseconds, race, with_spread
from minigpt_jax.config import ModelConfig, load_preset
from minigpt_jax.models.kernels import PLAIN, Kernels

ROUNDS = 7
BATCH_SIZE = 16


def replaced(config: ModelConfig, field: str) -> Kernels:
    return dataclasses.replace(choose_kernels(config), name=f"without {field}", **{field: getattr(PLAIN, field)})


class WithoutMatmul(Step):
    field = "matmul"
    name = f"plain {field}"

    def choose(self, config: ModelConfig, kernels: str) -> Kernels:
        return replaced(config, self.field)


class WithoutCenter(WithoutMatmul):
    field = "center"
    name = f"plain {field}"


class WithoutUnitRms(WithoutMatmul):
    field = "unit_rms"
    name = f"plain {field}"


class WithoutActivate(WithoutMatmul):
    field = "activate"
    name = f"plain {field}"


class WithoutAttention(WithoutMatmul):
    field = "attention"
    name = f"plain {field}"


class WithoutCache(MiniGPT):
    name = "plain empty_cache"

    def choose(self, config: ModelConfig, kernels: str) -> Kernels:
        return replaced(config, "empty_cache")


TRAINING = Step, WithoutMatmul, WithoutCenter, WithoutUnitRms, WithoutActivate, WithoutAttention


def measure(rounds: int) -> dict:
    """Prints a table for each preset and for decoding, and returns the figures."""
    figures = {}
    for preset, (batch_size, num_steps) in SETTINGS.items():
        config = load_preset(preset).override({"vocab_size": VOCAB_SIZE, "batch_size": batch_size, "dropout": 0.0})
        answers = race(TRAINING, (config, num_steps), rounds)
        figures[preset] = {"answers": answers, "steps": num_steps}
        show(f"training, {preset}", answers, num_steps)
    answers = race((MiniGPT, WithoutCache), (MODEL, BATCH_SIZE, NUM_TOKENS), rounds)
    figures["decoding"] = {"answers": answers, "steps": NUM_TOKENS}
    show(f"decoding {BATCH_SIZE} rows, 6 × 256", answers, NUM_TOKENS)
    return figures


def show(title: str, answers: dict[str, list[dict]], num_steps: int) -> None:
    """`saves` is the share of a step's time that the kernel saves: the median over the rounds."""
    print(f"\n{title:<28}{'ms a step':<28}{'saves':>8}   peak memory")
    (_, tuned), *_ = answers.items()
    for name, told in answers.items():
        pairs = zip(milliseconds(told, num_steps), milliseconds(tuned, num_steps), strict=True)
        share = 1 - 1 / statistics.median(plain / tuned for plain, tuned in pairs)
        print(f"{name:<28}{with_spread(milliseconds(told, num_steps)):<28}{share:8.1%}{told[-1]['peak_mb']:11.0f} MB")


def draw(figures: dict, axes_of: Any) -> None:
    from minigpt_jax.benchmarks.pictures import bars

    for name, found in figures.items():
        values = {each: milliseconds(told, found["steps"]) for each, told in found["answers"].items()}
        bars(axes_of(f"{name}: ms a step, one kernel plain at a time"), values)
