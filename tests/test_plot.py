"""The lines in the plots of runs are the rows of their metrics."""

import io

import pytest

from minigpt_jax.config import Config
from minigpt_jax.runs import plots
from minigpt_jax.runs.references import Evaluation, Reference

pytest.importorskip("matplotlib")


def rows_of(run):
    """Two training rows, one with a non-finite loss, and a validation row."""
    training = {"learning_rate": 0.1 * run, "grad_norm": 2.0 + run, "tokens_per_second": 1000.0 * run}
    return [
        {"step": 3, "train_loss": 4.0 + run, **training},
        {"step": 6, "train_loss": None, **training},
        {"step": 6, "val_loss": 3.0 + run},
    ]


def test_every_panel_has_the_values_of_every_run_in_its_colour():
    loss, *others = plots.draw({"one": rows_of(1), "two": rows_of(2)}).axes
    lines = {line.get_label(): (line.get_xydata().tolist(), line.get_color()) for line in loss.get_lines()}
    assert lines == {
        "one, training": ([[3.0, 5.0]], "C0"),
        "one, validation": ([[6.0, 4.0]], "C0"),
        "two, training": ([[3.0, 6.0]], "C1"),
        "two, validation": ([[6.0, 5.0]], "C1"),
    }
    names = [name for name in plots.PANELS if name != "loss"]
    for axes, name in zip(others, names, strict=True):
        lines = [(line.get_xydata().tolist(), line.get_color()) for line in axes.get_lines()]
        key = "tokens_per_second" if name == "_per_second" else name
        expected = [[[row["step"], row[key]] for row in rows_of(run) if key in row] for run in (1, 2)]
        assert lines == [(expected[0], "C0"), (expected[1], "C1")]
        assert axes.get_title(loc="left") == plots.PANELS[name]


def test_the_band_of_a_reference_is_behind_the_losses_only():
    evaluations = tuple(Evaluation(step, (5.0, 5.1, 5.2, 5.3, 5.4)) for step in (2, 6))
    seeds = dict(seeds=(0, 1, 2, 3, 4), final={}, evaluations=evaluations)  # noqa: C408
    reference = Reference("_toy$", "", "", "", made_with={}, sources={}, data_facts={}, config=Config(), **seeds)
    loss, *others = plots.draw({"one": rows_of(1)}, references=[reference]).axes
    [band] = loss.collections
    corners = {tuple(corner) for corner in band.get_paths()[0].vertices}
    lowest, highest = reference.band(2).lowest, reference.band(2).highest
    assert corners == {(2.0, lowest), (2.0, highest), (6.0, lowest), (6.0, highest)}
    assert not any(axes.collections for axes in others)
    names = [text.get_text() for text in loss.get_legend().get_texts()]
    assert names == ["one, training", "one, validation", "expected of _toy$, from 5 seeds"]


@pytest.mark.filterwarnings("error")
def test_names_of_runs_are_drawn_as_they_are_written():
    names = ["a$b$", r"$\nothing", "_hidden", "héß", "cost$"]
    figure = plots.draw(dict.fromkeys(names, rows_of(1)))
    figure.savefig(io.BytesIO(), dpi=20)
    texts = figure.axes[0].get_legend().get_texts()
    assert [text.get_text() for text in texts] == [
        f"{name}, {part}" for name in names for part in ("training", "validation")
    ]
    assert not any(text.get_parse_math() for text in texts)


@pytest.mark.filterwarnings("error")  # a missing glyph is a warning
def test_characters_that_no_font_has_are_escaped():
    name = "ab \N{CJK UNIFIED IDEOGRAPH-6F22} \U0010fffd\n"
    figure = plots.draw({name: rows_of(1)}, ["loss"])
    figure.savefig(io.BytesIO(), dpi=20)
    text = figure.axes[0].get_legend().get_texts()[0].get_text()
    assert text.startswith("ab ")
    assert r"\U0010fffd" in text
    assert ("漢" in text) != (r"\u6f22" in text)
