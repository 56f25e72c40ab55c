"""Plots the metrics of one or more runs in one PNG: losses, learning rate, gradient norm and throughput.

Behind the losses is the band in which a preset's reference expects them, for runs that can be compared with it.

python scripts/plot.py --workdir runs/shakespeare_char
python scripts/plot.py --workdir runs/a --workdir runs/b --out compared.png

Needs matplotlib (extra plot).
"""

from pathlib import Path

from absl import flags

from minigpt_jax import cli
from minigpt_jax.errors import DataError
from minigpt_jax.files import local_path
from minigpt_jax.runs import references
from minigpt_jax.runs.metrics import read_metrics
from minigpt_jax.runs.plots import check_png, draw, save

WORKDIR = flags.DEFINE_multi_string("workdir", [], "folder of a run; can be repeated (default: the newest under runs/)")
OUT = flags.DEFINE_string("out", None, "PNG file to write (default: metrics.png in the first run's folder)")


def main(more_workdirs: list[str]) -> None:
    workdirs = [local_path(folder) for folder in [*WORKDIR.value, *more_workdirs]] or [cli.newest_run()]
    path = check_png("out", OUT.value) if OUT.value else workdirs[0] / "metrics.png"
    runs = {str(workdir): read_rows(workdir) for workdir in workdirs}
    found = {reference.preset: reference for workdir in workdirs if (reference := references.of_run(workdir))}
    save(draw(runs, references=[*found.values()]), path)


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


if __name__ == "__main__":
    cli.run(main, __doc__, positional=True)
