"""Runs: resuming after a kill is bit-exact, and a run that does not match its config or data is refused, untouched."""

import contextlib
import dataclasses
import errno
import io
import json
import logging
import math
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import assert_close, assert_equal, assert_raises, assert_says, logged

from minigpt_jax.api import evaluate, load, train
from minigpt_jax.config import Config, DataConfig, ModelConfig, ReferenceResult, TrainingConfig
from minigpt_jax.data import batches
from minigpt_jax.errors import DataError, StoppedError, UsageError
from minigpt_jax.interop.load import read_run_config
from minigpt_jax.runs import checkpoints
from minigpt_jax.runs.folder import locked
from minigpt_jax.system import signals, streams
from minigpt_jax.tasks import language_modelling, prepare
from minigpt_jax.tasks.language_modelling import LanguageModelling
from minigpt_jax.training import loop, resume, run
from minigpt_jax.training.callbacks import Callback, Log, Summary, summary, time_limit
from minigpt_jax.training.compilations import Compilations
from minigpt_jax.training.run import Run, new_state
from minigpt_jax.training.schedule import learning_rate_schedule
from minigpt_jax.training.step import train_step

pytestmark = pytest.mark.e2e

TEXT = "".join(np.random.default_rng(0).choice(list("abcd \n"), 160)) + "abcd \n"
STEPS = 13
INTERVALS = {"eval_every": 4, "checkpoint_every": 5, "log_every": 3, "sample_every": 0, "keep_checkpoints": 2}

SHARDING = jax.sharding.SingleDeviceSharding(jax.devices()[0])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with the text, and for its tokens."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text(TEXT)
    return folder


@pytest.fixture
def config(files):
    """Everything that could break resuming: dropout, micro-batches, several epochs, intervals that all differ."""
    return Config(
        model=ModelConfig(num_layers=1, num_heads=2, embed_dim=8, ff_dim=8, context_length=8, dropout=0.2),
        training=TrainingConfig(
            batch_size=4,
            grad_accumulation=2,
            ema=0.9,
            steps=STEPS,
            learning_rate=1e-2,
            warmup_steps=3,
            eval_batches=1,
            **INTERVALS,
        ),
        data=DataConfig(dataset=str(files / "text.txt"), data_dir=str(files)),
    )


@pytest.fixture(autouse=True)
def fixed_matmul_rate(monkeypatch):
    """Measuring it at the end of each run would take longer than all of the steps."""
    monkeypatch.setattr(summary.hardware, "matmul_rate", lambda *_: 1e15)


class KilledError(Exception):
    pass


def train_until(config, workdir, step, monkeypatch, during="after_step"):
    """Trains until this step is done, then raises KilledError before the callbacks run (`after_step`) or in `save`."""
    owner = {"after_step": Log, "save": Run}[during]
    original = getattr(owner, during)

    def raise_at_step(self, *args):
        if (args[0] if args else self).step >= step:
            raise KilledError
        return original(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(owner, during, raise_at_step)
        with pytest.raises(KilledError):
            train(config, workdir)


def final_state(config, workdir, step=STEPS):
    task = prepare(config)
    return resume.restore(workdir, step, jax.eval_shape(lambda: new_state(task)), SHARDING)


def rows(workdir):
    """The rows of metrics without the values that depend on the clock."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    timings = ("seconds", "tokens_per_second")
    return [{name: value for name, value in json.loads(line).items() if name not in timings} for line in lines]


def snapshot(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def first_lines(caplog):
    """The first log line of each run of this process, new or resumed."""
    return [record.getMessage() for record in caplog.records if (record.module, record.funcName) == ("log", "begin")]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The folder of an uninterrupted run, trained by the first test that needs it. Tests must not change it."""
    return tmp_path_factory.mktemp("runs") / "straight"


@pytest.fixture
def finished(straight, config):
    if not straight.exists():
        train(config, straight)
    return straight


@pytest.fixture
def workdir(finished, tmp_path):
    """A copy of the finished run that a test may change."""
    return shutil.copytree(finished, tmp_path / "run")


# ---- Killed and resumed ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kills",
    [
        pytest.param(
            [(2, "after_step"), (7, "after_step"), (11, "after_step")],  # the first one before any checkpoint
            marks=pytest.mark.slow,
        ),
        pytest.param([(5, "save"), (10, "save"), (10, "save"), (13, "save")], marks=pytest.mark.slow),
        [(5, "after_step"), (6, "after_step"), (13, "after_step")],
    ],
    ids=str,
)
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(config, finished, tmp_path, monkeypatch, kills):
    workdir = tmp_path / "killed"
    for step, during in kills:
        train_until(config, workdir, step, monkeypatch, during)
    train(config, workdir)
    assert_equal(final_state(config, finished), final_state(config, workdir))
    assert rows(workdir) == rows(finished)
    assert checkpoints.steps(workdir) == checkpoints.steps(finished)
    for step in checkpoints.steps(finished):
        infos = [checkpoints.read_info(folder, step) for folder in (finished, workdir)]
        assert dataclasses.replace(infos[0], seconds=0) == dataclasses.replace(infos[1], seconds=0)


