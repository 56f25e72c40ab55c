"""The outcomes of an ablation, as a table and as a forest plot (extra plot)."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from minigpt_jax.experiments.ablation import Outcome
from minigpt_jax.experiments.grid import named
from minigpt_jax.runs.plots import import_matplotlib

Results = Sequence[Mapping[str, Any]]

# 97.5 % quantiles of Student's t with n - 1 degrees of freedom, by the number of pairs n; beyond 10 pairs that of 10.
T_QUANTILES = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
OUTLIER = 6.0  # times the third quartile of all differences: what is further out is an arrow
BUDGETS = {"equal_tokens": "equal tokens", "equal_time": "equal time"}  # fields of Outcome
COLOURS = {"equal_tokens": "C0", "equal_time": "C1"}


@dataclasses.dataclass(frozen=True)
class Difference:
    """The mean of the differences of two runs with the same seed, in nats: a change's loss minus the base's. Pairs with a
    diverged run are not part of it."""

    mean: float | None  # None without such pairs
    margin: float | None  # half of the 95 % confidence interval; None for fewer than two pairs
    diverged: tuple[int, ...]  # the seeds of the change's diverged runs

    def __str__(self) -> str:
        mean = "" if self.mean is None else f"{self.mean:+.4f}"
        return mean + ("" if self.margin is None else f" ± {self.margin:.4f}")


def difference(runs: Results, base: Results) -> Difference:
    """The difference of results that are in the same order of seeds."""
    pairs = [run["loss"] - other["loss"] for run, other in zip(runs, base, strict=True)
             if not (run["diverged"] or other["diverged"])]  # fmt: skip
    mean, margin, n = statistics.fmean(pairs) if pairs else None, None, len(pairs)
    if n > 1:
        margin = T_QUANTILES[min(n, 10)] * statistics.stdev(pairs) / math.sqrt(n)
    return Difference(mean, margin, diverged_seeds(runs))


def diverged_seeds(runs: Results) -> tuple[int, ...]:
    return tuple(run["settings"]["seed"] for run in runs if run["diverged"])


def compared(outcomes: Sequence[Outcome]) -> list[tuple[Outcome, dict[str, Difference]]]:
    """Each change with its differences to the base, at equal tokens and at equal time. The lowest loss at equal tokens
    comes first, and changes with diverged runs come last."""
    base, *others = outcomes
    rows = [(each, {name: difference(getattr(each, name), base.equal_tokens) for name in BUDGETS}) for each in others]

    def rank(row: tuple[Outcome, dict[str, Difference]]) -> tuple[bool, float]:
        mean = row[1]["equal_tokens"].mean
        return any(each.diverged for each in row[1].values()), math.inf if mean is None else mean

    return sorted(rows, key=rank)


def described_base(base: Outcome) -> str:
    """One line: the base's loss, size and steps."""
    runs, variant = base.equal_tokens, base.variant
    losses, diverged = [run["loss"] for run in runs if not run["diverged"]], diverged_seeds(runs)
    loss = f"loss {statistics.fmean(losses):.4f}" if losses else "diverged"
    spread = f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
    notes = f"mean ± sd of {len(losses)} seeds" + (f"; diverged: {named_seeds(diverged)}" if diverged else "")
    return f"base: {loss}{spread} ({notes}), {variant.parameters:,} parameters, {variant.steps:,} steps"


def described_divergence(row: Mapping[str, Difference]) -> str:
    """`diverged: seed 2 at equal tokens; seed 0, 2 at equal time`, or an empty string."""
    found = [f"{named_seeds(row[name].diverged)} at {text}" for name, text in BUDGETS.items() if row[name].diverged]
    return f"diverged: {'; '.join(found)}" if found else ""


def named_seeds(seeds: Sequence[int]) -> str:
    return f"seed {', '.join(map(str, seeds))}"


def table(outcomes: Sequence[Outcome]) -> str:
    """A line for the base, and one for each change: its parameters, its step time relative to the base's (median
    and bounds), and the differences of the loss, as mean ± half of the 95 % confidence interval."""
    cells = [("", "parameters", "step time", *(f"at {text}" for text in BUDGETS.values()), "")]
    for outcome, row in compared(outcomes):
        variant, losses = outcome.variant, [str(row[name]) for name in BUDGETS]
        low, ratio, high = variant.relative_step_time
        step_time = f"{ratio:.3f} ({low:.3f}–{high:.3f})" if low < high else "the same"
        cells.append((named(variant.settings), f"{variant.parameters:,}", step_time, *losses, described_divergence(row)))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    explanation = "Loss minus the base's, in nats, paired by seed: mean ± half of the 95 % confidence interval."
    return "\n".join([described_base(outcomes[0]), *lines, explanation])


