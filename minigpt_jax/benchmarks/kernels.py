"""What each kernel saves: steps with all tuned kernels, and with one kernel at a time replaced by its equation."""

import statistics
from collections.abc import Sequence
from typing import Any

from minigpt_jax.benchmarks.generate import MODEL, NUM_TOKENS, MiniGPT
from minigpt_jax.benchmarks.interleave import Variant, interleave, milliseconds, with_spread
from minigpt_jax.benchmarks.train import SETTINGS, VOCAB_SIZE, Step
from minigpt_jax.config import load_preset

ROUNDS = 7
BATCH_SIZE = 16
TRAINING = "matmul", "center", "unit_rms", "activate", "attention"


def measure(rounds: int) -> dict:
    """Prints tables for training each preset, without and with `--remat`, and for decoding. Returns the figures."""
    figures = {}

    def compare(title: str, candidate: type, ops: Sequence[str], setup: tuple, num_steps: int) -> None:
        replaced = [Variant(candidate, f"plain {op}", {"kernels": f"plain {op}"}) for op in ops]
        results = interleave((candidate, *replaced), setup, rounds)
        figures[title] = {"answers": results, "steps": num_steps}
        print_table(title, results, num_steps)

    for preset, (batch_size, num_steps) in SETTINGS.items():
        config = load_preset(preset).override({"vocab_size": VOCAB_SIZE, "batch_size": batch_size, "dropout": 0.0})
        compare(f"training, {preset}", Step, TRAINING, (config, num_steps), num_steps)
        with_remat = config.override({"remat": True})
        compare(f"training, {preset}, --remat", Step, ("recompute",), (with_remat, num_steps), num_steps)
    setup = MODEL, BATCH_SIZE, NUM_TOKENS
    compare(f"decoding {BATCH_SIZE} rows, 6 × 256", MiniGPT, ("empty_cache",), setup, NUM_TOKENS)
    return figures


def print_table(title: str, results: dict[str, list[dict]], num_steps: int) -> None:
    """`saves` is the share of the step's time that the tuned kernel saves, as the median over rounds."""
    print(f"\n{title:<32}{'ms/step':<28}{'saves':>8}   peak memory")
    (_, tuned), *_ = results.items()
    for name, runs in results.items():
        pairs = zip(milliseconds(runs, num_steps), milliseconds(tuned, num_steps), strict=True)
        share = 1 - 1 / statistics.median(plain / tuned for plain, tuned in pairs)
        print(f"{name:<32}{with_spread(milliseconds(runs, num_steps)):<28}{share:8.1%}{runs[-1]['peak_mb']:11.0f} MB")


def draw(figures: dict, axes_of: Any) -> None:
    from minigpt_jax.benchmarks.plots import bars

    for title, measured in figures.items():
        values = {name: milliseconds(runs, measured["steps"]) for name, runs in measured["answers"].items()}
        bars(axes_of(f"{title}: ms/step, one plain kernel at a time"), values)
