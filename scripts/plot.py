"""Plots the metrics of one or more runs in one PNG: losses, learning rate, gradient norm and throughput.

python scripts/plot.py --workdir runs/shakespeare_char
python scripts/plot.py --workdir runs/a --workdir runs/b --out compared.png

Needs matplotlib: python -m pip install -e '.[plot]'
"""

import logging
from pathlib import Path

from absl import flags

from minigpt_jax import cli
from minigpt_jax.errors import DataError, UsageError
from minigpt_jax.runs.metrics import read_metrics

WORKDIR = flags.DEFINE_multi_string("workdir", [], "folder of a run; can be repeated (default: the newest under runs/)")
OUT = flags.DEFINE_string("out", None, "PNG file to write (default: metrics.png in the first run's folder)")

PANELS = {  # titles by metric name or suffix: what is counted per second depends on the task
    "loss": "Loss, nats",
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm, before clipping",
    "_per_second": "Throughput, per second",
}

log = logging.getLogger("minigpt_jax.plot")


def main(more_workdirs: list[str]) -> None:
    workdirs = [Path(folder) for folder in [*WORKDIR.value, *more_workdirs]] or [cli.newest_run()]
    if OUT.value and not OUT.value.endswith(".png"):
        raise UsageError(f"out={OUT.value!r} must end in .png")
    runs = {str(workdir): read_rows(workdir) for workdir in workdirs}
    path = Path(OUT.value) if OUT.value else workdirs[0] / "metrics.png"
    try:
        draw(runs).savefig(path, dpi=150)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}") from error
    log.info("Wrote %s", path)


def read_rows(workdir: Path) -> list[dict]:
    """The rows of a run's metrics. Raises DataError if there are none."""
    path = workdir / "metrics.jsonl"
    try:
        rows = read_metrics(path)
    except OSError as error:
        raise DataError(f"{workdir} is not the folder of a run ({path.name}: {error.strerror})") from error
    if not rows:
        raise DataError(f"{path} has no rows yet")
    return rows


def draw(runs: dict[str, list[dict]]):
    """A figure with one panel per metric. A run has the same colour in all panels."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError("plotting needs matplotlib: python -m pip install -e '.[plot]'") from error

    figure = Figure(figsize=(11, 7), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(2, 2).flat, PANELS.items(), strict=True):
        for number, (workdir, rows) in enumerate(runs.items()):
            colour = f"C{number}"
            if name == "loss":
                axes.plot(*series(rows, "train_loss"), color=colour, alpha=0.45, linewidth=1, label=f"{workdir}, training")
                axes.plot(*series(rows, "val_loss"), color=colour, marker=".", linewidth=1.8, label=f"{workdir}, validation")
            else:
                axes.plot(*series(rows, name), color=colour, linewidth=1.2)
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if name != "loss":
            axes.set_ylim(bottom=0)
        else:
            axes.legend(frameon=False, fontsize=9)
    return figure


def series(rows: list[dict], name: str) -> tuple[list, list]:
    points = [(row["step"], row[key]) for row in rows for key in row if key.endswith(name) and row[key] is not None]
    return [step for step, _ in points], [value for _, value in points]


if __name__ == "__main__":
    cli.run(main, __doc__, positional=True)
