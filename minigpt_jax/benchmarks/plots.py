"""Plots all benchmark figures in one image. Needs matplotlib."""

import importlib
import math
import statistics
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure


def draw(figures: dict[str, dict]) -> Figure:
    """One panel for each title that the `draw` functions of the benchmarks request."""
    figure, panels = Figure(layout="constrained"), {}

    def axes_of(title: str) -> Axes:
        if title not in panels:
            panels[title] = axes = figure.add_subplot(label=title)
            axes.set_title(title, loc="left", fontsize=10)
            axes.grid(alpha=0.25)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
        return panels[title]

    for name, benchmark_figures in figures.items():
        importlib.import_module(f"minigpt_jax.benchmarks.{name}").draw(benchmark_figures, axes_of)
    num_columns = min(len(panels), 4 if len(panels) > 6 else 2)
    num_rows = math.ceil(len(panels) / num_columns)
    grid = figure.add_gridspec(num_rows, num_columns)
    for index, axes in enumerate(panels.values()):
        axes.set_subplotspec(grid[index])
    figure.set_size_inches(5 * num_columns, 3 * num_rows)
    return figure


def bars(axes: Axes, values: Mapping[str, Sequence[float]], bound: float | None = None, bound_label: str = "") -> None:
    """A bar per name at the median, with an error bar from minimum to maximum, and a dotted line at the bound."""
    for name, measured in values.items():
        median = statistics.median(measured)
        axes.barh(name, median, xerr=[[median - min(measured)], [max(measured) - median]], color="C0", ecolor="0.3")
    if bound is not None:
        axes.axvline(bound, color="0.3", linestyle=":")
        axes.set_xlabel(f"dotted: {bound_label}", fontsize=8)
    axes.invert_yaxis()
