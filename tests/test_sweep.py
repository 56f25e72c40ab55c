"""Sweeps: each run equals the same run alone, runs that differ in numbers share a step, and a killed sweep resumes."""

import json
import logging
import math

import jax
import numpy as np
import pytest
from helpers import assert_raises, assert_says, logged
from test_every_task import CASES, MODEL, TRAINING

from minigpt_jax.api import choose_kernels, train
from minigpt_jax.config import Config, ImageConfig, load_preset
from minigpt_jax.errors import DataError, UsageError
from minigpt_jax.experiments import stacked, sweep_report
from minigpt_jax.experiments.grid import expand, parse, sweepable
from minigpt_jax.experiments.sweep import sweep
from minigpt_jax.runs.metrics import read_metrics
from minigpt_jax.system import memory
from minigpt_jax.tasks import prepare
from minigpt_jax.training.callbacks import summary
from minigpt_jax.training.compilations import Compilations
from minigpt_jax.training.run import new_state, train_step_kwargs
from minigpt_jax.training.step import train_step

pytestmark = pytest.mark.e2e

TEXT = "".join(np.random.default_rng(0).choice(list("abcd \n"), 1000))
VARY = {"learning_rate": [1e-3, 1e-2], "seed": [0, 1]}
DEVICE = jax.devices()[0]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The preset `debug`, which has dropout, on a small text."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text(TEXT)
    data = {"dataset": str(folder / "text.txt"), "data_dir": str(folder)}
    return load_preset("debug").override(data).override(sample_every=0, eval_every=8)


def without_times(results):
    times = ("seconds", "steps_per_second", "stacked")
    return [{name: value for name, value in result.items() if name not in times} for result in results]


def saved(workdir):
    return [json.loads(line) for line in (workdir / "results.jsonl").read_text().splitlines()]


def losses(results):
    """All losses of all runs, in one list."""
    rows = [row for result in results for row in [result, *result["evaluations"]]]
    return [row[name] for row in rows for name in ("loss", "train_loss", "val_loss") if name in row]


def programs(compilations):
    """How many training steps were compiled, of one run and of a stack."""
    names = [name for name, _ in compilations.programs]
    return names.count("train_step"), names.count("stacked_step")


# ---- The runs of a sweep --------------------------------------------------------------------------------------------------


def test_every_combination_is_a_run_and_the_last_setting_changes_fastest():
    config = Config().override(min_learning_rate=0)
    points = expand(config, parse(["learning_rate=1e-3, 2", "norm=layernorm,rmsnorm", "bias=true"], config))
    assert [tuple(point.settings.values()) for point in points] == [
        (1e-3, "layernorm", True), (1e-3, "rmsnorm", True), (2.0, "layernorm", True), (2.0, "rmsnorm", True)
    ]  # fmt: skip
    for point in points:
        assert point.config == config.override(point.settings)


def test_whole_numbers_of_a_float_setting_are_floats():
    """Else they would be other arrays, which another program takes."""
    for vary in ({"weight_decay": [0, 1]}, parse(["weight_decay=0,1"], Config())):
        assert [type(point.settings["weight_decay"]) for point in expand(Config(), vary)] == [float, float]


def test_what_does_not_train_or_changes_the_data_cannot_be_varied():
    can = set(sweepable(Config()))
    assert can >= {"learning_rate", "seed", "steps", "dropout", "num_layers", "norm", "batch_size", "ema", "lora_rank"}
    assert not can & {"dataset", "tokenizer", "vocab_size", "eval_every", "eval_batches", "log_every", "init_from", "freeze"}
    assert "label_smoothing" in sweepable(Config(data=ImageConfig()))


