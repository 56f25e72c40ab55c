"""What the README says of the code: how many lines there are to read at most, and in which order processors run."""

import dataclasses
import re
from pathlib import Path

import pytest

from minigpt_jax.generation.strategy import DecodingConfig

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `(minigpt_jax/\S+)` \| (\d+) \|", README, re.MULTILINE)

# What a newcomer should have to read, at most.
BOUNDS = {
    "minigpt_jax/reference.py": 200,
    "minigpt_jax/models/{ops,masks,attention,layers,transformer,gpt}.py": 350,
    "minigpt_jax/training/{optimizer,step}.py": 100,
    "minigpt_jax/training/loop.py": 100,
    "minigpt_jax/generation/decode.py": 120,
}


def files(pattern):
    """Braces as in a shell; a folder means all Python files in it."""
    if pattern.endswith("/"):
        return sorted((ROOT / pattern).glob("*.py"))
    before, names, after = re.fullmatch(r"([^{]*)(?:\{(.*)\})?(.*)", pattern).groups()
    return [ROOT / f"{before}{name}{after}" for name in (names or "").split(",")]


@pytest.mark.parametrize("pattern, stated", ROWS)
def test_lines_are_about_as_many_as_the_readme_says_and_not_more(pattern, stated):
    count = sum(path.read_bytes().count(b"\n") for path in files(pattern))
    assert 0.8 * int(stated) <= count <= int(stated) <= BOUNDS.get(pattern, int(stated))


def test_what_has_a_bound_is_in_the_readme():
    assert {pattern for pattern, _ in ROWS} >= set(BOUNDS)


def test_the_order_of_the_processors_is_that_of_the_settings():
    names = [f"`{field.name}`" for field in dataclasses.fields(DecodingConfig) if field.name != "greedy"]
    assert ", ".join(names) in " ".join(README.split())
