"""What the scripts share, where a script is not needed to see it. The scripts themselves: test_scripts.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import assert_says, error_message

from minigpt_jax import cli
from minigpt_jax.config import SETTINGS
from minigpt_jax.errors import DataError


def make_run(name, modified):
    path = Path("runs", name, "checkpoints", "10", "manifest.json")
    path.parent.mkdir(parents=True)
    path.touch()
    os.utime(path, (modified, modified))


def test_newest_run_is_the_one_with_the_newest_checkpoint_and_named(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    for name, modified in (("b", 3000), ("c", 1000), ("a", 2000)):
        make_run(name, modified)
    Path("runs", "no_run_at_all").mkdir()
    Path("runs", "just_begun").mkdir()
    Path("runs", "just_begun", "config.json").touch()
    with caplog.at_level("INFO"):
        assert cli.newest_run() == Path("runs/b")
    [line] = caplog.messages
    assert_says(line, "runs/b")


@pytest.mark.parametrize("folder", [None, "runs", "runs/without_a_config"])
def test_where_there_is_no_run_the_way_to_one_is_told(tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    if folder:
        Path(folder).mkdir(parents=True)
    error_message(DataError, cli.newest_run, says=("runs/", "scripts/train.py", "--workdir"))


def test_help_of_a_setting_says_what_is_allowed_and_the_default_as_one_types_it():
    for name, allowed, default in [
        ("norm", ": layernorm | rmsnorm", " (default rmsnorm)"),
        ("qk_norm", "", " (default true)"),
        ("sample_every", "", " (default 250)"),
        ("data_dir", "", ""),
    ]:
        field = SETTINGS[name].field
        assert cli.setting_help(field) == field.metadata["help"] + allowed + default


def test_messages_are_one_line_on_standard_error_whatever_is_in_them(capsys):
    assert cli.report("two\n  lines: \t'x'", 1) == 1
    assert capsys.readouterr() == ("", "error: two lines: 'x'\n")


@pytest.mark.e2e
@pytest.mark.parametrize("word, is_told", [("RESOURCE_EXHAUSTED", True), ("INTERNAL", False)])
def test_memory_that_is_not_there_is_told_in_one_line_and_nothing_else_is_hidden(word, is_told):
    failing = f"def main(): raise RuntimeError('{word}: no 40 bytes')"
    program = f"from minigpt_jax import cli\n{failing}\ncli.run(main, '')"
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert process.returncode == 1
    assert process.stderr.startswith("error: ") == (process.stderr.count("\n") == 1) == is_told
    assert ("Traceback" in process.stderr) != is_told
    assert_says(process.stderr, f"{word}: no 40 bytes", *(["--batch_size", "--remat"] if is_told else []))
