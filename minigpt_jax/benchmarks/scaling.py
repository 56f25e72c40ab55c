"""How time and memory scale: in training with width, depth, context and batch, in decoding with context, batch and length.

Each point is measured in its own process and compared with an ideal. Ideal time is the model's matmuls at the machine's
matmul rate, or reading weights and cache at the bandwidth of a copy. Ideal memory scales up from the first point.
"""

import dataclasses
import statistics
import time
from typing import Any

import jax

from minigpt_jax.benchmarks.generate import MiniGPT, bytes_per_step
from minigpt_jax.benchmarks.interleave import in_own_process
from minigpt_jax.benchmarks.train import compiled_step
from minigpt_jax.config import Config, ModelConfig, TrainingConfig
from minigpt_jax.models.flops import flops_per_token
from minigpt_jax.system import hardware, memory

BASE = Config(model=ModelConfig(vocab_size=65), training=TrainingConfig(batch_size=12))  # 4 × 128, context 64
ROUNDS = 1
SECONDS = 2.0  # of training steps per point, and at least three steps


def train_config(name: str, value: int) -> Config:
    """The base config with one size changed. The feed-forward width scales with the model's; heads keep a size of 32."""
    if name == "width":
        changes = {"embed_dim": value, "ff_dim": 4 * value, "num_heads": value // 32}
    elif name in ("context", "context, --remat"):  # with the same number of tokens per batch
        tokens = {"context_length": value, "batch_size": max(1, 2048 // value)}
        changes = tokens | {"remat": name != "context"}
    else:
        changes = {{"depth": "num_layers", "batch": "batch_size"}[name]: value}
    return BASE.override(changes)


TRAINING = {
    "width": (64, 128, 256, 512),
    "depth": (1, 2, 4, 8, 16),
    "context": (64, 128, 256, 512, 1024, 2048),
    "context, --remat": (64, 128, 256, 512, 1024, 2048),
    "batch": (1, 4, 16, 64),
}
DECODING = {"context": (64, 256, 1024, 2048), "batch": (1, 4, 16, 64), "length": (256, 1024, 4096)}


def train_point(config: Config) -> dict[str, Any]:
    """Seconds per training step, and the MB that its compiled program needs, including parameters and optimizer."""
    step, state, batch, arguments = compiled_step(config)
    planned = step.memory_analysis()
    seconds = []
    while sum(seconds) < SECONDS or len(seconds) < 4:
        start = time.perf_counter()
        state, _ = jax.block_until_ready(step(state, batch, **arguments))
        seconds.append(time.perf_counter() - start)
    return {
        "seconds": statistics.median(seconds[1:]),
        "megabytes": (planned.argument_size_in_bytes + planned.temp_size_in_bytes) / 1e6,
        "state_megabytes": planned.argument_size_in_bytes / 1e6,
        "flops": flops_per_token(config.model) * batch["inputs_BT"].size,
    }


def decode_point(name: str, value: int) -> dict[str, Any]:
    """Seconds per decoding step, and the peak memory of the process in MB."""
    model = dataclasses.replace(BASE.model, context_length=value if name == "context" else 256)
    batch_size, num_tokens = value if name == "batch" else 1, value if name == "length" else model.context_length
    runner = MiniGPT(model, batch_size, num_tokens)
    seconds = hardware.best_seconds(runner.run, times=3)
    positions = min(num_tokens / 2, model.context_length)
    return {
        "seconds": seconds / num_tokens,
        "megabytes": memory.peak_megabytes(),
        "bytes": bytes_per_step(model, batch_size, positions),
    }


def measure(rounds: int) -> dict:
    """Prints a table for each size that is scaled, and returns the figures: medians of `rounds` processes per point."""
    rate, bandwidth = in_own_process(hardware.matmul_rate), in_own_process(hardware.copy_bandwidth)
    print(f"4 layers × 128, context 64, batch 12, with one size changed; 2048 tokens per batch where the context changes.\n"
          f"Ideal: matmuls at {rate / 1e9:.0f} GFLOP/s, or weights and cache at {bandwidth / 1e9:.0f} GB/s.")  # fmt: skip
    figures = {"matmul_rate": rate, "copy_bandwidth": bandwidth, "training": {}, "decoding": {}}
    for kind, sizes in (("training", TRAINING), ("decoding", DECODING)):
        for name, values in sizes.items():
            print(f"\n{kind}: {name:<20}{'ms/step':>10}{'ideal':>12}{'MB':>10}")
            points = []
            for value in values:
                point = median_point([measure_point(kind, name, value) for _ in range(rounds)])
                point["ideal"] = point["flops"] / rate if kind == "training" else point["bytes"] / bandwidth
                points.append({"value": value} | point)
                print(f"{value:<30}{1000 * point['seconds']:10.2f}{1000 * point['ideal']:12.2f}{point['megabytes']:10.0f}")
            figures[kind][name] = points
    return figures


def measure_point(kind: str, name: str, value: int) -> dict[str, Any]:
    if kind == "training":
        return in_own_process(train_point, train_config(name, value))
    return in_own_process(decode_point, name, value)


def median_point(points: list[dict[str, float]]) -> dict[str, Any]:
    """The measurement with the median seconds."""
    return sorted(points, key=lambda point: point["seconds"])[len(points) // 2]


def ideal_megabytes(kind: str, name: str, points: list[dict[str, float]]) -> list[float]:
    """Memory scaled up from the first point. In training: the state, plus activations in proportion to the size (constant
    along the context, where the tokens per batch are). In decoding: the bytes of the cache."""
    first = points[0]
    if kind == "decoding":
        grown = [point["bytes"] - first["bytes"] if name != "length" else 0 for point in points]
        return [first["megabytes"] + more / 1e6 for more in grown]
    activations = first["megabytes"] - first["state_megabytes"]
    ratios = [1 if name.startswith("context") else point["value"] / first["value"] for point in points]
    return [point["state_megabytes"] + activations * ratio for point, ratio in zip(points, ratios, strict=True)]


def draw(figures: dict, axes_of: Any) -> None:
    """A panel for time and one for memory for each size that is scaled. The ideal is dotted."""
    from matplotlib.ticker import LogLocator

    for kind in ("training", "decoding"):
        for name, points in figures[kind].items():
            size, _, variant = name.partition(", ")
            values = [point["value"] for point in points]
            panels = {
                "ms/step": ([1000 * point["seconds"] for point in points], [1000 * point["ideal"] for point in points]),
                "MB": ([point["megabytes"] for point in points], ideal_megabytes(kind, name, points)),
            }
            for unit, (measured, ideal) in panels.items():
                axes = axes_of(f"{kind.capitalize()} over {size}: {unit}")
                axes.plot(values, measured, "o-", label=variant or "measured")
                axes.plot(values, ideal, ":", color="0.3", label="" if variant else "ideal")
                axes.set_xscale("log")
                axes.set_xticks(values, [str(value) for value in values])
                axes.set_xticks([], minor=True)
                if unit == "MB":
                    axes.set_ylim(0, max(axes.get_ylim()[1], 1.1 * max(measured + ideal)))
                else:
                    axes.set_yscale("log")
                    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                    axes.yaxis.set_major_formatter("{x:g}")
                    axes.set_yticks([], minor=True)
                axes.legend(frameon=False, fontsize=8)
