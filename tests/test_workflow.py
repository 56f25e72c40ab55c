"""The public workflow and the README say the same: one test command, all extras, one version of ruff."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def read(path):
    return (ROOT / path).read_text(encoding="utf-8")


EXTRAS = tomllib.loads(read("pyproject.toml"))["project"]["optional-dependencies"]


def test_the_workflow_runs_the_readmes_command():
    [command] = re.findall(
        r'^(python -m pip install -e "\.\[test\]" && python -m pytest -m "not slow")$', read("README.md"), re.MULTILINE
    )
    assert command in read(".github/workflows/tests.yml")


def test_every_extra_is_installed_where_a_skip_is_a_failure():
    [extras] = re.findall(r"\.\[([a-z,]+)\]\".*--no-skips", read(".github/workflows/tests.yml"))
    named = set(extras.split(","))
    nested = re.findall(r"minigpt_jax\[([a-z,]+)\]", " ".join(requirement for name in named for requirement in EXTRAS[name]))
    assert named.union(*(names.split(",") for names in nested)) == set(EXTRAS)


def test_there_is_one_version_of_ruff():
    [pinned] = [re.fullmatch(r"ruff==([\d.]+)", name)[1] for name in EXTRAS["test"] if name.startswith("ruff")]
    assert f"rev: v{pinned}\n" in read(".pre-commit-config.yaml")


def test_there_is_one_version_of_the_type_checker():
    assert len({*re.findall(r"basedpyright==[\d.]+", read(".ci/run") + read(".github/workflows/tests.yml"))}) == 1


@pytest.mark.slow
@pytest.mark.parametrize("options, status", [([], 0), (["--no-skips"], 1)])
def test_a_skipped_test_is_a_failure_where_that_is_asked_for(tmp_path, options, status):
    (tmp_path / "pytest.ini").touch()
    (tmp_path / "test_it.py").write_text("import pytest\ndef test_it(): pytest.skip('an extra')\n")
    command = [sys.executable, "-m", "pytest", "-p", "conftest", "--rootdir", str(tmp_path), *options, str(tmp_path)]
    process = subprocess.run(
        command,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == status
    assert ("an extra" in process.stdout) == bool(options)
