"""The commands as users run them, on a small text, checked by their output, files and exit status.

Training runs in processes of its own. Most of the other commands run in this process, in a fraction of the time.
"""

import ast
import contextlib
import errno
import gzip
import importlib.util
import io
import json
import logging
import math
import os
import random
import re
import runpy
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from absl import flags
from helpers import assert_says

from minigpt_jax import cli
from minigpt_jax.config import Config, preset_names
from minigpt_jax.data import batches, corpora, tokenizers
from minigpt_jax.experiments import lds
from minigpt_jax.experiments.changes import CHANGES
from minigpt_jax.runs import checkpoints, plots, references
from minigpt_jax.system import devices

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).resolve().parents[1]

# Some characters take two or three bytes, so that counting bytes instead of characters fails.
WORDS = "To be, or not to be: that is the question — naïve café 漢字".split()  # noqa: SIM905
TEXT = "".join(f"{' '.join(random.Random(line).choices(WORDS, k=8))}\n" for line in range(100))
LATER_TEXT = TEXT[::-1]  # the same characters, so that the vocabulary fits


# ---- Running commands -----------------------------------------------------------------------------------------------------


def environment(folder):
    """The environment, changed so that scripts run in any folder, write only there and compile faster (less optimised)."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    cache = str(folder / "cache")
    changed = {"PYTHONPATH": str(ROOT), "PYTHONUTF8": "1", "XDG_CACHE_HOME": cache, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    return inherited | changed


def spawn(folder, command, **keywords):
    """Starts a script: `train --steps 5` is `python scripts/train.py --steps 5` in a shell."""
    name, *arguments = shlex.split(command)
    program = ["-c", *arguments] if name == "python" else [str(ROOT / "scripts" / f"{name}.py"), *arguments]
    outputs = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | keywords
    return subprocess.Popen([sys.executable, *program], cwd=folder, env=environment(folder), encoding="utf-8", **outputs)


def wait_for(process):
    """The finished process, with its output."""
    try:
        output = process.communicate(timeout=300)
        return subprocess.CompletedProcess(process.args, process.returncode, *output)
    finally:
        process.kill()


def start(folder, command, **keywords):
    return wait_for(spawn(folder, command, **keywords))


def run(folder, *commands):
    """The finished processes of the commands. Two run at a time."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda command: start(folder, command), commands))


def succeeded(process):
    assert process.returncode == 0, process.stderr
    assert "Traceback" not in process.stderr
    return process


@pytest.fixture
def call(monkeypatch, capsys):
    """A function that runs a command as `__main__` in this process, and cleans up after it."""
    monkeypatch.setattr(cli, "retain_heap", lambda: None)
    monkeypatch.setattr(cli, "compilation_cache", contextlib.nullcontext)
    log = logging.getLogger("minigpt_jax")
    for attribute, value in {"handlers": [], "propagate": log.propagate, "level": log.level}.items():
        monkeypatch.setattr(log, attribute, value)  # restored after the test

    def call(folder, command):
        name, *arguments = shlex.split(command)
        script = str(ROOT / "scripts" / f"{name}.py")
        log.handlers.clear()  # each call adds its own
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        status = 0
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as exit:
            status = exit.code
        finally:
            by_module = flags.FLAGS.flags_by_module_dict()
            for flag in by_module.get(script, []) + by_module.get(cli.__name__, []):
                delattr(flags.FLAGS, flag.name)
            flags.FLAGS.unparse_flags()
        return subprocess.CompletedProcess(command, status, *capsys.readouterr())

    return call


def files(folder):
    """Contents and times of all files in a folder, except the cache. Equal if nothing was written."""
    paths = [path for path in folder.rglob("*") if path.is_file() and "cache" not in path.relative_to(folder).parts]
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}


