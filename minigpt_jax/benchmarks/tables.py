"""Writes the tables of the README files: measured figures from JSON files, settings and presets from the code.

python -m minigpt_jax.benchmarks.tables           updates every README.md
python -m minigpt_jax.benchmarks.tables --check   changes nothing, exits with 1 if a table is out of date

A table replaces the lines between `<!-- table: NAME -->` and `<!-- end -->`. NAME is one of GENERATED or
`path/to/figures.json#key`. A measured figure is written once, in its JSON file, which maps each key to an object with the
FIELDS below.
"""

import dataclasses
import json
import logging
import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from minigpt_jax import cli
from minigpt_jax.commands import IS_CHECKOUT, PACKAGE_DIR
from minigpt_jax.config import SECTIONS, TASKS, Config, ImageConfig, Section, get_setting, load_preset, setting_type
from minigpt_jax.errors import DataError, UsageError, did_you_mean
from minigpt_jax.generation.strategy import BeamConfig, DecodingConfig
from minigpt_jax.runs.references import REFERENCES_DIR, Reference

ROOT = PACKAGE_DIR.parent
END = "<!-- end -->"
SOURCE_FIELDS = "machine", "versions", "date", "command"
FIELDS = {"caption", "columns", "rows", *SOURCE_FIELDS}
NOT_MEASURED = "not measured"  # in place of a preset's loss

log = logging.getLogger("minigpt_jax.tables")


def readmes(root: Path = ROOT) -> list[Path]:
    """The README of the project and those of its rooms."""
    rooms = [path for room in ("configs", "minigpt_jax", "scripts") for path in (root / room).rglob("README.md")]
    return [root / "README.md", *sorted(rooms)]


def updated(text: str, root: Path = ROOT) -> str:
    """The text with every table replaced by its current one. UsageError: unknown name; DataError: markers or figures."""
    result, *sections = re.split(r"^<!-- table: (.*) -->\n", text, flags=re.MULTILINE)
    for name, section in zip(sections[::2], sections[1::2], strict=True):
        _, end, rest = section.partition(END)
        if not end:
            raise DataError(f"table {name!r} has no {END} before the next table")
        result += f"<!-- table: {name} -->\n{table(name, root)}{END}{rest}"
    if result.count(END) != len(sections) // 2:
        raise DataError(f"there are {result.count(END)} {END} for {len(sections) // 2} <!-- table: NAME -->")
    return result


def table(name: str, root: Path = ROOT) -> str:
    """The Markdown of the table of this name."""
    if name in GENERATED:
        return GENERATED[name]()
    path, _, key = name.partition("#")
    if path.endswith(".json"):
        return figures_table(read_figures(root / path, key))
    raise UsageError(
        f"no table {name!r}{did_you_mean(name, GENERATED)}; allowed: {', '.join(GENERATED)}, path/to/figures.json#key"
    )


# ---- Measured figures -----------------------------------------------------------------------------------------------------


def read_figures(path: Path, key: str) -> dict[str, Any]:
    try:
        tables = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    if key not in tables:
        raise UsageError(f"no table {key!r}{did_you_mean(key, tables)} in {path}; allowed: {', '.join(tables)}")
    figures = tables[key]
    if set(figures) != FIELDS:
        raise DataError(f"{path}#{key} has the fields {sorted(figures)}; required: {sorted(FIELDS)}")
    for row in figures["rows"]:
        if len(row) != len(figures["columns"]):
            raise DataError(f"{path}#{key}: row {row} must have {len(figures['columns'])} cells")
    return figures


def figures_table(figures: dict[str, Any]) -> str:
    return markdown(figures["columns"], figures["rows"]) + f"\n{caption(figures)}\n"


def caption(figures: dict[str, Any]) -> str:
    """What the figures are, and in italics how they were measured."""
    source = [f"`{figures[name]}`" if name == "command" else figures[name] for name in SOURCE_FIELDS if figures[name]]
    return f"{figures['caption']} *{'; '.join(source)}.*"


# ---- From the code --------------------------------------------------------------------------------------------------------


def presets_table() -> str:
    """Every preset: what it trains, from its config, and what was measured."""
    figures = read_figures(ROOT / "configs/figures.json", "presets")
    rows = [[f"`{name}`", *described(preset(name)), *measured] for name, *measured in figures["rows"]]
    columns = ["preset", "model", "data", "steps × tokens", *figures["columns"][1:]]
    return markdown(columns, rows) + f"\n{caption(figures)}\n"


def short_presets_table() -> str:
    """Every measured language model without further flags, in four columns."""
    rows = read_figures(ROOT / "configs/figures.json", "presets")["rows"]
    plain = [row for row in rows if " " not in row[0] and preset(row[0]).task == "language_modelling"]
    measured = [(name, time, loss) for name, time, loss, _ in plain if loss != NOT_MEASURED]
    shown = [[f"`{name}`", model_and_tokens(preset(name)), time, loss] for name, time, loss in measured]
    return markdown(["preset", "model; token", "time", "validation loss, nats per token"], shown)


def model_and_tokens(config: Config) -> str:
    return f"{described(config)[0]}; {get_setting(config, 'tokenizer')}"