@pytest.mark.parametrize(
    "texts, words",
    [
        ([], ["vary", "learning_rate=1e-3,2e-3"]),
        (["learning_rate"], ["vary='learning_rate'", "learning_rate=1e-3,2e-3"]),
        (["learning_rate="], ["vary='learning_rate='", "float"]),
        (["learning_rate=1e-3,,2e-3"], ["vary='learning_rate=1e-3,,2e-3'", "float"]),
        (["learning_rate=fast"], ["vary='learning_rate=fast'", "float"]),
        (["num_layers=2.5"], ["vary='num_layers=2.5'", "int"]),
        (["bias=maybe"], ["vary='bias=maybe'", "true", "false"]),
        (["lr=1"], ["'lr'", "'learning_rate'", *sweepable(Config())]),
        (["dataset=a,b"], ["'dataset'", *sweepable(Config())]),
        (["seed=0", "seed=1"], ["seed"]),
        (["seed=0,1,0"], ["seed=0"]),
        (["seed=-1"], ["seed=-1", "0"]),
        (["norm=layrnorm"], ["norm='layrnorm'", "'layernorm'", "layernorm", "rmsnorm"]),
        (["num_heads=3"], ["embed_dim=128", "num_heads=3"]),
    ],
)
def test_bad_lists_are_one_line_errors(texts, words):
    assert_raises(UsageError, lambda: expand(Config(), parse(texts, Config())), says=words)


@pytest.mark.parametrize("vary", [{"seed": []}, {"norm": "rmsnorm"}])
def test_from_python_values_are_a_list_that_is_not_empty(vary):
    [name] = vary
    assert_raises(UsageError, expand, Config(), vary, says=[name])


# ---- Training -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory):
    """The results of four runs, one after another."""
    return sweep(config, VARY, tmp_path_factory.mktemp("alone"), stack=1)


def test_a_run_alone_is_the_run_that_train_makes(config, alone, tmp_path, monkeypatch):
    monkeypatch.setattr(summary.hardware, "matmul_rate", lambda *_: 1e15)
    result = alone[1]
    train(config.override(result["settings"]), tmp_path)
    rows = [(row["step"], row["val_loss"]) for row in read_metrics(tmp_path / "metrics.jsonl") if "val_loss" in row]
    assert rows == [(row["step"], row["val_loss"]) for row in result["evaluations"][1:]]
    assert [row["step"] for row in result["evaluations"]] == [0, 8, 16, 20]


def test_stacked_runs_equal_the_same_runs_alone(config, alone, tmp_path):
    """Two rates and two seeds, as a stack of three, and one that is filled up with copies."""
    assert len({result["loss"] for result in alone}) == 4
    results = sweep(config, VARY, tmp_path, stack=3)
    assert [result["settings"] for result in results] == [result["settings"] for result in alone]
    np.testing.assert_allclose(losses(results), losses(alone), rtol=2e-5)
    assert {result["stacked"] for result in results} == {3}


def test_training_calls_back_after_each_step_and_evaluation_and_may_be_ended_there(config):
    class EndError(Exception):
        pass

    num_steps, evaluated = 0, []

    def after_step():
        nonlocal num_steps
        num_steps += 1
        if num_steps == 19:
            raise EndError

    with pytest.raises(EndError):
        stacked.train(
            [prepare(config)], DEVICE, after_step=after_step,
            after_evaluation=lambda runs: evaluated.append((num_steps, runs[0].evaluations[-1]["step"])),
        )  # fmt: skip
    assert evaluated == [(8, 8), (16, 16)]


NUMBERS = {"seed": [0, 1], "learning_rate": [1e-3, 1e-2], "dropout": [0.1, 0.2], "warmup_steps": [1, 2]}


@pytest.mark.parametrize("size, compiled", [(1, (1, 0)), (6, (0, 1))])
def test_runs_that_differ_only_in_numbers_share_one_compiled_step(config, tmp_path, size, compiled):
    config = config.override(steps=2, ff_dim=40, num_layers=1)  # a shape that no other test has compiled
    with Compilations() as compilations:
        results = sweep(config, NUMBERS, tmp_path, stack=size)
    assert programs(compilations) == compiled
    assert len({result["loss"] for result in results}) == len(results) == 16


def test_runs_of_another_shape_follow_and_those_of_more_steps_share_the_step(config, tmp_path):
    config = config.override(ff_dim=24, num_layers=1)
    with Compilations() as compilations:
        results = sweep(config, {"steps": [2, 3], "dropout": [0.0, 0.1, 0.2]}, tmp_path, stack=1)
    assert programs(compilations) == (2, 0)  # without dropout, and with some
    assert [result["step"] for result in results] == [2] * 3 + [3] * 3


