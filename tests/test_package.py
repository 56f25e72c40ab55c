"""The installed package: without the checkout, a wheel trains, generates, evaluates and has every preset."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import minigpt_jax
from minigpt_jax.config import preset_names

ROOT = Path(__file__).resolve().parents[1]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]


def test_every_folder_with_sources_is_a_package():
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "minigpt_jax").rglob("*.py")}
    mapped = {"minigpt_jax.configs", "minigpt_jax.scripts"}
    assert {".".join(folder.parts) for folder in folders} | mapped == set(SETUPTOOLS["packages"])
    assert mapped == set(SETUPTOOLS["package-dir"]) - {"minigpt_jax"}


def test_the_version_is_the_changelogs():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## \[(\d.*?)\]", changelog, re.MULTILINE)[0] == minigpt_jax.__version__


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs a program, or `minigpt`, in an empty folder in which nothing but the wheel can be imported as this package."""
    folder = tmp_path_factory.mktemp("package")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    source = folder / "source"  # building leaves files beside the sources
    for path in ("minigpt_jax", "configs", "scripts"):
        shutil.copytree(ROOT / path, source / path, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / path, source)
    build = [*pip, "wheel", ".", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    subprocess.run(build, cwd=source, check=True, capture_output=True)
    [wheel] = folder.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(folder / "site"), str(wheel)], check=True)
    (folder / "work").mkdir()
    environment = os.environ | {"PYTHONPATH": str(folder / "site"), "XDG_CACHE_HOME": str(folder / "cache")}

    def run(*command, status=0):
        start = str(folder / "site" / "bin" / "minigpt") if command[0] == "minigpt" else "-c"
        command = [sys.executable, start, *command[command[0] == "minigpt" :]]
        process = subprocess.run(command, cwd=folder / "work", env=environment, capture_output=True, text=True)
        assert process.returncode == status, process.stderr
        return process

    run.folder = folder
    return run


PROGRAM = """
from pathlib import Path
import minigpt_jax as mg
from minigpt_jax.runs.references import REFERENCES_DIR, Reference
assert Path(mg.__file__).is_relative_to(SITE), mg.__file__
Path("text.txt").write_text("To be, or not to be, that is the question.\\n" * 50)
config = mg.load_preset("debug").override({"dataset": "text.txt", "steps": 4, "sample_every": 0})
mg.train(config, "runs/mine")
print(mg.load("runs/mine").generate("To be", 5))
for name in NAMES:
    mg.load_preset(name)
assert Reference.read(REFERENCES_DIR / "debug.json").preset == "debug"
print(mg.evaluate("runs/mine")["loss"])
"""


@pytest.mark.slow
def test_a_wheel_trains_generates_and_evaluates_from_python_and_from_the_shell(run):
    shown = run(f"SITE = {str(run.folder / 'site')!r}\nNAMES = {preset_names()!r}\n" + PROGRAM)
    text, loss = shown.stdout.rsplit("\n", 2)[:2]
    assert text.startswith("To be")
    assert "minigpt generate" in shown.stderr
    assert json.loads(run("minigpt", "evaluate", "--workdir=runs/mine").stdout)["loss"] == float(loss)
    assert run("minigpt", "generate", "--prompt=To be", "--length=5", "--greedy").stdout.startswith("To be")
    run("minigpt", "train", "--workdir=runs/mine", "--steps=5")
    assert sorted(path.name for path in (run.folder / "work/runs/mine/checkpoints").iterdir()) == ["4", "5"]
    assert "minigpt train" in run("minigpt", "train", "--help").stdout


@pytest.mark.slow
def test_minigpt_lists_its_commands_and_suggests_one_for_a_typo(run):
    listed = run("minigpt").stdout
    scripts = {path.stem for path in (ROOT / "scripts").glob("*.py")}
    assert {line.split()[0] for line in listed.splitlines()[2:]} == scripts
    wrong = run("minigpt", "trian", status=2).stderr
    assert len(wrong.splitlines()) == 1
    assert "trian" in wrong
    assert all(script in wrong for script in scripts)