def test_the_test_above_crosses_the_end_of_an_epoch(config):
    task = prepare(config)
    windows = batches.num_windows(task.splits["train"].ids, config.model.context_length)
    assert windows * 2 < STEPS * config.training.batch_size
    assert windows % config.training.batch_size  # an epoch ends within a batch


def test_each_step_reads_its_batch_once(config, tmp_path, monkeypatch):
    requested, original = [], batches.batch_at

    def batch_at(tokens, context_length, batch_size, seed, step):
        requested.append(step)
        return original(tokens, context_length, batch_size, seed, step)

    monkeypatch.setattr(batches, "batch_at", batch_at)
    train_until(config, tmp_path, 10, monkeypatch, "save")
    resumed_at = checkpoints.steps(tmp_path)[-1]
    train(config, tmp_path)
    assert requested == [*range(10), *range(resumed_at, STEPS)]


def test_more_steps_continue_a_finished_run(config, workdir, caplog):
    before, compiled = rows(workdir), train_step._cache_size()
    with caplog.at_level(logging.INFO), Compilations() as compilations:
        train(config.override({"steps": STEPS + 2}), workdir)
    assert train_step._cache_size() == compiled  # the number of steps is not part of the program
    assert "train_step" not in [name for name, _ in compilations.programs]
    [line] = first_lines(caplog)
    assert_says(line, str(workdir), config.data.dataset, str(STEPS), str(STEPS + 2))
    assert checkpoints.steps(workdir)[-1] == STEPS + 2
    assert rows(workdir)[: len(before)] == before
    assert {row["step"] for row in rows(workdir)[len(before) :]} == {STEPS + 2}


def test_a_finished_run_is_reported_and_left_unchanged(config, finished, caplog):
    before = snapshot(finished)
    with caplog.at_level(logging.INFO):
        train(config, finished)
    [line] = logged(caplog)
    assert_says(line, str(finished), str(STEPS), "--steps", "--overwrite")
    assert snapshot(finished) == before


def test_overwrite_restarts_the_run(config, workdir):
    other = config.override({"seed": 1})
    before = rows(workdir)
    shutil.copytree(workdir / "checkpoints" / str(STEPS), workdir / "checkpoints" / "99")
    train(other, workdir, overwrite=True)
    assert [row["step"] for row in rows(workdir)] == [row["step"] for row in before]
    assert all(row not in before for row in rows(workdir))
    assert checkpoints.steps(workdir)[-1] == STEPS
    assert read_run_config(workdir).training.seed == 1


def test_a_run_of_an_earlier_version_resumes_with_the_same_losses(tmp_path, monkeypatch):
    """Both the run, stopped at step 20 of 30, and the expected values are of 2026-11-28, before the models had kernels."""
    workdir = shutil.copytree(Path(__file__).parent / "earlier_run", tmp_path / "run")
    numbers = ((i, i * 7 % 13) for i in range(200))
    (tmp_path / "text.txt").write_text("".join(f"{i} and {k} make {i + k}.\n" for i, k in numbers))
    monkeypatch.chdir(tmp_path)
    assert load(workdir).generate("1 and", 24, greedy=True) == "1 and m\n1   m\n1 mm\n\n\n1  m\n1 m"
    train(read_run_config(workdir), workdir)
    *_, at_25, at_30, evaluated = rows(workdir)
    assert [row["train_loss"] for row in (at_25, at_30)] == pytest.approx([2.2875200, 2.2935147], abs=1e-4)
    assert evaluated["val_loss"] == pytest.approx(2.2163802, abs=1e-4)