def preset(name: str) -> Config:
    """`shakespeare_char --dataset tiny_shakespeare` is the preset with that setting changed."""
    name, *changes = name.split()
    return load_preset(name).override(
        dict(zip([flag.removeprefix("--") for flag in changes[::2]], changes[1::2], strict=True))
    )


def described(config: Config) -> list[str]:
    """Model, text with kind of token or images with size of patch, and length of training."""
    model, training, data = config.model, config.training, config.data
    parts = [f"{model.num_layers} × {model.embed_dim}, {model.num_heads} heads, context {model.context_length}"]
    parts += [model.positions, model.norm, model.activation]
    parts += [
        name for name in ("qk_norm", "qk_scale", "token_shift", "tie_embeddings", "bias", "dropout") if getattr(model, name)
    ]
    parts += [f"init {model.init}"] if model.init != "fan_in" else []
    if isinstance(data, ImageConfig):
        patches = f"{data.image_size} × {data.image_size}, patches {data.patch_size} × {data.patch_size}"
        return [", ".join(parts), f"{data.dataset}, {patches}", f"{training.steps} × {training.batch_size} images"]
    tokens = " ".join(str(part) for part in (get_setting(config, "tokenizer"), model.vocab_size) if part)
    steps = f"{training.steps} × {training.batch_size * model.context_length}"
    return [", ".join(parts), f"{get_setting(config, 'dataset')}, {tokens}", steps]


def references_table() -> str:
    """Every preset with a reference: the losses of its seeds after the last step, and what is expected of another seed."""
    rows = []
    for reference in (Reference.read(path) for path in sorted(REFERENCES_DIR.glob("*.json"))):
        last, losses = reference.evaluations[-1], reference.final["loss"]
        made = f"{reference.date}, {reference.machine}, jax {reference.made_with['jax']}"
        dataset = get_setting(reference.config, "dataset")
        rows.append(
            [f"`{reference.preset}`", dataset, len(reference.seeds), last.step, mean_and_range(last.val_loss),
             reference.band(last.step), mean_and_range(losses), made]
        )  # fmt: skip
    columns = [
        "preset",
        "data",
        "seeds",
        "last step",
        "its validation loss",
        "expected",
        "loss over the whole split",
        "made",
    ]
    return markdown(columns, rows)


def mean_and_range(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.3f} ({min(values):.3f}–{max(values):.3f})"


def settings_table(section: type[Section]) -> str:
    """Every setting of a section with its default, what is allowed and what it does, in the order of the fields."""
    fields = dataclasses.fields(section)
    rows = [[f"`{field.name}`", default(field), allowed(field), field.metadata["help"]] for field in fields]
    return markdown(["setting", "default", "allowed", "what it does"], rows)


def default(field: dataclasses.Field) -> str:
    return f"`{plain(field.default)}`"


def plain(value: Any) -> str:
    """As on the command line: `true`, and `1` rather than `1.0`."""
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def allowed(field: dataclasses.Field) -> str:
    rules, kind = field.metadata, setting_type(field)
    if kind is bool:
        return "`true`, `false`"
    if rules["choices"]:
        return ", ".join(f"`{choice}`" for choice in rules["choices"])
    signs = {"at_least": "≥", "above": ">", "at_most": "≤", "below": "<"}
    bounds = [f"{sign} {plain(rules[name])}" for name, sign in signs.items() if rules[name] is not None]
    return ", ".join([{int: "integer", float: "number", str: "text"}[kind], *bounds])


GENERATED = {
    "presets": presets_table,
    "presets.short": short_presets_table,
    "references": references_table,
    **{
        f"settings.{name}": lambda section=section: settings_table(section)
        for name, section in (SECTIONS | TASKS).items()
        if name not in ("data", "masked_language_modelling")  # those of language_modelling
    },
    "decoding": lambda: settings_table(DecodingConfig),
    "beams": lambda: settings_table(BeamConfig),
}


# ---- Markdown -------------------------------------------------------------------------------------------------------------


def markdown(columns: Iterable, rows: Iterable[Iterable]) -> str:
    lines = [[cell(value) for value in row] for row in ([*columns], ["---"] * len([*columns]), *rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def cell(value: Any) -> str:
    return str(value).replace("|", "\\|")


def update(root: Path = ROOT, check: bool = False) -> None:
    """Writes what has changed. With `check`: writes nothing, and raises DataError for the first file that is out of date."""
    for path in readmes(root):
        text, name = path.read_text(encoding="utf-8"), path.relative_to(root).as_posix()
        try:
            new = updated(text, root)
        except (DataError, UsageError) as error:
            raise type(error)(f"{name}: {error}") from error
        if new != text and check:
            raise DataError(f"{name} is out of date: run python -m minigpt_jax.benchmarks.tables")
        if new != text:
            path.write_text(new, encoding="utf-8")
            log.info("Updated %s.", name)


def main() -> None:
    if not IS_CHECKOUT:
        raise UsageError("the tables belong to a checkout of the project: run this there")
    update(check=CHECK.value)


if __name__ == "__main__":
    CHECK = flags.DEFINE_bool("check", False, "change nothing, and exit with 1 if a table is out of date")
    cli.run(main, str(__doc__))
