"""What the figures are measured against. Pure functions of the figures so far."""

import statistics
from collections.abc import Iterator
from typing import Any

from minigpt_jax.benchmarks.baselines import HuggingFace, TorchMixedStep
from minigpt_jax.benchmarks.gpu.setup import PRESETS

OURS = "minigpt_jax"  # the name of our candidate in every part


def goals(figures: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """By what is measured: the value so far or None, the target, and whether it is reached, None if nothing is measured."""
    return {
        name: {"measured": value, "target": f"{sign} {target:g}", "reached": reached(value, sign, target)}
        for name, value, sign, target in measured(figures)
    }


def reached(value: float | None, sign: str, target: float) -> bool | None:
    return None if value is None else value >= target if sign == "≥" else value <= target


def measured(figures: dict[str, Any]) -> Iterator[tuple[str, float | None, str, float]]:
    """(what, its value, ≥ or ≤, the target)."""
    yield "checks that failed", failed_checks(figures.get("correctness")), "≤", 0
    for preset in PRESETS:
        part = figures.get(f"train_{preset}", {})
        yield f"step of {preset}, compiled PyTorch over ours", ratio(part, TorchMixedStep.name), "≥", 1
    share = figures.get("train_gpt2_124m", {}).get(OURS, {}).get("share_of_matmul_rate")
    yield "FLOP/s of gpt2_124m, share of the bfloat16 matmul rate", share, "≥", 0.5
    yield "seconds of nanogpt_gpu to a loss of 1.47", figures.get("learning", {}).get("seconds_to", {}).get("1.47"), "≤", 60
    decoding = {name: value for name, value in figures.get("decoding", {}).items() if isinstance(value, dict)}
    for size in (1, 16, 64):
        part = {name: value.get(f"batch_{size}", {}) for name, value in decoding.items()}
        yield f"decoding {size} texts, transformers over ours", ratio(part, HuggingFace.name), "≥", 3


def ratio(part: dict[str, Any], other: str) -> float | None:
    """The other candidate's median time over ours, or None if one of the two has no runs."""
    times = [part.get(name, {}).get("ms") for name in (other, OURS)]
    return statistics.median(times[0]) / statistics.median(times[1]) if all(times) else None


def failed_checks(part: Any) -> int | None:
    """The number of checks that are not ok, or that raised an error; those that were skipped do not count."""
    found = list(checks(part))
    return found.count(False) if found else None


def checks(part: Any) -> Iterator[bool]:
    if isinstance(part, dict):
        if "ok" in part or isinstance(part.get("error"), str):
            yield part.get("ok", False)
        for value in part.values():
            yield from checks(value)