# ---- Files and log lines --------------------------------------------------------------------------------------------------


def test_metrics_have_the_documented_rows(finished, config):
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    training = [row for row in lines if "train_loss" in row]
    evaluations = [row for row in lines if "val_loss" in row]
    assert len(training) + len(evaluations) == len(lines)
    assert [row["step"] for row in training] == [3, 6, 9, 12, 13]
    assert [row["step"] for row in evaluations] == [4, 8, 12, 13]
    fields = {"step", "train_loss", "learning_rate", "grad_norm", "tokens_per_second", "seconds"}
    assert all(set(row) == fields for row in training)
    task = prepare(config)
    measures = {f"val_{name}" for name in task.evaluate(task.objective.init(jax.random.key(0)), 1)}
    assert all(set(row) == {"step", "seconds", *measures} for row in evaluations)
    assert all(math.isfinite(value) for row in lines for value in row.values())
    schedule = learning_rate_schedule(config.training, STEPS)
    assert [row["learning_rate"] for row in training] == pytest.approx(
        [float(schedule(row["step"] - 1)) for row in training]
    )


def test_the_folder_has_the_documented_files(finished, config):
    assert {path.name for path in finished.iterdir()} == {
        "config.json", "tokenizer.json", "metrics.jsonl", "checkpoints", "train.lock"
    }  # fmt: skip
    assert read_run_config(finished).model == dataclasses.replace(config.model, vocab_size=6)
    assert load(finished).tokenizer.characters == "\n abcd"
    evaluated = {row["step"]: row["val_loss"] for row in rows(finished) if "val_loss" in row}
    assert checkpoints.steps(finished)[-1] == STEPS
    assert checkpoints.best_first(finished)[0] == min(evaluated, key=evaluated.get)


@pytest.mark.slow
def test_checkpoints_are_saved_when_due_and_at_each_new_lowest_loss(config, tmp_path, monkeypatch):
    losses, saved, original = iter([1.0, 2.0, 0.5, 3.0, 3.0]), [], checkpoints.save

    def save(workdir, trees, info):
        saved.append((info.step, info.val_loss, info.best_val_loss))
        original(workdir, trees, info)

    monkeypatch.setattr(LanguageModelling, "evaluate", lambda *args, **keywords: {"loss": next(losses)})
    monkeypatch.setattr(checkpoints, "save", save)
    train(config, tmp_path)
    assert saved == [(4, 1.0, 1.0), (5, None, 1.0), (10, None, 1.0), (12, 0.5, 0.5), (13, 3.0, 0.5)]
    assert checkpoints.best_first(tmp_path)[0] == 12


@pytest.mark.slow
def test_how_often_a_run_evaluates_saves_and_logs_changes_no_parameter(config, finished, tmp_path):
    """Also, a row of metrics has the mean loss of the steps since the previous row."""
    busy, quiet = tmp_path / "busy", tmp_path / "quiet"
    train(config.override({"eval_every": 1, "checkpoint_every": 1, "log_every": 1, "eval_batches": 2}), busy)
    train(config.override({"eval_every": 1000, "checkpoint_every": 1000, "log_every": 1000}), quiet)
    for workdir in (busy, quiet):
        assert_equal(final_state(config, workdir), final_state(config, finished))
    losses = [row["train_loss"] for row in rows(busy) if "train_loss" in row]
    assert len(losses) == STEPS
    means = [np.mean(losses[i : i + 3]) for i in range(0, STEPS, 3)]
    assert [row["train_loss"] for row in rows(finished) if "train_loss" in row] == pytest.approx(means)
    assert [row["train_loss"] for row in rows(quiet) if "train_loss" in row] == pytest.approx([np.mean(losses)])


