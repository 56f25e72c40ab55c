"""Plots of the metrics of runs, and what all plots share. They need matplotlib (extra plot)."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from minigpt_jax.commands import install_command
from minigpt_jax.errors import DataError, UsageError
from minigpt_jax.files import local_path
from minigpt_jax.runs.references import Reference, expected

log = logging.getLogger(__name__)

PANELS = {  # titles by metric name or suffix: what is counted per second depends on the task
    "loss": "Loss, nats",
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm, before clipping",
    "_per_second": "Throughput, per second",
}


def draw(
    runs: Mapping[str, Sequence[Mapping[str, Any]]], panels: Sequence[str] = tuple(PANELS), size: Any = (11, 7),
    references: Sequence[Reference] = (),
) -> Any:  # fmt: skip
    """A figure of the metrics of runs, given as rows by name, with one panel per metric. Colours are the same in all panels.

    The panel of losses has the bands in which `references` expect the validation loss. Raises UsageError if matplotlib is
    not installed.
    """
    Figure, font_manager = import_matplotlib()
    figure = Figure(figsize=size, layout="constrained")
    num_columns = 2 if len(panels) > 1 else 1
    all_axes = figure.subplots(-(-len(panels) // num_columns), num_columns, squeeze=False).flat
    for axes, name in zip(all_axes, panels, strict=True):
        for number, (run, rows) in enumerate(runs.items()):
            colour = f"C{number}"
            if name == "loss":
                axes.plot(*series(rows, "train_loss"), color=colour, alpha=0.45, linewidth=1, label=f"{run}, training")
                axes.plot(*series(rows, "val_loss"), color=colour, marker=".", linewidth=1.8, label=f"{run}, validation")
            else:
                axes.plot(*series(rows, name), color=colour, linewidth=1.2)
        if name == "loss":
            for reference in references:
                draw_band(axes, reference)
        axes.set_title(PANELS[name], loc="left", fontsize=11)
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if name != "loss":
            axes.set_ylim(bottom=0)
        else:
            drawn = [*axes.get_lines(), *axes.collections]  # matplotlib would leave out names that start with `_`
            legend = axes.legend(drawn, ["-"] * len(drawn), frameon=False, prop={"size": 9})
            names, style = readable([str(each.get_label()) for each in drawn], font_manager)
            for text, name in zip(legend.get_texts(), names, strict=True):
                text.set(text=name, **style)
    return figure


def draw_band(axes: Any, reference: Reference) -> None:
    """Fills the band between the lowest and the highest expected validation loss, from the first to the last evaluation."""
    bands = [expected(each.val_loss) for each in reference.evaluations]
    axes.fill_between(
        [each.step for each in reference.evaluations], [band.lowest for band in bands], [band.highest for band in bands],
        color="0.5", alpha=0.35, linewidth=0, label=f"expected of {reference.preset}, from {len(reference.seeds)} seeds",
    )  # fmt: skip


def import_matplotlib() -> tuple[Any, Any]:
    """matplotlib's Figure and font_manager. Raises UsageError if it is not installed."""
    try:
        from matplotlib import font_manager
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError(f"plotting needs matplotlib: {install_command('plot')}") from error
    return Figure, font_manager


def check_png(name: str, path: str) -> Path:
    """The path of the PNG file that a flag of this name asks for. Raises UsageError if it ends in something else."""
    if not path.endswith(".png"):
        raise UsageError(f"{name}={path!r} must end in .png")
    return local_path(path)


def save(figure: Any, path: Path) -> None:
    """Writes a figure as PNG, and logs it. Raises DataError if the file cannot be written."""
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}") from error
    log.info("Wrote %s", path)


def save_if_possible(draw: Callable[[], Any], path: Path) -> None:
    """Writes the figure that `draw` returns as PNG, or logs that matplotlib is not installed. Raises DataError as `save`."""
    try:
        figure = draw()
    except UsageError as error:
        log.info("No plot: %s", error)
    else:
        save(figure, path)


def readable(names: Sequence[str], font_manager: Any) -> tuple[list[str], dict[str, Any]]:
    """Names that the user gave, and the properties of matplotlib's texts with which they are drawn as they are written: `$`
    is not mathematics, and each character comes from a font that has it."""
    fonts = fonts_for("".join(names), font_manager)
    return [drawable(name, fonts) for name in names], {"parse_math": False, "family": list(fonts)}


def fonts_for(text: str, font_manager: Any) -> dict[str, set[int]]:
    """Installed fonts that together have the characters of a text where any has them, each with its code points."""
    default = font_manager.FontProperties().get_name()
    fonts = {default: code_points(font_manager.findfont(default), font_manager)}
    missing = set(map(ord, text)) - fonts[default]
    for font in font_manager.fontManager.ttflist:
        if not missing:
            break
        known = set() if font.name.startswith("Last Resort") else code_points(font.fname, font_manager)  # it has only boxes
        if missing & known:
            fonts[font.name] = fonts.get(font.name, set()) | known
            missing -= known
    return fonts


def code_points(path: str, font_manager: Any) -> set[int]:
    try:
        return set(font_manager.get_font(path).get_charmap())
    except (OSError, RuntimeError):  # a font that matplotlib cannot use
        return set()


def drawable(text: str, fonts: Mapping[str, set[int]]) -> str:
    """The text, with escapes for characters that no font has."""
    known = set().union(*fonts.values())
    return "".join(char if ord(char) in known else char.encode("ascii", "backslashreplace").decode() for char in text)


def series(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of the metric with this name or suffix, where it is known."""
    points = [(row["step"], row[key]) for row in rows for key in row if key.endswith(name) and row[key] is not None]
    return [step for step, _ in points], [value for _, value in points]
