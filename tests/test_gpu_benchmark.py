"""The GPU benchmark: its time budget, its file, what it records of failures, and a rehearsal of every part on the CPU."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import assert_equal, assert_raises, assert_says

from minigpt_jax.benchmarks.baselines import HuggingFace, TorchMixedStep, TorchRecompute
from minigpt_jax.benchmarks.gpu import correctness, goals, runner, setup, training
from minigpt_jax.benchmarks.interleave import GuardedRunner
from minigpt_jax.benchmarks.train import step_inputs
from minigpt_jax.errors import DataError
from minigpt_jax.training.step import train_step

ROOT = Path(__file__).resolve().parents[1]
SETUP = setup.Setup(rehearse=True, rounds=1, dataset="text.txt", figures={})
REHEARSAL, REAL = SETUP, dataclasses.replace(SETUP, rehearse=False)

# ---- Budget and file ------------------------------------------------------------------------------------------------------


def figures_in(path):
    return json.loads(path.read_text())["gpu"]


def test_each_result_is_in_the_file_before_the_next_one_is_asked_for(tmp_path):
    path, seen = tmp_path / "figures.json", []

    def start(name, given, seconds):
        seen.append((name, given.figures.keys() - {"goals", "setup"}))
        yield {"first": 1}
        assert figures_in(path)[name] == {"first": 1}
        yield {"second": 2.5, "first": 3}
        assert figures_in(path)[name] == {"first": 3, "second": 2.5}

    figures = runner.run(REHEARSAL, [], 60, path, start)
    names = list(runner.PARTS)
    assert seen == [(name, set(names[:i])) for i, name in enumerate(names)]  # each part knows those before it
    assert figures_in(path) == figures
    assert all(figures[name].keys() == {"first", "second", "seconds"} for name in names)
    assert [entry.name for entry in tmp_path.iterdir()] == ["figures.json"]


def test_unwanted_parts_are_recorded_and_not_started(tmp_path):
    started = []
    figures = runner.run(
        REHEARSAL, ["limits", "device"], 60, tmp_path / "f.json", lambda name, *_: started.append(name) or iter(())
    )
    assert set(runner.PARTS) - set(started) == {"limits", "device"}
    assert figures["limits"].keys() == figures["device"].keys() == {"skipped"}


def test_a_part_that_does_not_fit_is_recorded_and_a_shorter_one_after_it_runs(monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(runner.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(runner, "PARTS", {"device": (10, 400), "long": (50, 400), "short": (20, 240), "last": (10, 400)})
    allowed = {}

    def start(name, given, seconds):
        allowed[name] = seconds
        clock[0] += 20
        yield {"platform": "gpu"}

    figures = runner.run(REAL, [], 1, None, start)
    assert allowed == {"device": 50, "short": 30, "last": 20}  # of a minute, an eighth of the time for 8 minutes
    assert_says(figures["long"]["skipped"], "40 s", "50 s")
    assert figures["short"] == {"platform": "gpu", "seconds": 20}


def test_without_a_gpu_only_a_rehearsal_goes_past_the_first_part(tmp_path):
    def start(name, given, seconds):
        yield {"platform": "cpu"}

    path = tmp_path / "f.json"
    assert_raises(DataError, runner.run, REAL, [], 60, path, start, says=("cpu", "--rehearse"))
    assert figures_in(path).keys() == {"setup", "device", "goals"}


# ---- Processes ------------------------------------------------------------------------------------------------------------


def results_of(program, tmp_path, monkeypatch, seconds=60.0):
    """The results of a part whose process is this shell script."""
    script = tmp_path / "part"
    script.write_text(f"#!/bin/sh\n{program}\n")
    script.chmod(0o755)
    monkeypatch.setattr(runner.sys, "executable", str(script))
    return runner.in_own_process(dict(os.environ), "device", SETUP, seconds)


@pytest.mark.e2e
@pytest.mark.skipif(sys.platform == "win32", reason="a shell script")
def test_a_part_is_killed_with_its_children_when_the_time_is_over(tmp_path, monkeypatch):
    program = f'sleep 60 & echo $! > {tmp_path}/child; echo \'{{"error_norm": NaN, "b": [1]}}\'; wait'
    start = time.monotonic()
    first, last = results_of(program, tmp_path, monkeypatch, seconds=1.0)
    assert time.monotonic() - start < 30
    assert first == {"error_norm": None, "b": [1]}
    assert_says(last["error"], "1 s")
    status = Path("/proc", (tmp_path / "child").read_text().strip(), "stat")
    assert not status.exists() or status.read_text().split()[2] == "Z"


@pytest.mark.e2e
@pytest.mark.skipif(sys.platform == "win32", reason="a shell script")
def test_a_part_that_dies_is_an_error_after_its_results(tmp_path, monkeypatch):
    first, last = results_of("echo '{\"a\": 1}'; exit 3", tmp_path, monkeypatch)
    assert first == {"a": 1}
    assert_says(last["error"], "3")
    assert list(results_of("cat > /dev/null; echo '{\"a\": 1}'", tmp_path, monkeypatch)) == [{"a": 1}]


class BrokenToy:
    name, needs = "broken", "json"

    def __init__(self, where):
        self.where = where
        self.fail("init")

    def fail(self, where):
        if where == self.where:
            raise ValueError(f"two\nlines in {where}")

    def run(self):
        self.fail("run")

    def report(self):
        self.fail("report")
        return {"fine": 1}


@pytest.mark.parametrize("where", ["init", "run", "report", "nowhere"])
def test_a_failing_candidate_reports_its_error_in_one_line(where, capsys):
    guarded = GuardedRunner(BrokenToy, (where,))
    guarded.run()
    guarded.run()
    error = {"error": f"ValueError: two lines in {where}"}
    assert guarded.report() == ({"fine": 1} if where == "nowhere" else error)
    assert capsys.readouterr().err.count("Traceback") == (where != "nowhere")  # only the first failure


def test_an_attempt_yields_the_value_or_the_error():
    assert [*setup.attempt("a", lambda x: x + 1, 2)] == [{"a": 3}]
    assert [*setup.attempt("a", lambda: 1 / 0)] == [{"a": {"error": "ZeroDivisionError: division by zero"}}]


def test_candidates_without_their_package_are_recorded():
    missing = type("Missing", (), {"name": "ours", "needs": "no_such_package"})
    available, skipped = setup.installed_or_skipped([BrokenToy, missing])
    assert available == [BrokenToy]
    assert skipped.keys() == {"ours"}
    assert_says(skipped["ours"]["skipped"], "no_such_package")


# ---- Figures --------------------------------------------------------------------------------------------------------------


def goal(figures, *words):
    [found] = [value for name, value in goals.goals(figures).items() if all(word in name for word in words)]
    return found["measured"], found["reached"]


def test_without_figures_no_goal_is_reached_or_missed():
    for figures in ({}, {name: {"skipped": "x"} for name in runner.PARTS}, {name: {"error": "x"} for name in runner.PARTS}):
        states = {name: value["reached"] for name, value in goals.goals(figures).items()}
        assert set(states.values()) - {None} == ({False} if figures.get("correctness", {}).get("error") else set())


def test_goals_are_ratios_of_medians():
    torch, theirs, ours = TorchMixedStep.name, HuggingFace.name, goals.OURS
    figures = {
        "train_gpt2_124m": {torch: {"ms": [9.0, 1.0, 3.0]}, ours: {"ms": [2.0], "share_of_matmul_rate": 0.625}},
        "train_mini_gpt": {torch: {"ms": [1.0]}, ours: {"ms": [2.0]}},
        "train_nanogpt_gpu": {torch: {"error": "no compiler"}, ours: {"ms": [2.0]}},
        "learning": {"seconds_to": {"1.50": 30.0, "1.47": 61.0}},
        "decoding": {"num_tokens": 200, theirs: {"batch_16": {"ms": [8.0]}}, ours: {"batch_16": {"ms": [2.0]}}},
    }
    assert goal(figures, "gpt2_124m", "PyTorch") == (1.5, True)
    assert goal(figures, "mini_gpt") == (0.5, False)
    assert goal(figures, "nanogpt_gpu", "PyTorch") == (None, None)
    assert goal(figures, "gpt2_124m", "share") == (0.625, True)
    assert goal(figures, "1.47") == (61, False)
    assert goal(figures, " 16 texts") == (4, True)
    assert goal(figures, " 64 texts") == (None, None)


def test_failed_checks_are_counted_and_skipped_ones_are_not():
    good, bad = {"error": 1e-6, "limit": 1e-5, "ok": True}, {"error": None, "limit": 1e-5, "ok": False}
    part = {
        "matmul_precision": "float32",
        "a": {"x": good, "y": bad},
        "b": {"error": "ValueError"},
        "c": {"skipped": "torch"},
    }
    assert goal({"correctness": part}, "failed") == (2, False)
    assert goal({"correctness": {"a": {"x": good}}}, "failed") == (0, True)


def test_a_check_is_ok_within_its_limit_and_never_for_nan():
    assert [correctness.check(error, 0.5)["ok"] for error in (0.5, 0.6, np.nan)] == [True, False, False]
    trees = {"a": [3.0, 0.0], "b": [[4.0]]}, {"a": [3.0, 0.0], "b": [[4.5]]}
    actual, expected = (jax.tree.map(np.array, tree, is_leaf=lambda leaf: isinstance(leaf, list)) for tree in trees)
    assert correctness.relative(actual, expected) == pytest.approx(0.5 / np.hypot(3, 4.5))


def test_figures_are_printed_briefly():
    assert runner.brief({"ms": [3.0, 1.0, 2.0], "name": "x", "n": {"m": 1, "e": 1.23456e-7}}) == (
        "ms 2 (1–3), name x, n m 1, e 1.235e-07"
    )


def test_a_row_starts_with_the_warm_up_run_and_grows():
    config = REHEARSAL.config("nanogpt_gpu")
    runs = [{"seconds": 9.0, "since_start": 20.0, "peak_mb": 5.0}]
    assert training.row(runs, config, 2, {}) == {"startup_seconds": 20.0, "peak_mb": 5.0}
    runs += [{"seconds": seconds, "since_start": 0.0, "peak_mb": 7.0} for seconds in (2.0, 4.0, 8.0)]
    figures = training.row(runs, config, 2, {"bfloat16": 1e12})
    assert (figures["ms"], figures["peak_mb"]) == ([1000, 2000, 4000], 7)
    assert figures["tokens_per_second"] == config.training.batch_size * config.model.context_length / 2
    assert figures["share_of_matmul_rate"] == figures["flops_per_second"] / 1e12
    assert "share_of_matmul_rate" not in training.row(runs, config, 2, {"bfloat16": {"error": "x"}})
    assert training.row([*runs, {"seconds": 0.0, "error": "x"}], config, 2, {}) == {"error": "x"}


@pytest.mark.parametrize("first, plans", [(40, 2), (400, 2), (104, 1), (3, 2)])
def test_the_largest_batch_is_found_with_few_compilations(first, plans):
    planned = []

    def plan(batch_size):
        planned.append(batch_size)
        return 1000 + 10.0 * batch_size, 1000.0

    assert training.largest_batch(plan, first, limit=2100) == (104 if plans == 2 else first)
    assert len(planned) == plans


def test_even_one_multiple_may_not_fit():
    assert training.largest_batch(lambda batch_size: (1000 + 10.0 * batch_size, 1000.0), 64, limit=900) == 8


@pytest.mark.slow
def test_several_steps_in_one_dispatch_are_bit_identical_to_single_steps():
    config = REHEARSAL.config("nanogpt_gpu", dropout=0.2)
    (single, batch, arguments), (several, _, _) = step_inputs(config), step_inputs(config)
    batches = [jax.tree.map(lambda leaf, i=i: np.roll(leaf, i, axis=0), batch) for i in range(3)]
    stacked = {name: np.stack([each[name] for each in batches]) for name in batch}
    losses = []
    for each in batches:
        single, metrics = train_step(single, each, **arguments)
        losses.append(float(metrics["loss"]))
    several, metrics = training.several_steps(several, stacked, **arguments)
    assert_equal(several, single)
    assert metrics["loss"].tolist() == losses
    assert len(set(losses)) == 3


@pytest.mark.parametrize("preset", setup.PRESETS)
def test_presets_are_measured_in_bfloat16_at_full_size_or_tiny(preset):
    tiny, full = REHEARSAL.config(preset), REAL.config(preset)
    for config in (tiny, full):
        assert (config.model.dtype, config.training.grad_accumulation) == ("bfloat16", 1)
        assert config.model.known_vocab_size > 0
    assert full.model.num_layers >= 6
    assert tiny.model.num_layers == 1
    assert (tiny.model.positions, tiny.model.dropout) == (full.model.positions, full.model.dropout)


# ---- Rehearsal ------------------------------------------------------------------------------------------------------------


def errors(figures, path=()):
    """The errors anywhere in the figures: messages, and checks that are not ok."""
    if isinstance(figures, dict):
        if isinstance(figures.get("error"), str) or figures.get("ok") is False:
            yield path, figures
        for name, value in figures.items():
            yield from errors(value, (*path, name))


@pytest.mark.slow
@pytest.mark.e2e
def test_a_rehearsal_runs_every_part(tmp_path):
    text, path = tmp_path / "text.txt", tmp_path / "gpu.json"
    text.write_text("To be, or not to be, that is the question.\n" * 200, encoding="utf-8")
    command = f"gpu --rehearse --rounds 1 --skip train_mini_gpt --dataset {text} --json {path}"
    script = [sys.executable, str(ROOT / "scripts/benchmark.py"), *command.split()]
    process = subprocess.run(script, capture_output=True, text=True, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    figures = figures_in(path)
    assert figures.keys() == {"setup", "goals", *runner.PARTS}
    assert figures["setup"] == {"minutes": 60, "rehearse": True, "rounds": 1}
    assert list(errors(figures)) == []
    assert figures.pop("train_mini_gpt").keys() == {"skipped"}
    missing = {name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None}
    for name, part, candidate in [
        ("torch", "train_gpt2_124m", TorchMixedStep), ("torch", "train_nanogpt_gpu", TorchMixedStep),
        ("torch", "decoding", TorchRecompute), ("transformers", "decoding", HuggingFace),
    ]:  # fmt: skip
        assert ("skipped" in figures[part][candidate.name]) == (name in missing)
    assert figures["train_gpt2_124m"]["batch_size"] % 8 == 0
    assert figures["train_gpt2_124m"][goals.OURS]["tokens_per_second"] > 0
    assert figures["decoding"][goals.OURS]["batch_64"]["tokens_per_second"] > 0
    assert figures["learning"]["seconds_to"].keys() == {"1.50", "1.47"}
    assert all(figures["limits"][name] > 0 for name in ("bfloat16", "tensorfloat32", "float32", "copy"))
    for compiled in (figures["compiling"][preset] for preset in setup.PRESETS):
        assert compiled["was_cached"] == [False, True]
        assert compiled["cached"] < compiled["cold"]
    assert goal(figures, "failed") == (0, True)
