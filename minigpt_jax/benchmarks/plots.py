"""The figures of benchmarks as one picture: bars for candidates, lines for what grows. Needs matplotlib."""

import importlib
import math
import statistics
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure


def draw(figures: dict[str, dict]) -> Figure:
    """A panel for each title that the benchmarks' own `draw` asks for."""
    figure, panels = Figure(layout="constrained"), {}

    def axes_of(title: str) -> Axes:
        if title not in panels:
            panels[title] = axes = figure.add_subplot(label=title)
            axes.set_title(title, loc="left", fontsize=10)
            axes.grid(alpha=0.25)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
        return panels[title]

    for name, found in figures.items():
        importlib.import_module(f"minigpt_jax.benchmarks.{name}").draw(found, axes_of)
    num_columns = min(len(panels), 4 if len(panels) > 6 else 2)
    num_rows = math.ceil(len(panels) / num_columns)
    grid = figure.add_gridspec(num_rows, num_columns)
    for place, axes in enumerate(panels.values()):
        axes.set_subplotspec(grid[place])
    figure.set_size_inches(5 * num_columns, 3 * num_rows)
    return figure


def bars(axes: Axes, values: Mapping[str, Sequence[float]], bound: float | None = None, bound_label: str = "") -> None:
    """A bar for each name's median, with a line from the least to the largest value, and a dotted one at a bound."""
    for name, found in values.items():
        median = statistics.median(found)
        axes.barh(name, median, xerr=[[median - min(found)], [max(found) - median]], color="C0", ecolor="0.3")
    if bound is not None:
        axes.axvline(bound, color="0.3", linestyle=":")
        axes.set_xlabel(f"dotted: {bound_label}", fontsize=8)
    axes.invert_yaxis()
