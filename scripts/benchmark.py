"""Measures this project and others on this machine, in interleaved runs.

python scripts/benchmark.py train      training steps, compared with PyTorch (extra torch)
python scripts/benchmark.py kernels    time that each kernel saves in training and decoding steps
python scripts/benchmark.py generate   decoding speed, compared with PyTorch and Hugging Face (extra hf)
python scripts/benchmark.py loss       training time to a loss, compared with nanoGPT's CPU setting in PyTorch (extra torch)
python scripts/benchmark.py data       tokenizing speed, and how long training waits for batches
python scripts/benchmark.py startup    time from the start of train.py to the end of its first step
python scripts/benchmark.py scaling    time and memory against width, depth, context, batch size and text length
python scripts/benchmark.py all        all of these
python scripts/benchmark.py gpu        everything about a GPU within --minutes, in one run (extras torch and hf)
"""

import importlib.util
import json
from pathlib import Path

from absl import flags

from minigpt_jax import cli
from minigpt_jax.commands import install_command
from minigpt_jax.errors import DataError, UsageError, did_you_mean, require_choice

ROUNDS = flags.DEFINE_integer("rounds", None, "number of runs per candidate or point")
MEGABYTES = flags.DEFINE_integer("megabytes", 50, "data: size of the text to tokenize, in MB")
DATASET = flags.DEFINE_string("dataset", "tiny_shakespeare", "loss, gpu: the text to train on")
KERNELS = cli.define_kernels_flag("train, generate: ")
JSON = flags.DEFINE_string("json", None, "also write the figures to this file")
MINUTES = flags.DEFINE_float(
    "minutes", None, "gpu: stop after this many minutes (default: 8, in a rehearsal 60); parts that do not fit are skipped"
)
REHEARSE = flags.DEFINE_bool("rehearse", False, "gpu: run every part with tiny sizes, on a CPU too")
SKIP = flags.DEFINE_list("skip", [], "gpu: parts to leave out, separated by commas")
PLOT = flags.DEFINE_string("plot", None, "also plot the figures to this PNG file (extra plot)")

BENCHMARKS = "train", "kernels", "generate", "loss", "data", "startup", "scaling"  # modules of minigpt_jax.benchmarks


def main(names: list[str]) -> None:
    for name in names:
        if name not in (*BENCHMARKS, "all", "gpu"):
            raise UsageError(
                f"unknown benchmark {name!r}{did_you_mean(name, BENCHMARKS)}: choose from {', '.join(BENCHMARKS)}, all, gpu"
            )
    for flag in (ROUNDS, MEGABYTES):
        if flag.value is not None and flag.value < 1:
            raise UsageError(f"{flag.name}={flag.value} must be at least 1")
    if PLOT.value and importlib.util.find_spec("matplotlib") is None:
        raise UsageError(f"plotting needs matplotlib: {install_command('plot')}")
    check_writable(JSON.value, ".json")
    check_writable(PLOT.value, ".png")
    if "gpu" in names:
        measure_gpu(names)
        return
    chosen = list(dict.fromkeys(BENCHMARKS if not names or "all" in names else names))
    options = {"data": {"megabytes": MEGABYTES.value}, "loss": {"dataset": DATASET.value}}
    options |= {name: {"kernels": KERNELS.value} for name in ("train", "generate")}
    figures = {}
    for name in chosen:
        # Not at the top: each candidate's process imports this file, and PyTorch's should not import JAX.
        benchmark = importlib.import_module(f"minigpt_jax.benchmarks.{name}")
        print(f"{'' if name == chosen[0] else chr(10)}---- {name}")
        try:
            figures[name] = benchmark.measure(ROUNDS.value or benchmark.ROUNDS, **options.get(name, {}))
        except (DataError, UsageError) as error:  # for example an extra that is not installed
            if len(chosen) == 1:
                raise
            print(f"skipped: {error}")
        if JSON.value:
            Path(JSON.value).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    if PLOT.value and figures:
        from minigpt_jax.benchmarks.plots import draw

        draw(figures).savefig(PLOT.value, dpi=120)


def measure_gpu(names: list[str]) -> None:
    from minigpt_jax.benchmarks.gpu import runner
    from minigpt_jax.benchmarks.gpu.setup import Setup

    if len(names) > 1 or PLOT.value:
        raise UsageError("gpu runs alone, without other benchmarks and --plot")
    minutes = MINUTES.value if MINUTES.value is not None else 60 if REHEARSE.value else 8
    if not minutes > 0:
        raise UsageError(f"minutes={minutes} must be greater than 0")
    for name in SKIP.value:
        require_choice("skip", name, runner.PARTS)
    setup = Setup(REHEARSE.value, ROUNDS.value or runner.ROUNDS, DATASET.value, {})
    runner.measure(setup, SKIP.value, minutes, Path(JSON.value) if JSON.value else None)


def check_writable(path: str | None, ending: str) -> None:
    """Raises before anything is measured, which takes minutes."""
    if path is None:
        return
    if not path.endswith(ending):
        raise UsageError(f"{path!r} must end in {ending}")
    try:
        Path(path).open("ab").close()
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}") from error


if __name__ == "__main__":
    cli.run(main, __doc__, positional=True)
