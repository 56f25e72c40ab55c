"""Claims in the READMEs match the code: lines to read, commands, extras, links, and the order of decoding settings."""

import dataclasses
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from minigpt_jax.benchmarks import tables
from minigpt_jax.config import SETTINGS, check_setting, preset_names, setting_type
from minigpt_jax.generation.strategy import BeamConfig, DecodingConfig

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [
        *tables.readmes(),
        ROOT / "CONTRIBUTING.md",
        ROOT / "CHANGELOG.md",
        *(ROOT / "minigpt_jax/compare").glob("*.md"),
    ]
}
README = PAGES["README.md"]
ROWS = re.findall(r"^\| `(minigpt_jax/\S+)` \| (\d+) \|", README + PAGES["minigpt_jax/README.md"], re.MULTILINE)

# What a newcomer should have to read, at most.
BOUNDS = {
    "minigpt_jax/reference.py": 200,
    "minigpt_jax/models/{ops,masks,attention,layers,transformer,gpt}.py": 350,
    "minigpt_jax/training/{optimizer,step}.py": 100,
    "minigpt_jax/training/loop.py": 100,
    "minigpt_jax/generation/decode.py": 120,
}


def files(pattern):
    """Braces as in a shell; a folder stands for all Python files in it."""
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


def test_the_readme_is_short():
    assert README.count("\n") <= 150


def test_the_decoding_settings_are_listed_in_the_order_in_which_they_apply():
    [table] = re.findall(
        r"<!-- table: decoding -->\n(.*?)<!-- end -->", PAGES["minigpt_jax/generation/README.md"], re.DOTALL
    )
    assert re.findall(r"^\| `(\w+)`", table, re.MULTILINE) == [field.name for field in dataclasses.fields(DecodingConfig)]


def test_every_extra_is_in_the_readme():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    [sentence] = re.findall(r"^Extras: (.*?)\.\n", README, re.MULTILINE | re.DOTALL)
    assert set(re.findall(r"`(\w+)`", sentence)) == set(extras)


# ---- Commands -------------------------------------------------------------------------------------------------------------

COMMAND = re.compile(r"(?:python scripts/|minigpt )([a-z]\w*)(?:\.py)?((?: '[^'\n]*'| \"[^\"\n]*\"| [^\s`#&|]+)*)")
COMMANDS = sorted({(page, name, options.strip()) for page, text in PAGES.items() for name, options in COMMAND.findall(text)})
PLACEHOLDERS = {"NAME", "TEXT", "DIR"}


def own_flags(name):
    """The names of the flags that a script defines, apart from those of settings."""
    source = (ROOT / "scripts" / f"{name}.py").read_text(encoding="utf-8")
    names = set(re.findall(r"DEFINE_\w+\(\s*\"(\w+)\"", source)) | {"help"}
    for section in (DecodingConfig, BeamConfig):
        if f"define_section_flags({section.__name__})" in source:
            names |= {field.name for field in dataclasses.fields(section)}
    shared = {"kernels": "define_kernels_flag", "matmul_precision": "define_precision_flag"}
    return names | {flag for flag, function in shared.items() if function in source}


def settings(name):
    """The settings that are flags of a script: all of them, or those that it names."""
    source = (ROOT / "scripts" / f"{name}.py").read_text(encoding="utf-8")
    [names] = re.findall(r"define_setting_flags\((.*?)\)", source) or [None]
    return set() if names is None else set(re.findall(r"\w+", names)) or set(SETTINGS)


def test_there_are_commands():
    assert {name for _, name, _ in COMMANDS} == {path.stem for path in (ROOT / "scripts").glob("*.py")}


@pytest.mark.parametrize("page, name, options", COMMANDS)
def test_commands_use_flags_and_values_that_exist(page, name, options):
    words = shlex.split(options)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            assert name == "benchmark", word  # the only command with arguments
            assert f'"{word}"' in (ROOT / "scripts/benchmark.py").read_text(encoding="utf-8")
            continue
        flag = word.removeprefix("--")
        negated = flag.removeprefix("no")
        if flag in settings(name):
            field = SETTINGS[flag].field
            if setting_type(field) is not bool:
                check_setting(field, setting_type(field)(words.pop(0)))
        elif flag != negated and negated in settings(name):
            assert setting_type(SETTINGS[negated].field) is bool
        else:
            assert flag in own_flags(name)
            value = words.pop(0) if words and not words[0].startswith("--") else None
            if flag == "config":
                assert value in {*preset_names(), *PLACEHOLDERS} or value.endswith(".py")


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page):
    targets = re.findall(r"\]\((?!https?:|#)([^)#]*)", PAGES[page])
    assert [target for target in targets if not ((ROOT / page).parent / target).exists()] == []


def test_the_page_points_to_the_engine():
    package = ROOT / "minigpt_jax"
    pointers = re.findall(r"# engine: (\w+) in ([\w/]+\.py)", (package / "reference.py").read_text(encoding="utf-8"))
    assert len(pointers) > 10
    for name, path in pointers:
        source = (package / path).read_text(encoding="utf-8")
        assert re.search(rf"^(def|class) {name}\b|^{name} =", source, re.MULTILINE), f"{name} is not in {path}"