@pytest.mark.slow
def test_plain_kernels_train_the_same_model_and_the_first_line_names_the_kernels(config, finished, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        train(config, tmp_path / "tuned")
        train(config, tmp_path / "plain", kernels="plain")
    names = [("tuned", "tuned, split attention"), ("plain", "plain")]
    for line, (name, kernels) in zip(first_lines(caplog), names, strict=True):
        assert_says(line, str(tmp_path / name), kernels)
    assert_close(final_state(config, tmp_path / "plain"), final_state(config, finished), atol=1e-4)
    with pytest.raises(UsageError, match="kernels='fast'"):
        train(config, tmp_path / "fast", kernels="fast")
    assert not (tmp_path / "fast").exists()


@pytest.mark.slow
def test_samples_go_to_standard_output_and_change_no_parameter(config, finished, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(language_modelling, "PREVIEW_LENGTH", 20)
    train(config.override({"sample_every": 6}), tmp_path)
    samples = capsys.readouterr().out
    assert samples.count("\n\n") >= 3  # after steps 6, 12 and 13
    assert set(samples) <= set("\n abcd")
    assert len(samples) == 3 * (len("\n") + 1 + 20 + len("\n\n"))
    assert_equal(final_state(config, tmp_path), final_state(config, finished))


@pytest.mark.parametrize("stream", ["/dev/full", *(pytest.param(each, marks=pytest.mark.slow) for each in (None, "ascii"))])
def test_a_run_continues_when_samples_and_logs_cannot_be_written(config, workdir, monkeypatch, caplog, stream):
    """And takes the streams of its own callbacks along."""
    monkeypatch.setattr(LanguageModelling, "preview", lambda *_: "漢字")
    full = open(stream, "w") if stream == "/dev/full" else contextlib.nullcontext()  # noqa: SIM115
    talk = AfterStep(STEPS + 1, lambda: print("漢字", file=sys.stderr, flush=True))
    with full as output, caplog.at_level("INFO"), monkeypatch.context() as patched:
        output = io.TextIOWrapper(io.BytesIO(), stream) if stream == "ascii" else output
        patched.setattr(sys, "stdout", output)
        patched.setattr(sys, "stderr", output)
        train(config.override({"steps": STEPS + 2, "sample_every": 1}), workdir, callbacks=[talk])
        assert sys.stdout is output
        streams.discard_rest(output)
    assert checkpoints.steps(workdir)[-1] == STEPS + 2
    if stream == "ascii":
        assert output.buffer.getvalue().count(rb"\u6f22\u5b57") == 3
    else:
        [warning] = logged(caplog, "WARNING")
        assert_says(warning, os.strerror(errno.ENOSPC if stream else errno.EBADF))


def conclude(config, workdir):
    """Logs the last lines of a finished run."""
    task = prepare(config)
    Summary().conclude(Run.open(task, workdir, STEPS, None, jax.devices()[0], "plain", Compilations()))


@pytest.mark.parametrize("expected, agrees", [(math.log(6), True), (9.0, False), (0.1, False)])
def test_the_verdict_compares_the_loss_with_the_reference_result(config, finished, caplog, expected, agrees):
    config = dataclasses.replace(config, reference_result=ReferenceResult(mean=expected, spread=0.3, seeds=3))
    with caplog.at_level(logging.INFO):
        conclude(config, finished)
    [verdict] = [line for line in logged(caplog) if "±" in line]
    assert_says(verdict, "3", f"{expected:.3f}", "0.300")
    assert bool(re.search(r"\bnot\b", verdict.lower())) != agrees


def test_the_reference_result_may_be_of_another_measure(config, finished, caplog):
    for mean in (math.log(6) / math.log(2), math.log(6)):  # uniform guessing, in bits and in nats
        known = ReferenceResult(mean=mean, spread=0.1, seeds=3, measure="bits_per_char")
        with caplog.at_level(logging.INFO):
            conclude(dataclasses.replace(config, reference_result=known), finished)
    bits, nats = [line for line in logged(caplog) if "±" in line]
    for verdict in (bits, nats):
        assert_says(verdict, "bits_per_char")
    assert "not" not in bits.lower().split()
    assert "not" in nats.lower().split()


def test_without_a_reference_result_there_is_no_verdict(config, finished, caplog):
    with caplog.at_level(logging.INFO):
        conclude(config, finished)
    assert re.search(r"\d\.\d+ nats per token", caplog.text)
    assert "±" not in caplog.text


def test_a_folder_deleted_while_training_is_an_error_and_not_recreated(config, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    delete = AfterStep(4, lambda: shutil.rmtree(workdir))
    assert_raises(DataError, train, config, workdir, callbacks=[delete], says=(str(workdir), os.strerror(errno.ENOENT)))
    assert not workdir.exists()


def test_a_missing_extra_is_noticed_before_a_run_is_overwritten(config, finished, monkeypatch):
    before = snapshot(finished)
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(UsageError):
        train(config, finished, overwrite=True, tensorboard=True)
    assert snapshot(finished) == before


# ---- Refused --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"num_heads": 4, "embed_dim": 16}, ["num_heads=2", "4", "embed_dim=8", "16"]),
        ({"learning_rate": 0.5, "seed": 7}, ["learning_rate=0.01", "0.5", "seed=0", "7"]),
        ({"steps": STEPS - 1}, [f"{STEPS}", f"{STEPS - 1}"]),
    ],
    ids=str,
)
def test_a_run_with_another_config_is_refused_and_left_unchanged(config, finished, changes, words):
    before = snapshot(finished)
    assert_raises(
        DataError, train, config.override(changes), finished, says=(str(finished), *words, "--workdir", "--overwrite")
    )
    assert snapshot(finished) == before


def test_a_text_that_has_moved_resumes_and_evaluates(config, finished, files, caplog):
    text, moved = files / "text.txt", files / "moved" / "to.TXT"
    expected = evaluate(finished)
    moved.parent.mkdir()
    text.rename(moved)
    try:
        with caplog.at_level("INFO", "minigpt_jax"):
            train(config.override({"dataset": str(moved)}), finished)
        assert_says(" ".join(logged(caplog)), "dataset", str(text), str(moved), str(STEPS))
        assert_raises(DataError, evaluate, finished, says=(str(text), "--dataset"))
        assert evaluate(finished, dataset=moved, data_dir=files / "moved") == expected
        wide = files / "moved" / "wide.txt"
        wide.write_bytes(moved.read_text().encode("utf-16"))
        assert evaluate(finished, dataset=wide, encoding="utf-16") == expected
        moved.write_bytes(moved.read_bytes() + b"!")
        assert_raises(DataError, evaluate, finished, dataset=moved, says=(str(moved), "--dataset"))
        moved.write_bytes(moved.read_bytes()[:-1])
    finally:
        moved.rename(text)
        shutil.rmtree(moved.parent)


def test_a_changed_text_is_refused(config, finished, files):
    before = snapshot(finished)
    try:
        (files / "text.txt").write_text(TEXT[::-1])
        words = (str(files / "text.txt"), "--overwrite")
        assert_raises(DataError, train, config.override({"steps": STEPS + 5}), finished, says=words)
    finally:
        (files / "text.txt").write_text(TEXT)
    assert snapshot(finished) == before


def corrupt(workdir, step):
    path = next(path for path in (workdir / "checkpoints" / str(step) / "opt_state").rglob("*") if path.parent.name == "d")
    path.write_bytes(path.read_bytes()[:-1])
    return path


def test_a_run_whose_newest_checkpoint_is_corrupt_resumes_exactly_from_the_previous_one(config, finished, workdir, caplog):
    earlier = [step for step in checkpoints.steps(workdir) if step < STEPS][-1]
    path = corrupt(workdir, STEPS)
    before = snapshot(workdir / "checkpoints" / str(STEPS))
    with caplog.at_level("INFO"):
        train(config, workdir)
    [warning], [line] = logged(caplog, "WARNING"), first_lines(caplog)
    folder = workdir / "checkpoints" / str(STEPS)
    assert_says(warning, str(folder), path.relative_to(folder).as_posix(), str(earlier))
    assert_says(line, str(workdir), config.data.dataset, str(earlier), str(STEPS))
    assert_equal(final_state(config, workdir), final_state(config, finished))
    assert rows(workdir) == rows(finished)
    aside = snapshot(workdir / "checkpoints" / f"{STEPS}.damaged")
    assert sorted(aside.values()) == sorted(before.values())  # nothing is deleted


def test_a_run_without_an_intact_checkpoint_is_refused_and_left_unchanged(config, workdir):
    paths = [corrupt(workdir, step) for step in checkpoints.steps(workdir)]
    before = snapshot(workdir)
    message = assert_raises(DataError, train, config.override({"steps": STEPS + 5}), workdir, says=(str(workdir),))
    assert paths[0].name in message
    assert snapshot(workdir) == before


def test_a_folder_in_use_by_another_process_is_refused(config, workdir):
    with locked(workdir):
        assert_raises(DataError, train, config.override({"steps": STEPS + 5}), workdir, says=(str(workdir), "--workdir"))
    assert checkpoints.steps(workdir)[-1] == STEPS


def test_allowed_changes_and_another_environment_are_logged_and_recorded(config, workdir, caplog, monkeypatch):
    before = resume.environment(jax.devices()[0])
    after = before | {"jax": "9.9", "device": "a better one"}
    for module in (resume, run):  # for the log, and for the checkpoint
        monkeypatch.setattr(module, "environment", lambda device: after)
    with caplog.at_level("INFO"):
        train(config.override({"steps": STEPS + 1, "log_every": 2}), workdir)
    changed, made_with = logged(caplog)[:2]
    assert_says(changed, f"steps={STEPS}", str(STEPS + 1), f"log_every={INTERVALS['log_every']}", "2")
    assert logged(caplog, "WARNING") == [made_with]
    assert_says(made_with, "jax", before["jax"], "9.9", "device", before["device"], "a better one")
    assert read_run_config(workdir).training.log_every == 2
    assert checkpoints.read_info(workdir, STEPS + 1).made_with["jax"] == "9.9"


@pytest.mark.parametrize(
    "change, name, value",
    [
        (lambda: jax.default_prng_impl("rbg"), "jax_default_prng_impl", "rbg"),
        (lambda: jax.default_matmul_precision("highest"), "jax_default_matmul_precision", "highest"),
        (lambda: jax.threefry_partitionable(False), "jax_threefry_partitionable", "False"),
    ],
)
def test_jax_settings_that_change_results_are_recorded(change, name, value):
    before = resume.environment(jax.devices()[0])
    with change():
        after = resume.environment(jax.devices()[0])
    assert {key: (before[key], after[key]) for key in before if before[key] != after[key]} == {
        name: (str(getattr(jax.config, name)), value)
    }


def test_a_folder_that_cannot_be_written_is_an_error(config, tmp_path):
    (tmp_path / "file").write_text("content")
    workdir = tmp_path / "file" / "run"
    assert_raises(DataError, train, config, workdir, says=(str(workdir), os.strerror(errno.ENOTDIR)))
    assert (tmp_path / "file").read_text() == "content"


def test_a_vocab_size_that_does_not_match_the_text_is_refused(config, tmp_path):
    words = ("vocab_size=7", "tokenizer=char", "6")
    assert_raises(DataError, train, config.override({"vocab_size": 7}), tmp_path / "run", says=words)
    assert not (tmp_path / "run").exists()


# ---- Stopping early -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class AfterStep(Callback):
    """Runs an action after this step."""

    step: int
    action: Callable[[], object]

    def after_step(self, run):
        if run.step == self.step:
            self.action()


OTHER_SIGNALS = [getattr(signal, name) for name in signals.STOP_SIGNALS[1:] if hasattr(signal, name)]


@pytest.mark.parametrize(
    "number", [signal.SIGINT, *(pytest.param(other, marks=pytest.mark.slow) for other in OTHER_SIGNALS)]
)
@pytest.mark.parametrize("step", [pytest.param(5, marks=pytest.mark.slow), 7])  # step 5 is saved anyway
def test_a_signal_stops_the_run_with_a_checkpoint_that_resumes_exactly(
    config, finished, tmp_path, caplog, default_handlers, number, step
):
    interrupt = AfterStep(step, lambda: os.kill(os.getpid(), number))
    with caplog.at_level("INFO"), pytest.raises(StoppedError) as stopped:
        train(config, tmp_path, callbacks=[interrupt])
    assert stopped.value.exit_status == 128 + number
    assert_says(logged(caplog)[-1], f"{step}/{STEPS}", f"python scripts/train.py --workdir {tmp_path}")
    assert checkpoints.steps(tmp_path)[-1] == step
    assert {signal.getsignal(each) for each in default_handlers} == {signal.SIG_DFL}
    train(config, tmp_path)
    assert_equal(final_state(config, tmp_path), final_state(config, finished))
    assert rows(tmp_path) == rows(finished)


def test_a_second_signal_has_its_default_effect(config, tmp_path, default_handlers):
    handlers = []
    stop = AfterStep(7, lambda: (os.kill(os.getpid(), signal.SIGTERM), handlers.append(signal.getsignal(signal.SIGTERM))))
    with pytest.raises(StoppedError):
        train(config, tmp_path, callbacks=[stop])
    assert handlers == [signal.SIG_DFL]


def test_the_time_limit_stops_the_run_with_a_checkpoint_and_no_error(config, finished, tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time_limit.time, "monotonic", lambda: now[0])
    pass_a_minute = AfterStep(5, lambda: now.append(now.pop() + 61))
    train(config, tmp_path, max_minutes=1, callbacks=[pass_a_minute])
    assert checkpoints.steps(tmp_path)[-1] == 6
    train(config, tmp_path, max_minutes=1)
    assert_equal(final_state(config, tmp_path), final_state(config, finished))


def test_patience_stops_the_run_early_with_a_log_line(config, tmp_path, monkeypatch, caplog):
    losses = {4: 2.0, 8: 1.0, 12: 1.5}
    calls = iter([*losses.values(), 9.0])
    monkeypatch.setattr(LanguageModelling, "evaluate", lambda *args, **keywords: {"loss": next(calls)})
    impatient = config.override({"patience": 1})
    with caplog.at_level("INFO"):
        train(impatient, tmp_path)
        [notice] = [record.getMessage() for record in caplog.records if record.module == "patience"]
        assert_says(notice, "1")
        assert checkpoints.steps(tmp_path)[-1] == 12
        assert checkpoints.best_first(tmp_path)[0] == 8
        before = snapshot(tmp_path)
        train(impatient, tmp_path)
    assert_says(logged(caplog)[-1], str(tmp_path), "12", "--patience", "1", "1", "0")
    assert snapshot(tmp_path) == before


def make_steps_non_finite(monkeypatch, bad):
    """Makes these steps non-finite, so that they change nothing but the step number."""
    original = loop.train_step

    def patched(state, batch, key, **arguments):
        kept = jax.tree.map(jax.numpy.copy, state)
        state, metrics = original(state, batch, key, **arguments)
        if int(state.step) in bad:
            nan = jax.numpy.asarray(jax.numpy.nan)
            return kept.replace(step=state.step), {"loss": nan, "grad_norm": nan, "is_finite": jax.numpy.asarray(False)}
        return state, metrics

    patched.lower = original.lower
    monkeypatch.setattr(loop, "train_step", patched)


@pytest.mark.slow
def test_non_finite_steps_are_skipped_and_counted_also_across_a_kill(config, tmp_path, monkeypatch):
    make_steps_non_finite(monkeypatch, {4, 5, 6, 7, 10})
    patient = config.override({"max_bad_steps": 5})
    train(patient, tmp_path / "straight")
    train_until(patient, tmp_path / "killed", 7, monkeypatch)
    train(patient, tmp_path / "killed")
    assert rows(tmp_path / "killed") == rows(tmp_path / "straight")
    text = (tmp_path / "straight" / "metrics.jsonl").read_text()
    assert "NaN" not in text
    training = [row for row in rows(tmp_path / "straight") if "train_loss" in row]
    assert [(row["step"], row.get("skipped_steps", 0)) for row in training] == [(3, 0), (6, 3), (9, 4), (12, 5), (13, 5)]
    schedule = learning_rate_schedule(config.training, STEPS)  # the optimizer does not count skipped steps
    for row in training:
        assert row["learning_rate"] == pytest.approx(float(schedule(row["step"] - 1 - row.get("skipped_steps", 0))))
    assert training[1]["train_loss"] is None
    assert training[1]["grad_norm"] is None
    assert training[2]["train_loss"] > 0
    assert checkpoints.read_info(tmp_path / "straight", STEPS).num_skipped == 5


@pytest.mark.parametrize("killed", [False, True])
def test_too_many_non_finite_steps_in_a_row_are_an_error_with_likely_causes(config, tmp_path, monkeypatch, killed):
    make_steps_non_finite(monkeypatch, {2, 4, 5, 6, 7, 8})
    strict = config.override({"max_bad_steps": 3})
    if killed:
        train_until(strict, tmp_path, 6, monkeypatch)
    words = ("3", "6", "--learning_rate", "--warmup_steps", "--dtype bfloat16")
    message = assert_raises(FloatingPointError, train, strict, tmp_path, says=words)
    assert len(re.findall(r"\d\.\d+", message)) == 1  # the last finite loss
    for step in checkpoints.steps(tmp_path):
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(final_state(config, tmp_path, step)))
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8")