def test_only_runs_of_the_same_structure_and_length_are_stacked(config):
    vary = {"steps": [2, 3], "dropout": [0.0, 0.1, 0.2], "seed": [0, 1]}
    tasks = [prepare(point.config) for point in expand(config, vary)]
    assert stacked.groups(tasks) == [(0, 1), (2, 3, 4, 5), (6, 7), (8, 9, 10, 11)]
    for change in ({"ff_dim": 16}, {"batch_size": 8}, {"grad_accumulation": 2}, {"ema": 0.9}, {"schedule": "linear"}):
        assert stacked.groups([tasks[2], prepare(tasks[2].config.override(change))]) == [(0,), (1,)]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_task_is_swept(name, tmp_path, monkeypatch):
    data, measures = CASES[name]
    config = Config(MODEL, TRAINING, data(tmp_path, monkeypatch))
    results = {size: sweep(config, VARY, tmp_path / f"sweep_{size}", stack=size) for size in (1, 4)}
    np.testing.assert_allclose(losses(results[4]), losses(results[1]), rtol=1e-4)
    assert all(measures <= set(result["measures"]) for result in results[1])


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"dtype": "bfloat16"}, {"remat": True, "grad_accumulation": 2}, {"context_length": 96}])
def test_other_kernels_and_types_are_stacked(config, tmp_path, changes):
    results = {size: sweep(config.override(changes), VARY, tmp_path / str(size), stack=size) for size in (1, 4)}
    tolerance = 2e-2 if "dtype" in changes else 1e-4
    np.testing.assert_allclose(losses(results[4]), losses(results[1]), rtol=tolerance)


@pytest.mark.slow
def test_a_part_of_a_model_and_an_adapter_are_swept(config, tmp_path, monkeypatch):
    monkeypatch.setattr(summary.hardware, "matmul_rate", lambda *_: 1e15)
    train(config, tmp_path / "base")
    base = config.override(init_from=str(tmp_path / "base"), steps=4)
    for name, changes, vary in [
        ("frozen", {"freeze": "embedding"}, VARY),
        ("adapter", {"lora_rank": 2}, {"lora_alpha": [2, 8], "learning_rate": [1e-3, 1e-2]}),
    ]:
        stack, alone = (sweep(base.override(changes), vary, tmp_path / f"{name}_{size}", stack=size) for size in (4, 1))
        np.testing.assert_allclose(losses(stack), losses(alone), rtol=1e-4)
        assert len({result["loss"] for result in alone}) == 4
        assert len({result["evaluations"][0]["val_loss"] for result in alone}) == 1  # all start from the same weights


# ---- Diverged runs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3])
def test_a_diverged_run_ends_and_is_shown_last(config, tmp_path, size):
    vary = {"learning_rate": [1e20, 1e-2], "seed": [0, 1]}
    results = sweep(config.override(warmup_steps=0, max_bad_steps=3, eval_every=5), vary, tmp_path, stack=size)
    assert [result["diverged"] for result in results] == [True, True, False, False]
    for result in results[:2]:
        assert (result["loss"], result["step"], result["skipped_steps"]) == (None, result["evaluations"][-1]["step"], 3)
        assert result["step"] < 20
    _, *rows = sweep_report.table(results).splitlines()
    assert [row.split()[0] for row in rows] == ["learning_rate=0.01", "learning_rate=1e+20"]
    assert_says(rows[0], "±", "2")
    assert_says(rows[1], "diverged", "2 diverged")
    assert [row["diverged"] for row in saved(tmp_path)].count(True) == 2


@pytest.mark.parametrize("loss, is_diverged", [(3.0, False), (4.3, False), (4.5, True), (math.nan, True), (math.inf, True)])
def test_a_run_that_ends_above_its_first_loss_has_diverged(config, loss, is_diverged):
    class Task:
        config = Config()

        def measures(self, params):
            return {"loss": loss, "perplexity": math.inf}

    result = stacked.Progress(Task(), [{"step": 0, "val_loss": 4.0}]).result(None, 20)
    assert (result["diverged"], result["loss"]) == (is_diverged, loss if math.isfinite(loss) else None)
    json.dumps(result, allow_nan=False)


