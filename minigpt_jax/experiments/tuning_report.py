"""What tuning has found, as a table and as a preset."""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from minigpt_jax.config import Config, differences, get_setting, load_preset
from minigpt_jax.experiments.grid import named

SHOWN = 5  # settings in the table


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """A line for each of the best results, given the best first: loss, number of the trial, settings."""
    rows = [f"{result['loss']:.4f}  {result['trial']:>5}  {named(result['settings'])}" for result in results[:SHOWN]]
    return "\n".join(["  loss  trial  settings", *rows])


def preset_source(preset: str, config: Config, tuned: Collection[str], about: str) -> str:
    """The Python source of a preset with this config, derived from another one. It has the settings that differ, and the
    tuned ones in any case. `about` is its docstring."""
    base = str(Path(preset).resolve()) if preset.endswith(".py") else preset
    names = differences(load_preset(preset), config).keys() | set(tuned)
    changed = {name: get_setting(config, name) for name in config.settings if name in names}
    settings = "".join(f"            {literal(name)}: {literal(value)},\n" for name, value in changed.items())
    docstring = about.replace("\\", "\\\\").replace('"""', '\\"\\"\\"')
    return f'''"""{docstring}
"""

from minigpt_jax.config import Config, load_preset


def get_config() -> Config:
    return load_preset({literal(base)}).override(
        {{
{settings}        }}
    )
'''


def literal(value: Any) -> str:
    """A setting's value in Python, with double quotes."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