def metrics(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def checkpoint_steps(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The finished `train.py`, with the folder of its text and run. Tests must not change the run."""
    folder = tmp_path_factory.mktemp("scripts")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    process = succeeded(start(folder, "train --config debug --dataset text.txt"))
    process.folder, process.workdir = folder, folder / "runs" / "debug"
    return process


# ---- Training -------------------------------------------------------------------------------------------------------------


def test_a_run_writes_config_tokenizer_metrics_and_checkpoints(trained):
    assert {path.name for path in trained.workdir.iterdir()} == {
        "config.json",
        "tokenizer.json",
        "metrics.jsonl",
        "train.lock",
        "checkpoints",
    }
    config = Config.from_json((trained.workdir / "config.json").read_text(encoding="utf-8"))
    assert (config.model.num_layers, config.model.vocab_size) == (2, len(set(TEXT)))
    tokenizer = tokenizers.from_json((trained.workdir / "tokenizer.json").read_text(encoding="utf-8"))
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert checkpoint_steps(trained.workdir) == [10, 20]


def test_metrics_rows_have_exactly_these_keys(trained):
    rows = metrics(trained.workdir)
    training_rows = [row for row in rows if "train_loss" in row]
    validation_rows = [row for row in rows if "val_loss" in row]
    assert len(training_rows) + len(validation_rows) == len(rows)
    for row in training_rows:
        assert set(row) == {"step", "train_loss", "learning_rate", "grad_norm", "tokens_per_second", "seconds"}
    for row in validation_rows:
        assert set(row) == {"step", "val_loss", "seconds"}
    assert [row["step"] for row in training_rows] == [5, 10, 15, 20]
    assert [row["step"] for row in validation_rows] == [10, 20]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert [row["seconds"] for row in rows] == sorted(row["seconds"] for row in rows)


def test_samples_go_to_standard_output_and_logs_to_standard_error(trained):
    assert set(trained.stdout) <= set(TEXT)
    assert len(trained.stdout) > 2 * 250  # at steps 10 and 20
    assert_says(trained.stderr.splitlines()[0], "runs/debug", "text.txt", "20")
    assert re.search(r"\b20/20\b.*\d tokens/s", trained.stderr)
    assert "%|" not in trained.stderr  # no progress bar without a terminal


@pytest.mark.parametrize("command", ["train --workdir runs/debug", "train --config debug --dataset text.txt"])
def test_a_finished_run_says_how_to_continue_and_writes_nothing(trained, call, command):
    before = files(trained.folder)
    process = succeeded(call(trained.folder, command))
    assert process.stdout == ""
    assert process.stderr.count("\n") == 1
    assert_says(process.stderr, "runs/debug", "20", "--steps", "--overwrite")
    assert files(trained.folder) == before


@pytest.fixture(scope="module")
def continued(trained):
    """Two copies of the run: one resumed, one restarted with another model."""
    for copy in ("more", "restarted"):
        shutil.copytree(trained.workdir, trained.folder / copy)
    return run(
        trained.folder,
        "train --workdir more --steps 30",
        "train --config debug --dataset text.txt --workdir restarted --overwrite --embed_dim 16 --epochs 0.1 --nobias",
    )


@pytest.mark.slow
def test_more_steps_resume_the_run(trained, continued):
    process, workdir = succeeded(continued[0]), trained.folder / "more"
    changed, resumed, *_ = process.stderr.splitlines()
    assert_says(changed, "steps=20", "30")
    assert_says(resumed, "more", "20", "30")
    steps = [row["step"] for row in metrics(workdir) if "train_loss" in row]
    assert steps == [5, 10, 15, 20, 25, 30]
    assert metrics(workdir)[: len(metrics(trained.workdir))] == metrics(trained.workdir)
    assert checkpoint_steps(workdir)[-1] == 30


@pytest.mark.slow
def test_overwrite_restarts_with_the_preset_and_flags(trained, continued):
    process, workdir = succeeded(continued[1]), trained.folder / "restarted"
    assert_says(process.stderr.splitlines()[0], "restarted", "text.txt")
    config = Config.from_json((workdir / "config.json").read_text(encoding="utf-8"))
    assert (config.model.embed_dim, config.model.ff_dim, config.training.weight_decay) == (16, 64, 0.1)
    assert (config.training.steps, config.training.epochs) == (None, 0.1)
    num_windows = batches.num_windows(np.zeros(int(0.9 * len(TEXT))), config.model.context_length)
    num_steps = math.ceil(0.1 * num_windows / config.training.batch_size)
    assert checkpoint_steps(workdir) == [num_steps]
    assert {row["step"] for row in metrics(workdir)} == {5, num_steps}


# ---- Generating -----------------------------------------------------------------------------------------------------------

PROMPT, LONG_PROMPT = "To be", "To be, or not to be: that is the question"  # the context has 16 characters
LENGTH = 40
GENERATE = {
    "seed 3": f"generate --workdir runs/debug --prompt '{PROMPT}' --length {LENGTH} --seed 3",
    "three of seed 4": f"generate --workdir runs/debug --prompt '{PROMPT}' --length {LENGTH} --seed 4 --num_samples 3",
    "four of seed 4": f"generate --workdir runs/debug --prompt '{PROMPT}' --length {LENGTH} --seed 4 --num_samples 4",
    "newest run, empty prompt": f"generate --length {LENGTH} --seed 5",
    "temperature 0": f"generate --workdir runs/debug --prompt '{LONG_PROMPT}' --length {LENGTH} --temperature 0",
    "greedy": f"generate --workdir runs/debug --prompt '{LONG_PROMPT}' --length {LENGTH} --greedy --seed 9",
    "from Python": shlex.join(
        [
            "python",
            "import json, minigpt_jax as mg; lm = mg.load('runs/debug');"
            f"print(json.dumps([lm.generate('{PROMPT}', {LENGTH}, seed=3), lm.generate('', {LENGTH}, seed=5)]))",
        ]
    ),
}


@pytest.fixture(scope="module")
def generated(trained):
    return {
        name: succeeded(process) for name, process in zip(GENERATE, run(trained.folder, *GENERATE.values()), strict=True)
    }


@pytest.mark.slow
def test_texts_split_over_devices_are_the_same_with_cached_programs(generated, trained):
    [again] = run(trained.folder, GENERATE["four of seed 4"])
    assert succeeded(again).stdout == generated["four of seed 4"].stdout
    assert again.stdout.startswith(generated["three of seed 4"].stdout)
    assert len(again.stdout) == 4 * (len(PROMPT) + LENGTH + 1)


def test_only_the_text_is_on_standard_output(generated):
    text = generated["seed 3"].stdout
    assert text.startswith(PROMPT)
    assert len(text) == len(PROMPT) + LENGTH + 1  # and a line break
    assert text.endswith("\n")
    assert set(text) <= set(TEXT)


def test_samples_differ_and_are_numbered_on_standard_error(generated):
    process, length = generated["three of seed 4"], len(PROMPT) + LENGTH + 1
    assert len(process.stdout) == 3 * length
    texts = {process.stdout[i * length : (i + 1) * length] for i in range(3)}
    assert len(texts) == 3
    assert all(text.startswith(PROMPT) for text in texts)
    assert re.findall(r"^--- .*\b(\d+)$", process.stderr, re.MULTILINE) == ["2", "3"]


def test_another_seed_gives_another_text(generated):
    assert generated["three of seed 4"].stdout[: len(generated["seed 3"].stdout)] != generated["seed 3"].stdout


def test_the_same_seed_gives_the_same_text_from_python_and_from_the_newest_run(generated):
    texts = json.loads(generated["from Python"].stdout)
    assert [generated["seed 3"].stdout, generated["newest run, empty prompt"].stdout] == [f"{text}\n" for text in texts]


def test_an_empty_prompt_is_allowed(generated):
    assert len(generated["newest run, empty prompt"].stdout) == LENGTH + 1


def test_temperature_0_is_greedy_for_any_seed(generated):
    assert generated["temperature 0"].stdout == generated["greedy"].stdout


def test_a_prompt_longer_than_the_context_is_printed_in_full_with_a_note(generated):
    process = generated["greedy"]
    assert process.stdout.startswith(LONG_PROMPT)
    assert len(process.stdout) == len(LONG_PROMPT) + LENGTH + 1
    assert_says(process.stderr, str(len(LONG_PROMPT)), "16")


# These run in this process, one after another, and share compiled programs.
RUN = "generate --workdir runs/debug --length 30"


@pytest.mark.parametrize(
    ("options", "uses_two"),
    [("--num_samples 2", True), ("--prompts -", True), ("--num_samples 1", False), ("--prompts - --beam_width 2", False)],
)
def test_several_texts_use_two_cpu_devices_before_anything_is_loaded(tmp_path, call, monkeypatch, options, uses_two):
    calls = []
    monkeypatch.setattr(devices, "use_two_cpu_devices", lambda: calls.append("first"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b""), "utf-8"))
    assert call(tmp_path, f"generate {options}").returncode != 0  # there is no run
    assert calls == ["first"] * uses_two


def test_many_prompts_give_json_lines_in_order(trained, call, monkeypatch):
    """From a file and from standard input."""
    (trained.folder / "prompts.txt").write_bytes("To be\r\nnaïve café\n".encode())
    command = f"{RUN} --num_samples 2 --seed 7 --format jsonl --stop 'q'"
    from_file = succeeded(call(trained.folder, f"{command} --prompts prompts.txt"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("To be\nnaïve café".encode()), "utf-8"))
    assert succeeded(call(trained.folder, f"{command} --prompts -")).stdout == from_file.stdout

    records = [json.loads(line) for line in from_file.stdout.splitlines()]
    assert [(record["prompt"], record["index"]) for record in records] == [
        ("To be", 0), ("To be", 1), ("naïve café", 2), ("naïve café", 3),
    ]  # fmt: skip
    tokenizer = tokenizers.from_json((trained.workdir / "tokenizer.json").read_text(encoding="utf-8"))
    for record in records:
        text = record["prompt"] + tokenizer.decode(record["tokens"])
        stopped = "q" in text
        assert record["reason"] == ("stop" if stopped else "length")
        assert record["text"] == (text[:-1] if stopped else text)
        assert len(record["log_probs"]) == len(record["tokens"]) <= 30
        assert max(record["log_probs"]) < 0
        assert record["seed"] == 7
    assert {record["reason"] for record in records} == {"stop", "length"}


def test_a_stop_token_ends_a_text_and_is_not_part_of_it(trained, call):
    tokenizer = tokenizers.from_json((trained.workdir / "tokenizer.json").read_text(encoding="utf-8"))
    full = json.loads(succeeded(call(trained.folder, f"{RUN} --format jsonl")).stdout)
    stop = full["tokens"][12]
    for settings in (f"--stop_tokens {stop}", f"--stop_tokens {stop} --stop_tokens {full['tokens'][-1]}"):
        stopped = json.loads(succeeded(call(trained.folder, f"{RUN} --format jsonl {settings}")).stdout)
        assert stopped["tokens"] == full["tokens"][: len(stopped["tokens"])]
        assert stopped["text"] == tokenizer.decode(stopped["tokens"][:-1])
        assert stopped["reason"] == "stop"
    lines = succeeded(call(trained.folder, f"{RUN} --format jsonl --stop_tokens {stop} --beam_width 2")).stdout
    beams = [json.loads(line) for line in lines.splitlines()]
    assert {(beam["reason"] == "stop") == (beam["tokens"][-1] == stop) for beam in beams} == {True}


def test_a_stream_gives_the_same_text(trained, call):
    settings = "--prompt 'To be' --temperature 0.9 --stop no"
    text = succeeded(call(trained.folder, f"{RUN} {settings}")).stdout
    assert succeeded(call(trained.folder, f"{RUN} {settings} --stream")).stdout == text


def test_interactive_continues_after_a_mistake_and_ends_with_the_input(trained, call, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("To be\nZ\nTo be\n"))
    process = succeeded(call(trained.folder, f"{RUN} --interactive"))
    texts = process.stdout.split("To be")[1:]
    assert process.stdout.startswith("To be")
    assert len(texts) == 2
    assert texts[0] != texts[1]  # each has its own seed
    assert "'Z'" in process.stderr
    assert process.stderr.count("> ") == 4


def test_interrupting_an_interactive_text_does_not_end_the_program(trained, call, monkeypatch):
    from minigpt_jax.generation.language_model import LanguageModel

    def interrupted(self, prompt, *args, **keywords):
        yield prompt
        raise KeyboardInterrupt

    monkeypatch.setattr(LanguageModel, "stream", interrupted)
    monkeypatch.setattr(sys, "stdin", io.StringIO("To be\nTo be\n"))
    assert succeeded(call(trained.folder, f"{RUN} --interactive")).stdout == "To be\nTo be\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize(
    "command",
    [
        RUN,
        pytest.param(f"{RUN} --stream", marks=pytest.mark.slow),
        pytest.param(f"{RUN} --interactive", marks=pytest.mark.slow),
        f"{RUN} --help",
        "tokens --tokenizer runs/debug/tokenizer.json --text To",
        pytest.param("checkpoints --workdir runs/debug", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("output, reason", [(None, errno.EBADF), ("/dev/full", errno.ENOSPC)])
def test_output_that_cannot_be_written_is_a_one_line_error(trained, call, monkeypatch, command, output, reason):
    monkeypatch.setattr(sys, "stdin", io.StringIO("To be\nTo be\n"))
    with open(output, "w") if output else contextlib.nullcontext() as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        process = call(trained.folder, command)
    assert process.returncode == DATA
    [line] = process.stderr.removeprefix("> ").splitlines()
    assert line.startswith("error: ")
    assert_says(line, os.strerror(reason))


@pytest.mark.parametrize("encoding, written", [("ascii", r"To caf\u00e9 \u6f22"), ("utf-8", "To café 漢")])
def test_json_stays_json_in_another_encoding(trained, call, monkeypatch, encoding, written):
    output = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, "stdout", output)
    succeeded(call(trained.folder, f"{RUN} --format jsonl --prompt 'To café 漢'"))
    line = output.buffer.getvalue().decode(encoding)
    assert written in line
    assert json.loads(line)["prompt"] == "To café 漢"


def test_prompts_that_are_not_utf8_are_refused_one_by_one(trained, call, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"To\n\xff\nbe\n"), "utf-8"))
    process = succeeded(call(trained.folder, f"{RUN} --interactive"))
    assert len(process.stdout) == 2 * (2 + 30 + 1)
    assert_says(process.stderr, r"'\udcff'")
    assert process.stderr.count("> ") == 4


def test_explain_shows_the_probabilities_of_each_token(trained, call):
    process = succeeded(call(trained.folder, f"{RUN} --prompt 'To be' --top_k 3 --explain"))
    header, *rows = process.stderr.splitlines()
    assert_says(header, "token", "p(model)", "p(drawn)", "entropy")
    assert len(rows) == 30
    assert {len(row) for row in rows} == {len(header)}
    for row in rows:
        prob, drawn, kept, mass, _ = row[10:].split()
        assert float(prob) / float(mass) == pytest.approx(float(drawn), abs=2e-3)
        assert kept == "3"
    line = succeeded(call(trained.folder, f"{RUN} --prompt 'To be' --top_k 3 --explain --format jsonl")).stdout
    assert [step["num_kept"] for step in json.loads(line)["explain"]] == [3] * 30


@pytest.mark.slow
def test_beam_search_is_at_least_as_probable_as_greedy(trained, call):
    command = f"{RUN} --prompt 'To be' --format jsonl"
    greedy = json.loads(succeeded(call(trained.folder, f"{command} --greedy")).stdout)
    beams = [json.loads(line) for line in succeeded(call(trained.folder, f"{command} --beam_width 4")).stdout.splitlines()]
    assert len(beams) == 4
    assert beams[0]["score"] >= sum(greedy["log_probs"])
    for beam in beams:
        assert sum(beam["log_probs"]) == pytest.approx(beam["score"], abs=1e-3)
        assert len(beam["log_probs"]) == len(beam["tokens"])
    best = succeeded(call(trained.folder, f"{RUN} --prompt 'To be' --beam_width 4")).stdout
    assert best == beams[0]["text"] + "\n"


# ---- Runs and checkpoints -------------------------------------------------------------------------------------------------


def test_a_run_in_progress_is_locked_and_sigterm_checkpoints_it(trained, call):
    command = "train --config debug --dataset text.txt --workdir runs/active"
    workdir, settings = trained.folder / "runs" / "active", "--steps 1000000 --sample_every 0 --eval_every 1000000"
    active = spawn(trained.folder, f"{command} {settings}")
    while active.poll() is None and not (workdir / "checkpoints" / "20").exists():
        time.sleep(0.05)
    second = call(trained.folder, command)
    active.terminate()
    first = wait_for(active)
    assert (second.returncode, second.stdout) == (1, "")
    assert second.stderr.startswith("error: ")
    assert second.stderr.count("\n") == 1
    assert_says(second.stderr, "runs/active", "--workdir")
    assert first.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in first.stderr
    last = first.stderr.splitlines()[-1]
    step = re.search(r"\b(\d+)/1000000\b", last)[1]
    assert_says(last, "python scripts/train.py --workdir runs/active")

    _, *listed = succeeded(call(trained.folder, "checkpoints --workdir runs/active")).stdout.splitlines()
    assert [line.split()[0] for line in listed] == [*map(str, checkpoint_steps(workdir))]
    assert listed[-1].split()[0] == step
    assert sum("best" in line for line in listed) == 1


@pytest.mark.slow
def test_a_run_without_a_checkpoint_restarts_with_its_settings(trained, call):
    workdir = trained.folder / "runs" / "restarted"
    workdir.mkdir()
    shutil.copy(trained.workdir / "config.json", workdir)
    process = succeeded(call(trained.folder, "train --workdir runs/restarted"))
    restarting, started, *_ = process.stderr.splitlines()
    assert_says(restarting, "runs/restarted", "--overwrite")
    assert_says(started, "runs/restarted", "text.txt", "20")
    assert Config.from_json((workdir / "config.json").read_text(encoding="utf-8")) == Config.from_json(
        (trained.workdir / "config.json").read_text(encoding="utf-8")
    )
    assert checkpoint_steps(workdir) == [10, 20]


def test_a_corrupt_checkpoint_is_listed_and_another_one_used(trained, call):
    corrupt = shutil.copytree(trained.workdir, trained.folder / "corrupt")
    best, other = checkpoints.best_first(corrupt)
    path = corrupt / "checkpoints" / str(best) / "checkpoint.json"
    path.write_bytes(path.read_bytes().replace(b"2", b"3"))
    listed = call(trained.folder, "checkpoints --workdir corrupt")
    assert listed.returncode == 1
    _, *rows = listed.stdout.splitlines()
    assert [row.split()[0] for row in rows if "checkpoint.json" in row] == [str(best)]
    assert [row.split()[0] for row in rows if "best" in row] == [str(other)]
    process = succeeded(call(trained.folder, "generate --workdir corrupt --length 5"))
    [warning] = process.stderr.splitlines()
    assert_says(warning, f"corrupt/checkpoints/{best}", "checkpoint.json", str(other))
    assert len(process.stdout) == 6


def test_a_plot_of_two_runs_is_a_png(trained, call):
    pytest.importorskip("matplotlib")
    succeeded(call(trained.folder, "plot --workdir runs/debug --workdir runs/debug --out compared.png"))
    png = (trained.folder / "compared.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert struct.unpack(">II", png[16:24]) == (11 * 150, 7 * 150)


@pytest.mark.slow
def test_a_reference_is_made_by_one_command_and_its_band_is_plotted(tmp_path, call, monkeypatch):
    pytest.importorskip("matplotlib")
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    monkeypatch.setattr(references, "REFERENCES_DIR", tmp_path / "references")
    process = succeeded(call(tmp_path, "reference --config debug --dataset text.txt --data_dir data"))
    path = tmp_path / "references" / "debug.json"
    assert_says(process.stderr.splitlines()[-1], str(path))
    assert process.stdout == ""
    reference = references.Reference.read(path)
    assert reference.seeds == (0, 1, 2, 3, 4)
    assert [each.step for each in reference.evaluations] == [10, 20]
    assert reference.command == "python scripts/reference.py --config debug --dataset text.txt --seeds 5"
    assert sorted(path.name for path in (tmp_path / "runs" / "references" / "debug").iterdir()) == list("01234")

    draw, drawn = plots.draw, []
    monkeypatch.setattr(plots, "draw", lambda *args, **keywords: drawn.append(keywords) or draw(*args, **keywords))
    runs = "--workdir runs/references/debug/0 --workdir runs/references/debug/1"
    succeeded(call(tmp_path, f"plot {runs} --out band.png"))
    assert drawn == [{"references": [reference]}]  # once for both
    assert (tmp_path / "band.png").read_bytes().startswith(b"\x89PNG")


def assert_drawn_and_not_repeated(plot, again, process):
    if importlib.util.find_spec("matplotlib"):
        assert plot.read_bytes().startswith(b"\x89PNG")
    results = plot.parent / "results.jsonl"
    written = results.stat().st_mtime_ns
    assert again().stdout == process.stdout
    assert results.stat().st_mtime_ns == written


def test_a_sweep_prints_a_table_writes_a_plot_and_is_not_repeated(trained, call):
    command = "sweep --config debug --dataset text.txt --steps 2 --vary learning_rate=1e-3,1e-2 --vary seed=0,1"
    process, workdir = succeeded(call(trained.folder, command)), trained.folder / "runs" / "sweeps" / "debug"
    header, *rows = process.stdout.splitlines()
    assert_says(header, "loss", "±")
    assert sorted(row.split()[0] for row in rows) == ["learning_rate=0.001", "learning_rate=0.01"]
    results = [json.loads(line) for line in (workdir / "results.jsonl").read_text().splitlines()]
    assert [list(result["settings"].values()) for result in results] == [[1e-3, 0], [1e-3, 1], [1e-2, 0], [1e-2, 1]]
    assert_says(process.stderr, "runs/sweeps/debug", "4", *(f"{result['loss']:.4f}" for result in results))
    assert_drawn_and_not_repeated(workdir / "sweep.png", lambda: succeeded(call(trained.folder, command)), process)


def test_an_ablation_prints_a_table_writes_a_plot_and_is_not_repeated(trained, call):
    command = "ablate --base debug --dataset text.txt --steps 2 --only beta2"
    process, workdir = succeeded(call(trained.folder, command)), trained.folder / "runs" / "ablations" / "debug"
    base, header, *rows, _ = process.stdout.splitlines()
    assert_says(base, "base", "3", "2 steps")
    assert_says(header, "parameters", "equal tokens", "equal time")
    assert sorted(row.split()[0] for row in rows) == ["beta2=0.95", "beta2=0.999"]
    results = [json.loads(line) for line in (workdir / "results.jsonl").read_text().splitlines()]
    assert [result["settings"]["seed"] for result in results] == [0, 1, 2] * 3
    assert_drawn_and_not_repeated(workdir / "ablation.png", lambda: succeeded(call(trained.folder, command)), process)


def test_tuning_prints_the_best_and_writes_a_preset_that_trains_to_the_same_loss(trained, call):
    pytest.importorskip("optuna")
    command = "tune --config debug --dataset text.txt --steps 4 --range learning_rate=1e-3,1e-2 --trials 3"
    header, best, *others = succeeded(call(trained.folder, command)).stdout.splitlines()
    assert header.split() == ["loss", "trial", "settings"]
    loss, _, rate = best.split()
    preset = (trained.folder / "runs" / "tune" / "debug" / "best.py").read_text(encoding="utf-8")
    again = "python scripts/tune.py --config=debug --range=learning_rate=1e-3,1e-2 --steps=4 --dataset=text.txt --trials=3"
    assert_says(preset, loss, again)
    process = succeeded(start(trained.folder, "train --config runs/tune/debug/best.py --workdir runs/best"))
    [trained_loss] = re.findall(r"whole split: ([\d.]+)", process.stderr)
    assert float(trained_loss) == pytest.approx(float(loss), abs=2e-4)
    config = Config.from_json((trained.folder / "runs" / "best" / "config.json").read_text(encoding="utf-8"))
    assert rate == f"learning_rate={config.training.learning_rate}"
    assert len(others) < 2


# ---- Evaluating -----------------------------------------------------------------------------------------------------------


def test_evaluation_is_json_with_consistent_values(trained):
    commands = ("evaluate --workdir runs/debug", "evaluate --workdir runs/debug --split train")
    val, train = (json.loads(succeeded(process).stdout) for process in run(trained.folder, *commands))
    num_train = int(0.9 * len(TEXT))
    for result, text in ((val, TEXT[num_train + 1 :]), (train, TEXT[1:num_train])):
        assert result["tokens"] == len(text)
        assert 0 < result["loss"] < 2 * math.log(len(set(TEXT)))
        assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))
        assert result["bits_per_char"] == pytest.approx(result["loss"] / math.log(2))  # a token is a character
        assert result["bits_per_byte"] * len(text.encode()) == pytest.approx(result["bits_per_char"] * len(text))
        assert result["bits_per_byte"] < 0.97 * result["bits_per_char"]
    assert val["loss"] != train["loss"]
    logged = re.search(r"([\d.]+) nats per token", trained.stderr)[1]
    assert val["loss"] == pytest.approx(float(logged), abs=1e-4)


@pytest.mark.slow
def test_words_and_bpe_train_evaluate_and_generate_from_files_of_every_kind(trained):
    pytest.importorskip("tokenizers")
    folder = trained.folder / "texts"
    folder.mkdir()
    (folder / "a.txt.gz").write_bytes(gzip.compress(TEXT.encode()))
    (folder / "b.jsonl").write_text(
        json.dumps({"text": TEXT}) + "\n" + json.dumps({"text": "To be\n"}) + "\n", encoding="utf-8"
    )
    (trained.folder / "val.txt").write_text(f"{LATER_TEXT} naïve to be unheard-of\n", encoding="utf-8")
    words, pairs = run(
        trained.folder,
        "train --config debug --workdir words --dataset texts --tokenizer word --sample_every 0",
        "train --config debug --workdir pairs --dataset 'texts/*' --val_dataset val.txt --tokenizer bpe --vocab_size 290",
    )
    share = re.compile(r"\b\d+\.\d%")  # unknown words among the tokens
    assert share.findall(succeeded(words).stderr)[0] == "0.0%"
    assert not share.search(succeeded(pairs).stderr)
    results = run(trained.folder, "evaluate --workdir words --stride 8", "evaluate --workdir pairs")
    of_words, of_pairs = (json.loads(succeeded(process).stdout) for process in results)
    assert of_words["stride"] == 8
    assert of_words["tokens_per_char"] < 1
    assert 0 < of_pairs["bits_per_byte"] < of_pairs["bits_per_char"] < 8 * 2
    logged = re.search(r"([\d.]+) bits per character", pairs.stderr)[1]
    assert of_pairs["bits_per_char"] == pytest.approx(float(logged), abs=1e-3)
    texts = run(
        trained.folder,
        "generate --workdir words --prompt 'To be unheard' --length 20",
        "generate --workdir pairs --prompt 'naïve 漢 🙂' --length 20 --format jsonl",
    )
    assert succeeded(texts[0]).stdout.startswith("To be unheard")
    assert_says(texts[0].stderr, "<unk>", "1")
    assert json.loads(succeeded(texts[1]).stdout)["text"].startswith("naïve 漢 🙂")
    assert json.loads((trained.folder / "pairs" / "tokenizer.json").read_text(encoding="utf-8"))["model"]["type"] == "BPE"


@pytest.mark.slow
def test_memorisation_is_measured_beside_the_loss_and_the_text_may_have_moved(trained, call):
    pytest.importorskip("pydivsufsort")
    plain = json.loads(succeeded(call(trained.folder, "evaluate --workdir runs/debug")).stdout)
    path = shutil.copytree(trained.workdir, trained.folder / "elsewhere") / "config.json"
    path.write_text(path.read_text(encoding="utf-8").replace("text.txt", "missing.txt"), encoding="utf-8")
    process = succeeded(call(trained.folder, "evaluate --workdir elsewhere --memorisation --dataset text.txt"))
    result = json.loads(process.stdout)
    memorisation = result.pop("memorisation")
    assert result == plain | {"workdir": "elsewhere"}
    assert memorisation["samples"]["characters"] == 16 * 1000  # a token is a character
    train, val = TEXT[: int(0.9 * len(TEXT))], TEXT[int(0.9 * len(TEXT)) :]
    copies = {name: copy["text"] for name, copy in memorisation["longest_copy"].items()}
    assert all(copy in train for copy in copies.values())
    assert copies["val"] in val
    assert len(copies["val"]) == memorisation["longest_copy"]["val"]["characters"] > len(copies["samples"])
    found = memorisation["ngrams_found"]
    assert all(1 > shares["val"] > shares["samples"] >= 0 for shares in (found["8"], found["16"]))
    assert list(memorisation["extractable"]["by_prompt_tokens"]) == ["10"]  # the context has 16 tokens


# ---- Attributing ----------------------------------------------------------------------------------------------------------


def test_a_text_is_attributed_to_its_own_passage_in_a_table(trained, call):
    train, starts = TEXT[: int(0.9 * len(TEXT))], []
    process = succeeded(call(trained.folder, "attribute --workdir runs/debug --text 'question — naïve' --num_passages 2"))
    header, *rows = process.stdout.splitlines()
    assert_says(header, "raised", "position", "passage")
    assert_says(rows[2], "lowered")
    for row in rows[:2] + rows[3:]:
        score, position, passage = re.fullmatch(r" *(\S+) +(\d+)  ('.*')", row).groups()
        assert (float(score) > 0) == (row in rows[:2])
        assert ast.literal_eval(passage) == train[int(position) : int(position) + 17]
        starts.append(position)
    assert len(set(starts)) == 4
    assert_says(process.stderr, "80", "10", "20")  # passages, and the steps of the checkpoints


@pytest.mark.slow
def test_the_lds_is_printed_beside_that_of_random_scores(trained, call, monkeypatch):
    for name, value in {
        "NUM_MODELS": 10,
        "NUM_PASSAGES": 40,
        "NUM_TEXTS": 3,
        "SETTINGS": lds.SETTINGS | {"steps": 4},
    }.items():
        monkeypatch.setattr(lds, name, value)
    process = succeeded(call(trained.folder, "attribute --workdir runs/debug --lds"))
    header, *rows, meaning = process.stdout.splitlines()
    assert_says(header, "LDS", "±")
    assert_says(meaning, "1", "0", "small")
    for row, name in zip(rows, ("tracin", "random"), strict=True):
        value, error = re.fullmatch(rf"{name} +(-?\d\.\d+) ± (\d\.\d+)", row).groups()
        assert -1 <= float(value) <= 1
        assert float(error) > 0
    assert_says(process.stderr, "10", "40", "16")


# ---- Tokens and twins -----------------------------------------------------------------------------------------------------


def test_tokens_are_shown_with_ids_and_counts(trained, call):
    shown = succeeded(call(trained.folder, "tokens --tokenizer word --dataset text.txt --text 'To be, zz to be'"))
    lines = shown.stdout.splitlines()
    assert lines[0] == "To| |be|,| |<unk>| |to| |be"
    counts = {line.split("'")[1]: line.split()[1] for line in lines[3:-2]}
    assert counts == {"To": "1", " ": "4", "be": "2", ",": "1", "<unk>": "1", "to": "1"}
    assert_says(lines[-1], "10", "15", "15", "1.50")
    shown = succeeded(call(trained.folder, "tokens --tokenizer runs/debug/tokenizer.json --text 'café'"))
    assert shown.stdout.splitlines()[0] == "c|a|f|é"
    shown = succeeded(call(trained.folder, "tokens --tokenizer byte --text 'é\\n'"))
    assert shown.stdout.splitlines()[0] == r"\xc3|\xa9|\|n"


@pytest.mark.slow
def test_the_twins_are_compared_in_a_table(trained, call):
    pytest.importorskip("torch")
    shown = succeeded(call(trained.folder, "compare_torch --config debug --dataset text.txt --steps 2"))
    lines = shown.stdout.splitlines()
    assert lines[1].split()[0] == "logits"
    assert any(line.startswith("step 2: transformer.final_norm.weight") for line in lines)
    num_compared = len(lines[1 : lines.index("")])
    assert_says(lines[-1], str(num_compared))  # the command fails if any differ
    assert [line.split()[0] for line in lines[-3:-1]] == ["minigpt_jax", "PyTorch"]


def test_without_pytorch_the_error_says_what_to_install(trained, call, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    process = call(trained.folder, "compare_torch --config debug --dataset text.txt")
    assert process.returncode == USAGE
    assert process.stderr.startswith("error: ")
    assert process.stderr.count("\n") == 1
    assert_says(process.stderr, "python -m pip install -e '.[torch]'")


# ---- Hugging Face ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_is_exported_to_hugging_face_and_trained_further(trained, call):
    shape = "--activation swiglu --noqk_norm --num_kv_heads 1 --sample_every 0"
    folder, small = trained.folder, "--config debug --dataset text.txt --steps 4"
    succeeded(start(folder, f"train {small} {shape} --workdir runs/llama"))
    exported = succeeded(call(folder, "export_hf --workdir runs/llama --out exported"))
    assert (exported.stdout, exported.stderr.count("\n")) == ("", 1)
    assert_says(exported.stderr, "exported", "llama")
    ours, theirs = (succeeded(call(folder, f"generate --workdir {name} {GREEDY}")) for name in ("runs/llama", "exported"))
    assert ours.stdout == theirs.stdout != ""
    train = f"train --init_from exported {small} --learning_rate 1e-7 --min_learning_rate 0"
    first = succeeded(start(folder, f"{train} --workdir runs/tuned"))
    second = succeeded(start(folder, f"{train} --workdir runs/tuned --steps 6"))
    changed, resumed, *_ = second.stderr.splitlines()
    assert_says(changed, "steps=4", "6")
    assert_says(resumed, "runs/tuned", "exported", "4", "6")
    losses = [metrics(folder / "runs" / name)[-1]["val_loss"] for name in ("llama", "tuned")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)  # random weights would be far off
    config = Config.from_json((folder / "runs" / "tuned" / "config.json").read_text(encoding="utf-8"))
    assert (config.model.num_kv_heads, config.model.activation, config.data.tokenizer) == (1, "swiglu", "exported/")
    assert (folder / "runs" / "tuned" / "tokenizer.json").read_text() == (
        folder / "runs" / "llama" / "tokenizer.json"
    ).read_text()
    assert_says(first.stderr.splitlines()[0], "runs/tuned", "exported")


@pytest.mark.slow
def test_a_lora_run_is_exported_as_an_adapter_and_as_a_whole_model(trained, call):
    folder, small = trained.folder, "--config debug --dataset text.txt --steps 4 --sample_every 0"
    succeeded(start(folder, f"train {small} --activation swiglu --noqk_norm --workdir runs/base"))
    lora = "--init_from runs/base --lora_rank 2 --learning_rate 0.3 --warmup_steps 0"
    first, *_ = succeeded(start(folder, f"train {small} {lora} --workdir runs/lora")).stderr.splitlines()
    assert_says(first, "runs/lora", "runs/base", "parameters trained")
    adapter = succeeded(call(folder, "export_hf --workdir runs/lora --out adapter"))
    assert (adapter.stdout, adapter.stderr.count("\n")) == ("", 2)
    assert_says(
        adapter.stderr, "adapter of runs/lora", f"base model {folder / 'adapter/base'}", "peft.AutoPeftModelForCausalLM"
    )
    succeeded(call(folder, "export_hf --workdir runs/lora --out merged --merge"))
    names = "runs/lora", "adapter", "merged", "runs/base"
    *same, base = (succeeded(call(folder, f"generate --workdir {name} {GREEDY}")).stdout for name in names)
    assert len(set(same)) == 1
    assert same[0] != base
    assert sorted(path.name for path in (folder / "adapter").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "base"
    ]  # fmt: skip
    refused = call(folder, "export_hf --workdir runs/base --out new --merge")
    assert (refused.returncode, (folder / "new").exists()) == (USAGE, False)
    assert_says(refused.stderr, "runs/base", "--merge")


GREEDY = "--prompt 'To be' --length 20 --greedy"


# ---- Images ---------------------------------------------------------------------------------------------------------------

TINY_VIT = "--num_layers 1 --num_heads 2 --embed_dim 8 --ff_dim 8 --patch_size 14 --batch_size 4 --steps 2 --log_every 1"


def test_a_folder_of_images_trains_is_evaluated_and_classified_with_plots(tmp_path, call):
    pil = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    for name, pixel in {"dark": 10, "light": 240}.items():
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(5):
            pil.new("L", (28, 28), pixel + number).save(tmp_path / "photos" / name / f"{number}.png")
    trained = succeeded(start(tmp_path, f"train --config vit_digits --dataset photos --workdir run {TINY_VIT}"))
    assert_says(trained.stderr, "2", "classes", "accuracy", "scripts/classify.py", "images/s")
    assert "±" not in trained.stderr  # the reference result is that of the digits
    assert set(metrics(tmp_path / "run")[0]) >= {"train_loss", "images_per_second"}

    evaluated = succeeded(call(tmp_path, "evaluate --workdir run --plot confusion.png"))
    assert json.loads(evaluated.stdout).keys() == {"workdir", "split", "loss", "accuracy", "images"}
    assert_says(evaluated.stderr, "confusion.png")
    pil.new("RGB", (50, 30), "white").save(tmp_path / "some.png")
    classified = succeeded(call(tmp_path, "classify --workdir run --image some.png --plot attention.png"))
    lines = classified.stdout.splitlines()
    assert sorted(line.split()[1] for line in lines) == ["dark", "light"]
    assert sum(float(line.split("%")[0]) for line in lines) == pytest.approx(100, abs=0.02)
    assert_says(classified.stderr, "50", "30", "28", "28", "lighter", "--invert", "attention.png")
    inverted = succeeded(call(tmp_path, "classify --workdir run --image some.png --invert"))
    assert_says(inverted.stderr, "darker", "--invert")
    assert inverted.stdout != classified.stdout
    for path in (tmp_path / "confusion.png", tmp_path / "attention.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    (tmp_path / "photos" / "light" / "4.png").write_bytes(b"no image")
    refused = call(tmp_path, "evaluate --workdir run --memorisation --plot refused.png")
    assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (USAGE, "", 1)
    assert_says(refused.stderr, "run", "image_classification", "language_modelling")
    assert not (tmp_path / "refused.png").exists()
    broken = call(tmp_path, "evaluate --workdir run")
    assert (broken.returncode, broken.stderr.count("\n")) == (DATA, 1)
    assert_says(broken.stderr, "4.png")


# ---- Mistakes -------------------------------------------------------------------------------------------------------------

NEW = "train --config debug --dataset text.txt --workdir new"
PROMPTED = "generate --workdir runs/debug --prompt To"
ATTRIBUTE = "attribute --workdir runs/debug --text"
SWEEP = "sweep --config debug --dataset text.txt --workdir new --vary"
ABLATE = "ablate --base debug --dataset text.txt --workdir new"
TUNE = "tune --config debug --dataset text.txt --workdir new --range"
USAGE, DATA = 2, 1

TOKENIZERS = tuple(tokenizers.KINDS)
VOCABULARY, LONGEST = (
    str(len(set(TEXT))),
    str(len(TEXT) - int(0.9 * len(TEXT)) - 1),
)  # the longest context that fits the validation text

# Command, exit status, and names and values in the message. A suggestion comes in addition to the list of allowed values.
MISTAKES = [
    (f"{NEW} --num_leyers 3", USAGE, ["num_leyers", "num_layers"]),
    (f"{NEW} stray", USAGE, ["'stray'"]),
    (f"{NEW} --noqk_norm=3", USAGE, ["--noqk_norm=3"]),
    (f"{NEW} --steps 3000000000", USAGE, ["steps=3000000000", "2147483648"]),
    (f"{NEW} --epochs 1e300", USAGE, ["epochs=1e+300", "2147483647"]),
    (f"{NEW} --workdir ''", USAGE, ["workdir"]),
    (f"{NEW} --num_layers two", USAGE, ["--num_layers=two"]),
    ("train --config debgu --workdir new", USAGE, ["debgu", "debug", *preset_names()]),
    (f"{NEW} --norm layrnorm", USAGE, ["norm='layrnorm'", "layernorm", "layernorm", "rmsnorm"]),
    (f"{NEW} --num_heads 3", USAGE, ["embed_dim=32", "num_heads=3"]),
    (f"{NEW} --learning_rate nan", USAGE, ["learning_rate=nan"]),
    (f"{NEW} --steps 5 --epochs 1", USAGE, ["steps=5", "epochs=1.0"]),
    (f"{NEW} --context_length 5000", DATA, ["train", "context_length=5000", "5001", LONGEST]),
    (f"{NEW} --context_length 2000", DATA, ["val", "context_length=2000", "2001", LONGEST]),
    (f"{NEW} --dataset missing.txt", DATA, ["missing.txt"]),
    (f"{NEW} --dataset shakespear", DATA, ["shakespear", "shakespeare", *corpora.CORPORA]),
    (f"{NEW} --dataset empty.txt", DATA, ["empty.txt"]),
    (f"{NEW} --dataset binary.bin", DATA, ["binary.bin", "NUL", "3"]),
    (f"{NEW} --dataset latin1.txt", DATA, ["latin1.txt", "UTF-8", "0xe9", "3", "--encoding"]),
    (f"{NEW} --dataset latin1.txt --encoding latin9000", USAGE, ["encoding='latin9000'", "cp1252"]),
    (f"{NEW} --dataset foreign", DATA, ["foreign", ".txt", ".jsonl"]),
    (f"{NEW} --dataset '*.rst'", DATA, ["*.rst"]),
    (f"{NEW} --dataset bad.jsonl", DATA, ["line 2", "bad.jsonl", '"text"']),
    (f"{NEW} --dataset bad.txt.gz", DATA, ["bad.txt.gz", "gzip"]),
    (f"{NEW} --val_dataset short.txt", DATA, ["val", "5", "context_length=16", "17", "4"]),
    (f"{NEW} --val_dataset missing.txt", DATA, ["missing.txt"]),
    (f"{NEW} --tokenizer wrod", USAGE, ["tokenizer='wrod'", "word", *TOKENIZERS]),
    (f"{NEW} --tokenizer ./missing.json", DATA, ["./missing.json", "No such file or directory"]),
    (f"{NEW} --tokenizer runs/debug/config.json", DATA, ["runs/debug/config.json"]),
    (f"{NEW} --tokenizer word --vocab_size 5000", DATA, ["vocab_size=5000", "tokenizer=word"]),
    (f"{NEW} --tokenizer bpe --vocab_size 100", USAGE, ["vocab_size=100", "257", "1048576", "tokenizer=bpe"]),
    (f"{NEW} --data_dir text.txt", DATA, ["text.txt", "--data_dir"]),
    (f"{NEW} --workdir foreign", DATA, ["foreign", "'epoch_3'", "--workdir"]),
    (f"{NEW} --workdir other", DATA, ["--init_from other"]),
    (f"{NEW} --workdir another", DATA, ["another/config.json"]),
    (f"{NEW} --workdir text.txt", DATA, ["text.txt", "File exists"]),
    ("train --workdir runs/debug --num_layers 3 --bias", DATA, ["runs/debug", "num_layers=2", "3", "bias=False", "True"]),
    ("train --workdir runs/debug --dataset later.txt", DATA, ["later.txt", "--dataset", "--workdir", "--overwrite"]),
    ("train --workdir runs/debug --steps 10", DATA, ["20", "10", "--overwrite"]),
    ("train --config debug --dataset later.txt --workdir changed", DATA, ["later.txt", "--overwrite"]),
    ("train --workdir runs/debug --tokenizer byte", DATA, ["tokenizer=char", "byte", "--overwrite"]),
    ("evaluate --workdir changed", DATA, ["later.txt", "--overwrite"]),
    ("evaluate --workdir runs/debug --stride 17", USAGE, ["stride=17", "1", "context_length=16"]),
    ("evaluate --workdir runs/debug --stride 0", USAGE, ["stride=0", "1", "context_length=16"]),
    ("tokens", USAGE, ["--text"]),
    ("tokens --text To --tokenizer bytes", USAGE, ["tokenizer='bytes'", "byte", *TOKENIZERS]),
    ("tokens --text Zero --dataset text.txt", DATA, ["'Z'"]),
    ("evaluate --workdir runs/debug --split vall", USAGE, ["split='vall'", "val", "val", "train"]),
    ("evaluate --workdir nowhere", DATA, ["nowhere", "config.json", "scripts/train.py"]),
    ("evaluate --workdir runs/debug --plot confusion.png", USAGE, ["language_modelling", "plot"]),
    ("evaluate --workdir runs/debug --plot confusion.jpg", USAGE, ["plot='confusion.jpg'", ".png"]),
    ("attribute --workdir runs/debug", USAGE, ["--text", "--lds"]),
    (f"{ATTRIBUTE} ''", USAGE, ["0", "2", "17"]),
    (f"{ATTRIBUTE} T", USAGE, ["1", "2", "17"]),
    (f"{ATTRIBUTE} 'To be, or not to be'", USAGE, ["19", "2", "17"]),
    (f"{ATTRIBUTE} 'Zürich'", DATA, ["text", "'Z'", "'ü'", "tokenizer.json"]),
    (f"{ATTRIBUTE} To --num_passages 0", USAGE, ["num_passages=0", "1"]),
    (f"{ATTRIBUTE} To --dataset later.txt", DATA, ["later.txt", "--dataset"]),
    ("attribute --workdir nowhere --text To", DATA, ["nowhere", "config.json", "scripts/train.py"]),
    ("attribute --workdir nowhere --lds", DATA, ["nowhere", "config.json", "scripts/train.py"]),
    ("classify --workdir runs/debug", USAGE, ["--image", "--text"]),
    ("classify --workdir runs/debug --image some.png --text To", USAGE, ["--image", "--text"]),
    ("classify --workdir runs/debug --text To", DATA, ["runs/debug", "language_modelling"]),
    ("classify --workdir runs/debug --text To --plot plot.png", USAGE, ["--plot", "images"]),
    ("classify --workdir runs/debug --image some.png", DATA, ["runs/debug", "language_modelling"]),
    ("classify --workdir runs/debug --image some.png --plot plot.jpg", USAGE, ["plot='plot.jpg'", ".png"]),
    ("classify --workdir nowhere --image some.png", DATA, ["nowhere", "config.json", "scripts/train.py"]),
    ("train --config vit_digits --workdir new --tokenizer char", USAGE, ["'tokenizer'", "image_classification"]),
    ("train --config vit_digits --workdir new --patch_size 5", USAGE, ["image_size=28", "patch_size=5"]),
    ("train --config vit_digits --workdir new --dataset foreign", DATA, ["foreign", "two"]),
    ("train --config vit_digits --workdir new --dataset text.txt", DATA, ["'text.txt'", "digits"]),
    ("generate --workdir .", DATA, ["config.json", "scripts/train.py"]),
    (f"{PROMPTED} --length 0", USAGE, ["length=0", "1"]),
    (f"{PROMPTED} --length -3", USAGE, ["length=-3", "1"]),
    (f"{PROMPTED} --num_samples 0", USAGE, ["num_samples=0", "1"]),
    (f"{PROMPTED} --temperature -1", USAGE, ["temperature=-1.0", "0", "1e-30"]),
    (f"{PROMPTED} --temperature nan", USAGE, ["temperature=nan"]),
    (f"{PROMPTED} --top_p 0", USAGE, ["top_p=0.0", "0.0"]),
    (f"{PROMPTED} --top_p 1.5", USAGE, ["top_p=1.5", "1.0"]),
    (f"{PROMPTED} --top_k -1", USAGE, ["top_k=-1", "0"]),
    (f"{PROMPTED} --prompt 'Zürich: 42'", DATA, ["'2', '4', 'Z'", "'ü'", "tokenizer.json"]),
    (f"{PROMPTED} --seed -1", USAGE, ["seed=-1", "4294967296"]),
    (f"{PROMPTED} --greedy --temperature 0.5", USAGE, ["greedy", "temperature=0.5"]),
    (f"{PROMPTED} --beam_width 3 --top_k 3", USAGE, ["--beam_width", "--top_k"]),
    (f"{PROMPTED} --beam_width 3 --stream", USAGE, ["--stream"]),
    (f"{PROMPTED} --beam_width 500", USAGE, ["beam_width=500", VOCABULARY]),
    (f"{PROMPTED} --beam_width 2 --length_penalty 300", USAGE, ["length_penalty=300.0", "10.0"]),
    (f"{PROMPTED} --beam_width 0", USAGE, ["beam_width=0", "1"]),
    (f"{PROMPTED} --beam_width 2 --stop 'no'", USAGE, ["stop='no'", "2"]),
    (f"{PROMPTED} --length_penalty 1", USAGE, ["length_penalty", "--beam_width"]),
    (f"{PROMPTED} --stop ''", USAGE, ["stop"]),
    (f"{PROMPTED} --stop_tokens 500", USAGE, ["stop_tokens=500", "0", VOCABULARY]),
    (f"{PROMPTED} --beam_width 2 --stop_tokens -1", USAGE, ["stop_tokens=-1", "0", VOCABULARY]),
    (f"{PROMPTED} --format jsonn", USAGE, ["format='jsonn'", "jsonl", "jsonl", "text"]),
    (f"{PROMPTED} --prompts prompts.txt", USAGE, ["--prompt", "--prompts"]),
    (f"{PROMPTED} --interactive", USAGE, ["--interactive", "--prompt"]),
    (f"{PROMPTED} --temperature 1e-40", USAGE, ["temperature=1e-40", "1e-30"]),
    ("generate --workdir runs/debug --prompts missing.txt", DATA, ["missing.txt"]),
    ("generate --workdir runs/debug --prompts empty.txt", DATA, ["empty.txt"]),
    ("generate --workdir runs/debug --prompts latin1.txt", DATA, ["latin1.txt", "UTF-8", "0xe9", "3"]),
    ("generate --workdir runs/debug --prompts gap.txt", DATA, ["line 2", "gap.txt"]),
    (f"{NEW} --max_minutes 0", USAGE, ["max_minutes=0.0", "0"]),
    (f"{NEW} --patience -1", USAGE, ["patience=-1", "0"]),
    (f"{NEW} --ema 1", USAGE, ["ema=1.0", "1.0"]),
    ("checkpoints --workdir nowhere", DATA, ["nowhere", "config.json", "scripts/train.py"]),
    ("check_run --kills 0", USAGE, ["kills=0", "1"]),
    ("reference --config debug --seeds 4", USAGE, ["seeds=4", "5"]),
    ("reference --config debgu", USAGE, ["'debgu'", "'debug'"]),
    (f"{SWEEP} lerning_rate=1", USAGE, ["'lerning_rate'", "'learning_rate'", "learning_rate", "seed", "dropout", "norm"]),
    (f"{SWEEP} dataset=a,b", USAGE, ["'dataset'", "learning_rate", "seed"]),
    (f"{SWEEP} seed=", USAGE, ["vary='seed='", "int"]),
    (f"{SWEEP} seed=0,,1", USAGE, ["vary='seed=0,,1'", "int"]),
    (f"{SWEEP} seed", USAGE, ["vary='seed'", "learning_rate=1e-3,2e-3"]),
    (f"{SWEEP} num_heads=2,3", USAGE, ["embed_dim=32", "num_heads=3"]),
    (f"{SWEEP} seed=0,1 --seed 2", USAGE, ["seed", "--vary"]),
    (f"{SWEEP} seed=0,1 --stack 0", USAGE, ["stack=0", "1"]),
    (f"{SWEEP} seed=0,1 --patience 3", USAGE, ["patience=3"]),
    (f"{SWEEP} seed=0,1 --embed_dim 65536 --ff_dim 262144", USAGE, ["0 fit", "batch_size"]),
    (f"{SWEEP} seed=0,1 --dataset missing.txt", DATA, ["missing.txt"]),
    (f"{SWEEP} seed=0,1 --workdir runs/debug", DATA, ["runs/debug", "--workdir"]),
    ("sweep --config debug --dataset text.txt --workdir new", USAGE, ["learning_rate=1e-3,2e-3"]),
    (f"{ABLATE} --only postions", USAGE, ["only='postions'", "'positions'", *CHANGES]),
    (f"{ABLATE} --seeds 2", USAGE, ["seeds=2", "3"]),
    (f"{ABLATE} --dataset missing.txt", DATA, ["missing.txt"]),
    (f"{ABLATE} --workdir runs/debug", DATA, ["runs/debug", "run", "--workdir"]),
    (f"{ABLATE} --base chat_shakespeare", USAGE, ["task chat", "language_modelling"]),
    (f"{ABLATE} --base debgu", USAGE, ["'debgu'", "'debug'"]),
    (f"{ABLATE} --seed 3", USAGE, ["--seed", "'seeds'"]),
    (f"{TUNE} lerning_rate=1e-4..1e-2", USAGE, ["'lerning_rate'", "'learning_rate'", "learning_rate", "dropout", "norm"]),
    (f"{TUNE} tokenizer=char,byte", USAGE, ["'tokenizer'", "learning_rate", "dropout"]),
    (f"{TUNE} seed=0..9", USAGE, ["'seed'", "learning_rate", "dropout"]),
    (f"{TUNE} learning_rate=1e-4..", USAGE, ["range='learning_rate=1e-4..'", "float"]),
    (f"{TUNE} learning_rate=1e-2..1e-4", USAGE, ["range=0.01..0.0001"]),
    (f"{TUNE} learning_rate", USAGE, ["range='learning_rate'", "learning_rate=1e-4..1e-2", "num_layers=2,3,4"]),
    (f"{TUNE} num_heads=2,3", USAGE, ["embed_dim=32", "num_heads=3"]),
    (f"{TUNE} num_layers=1,2 --num_layers 2", USAGE, ["num_layers", "--range"]),
    (f"{TUNE} num_layers=1,2 --trials 0", USAGE, ["trials=0", "1"]),
    (f"{TUNE} num_layers=1,2 --minutes 0", USAGE, ["minutes=0.0", "0"]),
    (f"{TUNE} num_layers=1,2 --patience 3", USAGE, ["patience=3"]),
    (f"{TUNE} num_layers=1,2 --workdir runs/debug", DATA, ["runs/debug", "--workdir"]),
    (f"{TUNE} num_layers=1,2 --workdir ''", USAGE, ["workdir"]),
    ("tune --config debug --dataset text.txt --workdir new", USAGE, ["learning_rate=1e-4..1e-2", "num_layers=2,3,4"]),
    ("plot --workdir nowhere", DATA, ["nowhere", "metrics.jsonl", "No such file or directory"]),
    ("plot --workdir runs/debug --out picture.jpg", USAGE, ["picture.jpg", ".png"]),
    (f"{NEW} --init_from nowhere", DATA, ["nowhere", "config.json", "scripts/train.py"]),
    (f"{NEW} --init_from runs/debug --num_layers 3", DATA, ["init_from=runs/debug", "num_layers=3", "2"]),
    (f"{NEW} --init_from runs/debug --tokenizer byte", DATA, [f"vocab_size={VOCABULARY}", "tokenizer=byte", "256"]),
    (f"{NEW} --init_from runs/debug --context_length 17", DATA, ["init_from=runs/debug", "context_length=17", "16"]),
    (f"{NEW} --init_from other", DATA, ["other", "tokenizer.json"]),
    (f"{NEW} --init_from binary.bin", DATA, ["binary.bin", "pickle"]),
    ("evaluate --workdir other", DATA, ["--init_from other"]),
    ("train --workdir runs/debug --init_from runs/debug", DATA, ["init_from=None", "runs/debug"]),
    ("generate --workdir binary.bin", DATA, ["binary.bin", "pickle"]),
    ("export_hf --workdir runs/debug", USAGE, ["--out"]),
    (f"{NEW} --init_from runs/debug --freeze nothing", USAGE, ["freeze='nothing'", "head/kernel"]),
    (f"{NEW} --init_from runs/debug --lora_rank 2 --lora_targets nothing", USAGE, ["lora_targets='nothing'", "head"]),
    (f"{NEW} --init_from runs/debug --lora_rank 33", USAGE, ["lora_rank=33", "32"]),
    (f"{NEW} --lora_rank 2", USAGE, ["lora_rank=2", "init_from"]),
    (f"{NEW} --lora_alpha 2", USAGE, ["lora_alpha=2.0", "lora_rank"]),
    ("export_hf --workdir runs/debug --out new", DATA, ["activation=relu2", "qk_norm=True"]),
    ("export_hf --workdir nowhere --out new", DATA, ["nowhere", "config.json", "scripts/train.py"]),
    ("benchmark generat", USAGE, ["generat", "generate", "generate", "startup", "all", "gpu"]),
    ("benchmark gpu train", USAGE, ["gpu", "--plot"]),
    ("benchmark gpu --skip device,limit", USAGE, ["skip='limit'", "'limits'", "limits", "train_gpt2_124m", "compiling"]),
    ("fill_mask --workdir runs/debug --prompt [MASK]", DATA, ["runs/debug", "language_modelling"]),
    ("compare_torch --config bert_shakespeare", USAGE, ["bert_shakespeare", "masked_language_modelling", "GPT"]),
    ("benchmark gpu --minutes 0", USAGE, ["minutes=0.0", "0"]),
]


@pytest.fixture(scope="module")
def folder_for_mistakes(trained):
    """The folder of the run, with the files for the mistakes."""
    folder = trained.folder
    (folder / "later.txt").write_text(LATER_TEXT, encoding="utf-8")
    (folder / "foreign" / "checkpoints" / "epoch_3").mkdir(parents=True)
    (folder / "foreign" / "checkpoints" / "epoch_3" / "weights").write_text("dear", encoding="utf-8")
    (folder / "other").mkdir()
    (folder / "other" / "config.json").write_text('{"model_type": "gpt2"}', encoding="utf-8")
    (folder / "another").mkdir()
    (folder / "another" / "config.json").write_text('{"epochs": 3}', encoding="utf-8")
    (folder / "empty.txt").touch()
    (folder / "gap.txt").write_text("To\n\nbe\n", encoding="utf-8")
    (folder / "binary.bin").write_bytes(b"abc\0def")
    (folder / "bad.jsonl").write_text('{"text": "good"}\n{"txt": "bad"}\n', encoding="utf-8")
    (folder / "bad.txt.gz").write_bytes(b"no gzip")
    (folder / "short.txt").write_text("To be", encoding="utf-8")
    (folder / "latin1.txt").write_bytes("café".encode("latin-1") * 100)
    # A run whose text has changed.
    shutil.copytree(trained.workdir, folder / "changed")
    config = (folder / "changed" / "config.json").read_text(encoding="utf-8")
    (folder / "changed" / "config.json").write_text(config.replace("text.txt", "later.txt"), encoding="utf-8")
    return folder


def slow_after_the_first_of_each_script(mistakes):
    seen, cases = set(), []
    for mistake in mistakes:
        script = mistake[0].split()[0]
        cases.append(pytest.param(*mistake, id=mistake[0], marks=[pytest.mark.slow] if script in seen else []))
        seen.add(script)
    return cases


@pytest.mark.parametrize("command, status, words", slow_after_the_first_of_each_script(MISTAKES))
def test_a_mistake_is_a_one_line_error_and_nothing_is_written(folder_for_mistakes, call, command, status, words):
    before = files(folder_for_mistakes)
    process = call(folder_for_mistakes, command)
    assert process.stderr.startswith("error: ")
    assert process.stderr.count("\n") == 1
    assert_says(process.stderr, *words)
    assert process.returncode == status
    assert process.stdout == ""
    assert files(folder_for_mistakes) == before


def test_a_mistake_sets_the_exit_status_without_a_traceback(tmp_path):
    usage, data = run(tmp_path, "train --config debgu", "generate --workdir nowhere")
    assert (usage.returncode, data.returncode) == (USAGE, DATA)
    for process in (usage, data):
        assert process.stderr.startswith("error: ")
        assert process.stderr.count("\n") == 1
        assert process.stdout == ""


# ---- Other tasks ----------------------------------------------------------------------------------------------------------

TINY = "--num_layers 1 --embed_dim 16 --ff_dim 16 --num_heads 2 --context_length 16 --batch_size 2 --steps 3"


@pytest.mark.slow
def test_a_masked_model_trains_evaluates_and_fills_in(trained, call):
    train = f"train --config bert_shakespeare --dataset text.txt --vocab_size 20 {TINY} --workdir runs/bert"
    shown = succeeded(start(trained.folder, train))
    assert_says(shown.stderr, "accuracy", "fill_mask.py")
    result = json.loads(succeeded(call(trained.folder, "evaluate --workdir runs/bert")).stdout)
    assert 0 <= result["accuracy"] <= 1
    assert 0.2 < result["unigram_accuracy"] < 0.6  # half of all tokens are blanks
    filled = succeeded(call(trained.folder, "fill_mask --workdir runs/bert --prompt 'To [MASK], or [MASK] to be'")).stdout
    assert [line for line in filled.splitlines() if line.startswith("[")] == ["[MASK] 1", "[MASK] 2"]
    rows = [re.fullmatch(r" +(0\.\d{4})  ('.+')", line) for line in filled.splitlines() if line.startswith(" ")]
    assert len(rows) == 10
    values = [float(row[1]) for row in rows]
    assert values[:5] == sorted(values[:5], reverse=True)
    for command, status, words in [
        ("fill_mask --workdir runs/bert --prompt 'To be'", USAGE, ["[MASK]"]),
        ("evaluate --workdir runs/bert --stride 4", USAGE, ["stride=4"]),
        ("evaluate --workdir runs/bert --memorisation", USAGE, ["masked_language_modelling", "language_modelling"]),
        ("attribute --workdir runs/bert --text To", USAGE, ["masked_language_modelling", "language_modelling"]),
        ("generate --workdir runs/bert", DATA, ["runs/bert", "masked_language_modelling", "language_modelling"]),
        ("train --config debug --dataset text.txt --init_from runs/bert --workdir runs/new", DATA, ["runs/bert"]),
        (
            "train --config bert_shakespeare --dataset text.txt --init_from runs/debug --workdir runs/new",
            DATA,
            ["runs/debug", "language_modelling", "masked_language_modelling"],
        ),
    ]:
        process = call(trained.folder, command)
        assert (process.returncode, process.stdout, process.stderr.count("\n")) == (status, "", 1)
        assert_says(process.stderr, *words)
    further = "train --config bert_shakespeare --dataset text.txt --init_from runs/bert --steps 1 --workdir runs/further"
    assert_says(succeeded(start(trained.folder, further)).stderr, "runs/bert")


# ---- Help -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, expected",
    [
        ("train", "--num_layers --steps --epochs --dataset --workdir --overwrite --kernels"),
        ("generate", "--workdir --prompt --length --temperature --top_k --top_p --greedy --num_samples --seed --kernels"),
        ("sweep", "--config --vary --workdir --stack --overwrite --steps --kernels"),
        ("ablate", "--base --only --seeds --workdir --overwrite --steps --dataset --kernels"),
        ("tune", "--config --range --trials --minutes --workdir --storage --steps --kernels"),
        ("evaluate", "--workdir --split --dataset --val_dataset --data_dir --plot --memorisation"),
        ("classify", "--workdir --image --text --invert --plot --kernels"),
        ("attribute", "--workdir --text --num_passages --lds --dataset --data_dir"),
    ],
)
def test_help_lists_the_flags_of_the_script(tmp_path, call, name, expected):
    process = succeeded(call(tmp_path, f"{name} --help"))
    lines = {line.strip() for line in process.stdout.splitlines()}
    assert f"python scripts/{name}.py" in process.stdout
    assert set(expected.split()) <= lines
    assert process.stderr == ""
    assert files(tmp_path) == {}


def test_help_of_a_setting_that_tasks_share_is_that_of_each(tmp_path, call):
    _, text = succeeded(call(tmp_path, "train --help")).stdout.split("  --dataset\n")
    assert_says(text.splitlines()[0], "shakespeare", "digits")


def test_a_closed_pipe_is_not_an_error(tmp_path):
    """As in `train.py --help | head -1`, where Python itself would print an error at exit."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    process = start(tmp_path, "train --help", stdout=write_end)
    os.close(write_end)
    assert (process.returncode, process.stderr) == (0, "")
