"""What each kernel saves: training and decoding steps with tuned kernels, and with one of them at a time replaced by its
equation.
"""

import statistics
from collections.abc import Sequence
from typing import Any

from minigpt_jax.benchmarks.generate import MODEL, NUM_TOKENS, MiniGPT
from minigpt_jax.benchmarks.interleave import With, interleave, milliseconds, with_spread
from minigpt_jax.benchmarks.train import SETTINGS, VOCAB_SIZE, Step
from minigpt_jax.config import load_preset

ROUNDS = 7
BATCH_SIZE = 16
TRAINING = "matmul", "center", "unit_rms", "activate", "attention"


def measure(rounds: int) -> dict:
    """Prints a table for training each preset, also with recomputed blocks, and for decoding; returns the figures."""
    figures = {}

    def compare(title: str, candidate: type, ops: Sequence[str], setup: tuple, num_steps: int) -> None:
        replaced = [With(candidate, f"plain {op}", {"kernels": f"plain {op}"}) for op in ops]
        answers = interleave((candidate, *replaced), setup, rounds)
        figures[title] = {"answers": answers, "steps": num_steps}
        show(title, answers, num_steps)

    for preset, (batch_size, num_steps) in SETTINGS.items():
        config = load_preset(preset).override({"vocab_size": VOCAB_SIZE, "batch_size": batch_size, "dropout": 0.0})
        compare(f"training, {preset}", Step, TRAINING, (config, num_steps), num_steps)
        recomputed = config.override({"remat": True})
        compare(f"training, {preset}, --remat", Step, ("recompute",), (recomputed, num_steps), num_steps)
    setup = MODEL, BATCH_SIZE, NUM_TOKENS
    compare(f"decoding {BATCH_SIZE} rows, 6 × 256", MiniGPT, ("empty_cache",), setup, NUM_TOKENS)
    return figures


def show(title: str, answers: dict[str, list[dict]], num_steps: int) -> None:
    """`saves` is the share of a step's time that the kernel saves: the median over the rounds."""
    print(f"\n{title:<32}{'ms a step':<28}{'saves':>8}   peak memory")
    (_, tuned), *_ = answers.items()
    for name, told in answers.items():
        pairs = zip(milliseconds(told, num_steps), milliseconds(tuned, num_steps), strict=True)
        share = 1 - 1 / statistics.median(plain / tuned for plain, tuned in pairs)
        print(f"{name:<32}{with_spread(milliseconds(told, num_steps)):<28}{share:8.1%}{told[-1]['peak_mb']:11.0f} MB")


def draw(figures: dict, axes_of: Any) -> None:
    from minigpt_jax.benchmarks.plots import bars

    for name, found in figures.items():
        values = {each: milliseconds(told, found["steps"]) for each, told in found["answers"].items()}
        bars(axes_of(f"{name}: ms a step, one kernel plain at a time"), values)