def test_non_finite_steps_in_a_row_are_counted(config):
    class Task:
        config = Config().override(max_bad_steps=3)

    run, bad = stacked.Progress(Task()), np.nan
    assert run.count(1, [4.0, bad, bad, 3.0], [True, False, False, True]) == [4.0, 3.0]
    assert (run.num_skipped, run.ended_at) == (2, None)
    assert run.count(5, [2.0, bad], [True, False]) == [2.0]
    assert run.count(7, [bad, bad, 1.0], [False, False, True]) == []
    assert (run.num_skipped, run.ended_at) == (5, 8)


# ---- Resuming -------------------------------------------------------------------------------------------------------------


class KilledError(Exception):
    pass


def kill_after(monkeypatch, num_parts):
    """Makes the training of the part after that many raise KilledError. Returns the list of the parts, as seeds."""
    parts, original = [], stacked.train

    def train(tasks, device):
        if len(parts) == num_parts:
            raise KilledError
        parts.append([task.config.training.seed for task in tasks])
        return original(tasks, device)

    monkeypatch.setattr(stacked, "train", train)
    return parts


def test_a_killed_sweep_resumes_without_repeating_finished_runs(config, alone, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        kill_after(patched, 2)
        with pytest.raises(KilledError):
            sweep(config, VARY, tmp_path, stack=1)
    path = tmp_path / "results.jsonl"
    assert len(path.read_text().splitlines()) == 2
    with path.open("a") as file:
        file.write('{"settings": {"learning_rate": 0.01, "se')  # a kill while a line was written
    with monkeypatch.context() as patched:
        parts = kill_after(patched, 99)
        results = sweep(config, VARY, tmp_path, stack=1)
    assert parts == [[0], [1]]
    assert without_times(results) == without_times(alone)
    assert saved(tmp_path) == results


def test_more_values_train_only_the_missing_runs_and_order_does_not_matter(config, tmp_path, monkeypatch):
    config = config.override(steps=2)
    first = sweep(config, {"learning_rate": [1e-2], "seed": [3]}, tmp_path, stack=1)
    parts = kill_after(monkeypatch, 99)
    results = sweep(config.override(log_every=7), {"seed": [4, 3], "learning_rate": [1e-2]}, tmp_path, stack=1)
    assert parts == [[4]]
    assert results[1] == first[0]
    assert [list(result["settings"]) for result in results] == [["seed", "learning_rate"]] * 2
    before = (tmp_path / "results.jsonl").stat().st_mtime_ns
    assert sweep(config, {"seed": [3, 4], "learning_rate": [1e-2]}, tmp_path) == results[::-1]
    assert (tmp_path / "results.jsonl").stat().st_mtime_ns == before


def test_another_sweep_is_refused_with_the_differing_fields(config, tmp_path):
    config = config.override(steps=2)
    sweep(config, {"seed": [0, 1]}, tmp_path, stack=1)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for other, vary, words in [
        (config.override(steps=3, batch_size=8), {"seed": [0, 1]}, ["steps=2", "3", "batch_size=4", "8", "--overwrite"]),
        (config, {"seed": [0, 2]}, ["vary seed: [0, 1]", "[0, 2]", "--workdir"]),
        (config, {"seed": [0, 1], "bias": [True]}, ["vary bias: None", "[True]"]),
    ]:
        assert_raises(DataError, sweep, other, vary, tmp_path, says=[str(tmp_path), *words])
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    sweep(config, {"seed": [2]}, tmp_path, stack=1, overwrite=True)
    assert [row["settings"] for row in saved(tmp_path)] == [{"seed": 2}]


def test_changed_data_and_unreadable_settings_are_refused(config, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    config = config.override(steps=2, dataset=str(tmp_path / "text.txt"))
    sweep(config, {"seed": [0]}, tmp_path / "sweep", stack=1)
    (tmp_path / "text.txt").write_text(TEXT[::-1])
    words = [str(tmp_path / "sweep"), "data", "--overwrite"]
    assert_raises(DataError, sweep, config, {"seed": [0, 1]}, tmp_path / "sweep", says=words)
    (tmp_path / "sweep" / "sweep.json").write_text("{}")
    assert_raises(DataError, sweep, config, {"seed": [0]}, tmp_path / "sweep", says=["sweep.json", "--overwrite"])


def test_the_folder_of_a_run_is_refused(config, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert_raises(DataError, sweep, config, VARY, tmp_path, says=[str(tmp_path), "run", "--workdir"])


def test_early_stopping_is_refused(config, tmp_path):
    assert_raises(UsageError, sweep, config.override(patience=2), VARY, tmp_path / "new", says=["patience=2"])
    assert not (tmp_path / "new").exists()


# ---- How many side by side ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "seconds, fitting, size, words",
    [
        ({1: 1.0, 4: 3.0}, 4, 4, ["1000.00", "750.00", "4", "stacked"]),
        ({1: 1.0, 4: 5.0}, 4, 1, ["1000.00", "1250.00", "4", "one after another"]),
        ({1: 1.0, 2: 1.0}, 3, 2, ["500.00", "2"]),  # two equal parts
        ({1: 1e-3}, 4, 1, ["4", "20", "compiling"]),  # four runs of 20 steps take less than compiling
        ({}, 1, 1, None),
    ],
)
def test_the_faster_of_both_is_chosen_and_logged(config, monkeypatch, caplog, seconds, fitting, size, words):
    monkeypatch.setattr(stacked, "time_step", lambda tasks, device: (seconds[len(tasks)], 10.0))
    with caplog.at_level(logging.INFO):
        assert stacked.choose_size([prepare(config)] * 4, DEVICE, fitting) == size
    messages = logged(caplog)
    assert len(messages) == (words is not None)
    assert_says("".join(messages), *words or [])


def test_steps_are_timed_without_their_compilation(config):
    seconds, compile_seconds = stacked.time_step([prepare(config.override(ff_dim=16, num_layers=1))], DEVICE)
    assert 0 < seconds < compile_seconds


def test_more_runs_side_by_side_than_fit_are_refused_with_the_number_that_fit(config, tmp_path, monkeypatch):
    task = prepare(config, kernels=choose_kernels(config.model))
    needed = stacked.bytes_per_run(task)
    monkeypatch.setattr(memory, "available_bytes", lambda device: 2.5 * needed / stacked.MEMORY_SHARE)
    assert_raises(UsageError, sweep, config, VARY, tmp_path / "new", stack=3, says=["stack=3", "2 fit", "stack=2"])
    monkeypatch.setattr(memory, "available_bytes", lambda device: 0.9 * needed / stacked.MEMORY_SHARE)
    assert_raises(UsageError, sweep, config, VARY, tmp_path / "new", says=["0 fit", "batch_size"])
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr(memory, "available_bytes", lambda device: 3.5 * needed / stacked.MEMORY_SHARE)
    assert [stacked.num_fitting(task, DEVICE, count, None) for count in (2, 3, 15)] == [2, 3, 3]
    assert stacked.num_fitting(task, DEVICE, 2, 100) == 2  # there are only two
    monkeypatch.setattr(memory, "available_bytes", lambda device: None)
    assert stacked.num_fitting(task, DEVICE, 15, None) == 15


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"remat": True}, {"grad_accumulation": 4}, {"batch_size": 32}, {"ema": 0.9}])
def test_the_estimated_memory_is_about_what_xla_plans(config, changes):
    config = config.override({"context_length": 64, "embed_dim": 64, "ff_dim": 256, "batch_size": 8} | changes)
    task = prepare(config, kernels=choose_kernels(config.model))
    state, key = jax.eval_shape(lambda: new_state(task)), jax.random.key(0)
    plan = train_step.lower(state, task.batch_at(0), key, **train_step_kwargs(task)).compile().memory_analysis()
    planned = plan.argument_size_in_bytes + plan.temp_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
    assert planned * stacked.MEMORY_SHARE < stacked.bytes_per_run(task) < 1.2 * planned


