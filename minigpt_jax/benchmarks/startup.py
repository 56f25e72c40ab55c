"""Time from the start of `train.py` to the end of its first step, with an empty and with a warm compilation cache."""

import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from minigpt_jax.benchmarks.interleave import with_spread
from minigpt_jax.commands import SCRIPTS_DIR
from minigpt_jax.errors import DataError
from minigpt_jax.files import cache_dir

ROUNDS = 5
TRAIN = SCRIPTS_DIR / "train.py"
PRESETS = "shakespeare_char", "mini_gpt"


def start(preset: str, folder: Path, cache: Path) -> dict[str, float]:
    """Seconds from the start of a process until it logs that the run is ready, and that its first step is done."""
    settings = f"--config {preset} --data_dir {shlex.quote(str(cache_dir()))} --overwrite --steps 2 --sample_every 0"
    command = [sys.executable, str(TRAIN), *shlex.split(settings), "--workdir", str(folder / "run")]
    seconds, lines = {}, []
    start_time = time.perf_counter()
    environment = os.environ | {"XDG_CACHE_HOME": str(cache), "JAX_COMPILATION_CACHE_DIR": ""}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr or ():
            lines.append(line.strip())
            if "new run" in line.lower():
                seconds["ready"] = time.perf_counter() - start_time
            if "first step" in line.lower():
                seconds["first_step"] = time.perf_counter() - start_time
                process.terminate()
    if "first_step" not in seconds:
        raise DataError(f"train.py exited before its first step: {lines[-1] if lines else 'no output'}")
    return seconds


def measure(rounds: int) -> dict:
    """Prints a table of seconds for each preset, and returns the figures."""
    print("Seconds from the start of train.py: median (min–max). first: empty compilation cache; later: warm cache.")
    print(f"{'':<28}{'run ready':<28}first step done")
    figures = {}
    for preset in PRESETS:
        with tempfile.TemporaryDirectory() as folder:
            cache = Path(folder, "cache")
            start(preset, Path(folder), cache)  # warms the file cache, and may download and tokenize the text
            figures[preset] = {"first": [], "later": []}
            for round in range(rounds):
                cache = Path(folder, f"cache_{round}")
                figures[preset]["first"].append(start(preset, Path(folder), cache))
                figures[preset]["later"].append(start(preset, Path(folder), cache))
        for which, runs in figures[preset].items():
            ready, done = ([run[name] for run in runs] for name in ("ready", "first_step"))
            print(f"{f'{preset}, {which}':<28}{with_spread(ready):<28}{with_spread(done):<28}")
    return figures


def draw(figures: dict, axes_of: Any) -> None:
    from minigpt_jax.benchmarks.plots import bars

    values = {
        f"{preset}, {which}": [run["first_step"] for run in runs]
        for preset, starts in figures.items()
        for which, runs in starts.items()
    }
    bars(axes_of("Start of train.py to end of first step, s"), values)
