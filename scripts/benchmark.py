"""Measures this project, and others beside it, on this machine, in turn, in one run.

python scripts/benchmark.py train      a training step, beside PyTorch's (extra torch)
python scripts/benchmark.py kernels    what each kernel saves in training and decoding steps
python scripts/benchmark.py generate   tokens per second of decoding, beside PyTorch and Hugging Face (extra hf)
python scripts/benchmark.py loss       time to a loss, beside nanoGPT's setting in PyTorch (extra torch)
python scripts/benchmark.py data       tokenizing, and what training waits for batches, also from a file above memory
python scripts/benchmark.py startup    from the start of train.py to the end of its first step
python scripts/benchmark.py scaling    time and memory over width, depth, context, batch and length
python scripts/benchmark.py all        all of these
"""

import importlib.util
import json
from pathlib import Path

from absl import flags

from minigpt_jax import cli
from minigpt_jax.errors import DataError, UsageError, did_you_mean

ROUNDS = flags.DEFINE_integer("rounds", None, "how often each candidate is asked, or each point measured")
MEGABYTES = flags.DEFINE_integer("megabytes", 50, "data: size of the text that is tokenized")
DATASET = flags.DEFINE_string("dataset", "tiny_shakespeare", "loss: the text")
KERNELS = cli.define_kernels_flag("train, generate: ")
JSON = flags.DEFINE_string("json", None, "also write the figures to this file")
PLOT = flags.DEFINE_string("plot", None, "also draw the figures into this PNG (extra plot)")

BENCHMARKS = "train", "kernels", "generate", "loss", "data", "startup", "scaling"  # modules of minigpt_jax.benchmarks


def main(names: list[str]) -> None:
    for name in names:
        if name not in (*BENCHMARKS, "all"):
            raise UsageError(
                f"no benchmark {name!r}{did_you_mean(name, BENCHMARKS)}; there are: {', '.join(BENCHMARKS)}, all"
            )
    for flag in (ROUNDS, MEGABYTES):
        if flag.value is not None and flag.value < 1:
            raise UsageError(f"{flag.name}={flag.value} must be at least 1")
    if PLOT.value and importlib.util.find_spec("matplotlib") is None:
        raise UsageError("plotting needs matplotlib: python -m pip install -e '.[plot]'")
    check_can_be_written(JSON.value, ".json")
    check_can_be_written(PLOT.value, ".png")
    chosen = list(dict.fromkeys(BENCHMARKS if not names or "all" in names else names))
    only_for = {"data": {"megabytes": MEGABYTES.value}, "loss": {"dataset": DATASET.value}}
    only_for |= {name: {"kernels": KERNELS.value} for name in ("train", "generate")}
    figures = {}
    for name in chosen:
        # Imported here and not above, since candidates start with the imports of this file, and PyTorch's need no JAX.
        benchmark = importlib.import_module(f"minigpt_jax.benchmarks.{name}")
        print(f"{'' if name == chosen[0] else chr(10)}---- {name}")
        try:
            figures[name] = benchmark.measure(ROUNDS.value or benchmark.ROUNDS, **only_for.get(name, {}))
        except (DataError, UsageError) as error:  # such as an extra that is not installed
            if len(chosen) == 1:
                raise
            print(f"left out: {error}")
        if JSON.value:
            Path(JSON.value).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    if PLOT.value and figures:
        from minigpt_jax.benchmarks.plots import draw

        draw(figures).savefig(PLOT.value, dpi=120)


def check_can_be_written(path: str | None, ending: str) -> None:
    """Before anything is measured, since that takes minutes."""
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
