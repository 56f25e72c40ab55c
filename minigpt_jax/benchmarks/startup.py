"""What passes from the start of `train.py` to the end of its first step, without and with programs kept from before."""

import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from minigpt_jax.benchmarks.interleave import with_spread
from minigpt_jax.errors import DataError
from minigpt_jax.files import cache_dir

ROUNDS = 5
TRAIN = Path(__file__).resolve().parents[2] / "scripts" / "train.py"
PRESETS = "shakespeare_char", "mini_gpt"


def start(preset: str, folder: Path, cache: Path) -> dict[str, float]:
    """Seconds from the start of a process to the line that tells of its run, and to the one that tells of its first step."""
    settings = f"--config {preset} --data_dir {shlex.quote(str(cache_dir()))} --overwrite --steps 2 --sample_every 0"
    command = [sys.executable, str(TRAIN), *shlex.split(settings), "--workdir", str(folder / "run")]
    seconds, lines = {}, []
    began = time.perf_counter()
    environment = os.environ | {"XDG_CACHE_HOME": str(cache), "JAX_COMPILATION_CACHE_DIR": ""}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr or ():
            lines.append(line.strip())
            if line.startswith("New run"):
                seconds["ready"] = time.perf_counter() - began
            if line.startswith("The first step"):
                seconds["first_step"] = time.perf_counter() - began
                process.terminate()
    if "first_step" not in seconds:
        raise DataError(f"train.py did not come to its first step: {lines[-1] if lines else 'it said nothing'}")
    return seconds


def measure(rounds: int) -> dict:
    """Prints a table of seconds for each preset, and returns them."""
    print(f"{'seconds to':<28}{'the run is ready':<28}{'the first step is done':<28}")
    figures = {}
    for preset in PRESETS:
        with tempfile.TemporaryDirectory() as folder:
            cache = Path(folder, "cache")
            start(preset, Path(folder), cache)  # warms the files, and may make the text and its tokens
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
    bars(axes_of("From start to first step, s"), values)
