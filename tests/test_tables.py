"""The tables of the README files: up to date, each figure used, and clear errors where one cannot be made."""

import dataclasses
import json

import pytest
from helpers import assert_raises

from minigpt_jax.benchmarks import tables
from minigpt_jax.config import Section, load_preset, preset_names, setting
from minigpt_jax.errors import DataError, UsageError

ROOT = tables.ROOT
FIGURES = {
    f"{path.relative_to(ROOT).as_posix()}#{key}"
    for room in ("configs", "minigpt_jax")
    for pattern in ("figures.json", "figures/*.json")
    for path in (ROOT / room).rglob(pattern)
    for key in json.loads(path.read_text(encoding="utf-8"))
}
GOOD = {
    "caption": "C.",
    "command": "c",
    "machine": "m",
    "versions": "",
    "date": "d",
    "columns": ["a", "b"],
    "rows": [[1, "x|y"]],
}


def names(path):
    return [
        line.removeprefix("<!-- table: ").removesuffix(" -->")
        for line in path.read_text("utf-8").splitlines()
        if "<!-- table: " in line
    ]


def root_with(folder, text, **changes):
    """A project with one README, and one table of figures with these fields changed; None leaves a field out."""
    figures = {name: value for name, value in (GOOD | changes).items() if value is not None}
    (folder / "figures.json").write_text(json.dumps({"key": figures}), encoding="utf-8")
    (folder / "README.md").write_text(text, encoding="utf-8")
    return folder


ONE = "before\n<!-- table: figures.json#key -->\nold\n<!-- end -->\nafter\n"


@pytest.mark.parametrize("path", tables.readmes(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_table_is_up_to_date(path):
    text = path.read_text(encoding="utf-8")
    assert tables.updated(text) == text


def test_every_table_is_in_a_readme():
    used = {name for path in tables.readmes() for name in names(path)}
    assert used == FIGURES - {"configs/figures.json#presets"} | set(tables.GENERATED)  # which `presets` reads


def test_every_preset_is_in_the_table_with_its_reference_result():
    rows = {
        name.split()[0]: loss
        for name, _, loss, _ in reversed(tables.read_figures(ROOT / "configs/figures.json", "presets")["rows"])
    }
    assert set(rows) == set(preset_names())
    results = {name: result for name in rows if (result := load_preset(name).reference_result)}
    assert results
    for name, result in results.items():
        measure = "" if result.measure == "loss" else f"{result.measure} "
        assert rows[name] == f"{measure}{result.mean:.3f} ± {result.spread:.3f}, {result.seeds} seeds"


def test_a_table_replaces_what_is_between_its_markers(tmp_path):
    root = root_with(tmp_path, ONE)
    tables.update(root)
    table = "| a | b |\n| --- | --- |\n| 1 | x\\|y |\n\nC. *m; d; `c`.*\n"
    assert (root / "README.md").read_text("utf-8") == ONE.replace("old\n", table)
    tables.update(root, check=True)


def test_check_names_what_is_out_of_date_and_changes_nothing(tmp_path):
    root = root_with(tmp_path, ONE)
    assert_raises(DataError, tables.update, root, check=True, says=("README.md",))
    assert (root / "README.md").read_text("utf-8") == ONE


def test_an_unknown_name_lists_the_known_ones(tmp_path):
    root = root_with(tmp_path, ONE.replace("figures.json#key", "setings.model"))
    assert_raises(UsageError, tables.update, root, says=("README.md", "setings.model", "settings.model", *tables.GENERATED))
    root = root_with(tmp_path, ONE.replace("#key", "#kee"))
    assert_raises(UsageError, tables.update, root, says=("'kee'", "'key'"))
    root = root_with(tmp_path, ONE.replace("figures.json", "none.json"))
    assert_raises(DataError, tables.update, root, says=("none.json",))


@pytest.mark.parametrize(
    "text", [ONE.replace("<!-- end -->", "") + ONE, ONE.replace("<!-- end -->", ""), ONE + "<!-- end -->"]
)
def test_markers_come_in_pairs(text, tmp_path):
    assert_raises(DataError, tables.update, root_with(tmp_path, text), says=("README.md", "<!-- end -->"))


@pytest.mark.parametrize(
    "changes, says", [({"date": None}, "date"), ({"notes": "n"}, "notes"), ({"rows": [["x"]]}, "['x']")]
)
def test_figures_that_are_incomplete_are_refused(changes, says, tmp_path):
    assert_raises(DataError, tables.update, root_with(tmp_path, ONE, **changes), says=("key", says))


def test_settings_become_rows():
    @dataclasses.dataclass(frozen=True)
    class Toy(Section):
        kind: str = setting("a", "what kind", choices=("a", "b"))
        share: float | None = setting(None, "how much", above=0.0, at_most=1.0)
        on: bool = setting(True, "whether")
        rate: float = setting(2.0, "how fast")

    rows = ["`kind` | `a` | `a`, `b` | what kind", "`share` | `None` | number, > 0, ≤ 1 | how much"]
    rows += ["`on` | `true` | `true`, `false` | whether", "`rate` | `2` | number | how fast"]
    assert tables.settings_table(Toy).splitlines()[2:] == [f"| {row} |" for row in rows]
