"""Tokenizing speed, and how long training waits for batches, also from a file larger than memory."""

import itertools
import os
import statistics
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from minigpt_jax.benchmarks.interleave import in_own_process, with_spread
from minigpt_jax.benchmarks.train import compiled_step
from minigpt_jax.config import load_preset
from minigpt_jax.data.batches import batch_at
from minigpt_jax.data.text_files import find_text, scan
from minigpt_jax.data.token_file import map_ids, tokenize
from minigpt_jax.data.tokenizers import KINDS, make_tokenizer
from minigpt_jax.system import memory

ROUNDS = 3
NUM_STEPS = 200


def write_sources(path: Path, megabytes: int) -> None:
    """Writes a text with many different words: the standard library's sources, repeated up to this size."""
    remaining = megabytes * 1_000_000
    sources = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
    with path.open("w", encoding="utf-8") as file:
        while remaining > 0:
            for source in sources:
                text = source.read_text(encoding="utf-8", errors="ignore").replace("\0", "")[: max(remaining, 0)]
                remaining -= file.write(text)


def time_passes(kind: str, path: Path) -> dict[str, Any]:
    """Seconds of each pass over a text, and peak memory."""
    text, times = find_text(str(path)), [time.perf_counter()]
    seen = scan(text)
    times.append(time.perf_counter())
    tokenizer = make_tokenizer(kind, (piece for _, piece in text.pieces()))
    times.append(time.perf_counter())
    with tempfile.TemporaryDirectory() as folder:
        tokenize(text, seen, tokenizer, Path(folder))
        times.append(time.perf_counter())
    seconds = dict(zip(("reading", "learning", "tokenizing"), (b - a for a, b in itertools.pairwise(times)), strict=True))
    return seconds | {"peak_mb": memory.peak_megabytes()}


def feed(path: Path, rounds: int) -> dict[str, Any]:
    """Median seconds of a training step of the default preset, without its parameter average, and of reading its batch from
    a token file; the seconds of the first batch; peak memory."""
    config = load_preset("shakespeare_char").override({"vocab_size": 65})
    train_step, state, _, arguments = compiled_step(config)
    tokens = map_ids(path, np.dtype("<u2"))
    reading, training = [], []
    for step in range(rounds * NUM_STEPS):
        start = time.perf_counter()
        batch = batch_at(tokens, config.model.context_length, config.training.batch_size, 0, step)
        read_end = time.perf_counter()
        state, _ = jax.block_until_ready(train_step(state, batch, **arguments))
        reading.append(read_end - start)
        training.append(time.perf_counter() - read_end)
    seconds = {name: statistics.median(values[1:]) for name, values in (("reading", reading), ("training", training))}
    return seconds | {"first": reading[0], "peak_mb": memory.peak_megabytes()}


def measure(rounds: int, megabytes: int) -> dict:
    """Prints the speed of each tokenizer and how long a step waits for its batch, and returns the figures."""
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "text.txt")
        write_sources(text, megabytes)
        size = text.stat().st_size / 1e6
        runs = [{kind: in_own_process(time_passes, kind, text) for kind in KINDS} for _ in range(rounds)]
    print(f"{size:.0f} MB of Python sources, MB/s: median (min–max)\n"
          f"{'tokenizer':<12}{'reading':<26}{'learning':<26}{'tokenizing':<26}peak memory")  # fmt: skip
    for kind in KINDS:
        speeds = {name: [size / run[kind][name] for run in runs] for name in ("reading", "learning", "tokenizing")}
        peak = max(run[kind]["peak_mb"] for run in runs)
        columns = {name: with_spread(values) for name, values in speeds.items()}
        if kind == "byte":  # whose vocabulary is fixed
            columns["learning"] = "-"
        print(f"{kind:<12}{''.join(f'{text:<26}' for text in columns.values())}{peak:8.0f} MB")
        figures[kind] = {"megabytes_per_second": speeds, "peak_mb": peak}
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    print("\ntoken file        first batch        batch         step   waiting   peak memory")
    for name, num_bytes in (("10 MB", 10_000_000), (f"{2 * ram / 1e9:.0f} GB, sparse", 2 * ram)):
        with tempfile.NamedTemporaryFile() as file:
            file.truncate(num_bytes)
            times = in_own_process(feed, Path(file.name), rounds)
        share = times["reading"] / (times["reading"] + times["training"])
        print(f"{name:<16}{times['first']:11.3f} s{1e3 * times['reading']:10.3f} ms{1e3 * times['training']:10.2f} ms"
              f"{share:10.2%}{times['peak_mb']:11.0f} MB")  # fmt: skip
        figures[f"feeding from {name}"] = times
    return figures


def draw(figures: dict, axes_of: Any) -> None:
    from minigpt_jax.benchmarks.plots import bars

    bars(axes_of("Tokenizing, MB/s"), {kind: figures[kind]["megabytes_per_second"]["tokenizing"] for kind in KINDS})