# ---- Plot -----------------------------------------------------------------------------------------------------------------


def draw(outcomes: Sequence[Outcome]) -> Any:
    """A forest plot: for each change the differences of the loss with their 95 % confidence intervals, and on the right its
    parameters and relative step time. Differences far beyond most others are arrows at the edge, with their values.

    Raises UsageError if matplotlib is not installed.
    """
    Figure, _ = import_matplotlib()
    rows = compared(outcomes)
    figure = Figure(figsize=(10, 1.8 + 0.36 * len(rows)), layout="constrained")
    axes = figure.subplots()
    edges = visible_range([each for _, row in rows for each in row.values()])
    axes.axvline(0, color="0.3", linewidth=1)
    for index in range(0, len(rows), 2):  # stripes lead from the name of a change to its size
        axes.axhspan(index - 0.5, index + 0.5, color="0.96", zorder=0)
    for offset, (name, text) in zip((-0.17, 0.17), BUDGETS.items(), strict=True):
        style = {"color": COLOURS[name], "linestyle": "", "marker": "o", "markersize": 5}
        for index, (_, row) in enumerate(rows):
            draw_difference(axes, row[name], index + offset, edges, style)
        axes.errorbar([], [], xerr=[], **style, label=f"at {text}")
    variants = [each.variant for each, _ in rows]
    names = [named(each.settings) for each in variants]
    sizes = [f"{each.parameters / 1e6:.2f} M   {each.relative_step_time[1]:.2f} ×" for each in variants]
    axes.set(xlim=edges, ylim=(len(rows) - 0.5, -0.5))
    axes.set_yticks(range(len(rows)), names, fontsize=9)
    beside = axes.secondary_yaxis("right")
    beside.set_yticks(range(len(rows)), sizes, fontsize=9)
    axes.annotate("params   step time", (1, 1), (8, 4), xycoords="axes fraction", textcoords="offset points", fontsize=9)
    for side in (axes, beside):
        side.tick_params(axis="y", length=0, pad=8)
        side.spines[:].set_visible(False)
    axes.spines["bottom"].set_visible(True)
    axes.grid(axis="x", alpha=0.25)
    figure.suptitle(described_base(outcomes[0]), fontsize=10)
    axes.set_xlabel("loss minus the base's, in nats, with 95 % confidence intervals (left of 0: better)", fontsize=9)
    axes.legend(frameon=False, fontsize=9, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
    return figure


def visible_range(shown: Sequence[Difference]) -> tuple[float, float]:
    """The range of the horizontal axis: that of all intervals but those of outliers."""
    means = sorted(abs(each.mean) for each in shown if each.mean is not None)
    largest = OUTLIER * means[math.ceil(0.75 * (len(means) - 1))] if means else 0.0
    ends = [0.0]
    for each in shown:
        if each.mean is not None and abs(each.mean) <= largest:
            margin = each.margin or 0.0
            ends += [max(each.mean - margin, -largest), min(each.mean + margin, largest)]
    space = 0.05 * (max(ends) - min(ends)) or 1.0
    return min(ends) - space, max(ends) + space


def draw_difference(axes: Any, shown: Difference, y: float, edges: tuple[float, float], style: dict[str, Any]) -> None:
    """A point with its interval, or an arrow with the value at the edge. Diverged runs are a cross with their number."""
    (lowest, highest), mean = edges, shown.mean
    edge, align, shift, marker = highest, "right", -6, ">"
    notes = []
    if mean is not None and lowest <= mean <= highest:
        axes.errorbar(mean, y, xerr=shown.margin, **style)
    elif mean is not None:
        notes.append(str(shown))
        if mean < 0:
            edge, align, shift, marker = lowest, "left", 6, "<"
    if shown.diverged:
        notes.append(f"{len(shown.diverged)} diverged")
        marker = "x"
    if notes:
        axes.plot(edge, y, **style | {"marker": marker}, clip_on=False)
        axes.annotate(
            ", ".join(notes), (edge, y), (shift, 0), textcoords="offset points", ha=align, va="center", fontsize=7,
            color=style["color"],
        )  # fmt: skip