def test_available_memory_is_known_on_linux_and_on_accelerators():
    class Accelerator:
        def memory_stats(self):
            return {"bytes_limit": 100, "bytes_in_use": 30}

    assert memory.available_bytes(Accelerator()) == 70
    available = memory.available_bytes(DEVICE)
    assert available is None or 1e7 < available < 1e14


# ---- Table and plot -------------------------------------------------------------------------------------------------------


def made_up(rate, seed, loss, width=8):
    """The result of a run that ends with this loss; None if it diverged."""
    rows = [{"step": step, "val_loss": value} for step, value in ((0, 4.0), (5, 3.0), (10, loss))]
    settings = {"learning_rate": rate, "ff_dim": width, "seed": seed}
    return {"settings": settings, "step": 10, "loss": loss, "diverged": loss is None, "evaluations": rows}


MADE_UP = [
    made_up(0.1, 0, 2.0), made_up(0.1, 1, 2.2), made_up(0.2, 0, 1.0), made_up(0.2, 1, None), made_up(0.4, 0, None),
    made_up(0.4, 1, None), made_up(0.8, 0, 1.5), made_up(0.8, 1, 1.7),
]  # fmt: skip


def test_the_table_is_sorted_by_mean_and_has_diverged_rows_last():
    _, *rows = sweep_report.table(MADE_UP).splitlines()
    assert [row.split() for row in rows] == [
        ["learning_rate=0.8", "ff_dim=8", "1.6000", "±", "0.1414", "2"],
        ["learning_rate=0.1", "ff_dim=8", "2.1000", "±", "0.1414", "2"],
        ["learning_rate=0.2", "ff_dim=8", "1.0000", "2,", "1", "diverged"],
        ["learning_rate=0.4", "ff_dim=8", "diverged", "2,", "2", "diverged"],
    ]
    only_seeds = [result | {"settings": {"seed": number}} for number, result in enumerate(MADE_UP[:2])]
    assert_says(sweep_report.table(only_seeds).splitlines()[1], "2.1000", "0.1414", "2")


