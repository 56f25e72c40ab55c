"""The code shared by the scripts, tested without running one. test_scripts.py runs them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags
from helpers import assert_raises, assert_says

from minigpt_jax import cli
from minigpt_jax.config import SETTINGS
from minigpt_jax.errors import DataError, UsageError


def make_run(name, modified):
    path = Path("runs", name, "checkpoints", "10", "manifest.json")
    path.parent.mkdir(parents=True)
    path.touch()
    os.utime(path, (modified, modified))


def test_newest_run_has_the_newest_checkpoint_and_is_logged(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    for name, modified in (("b", 3000), ("c", 1000), ("a", 2000)):
        make_run(name, modified)
    Path("runs", "not_a_run").mkdir()
    Path("runs", "no_checkpoint").mkdir()
    Path("runs", "no_checkpoint", "config.json").touch()
    with caplog.at_level("INFO"):
        assert cli.newest_run() == Path("runs/b")
    [line] = caplog.messages
    assert_says(line, "runs/b")


@pytest.mark.parametrize("folder", [None, "runs", "runs/without_a_config"])
def test_without_a_run_the_error_says_how_to_get_one(tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    if folder:
        Path(folder).mkdir(parents=True)
    assert_raises(DataError, cli.newest_run, says=("runs/", "scripts/train.py", "--workdir"))


def test_setting_help_lists_choices_and_the_default_as_typed():
    for name, allowed, default in [
        ("norm", ": layernorm | rmsnorm", " (default rmsnorm)"),
        ("qk_norm", "", " (default true)"),
        ("sample_every", "", " (default 250)"),
        ("data_dir", "", ""),
    ]:
        field = SETTINGS[name].field
        assert cli.setting_help(field) == field.metadata["help"] + allowed + default


def test_report_prints_one_line_on_standard_error(capsys):
    assert cli.report("two\n  lines: \t'x'", 1) == 1
    assert capsys.readouterr() == ("", "error: two lines: 'x'\n")


@pytest.mark.e2e
@pytest.mark.parametrize("given, applied", [((), "None"), (("--matmul_precision=float32",), "float32")])
def test_the_matmul_precision_is_jaxs_unless_it_is_given(given, applied):
    main = "def main(): print(jax.config.jax_default_matmul_precision)"
    program = f"import jax\nfrom minigpt_jax import cli\ncli.define_precision_flag()\n{main}\ncli.run(main, '')"
    process = subprocess.run([sys.executable, "-c", program, *given], capture_output=True, text=True, check=True)
    assert process.stdout == f"{applied}\n"


@pytest.mark.e2e
@pytest.mark.parametrize("status, is_reported", [("RESOURCE_EXHAUSTED", True), ("INTERNAL", False)])
def test_out_of_memory_is_a_one_line_error_and_other_runtime_errors_are_not(status, is_reported):
    main = f"def main(): raise RuntimeError('{status}: no 40 bytes')"
    program = f"from minigpt_jax import cli\n{main}\ncli.run(main, '')"
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert process.returncode == 1
    assert process.stderr.startswith("error: ") == (process.stderr.count("\n") == 1) == is_reported
    assert ("Traceback" in process.stderr) != is_reported
    assert_says(process.stderr, f"{status}: no 40 bytes", *(["--batch_size", "--remat"] if is_reported else []))


@pytest.mark.parametrize(
    "flag, ours", [("max_new_tokens", "length"), ("lenght", "length"), ("n_layer", None), ("zzz", None)]
)
def test_an_unknown_flag_names_the_one_that_is_meant(monkeypatch, flag, ours):
    known = flags.FlagValues()
    flags.DEFINE_integer("length", 1, "", flag_values=known)
    monkeypatch.setattr(flags, "FLAGS", known)
    monkeypatch.setattr(sys, "argv", ["generate.py", f"--{flag}=3"])
    message = assert_raises(UsageError, cli.parsed_arguments, says=(f"--{flag}",))
    assert (repr(ours) in message) if ours else ("'" not in message)


@pytest.mark.e2e
def test_a_value_that_jax_does_not_know_is_one_line():
    environment = os.environ | {"JAX_ENABLE_X64": "maybe"}
    process = subprocess.run(
        [sys.executable, "-c", "from minigpt_jax import cli"], capture_output=True, text=True, env=environment
    )
    assert (process.returncode, process.stderr.count("\n")) == (2, 1)
    assert_says(process.stderr, "JAX_ENABLE_X64", "maybe")


@pytest.mark.parametrize("reader, code, lines", [("full", 1, 1), ("has left", None, 0)])
def test_the_list_of_commands_ends_where_its_output_cannot_be_written(monkeypatch, capsys, reader, code, lines):
    read_end, write_end = os.pipe()
    os.close(read_end)
    monkeypatch.setattr(sys, "argv", ["minigpt"])
    with open("/dev/full", "w") as full, open(write_end, "w") as left:
        monkeypatch.setattr(sys, "stdout", full if reader == "full" else left)
        with pytest.raises(SystemExit) as stopped:
            cli.minigpt()
    assert stopped.value.code == code
    assert capsys.readouterr().err.count("\n") == lines