# ---- TensorBoard ----------------------------------------------------------------------------------------------------------


def test_metrics_go_to_tensorboard_too(config, tmp_path):
    """Each number of each row, and nothing else."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    train(config, tmp_path, tensorboard=True)
    [path] = (tmp_path / "tensorboard").glob("events*")
    data, scalars = path.read_bytes(), {}
    while data:  # a record consists of its length, a checksum, the event and another checksum
        length = int.from_bytes(data[:8], "little")
        event = event_pb2.Event.FromString(data[12 : 12 + length])
        scalars |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
        data = data[16 + length :]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    expected = {(name, row["step"]): row[name] for row in lines for name in row.keys() - {"step"}}
    # The training and evaluation rows of a step both have its seconds.
    assert scalars == {key: pytest.approx(value, rel=1e-6) for key, value in expected.items()}


def test_without_tensorboardx_the_error_names_the_extra(config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    words = ("--tensorboard", "python -m pip install -e '.[tensorboard]'")
    assert_raises(UsageError, train, config, tmp_path, tensorboard=True, says=words)


@pytest.mark.slow
def test_recompiling_the_step_logs_a_warning(config, tmp_path, monkeypatch, caplog):
    batch_at = batches.batch_at

    def narrow_later(*arguments):
        batch = batch_at(*arguments)
        return batch | {"inputs_BT": batch["inputs_BT"].astype(np.int8)} if arguments[-1] >= 5 else batch

    monkeypatch.setattr(batches, "batch_at", narrow_later)
    with caplog.at_level("INFO"):
        train(config, tmp_path)
    [warning] = logged(caplog, "WARNING")
    assert_says(warning, "train_step", "[1]['inputs_BT']", "int32[4,8]", "int8[4,8]")


class Finished(Callback):
    """Keeps a reference to the run."""

    def finish(self, run):
        self.run = run


@pytest.mark.slow
def test_the_last_lines_report_time_and_memory(config, tmp_path, monkeypatch, caplog):
    batch_at = LanguageModelling.batch_at
    monkeypatch.setattr(LanguageModelling, "batch_at", lambda self, step: time.sleep(0.01) or batch_at(self, step))
    finished = Finished()
    with caplog.at_level("INFO"):
        train(config, tmp_path, profile=True, callbacks=[finished])
    timing, throughput, memory = (record.getMessage() for record in caplog.records if record.funcName == "report")
    clock = finished.run.clock
    assert clock.seconds_waiting >= 0.01 * (STEPS - 1)
    assert_says(timing, f"{clock.training_seconds:.1f} s", f"{clock.seconds_waiting:.1f} s")
    assert_says(throughput, "tokens/s", "GFLOP/s", "0 %", "1,000,000.0 GFLOP/s", "float32")
    assert float(re.search(r"(\d+) MB", memory)[1]) > 10
    heading, *rows_of_profile, last = (record.getMessage() for record in caplog.records if record.module == "profile")
    assert_says(heading, "ms/step")
    assert_says(last, str(tmp_path / "profile"))
    slowest = [row.split(maxsplit=2) for row in rows_of_profile]
    assert len(slowest) == 10
    milliseconds = [float(row[0]) for row in slowest]
    assert milliseconds == sorted(milliseconds, reverse=True)
    assert any(name.startswith("transformer/block/") for _, _, name in slowest)
    assert list((tmp_path / "profile").rglob("*.trace.json.gz"))
