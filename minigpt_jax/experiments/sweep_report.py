"""The results of a sweep, as a table and as a plot (extra plot)."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from minigpt_jax.experiments.grid import named
from minigpt_jax.runs.plots import import_matplotlib

Results = Sequence[Mapping[str, Any]]


def combinations(results: Results) -> dict[str, list[Mapping[str, Any]]]:
    """The results that differ only in the seed, by what they have in common. The best mean loss comes first, and
    combinations with a diverged run come last."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        settings = {name: value for name, value in result["settings"].items() if name != "seed"}
        found.setdefault(named(settings) or "all seeds", []).append(result)

    def rank(named: tuple[str, list[Mapping[str, Any]]]) -> tuple[bool, float]:
        losses = converged_losses(named[1])
        return len(losses) < len(named[1]), statistics.mean(losses) if losses else float("inf")

    return dict(sorted(found.items(), key=rank))


def converged_losses(results: Results) -> list[float]:
    return [result["loss"] for result in results if not result["diverged"]]


def table(results: Results) -> str:
    """A line for each combination of settings: the loss as mean ± standard deviation over the seeds, their number, and how
    many of them diverged. Those are not part of the mean."""
    rows = combinations(results)
    width = max(map(len, rows))
    lines = [f"{'':<{width}}  loss, mean ± sd   runs"]
    for name, runs in rows.items():
        losses, num_diverged = converged_losses(runs), sum(run["diverged"] for run in runs)
        mean = f"{statistics.mean(losses):.4f}" if losses else "diverged"
        loss = mean + (f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else "")
        lines.append(f"{name:<{width}}  {loss:<15}   {len(runs)}" + (f", {num_diverged} diverged" if num_diverged else ""))
    return "\n".join(lines)


# ---- Plot -----------------------------------------------------------------------------------------------------------------


def draw(results: Results, vary: Mapping[str, Sequence[Any]]) -> Any:
    """A figure of validation loss against steps: a line for the mean over seeds, with a band of one standard deviation, and
    dashed lines for diverged runs. If numbers are varied, a second panel has the final loss against the first of them.

    Raises UsageError if matplotlib is not installed.
    """
    Figure, _ = import_matplotlib()
    numbers = [name for name, values in vary.items() if name != "seed" and len(values) > 1 and are_numbers(values)]
    rows = combinations(results)
    figure = Figure(figsize=(11 if numbers else 7, 5 + 0.15 * len(rows)), layout="constrained")
    all_axes = figure.subplots(1, 2 if numbers else 1, squeeze=False)[0]
    draw_curves(all_axes[0], rows)
    if numbers:
        draw_final_losses(all_axes[1], numbers[0], results)
    for axes in all_axes:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    return figure


def are_numbers(values: Sequence[Any]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def mean_and_spread(values: Any) -> tuple[Any, Any]:
    """Mean and standard deviation over the first axis; the latter is 0 for a single value."""
    return np.mean(values, axis=0), np.std(values, axis=0, ddof=min(1, len(values) - 1))


def curve(run: Mapping[str, Any]) -> tuple[list[int], list[float]]:
    """Steps and validation losses of a run. The line has a gap where they were not finite."""
    losses = [row["val_loss"] for row in run["evaluations"]]
    return [row["step"] for row in run["evaluations"]], [float("nan") if loss is None else loss for loss in losses]


def colour_of(index: int, count: int) -> Any:
    """One of matplotlib's ten colours or, of more than ten lines, a shade between dark and light."""
    from matplotlib import colormaps

    return f"C{index}" if count <= 10 else colormaps["viridis"](0.95 * index / count)


def draw_band(axes: Any, x: Any, mean: Any, spread: Any, colour: Any, label: str) -> None:
    """A line, and a band of one standard deviation around it."""
    axes.plot(x, mean, color=colour, marker=".", linewidth=1.5, label=label)
    axes.fill_between(x, mean - spread, mean + spread, color=colour, alpha=0.2, linewidth=0)


def draw_crosses(axes: Any, x: Sequence[float], colour: Any, label: str | None = None) -> None:
    """Crosses at the upper edge, for runs that diverged."""
    edge = {"transform": axes.get_xaxis_transform(), "clip_on": False, "linestyle": ""}
    axes.plot(x, [1.0] * len(x), color=colour, marker="x", label=label, **edge)


def draw_curves(axes: Any, rows: Mapping[str, Results]) -> None:
    """The losses before the first step and those of runs that diverge may be above the visible range. A cross at the upper
    edge marks the last step of the latter."""
    highest = []
    for index, (name, runs) in enumerate(rows.items()):
        colour, converged = colour_of(index, len(rows)), [run for run in runs if not run["diverged"]]
        diverged = [run for run in runs if run["diverged"]]
        if converged:
            losses = [curve(run)[1] for run in converged]
            draw_band(axes, curve(converged[0])[0], *mean_and_spread(losses), colour, name)
            highest += [loss for each in losses for loss in each[1:] if math.isfinite(loss)]
        for number, run in enumerate(diverged):
            label = f"{name}: {len(diverged)} of {len(runs)} diverged" if number == 0 else None
            axes.plot(*curve(run), color=colour, linestyle="--", linewidth=1, label=label)
        if diverged:
            draw_crosses(axes, [run["step"] for run in diverged], colour)
    if highest:
        axes.set_ylim(top=1.02 * max(highest))
    axes.set_title("Validation loss, nats", loc="left", fontsize=11)
    axes.set_xlabel("step")


def draw_final_losses(axes: Any, setting: str, results: Results) -> None:
    """The final loss against a setting, with a line and a band for each combination of the others."""
    lines: dict[str, dict[float, list[Mapping[str, Any]]]] = {}
    for result in results:
        others = {name: value for name, value in result["settings"].items() if name not in (setting, "seed")}
        runs_by_value = lines.setdefault(named(others) or "final loss", {})
        runs_by_value.setdefault(result["settings"][setting], []).append(result)
    for index, (name, runs_by_value) in enumerate(lines.items()):
        colour = colour_of(index, len(lines))
        losses = {value: converged_losses(runs) for value, runs in sorted(runs_by_value.items())}
        points = [(value, *mean_and_spread(each)) for value, each in losses.items() if each]
        if points:
            values, mean, spread = (np.array(column) for column in zip(*points, strict=True))
            draw_band(axes, values, mean, spread, colour, name)
        if crosses := [value for value, runs in runs_by_value.items() if len(losses[value]) < len(runs)]:
            draw_crosses(axes, crosses, colour, f"{name}: diverged")
    values = [result["settings"][setting] for result in results]
    if min(values) > 0 and max(values) >= 8 * min(values):
        axes.set_xscale("log")
    axes.set_title("Final loss on all validation data, nats", loc="left", fontsize=11)
    axes.set_xlabel(setting)
