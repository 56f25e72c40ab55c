"""The CI workflow agrees with the README and pyproject.toml: test command, extras, versions of the tools."""

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


def test_the_workflow_runs_the_test_command_of_the_readme():
    [command] = re.findall(
        r'^(python -m pip install -e "\.\[test\]" && python -m pytest -m "not slow")$', read("README.md"), re.MULTILINE
    )
    assert command in read(".github/workflows/tests.yml")


def test_every_extra_is_installed_with_no_skips():
    [extras] = re.findall(r"\.\[([a-z,]+)\]\".*--no-skips", read(".github/workflows/tests.yml"))
    installed = set(extras.split(","))
    requirements = " ".join(requirement for name in installed for requirement in EXTRAS[name])
    nested = re.findall(r"minigpt_jax\[([a-z,]+)\]", requirements)
    assert installed.union(*(names.split(",") for names in nested)) == set(EXTRAS)


def test_ruff_has_the_same_version_everywhere():
    [pinned] = [re.fullmatch(r"ruff==([\d.]+)", name)[1] for name in EXTRAS["test"] if name.startswith("ruff")]
    assert f"rev: v{pinned}\n" in read(".pre-commit-config.yaml")


def test_the_type_checker_has_the_same_version_everywhere():
    assert len({*re.findall(r"basedpyright==[\d.]+", read(".ci/run") + read(".github/workflows/tests.yml"))}) == 1


@pytest.mark.slow
@pytest.mark.parametrize("options, status", [([], 0), (["--no-skips"], 1)])
def test_no_skips_turns_a_skipped_test_into_a_failure(tmp_path, options, status):
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