def test_a_loss_that_was_not_finite_once_is_a_gap_in_the_plot():
    pytest.importorskip("matplotlib")
    runs = [made_up(0.1, 0, 2.0), made_up(0.1, 1, 2.2)]
    runs[1]["evaluations"][1]["val_loss"] = None
    [line] = sweep_report.draw(runs, {"seed": [0, 1]}).axes[0].get_lines()
    np.testing.assert_allclose(line.get_ydata(), [4, np.nan, 2.1])


def test_the_plot_has_bands_and_shows_diverged_runs():
    pytest.importorskip("matplotlib")
    curves, final = sweep_report.draw(MADE_UP, {"learning_rate": [0.1, 0.2, 0.4, 0.8], "ff_dim": [8], "seed": [0, 1]}).axes
    lines = {line.get_label(): line for line in curves.get_lines() if not line.get_label().startswith("_")}
    assert lines["learning_rate=0.8 ff_dim=8"].get_xydata().tolist() == [[0, 4], [5, 3], [10, 1.6]]
    [diverged] = [line for label, line in lines.items() if "0.4" in label]
    assert diverged.get_linestyle() == "--"
    np.testing.assert_array_equal(diverged.get_xydata(), [[0, 4], [5, 3], [10, np.nan]])
    assert_says(diverged.get_label(), "2", "2", "diverged")
    marks = [line.get_xydata().tolist() for line in curves.get_lines() if line.get_marker() == "x"]
    assert marks == [[[10, 1]], [[10, 1], [10, 1]]]  # at the upper edge
    assert len(curves.collections) == 3  # a band for each combination that has a mean
    lower, upper = curves.collections[0].get_paths()[0].get_extents().get_points()[:, 1]
    assert (lower, upper) == pytest.approx((1.6 - 0.1414, 4.0), abs=1e-3)

    line, crosses = final.get_lines()
    np.testing.assert_allclose(line.get_xydata(), [[0.1, 2.1], [0.2, 1.0], [0.8, 1.6]])
    assert sorted(crosses.get_xdata()) == [0.2, 0.4]
    assert len(final.collections) == 1
    only_seeds = [result | {"settings": {"seed": number}} for number, result in enumerate(MADE_UP[:2])]
    assert len(sweep_report.draw(only_seeds, {"seed": [0, 1]}).axes) == 1
