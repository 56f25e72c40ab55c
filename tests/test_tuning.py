"""Tuning: what may be tuned, how a study continues after any end, and that processes share it without repeating a trial."""

import ast
import importlib.util
import logging
import math
import os
import shlex
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
from helpers import assert_raises, assert_says, logged

from minigpt_jax.config import Config, ImageConfig, get_setting, load_preset
from minigpt_jax.errors import DataError, StoppedError, UsageError
from minigpt_jax.experiments import stacked, studies, tuning
from minigpt_jax.experiments.grid import sweepable
from minigpt_jax.experiments.ranges import Interval, Space, parse, tunable
from minigpt_jax.experiments.sweep import sweep
from minigpt_jax.experiments.tuning import tune
from minigpt_jax.experiments.tuning_report import preset_source, table

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).resolve().parents[1]
TEXT = "".join(np.random.default_rng(0).choice(list("abcd \n"), 1000))
RANGES = {"learning_rate": Interval(1e-4, 1e-1, log=True), "num_layers": [1, 2]}
COMMAND = "python scripts/tune.py --config debug"


# ---- Ranges ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, expected",
    [
        ("learning_rate=1e-4..1e-2", Interval(1e-4, 1e-2, log=True)),
        ("learning_rate = 1e-4 .. 1e-3", Interval(1e-4, 1e-3)),  # a factor of ten is not more than ten
        ("learning_rate=1e-4..1.01e-3", Interval(1e-4, 1.01e-3, log=True)),
        ("learning_rate=1e-4..1e-3:log", Interval(1e-4, 1e-3, log=True)),
        ("learning_rate=1e-4..1e-2:linear", Interval(1e-4, 1e-2)),
        ("dropout=0..0.5", Interval(0.0, 0.5)),
        ("warmup_steps=1..100", Interval(1, 100, log=True)),
        ("num_layers=2..4", Interval(2, 4)),
        ("num_layers=2,3,4", [2, 3, 4]),
        ("dropout=0,0.1", [0.0, 0.1]),
        ("norm=rmsnorm,layernorm", ["rmsnorm", "layernorm"]),
        ("bias=true,false", [True, False]),
    ],
)
def test_ranges_are_intervals_or_lists_and_wide_intervals_have_a_log_scale(text, expected):
    [(name, values)] = parse([text], Config()).items()
    assert name == text.partition("=")[0].strip()
    assert (values, type(values)) == (expected, type(expected))
    ends = (values.low, values.high) if isinstance(values, Interval) else values
    assert {type(value) for value in ends} == {type(get_setting(Config(), name))}


@pytest.mark.parametrize(
    "texts, words",
    [
        ([], ["range", "learning_rate=1e-4..1e-2", "num_layers=2,3,4"]),
        (["learning_rate"], ["range='learning_rate'", "learning_rate=1e-4..1e-2"]),
        (["lerning_rate=1e-4..1e-2"], ["'lerning_rate'", "'learning_rate'", *tunable(Config())]),
        (["lr=1e-4..1e-2"], ["'lr'", "'learning_rate'", *tunable(Config())]),
        (["seed=0..9"], ["'seed'", *tunable(Config())]),
        (["tokenizer=char,byte"], ["'tokenizer'", *tunable(Config())]),
        (["dataset=a,b"], ["'dataset'", *tunable(Config())]),
        (["eval_batches=1..9"], ["'eval_batches'", *tunable(Config())]),
        (["learning_rate=1e-4.."], ["range='learning_rate=1e-4..'", "float"]),
        (["learning_rate=..1e-2"], ["range='learning_rate=..1e-2'", "float"]),
        (["learning_rate=slow..fast"], ["range='learning_rate=slow..fast'", "float"]),
        (["num_layers=2..3.5"], ["range='num_layers=2..3.5'", "int"]),
        (["num_layers=2,,3"], ["range='num_layers=2,,3'", "int"]),
        (["learning_rate=1e-2..1e-4"], ["range=0.01..0.0001"]),
        (["num_layers=3..3"], ["range=3..3"]),
        (["dropout=0..nan"], ["range=0.0..nan"]),
        (["grad_clip=1..inf"], ["range=1.0..inf"]),
        (["learning_rate=1e-4..1e-2:exp"], ["range='learning_rate=1e-4..1e-2:exp'", "log", "linear"]),
        (["dropout=0..0.5:log"], ["range=0.0..0.5", "linear"]),
        (["norm=a..b"], ["norm", "range='norm=a..b'"]),
        (["num_layers=3"], ["num_layers=[3]"]),
        (["num_layers=3,3"], ["num_layers=[3, 3]"]),
        (["num_layers=2,3", "num_layers=4..5"], ["num_layers"]),
        (["dropout=0..1"], ["dropout=1.0", "1.0"]),
        (["norm=rmsnorm,layrnorm"], ["norm='layrnorm'", "'layernorm'", "layernorm", "rmsnorm"]),
        (["num_heads=2,3"], ["embed_dim=128", "num_heads=3"]),
        (["embed_dim=64..128"], ["embed_dim=65", "num_heads=4"]),
        (["min_learning_rate=0..0.1"], ["min_learning_rate=0.1", "learning_rate=0.001"]),
        (["learning_rate=1e-4..1e-2", "min_learning_rate=1e-5..1e-3"], ["min_learning_rate=0.001", "learning_rate=0.0001"]),
    ],
)
def test_bad_ranges_are_one_line_errors(texts, words):
    assert_raises(UsageError, lambda: Space(Config(), parse(texts, Config())), says=words)


@pytest.mark.parametrize("ranges", [{"activation": "gelu"}, {"num_layers": []}, {"num_layers": Interval(1.0, 2.0)}])
def test_from_python_a_range_is_an_interval_or_a_list(ranges):
    [name] = ranges
    assert_raises(UsageError, Space, Config(), ranges, says=[name])


def test_what_can_be_swept_can_be_tuned_but_for_the_seed():
    for config in (Config(), Config(data=ImageConfig())):
        assert set(sweepable(config)) - set(tunable(config)) == {"seed"}


def test_the_last_learning_rate_keeps_its_ratio_to_the_peak_unless_it_is_tuned_too():
    config = load_preset("shakespeare_char")
    for rate, last in ((1e-4, 2e-5), (2e-3, 4e-4), (0.0123, 0.00246)):
        changed = Space(config, {"learning_rate": Interval(1e-4, 1e-1)}).config_of({"learning_rate": rate}).training
        assert (changed.learning_rate, changed.min_learning_rate) == (rate, last)
    both = Space(config, {"learning_rate": Interval(1e-3, 1e-1), "min_learning_rate": Interval(1e-5, 1e-3)})
    changed = both.config_of({"learning_rate": 0.01, "min_learning_rate": 1e-4}).training
    assert (changed.learning_rate, changed.min_learning_rate) == (0.01, 1e-4)


def test_sampled_numbers_are_rounded_but_stay_in_their_interval():
    ranges = {"learning_rate": Interval(0.001234567, 0.01234567), "num_layers": Interval(1, 9), "dropout": [0, 0.123456]}
    space = Space(Config(), ranges)
    for sampled, expected in [(0.005432199, 0.005432), (0.001234567, 0.001235), (0.01234567, 0.01234567)]:
        settings = space.settings_of({"learning_rate": sampled, "num_layers": 3, "dropout": 0})
        assert settings == {"learning_rate": expected, "num_layers": 3, "dropout": 0.0} or expected == 0.01234567
        assert 0.001234567 <= settings["learning_rate"] <= 0.01234567
        assert type(settings["dropout"]) is float
    assert space.settings_of({"learning_rate": 0.01, "num_layers": 3, "dropout": 0.123456})["dropout"] == 0.123456


# ---- Table and preset -----------------------------------------------------------------------------------------------------


def test_the_table_has_the_best_five():
    results = [{"loss": 1 + n / 10, "trial": 9 - n, "settings": {"learning_rate": 1e-3, "num_layers": n}} for n in range(7)]
    header, *rows = table(results).splitlines()
    assert header.split() == ["loss", "trial", "settings"]
    assert [row.split() for row in rows] == [
        [f"{1 + n / 10:.4f}", str(9 - n), "learning_rate=0.001", f"num_layers={n}"] for n in range(5)
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {"num_layers": 3, "learning_rate": 0.003122, "bias": True, "norm": "layernorm"},
        {"epochs": 0.5, "dataset": 'a "quoted" \\ \n path', "num_kv_heads": 1},
        {},
    ],
)
def test_the_preset_is_the_config_again_and_names_the_tuned_settings(tmp_path, changes):
    config = load_preset("debug").override(changes)
    path = tmp_path / "best.py"
    about = 'A """docstring""" with C:\\Users\\path "'
    path.write_text(preset_source("debug", config, ["num_layers"], about), encoding="utf-8")
    assert load_preset(path) == config
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) == about
    assert f'"num_layers": {config.model.num_layers}' in path.read_text(encoding="utf-8")


def test_a_preset_that_is_a_file_is_found_from_any_folder(tmp_path, monkeypatch):
    shutil.copy(ROOT / "configs" / "debug.py", tmp_path / "mine.py")
    monkeypatch.chdir(tmp_path)
    config = load_preset("mine.py").override(num_layers=1)
    (tmp_path / "best.py").write_text(preset_source("mine.py", config, ["num_layers"], "Mine."), encoding="utf-8")
    monkeypatch.chdir(ROOT)
    assert load_preset(tmp_path / "best.py") == config


# ---- Studies whose training is made up ------------------------------------------------------------------------------------


@pytest.fixture
def optuna():
    return pytest.importorskip("optuna")


@pytest.fixture
def stored(optuna):
    """A function that opens the study of a folder, or that in a database, with Optuna alone."""
    opened = []

    def stored(workdir, url=None):
        opened.append(optuna.storages.RDBStorage(url or f"sqlite:///{workdir / 'study.db'}"))
        return optuna.load_study(study_name=workdir.name, storage=opened[-1])

    yield stored
    for storage in opened:
        storage.remove_session()
        storage.engine.dispose()


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The preset `debug` on a small text, evaluated at the steps 8, 16 and 20. Pruning may start at step 5."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text(TEXT)
    data = {"dataset": str(folder / "text.txt"), "data_dir": str(folder)}
    return load_preset("debug").override(data).override(eval_every=8)


@pytest.fixture
def trained(monkeypatch):
    """The settings of the runs that were trained. Training is made up: a run's loss is that of `trained.loss`, a function of
    config and step. `trained.during` is called with the number of earlier runs and the step, after each step."""

    class Trained(list):
        def loss(self, config, step):
            return abs(math.log10(config.training.learning_rate) + 2.5) + config.model.num_layers / 10 + 1 / step

        def during(self, number, step):
            pass

    trained = Trained()

    def train(tasks, device, *, after_step, after_evaluation):
        [task] = tasks
        run, number = stacked.Progress(task), len(trained)
        trained.append((task.config.training.learning_rate, task.config.model.num_layers))
        for step in range(1, task.num_steps + 1):
            trained.during(number, step)
            after_step()
            if step % 8 == 0 or step == task.num_steps:
                loss = stacked.finite(trained.loss(task.config, step))
                run.evaluations.append({"step": step, "val_loss": loss})
                after_evaluation([run])
        return [{"loss": loss, "diverged": loss > 4, "step": step, "measures": {"loss": loss, "bits_per_char": loss}}]

    monkeypatch.setattr(stacked, "train", train)
    return trained


def search(config, workdir, trials=4, ranges=RANGES, **options):
    return tune("debug", config, ranges, workdir, COMMAND, trials=trials, **options)


def states(study):
    return [trial.state.name for trial in study.trials]


def of_results(results):
    """The settings of the results, in the order of the trials."""
    return [tuple(result["settings"].values()) for result in sorted(results, key=lambda result: result["trial"])]


def test_a_study_tries_settings_in_the_ranges_and_returns_the_best_first(stored, config, trained, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "minigpt_jax"):
        results = search(config, tmp_path / "mine")
    assert len(trained) == len(results) == 4
    assert of_results(results) == trained
    assert len({rate for rate, _ in trained}) == 4
    for rate, num_layers in trained:
        assert 1e-4 <= rate <= 1e-1
        assert num_layers in (1, 2)
    losses = [result["loss"] for result in results]
    assert losses == sorted(losses)
    expected = trained.loss(config.override(results[0]["settings"] | {"min_learning_rate": 0}), 20)
    assert losses[0] == expected == results[0]["measures"]["loss"]
    best = load_preset(tmp_path / "mine" / "best.py")
    assert best == Space(config, RANGES).config_of(results[0]["settings"])
    text = (tmp_path / "mine" / "best.py").read_text(encoding="utf-8")
    assert_says(text, "4 trials", f"Trial {results[0]['trial']}", f"{losses[0]:.4f}", COMMAND, "scripts/train.py")
    assert_says("\n".join(logged(caplog)), "Study mine", "Trial 0", "Trial 3", f"lowest loss {losses[0]:.4f}", "4 of 4")


def test_the_same_study_is_made_again_and_a_complete_one_trains_nothing(stored, config, trained, tmp_path):
    first = search(config, tmp_path / "one")
    again = search(config, tmp_path / "two")
    assert trained[:4] == trained[4:]
    before = (tmp_path / "one" / "best.py").read_text()
    (tmp_path / "one" / "best.py").unlink()
    assert search(config, tmp_path / "one") == first
    assert (tmp_path / "one" / "best.py").read_text() == before
    assert search(config.override(log_every=7), tmp_path / "one") == first
    assert len(trained) == 8
    assert [result["loss"] for result in first] == [result["loss"] for result in again]
    search(config, tmp_path / "one", trials=5)
    assert len(trained) == 9


def test_settings_that_have_been_tried_are_not_trained_again(stored, config, trained, tmp_path):
    results = search(config, tmp_path, trials=6, ranges={"num_layers": [1, 2]})
    assert sorted(num_layers for _, num_layers in trained) == [1, 2]
    assert [result["settings"] for result in results] == [{"num_layers": 1}, {"num_layers": 2}]
    assert states(stored(tmp_path)) == ["COMPLETE"] * 6


@pytest.mark.parametrize("warmup_steps, steps", [(5, [8]), (9, [8, 16]), (17, [8, 16, 20])])
def test_a_run_above_the_median_is_pruned_after_the_warmup_but_not_at_the_end(
    stored, config, trained, tmp_path, caplog, warmup_steps, steps
):
    """Once five trials are complete. Each run is worse than those before."""
    trained.loss = lambda config, step: len(trained) / 2
    with caplog.at_level(logging.INFO, "minigpt_jax"):
        results = search(config.override(warmup_steps=warmup_steps), tmp_path, trials=6)
    is_pruned, last = len(steps) < 3, stored(tmp_path).trials[5]
    assert states(stored(tmp_path)) == ["COMPLETE"] * 5 + ["PRUNED" if is_pruned else "COMPLETE"]
    assert list(last.intermediate_values) == steps
    assert [result["trial"] for result in results] == list(range(6 - is_pruned))
    text = (tmp_path / "best.py").read_text(encoding="utf-8")
    assert_says(text, "6 trials", f"Pruned: {int(is_pruned)}", "Failed: 0")
    assert any(message.startswith("Trial 5: pruned at step") for message in logged(caplog)) == is_pruned


@pytest.mark.parametrize("loss, at_step", [(math.nan, 8), (math.nan, 20), (5.0, 20)])
def test_a_diverged_run_is_a_failed_trial_and_the_study_continues(stored, config, trained, tmp_path, caplog, loss, at_step):
    usual = trained.loss
    trained.loss = lambda config, step: loss if len(trained) == 2 and step >= at_step else usual(config, step)
    with caplog.at_level(logging.INFO, "minigpt_jax"):
        results = search(config, tmp_path)
    assert states(stored(tmp_path)) == ["COMPLETE", "PRUNED", "COMPLETE", "COMPLETE"]
    assert sorted(result["trial"] for result in results) == [0, 2, 3]
    [message] = [message for message in logged(caplog) if message.startswith("Trial") and "diverged" in message]
    assert_says(message, "Trial 1", f"step {at_step if math.isnan(loss) else 20}")
    assert_says((tmp_path / "best.py").read_text(encoding="utf-8"), "Pruned: 0", "Failed: 1")


def test_settings_that_do_not_fit_together_are_a_failed_trial(stored, config, trained, tmp_path, caplog):
    """3 heads, between the ends of an interval; and a context that is longer than the validation text."""
    ranges = {"num_heads": Interval(1, 4), "context_length": [16, 512]}
    with caplog.at_level(logging.INFO, "minigpt_jax"):
        search(config, tmp_path, trials=12, ranges=ranges)
    study = stored(tmp_path)
    for trial in study.trials:
        fits = trial.params["num_heads"] != 3 and trial.params["context_length"] == 16
        assert trial.state.name == ("COMPLETE" if fits else "PRUNED")
    failures = {trial.user_attrs["failure"] for trial in study.trials if trial.state.name == "PRUNED"}
    assert any("num_heads=3" in failure for failure in failures)
    assert any("512" in failure for failure in failures)
    assert failures <= {message.split(": ", 1)[1].rsplit("; ", 1)[0] for message in logged(caplog) if "Trial" in message}


def test_a_study_whose_trials_all_fail_has_no_result(stored, config, trained, tmp_path):
    trained.loss = lambda config, step: math.inf
    assert_raises(DataError, search, config, tmp_path, says=["4"])
    assert not (tmp_path / "best.py").exists()


# ---- Ends and resuming ----------------------------------------------------------------------------------------------------


def interrupt(number, action):
    """A `trained.during` that acts once, at the third step of this run."""
    done = []

    def during(now, step):
        if (now, step) == (number, 3) and not done:
            done.append(True)
            action()

    return during


def test_ctrl_c_stops_within_the_trial_and_the_same_call_resumes(
    stored, config, trained, tmp_path, default_handlers, caplog
):
    trained.during = interrupt(2, lambda: signal.raise_signal(signal.SIGINT))
    with caplog.at_level(logging.INFO, "minigpt_jax"), pytest.raises(StoppedError) as stopped:
        search(config, tmp_path)
    assert stopped.value.exit_status == 130
    assert_says(logged(caplog)[-1], "2 of 4")
    assert states(stored(tmp_path)) == ["COMPLETE", "COMPLETE", "FAIL"]
    assert (tmp_path / "best.py").exists()
    results = search(config, tmp_path)
    assert states(stored(tmp_path)) == ["COMPLETE", "COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    assert of_results(results) == trained[:2] + trained[3:]
    assert len(set(trained)) == 5


def test_the_time_limit_stops_the_trial_in_work_which_does_not_count(stored, config, trained, tmp_path, monkeypatch, caplog):
    clock = [0.0]
    trained.during = interrupt(2, lambda: clock.append(61.0))
    with monkeypatch.context() as patched, caplog.at_level(logging.INFO, "minigpt_jax"):
        patched.setattr(tuning.time, "monotonic", lambda: clock[-1])
        results = search(config, tmp_path, minutes=1)
    assert of_results(results) == trained[:2]
    assert states(stored(tmp_path)) == ["COMPLETE", "COMPLETE", "FAIL"]
    assert_says(logged(caplog)[-1], "2 of 4")
    assert_raises(DataError, search, config, tmp_path / "short", minutes=1e-9, says=["0"])


def test_an_error_ends_the_study_and_its_trial_does_not_count(stored, config, trained, tmp_path):
    def fail():
        raise ZeroDivisionError

    trained.during = interrupt(1, fail)
    with pytest.raises(ZeroDivisionError):
        search(config, tmp_path)
    assert states(stored(tmp_path)) == ["COMPLETE", "FAIL"]
    assert len(search(config, tmp_path)) == 4


# ---- Other processes ------------------------------------------------------------------------------------------------------


def start_elsewhere(study):
    """Starts a trial as another process does. Returns a function that completes it with a loss."""
    trial = study.ask()
    Space(load_preset("debug"), RANGES).suggest(trial)

    def complete(loss):
        trial.set_user_attr("measures", {"loss": loss, "bits_per_char": loss})
        trial.set_user_attr("machine", "another")
        study.tell(trial, loss)

    return complete


def sign_of_life(workdir, number, when):
    """Records when the process of a trial was last seen, in the database's time."""
    with sqlite3.connect(workdir / "study.db") as database:
        [(trial_id,)] = database.execute("SELECT trial_id FROM trials WHERE number = ?", (number,))
        database.execute(
            f"INSERT OR REPLACE INTO trial_heartbeats (trial_id, heartbeat) VALUES (?, datetime('now', '{when}'))",
            (trial_id,),
        )
    database.close()


def test_the_last_trial_of_another_process_is_waited_for(stored, config, trained, tmp_path, monkeypatch, caplog):
    search(config, tmp_path, trials=3)
    complete = start_elsewhere(stored(tmp_path))
    sign_of_life(tmp_path, 3, "-5 seconds")
    waits = []

    def sleep(seconds):
        waits.append(seconds)
        if len(waits) == 3:
            complete(-1.0)

    monkeypatch.setattr(tuning.time, "sleep", sleep)
    with caplog.at_level(logging.INFO, "minigpt_jax"):
        results = search(config, tmp_path)
    assert (len(trained), len(waits), len(results)) == (3, 3, 4)
    assert results[0]["loss"] == -1
    assert_says((tmp_path / "best.py").read_text(), "another", "-1.0000")
    assert len([message for message in logged(caplog) if message.startswith("Waiting")]) == 1


@pytest.fixture
def no_waiting(monkeypatch):
    monkeypatch.setattr(tuning.time, "sleep", lambda seconds: pytest.fail("waits for a trial that nobody runs"))


def test_the_trial_of_a_killed_process_is_replaced(stored, config, trained, tmp_path, no_waiting):
    search(config, tmp_path, trials=3)
    start_elsewhere(stored(tmp_path))
    sign_of_life(tmp_path, 3, f"-{studies.GRACE + 10} seconds")
    assert len(search(config, tmp_path)) == 4
    assert states(stored(tmp_path)) == ["COMPLETE"] * 3 + ["FAIL", "COMPLETE"]


def test_a_process_that_was_killed_before_it_chose_settings_is_not_waited_for(stored, config, trained, tmp_path, no_waiting):
    search(config, tmp_path, trials=3)
    stored(tmp_path).ask()
    with sqlite3.connect(tmp_path / "study.db") as database:
        database.execute("UPDATE trials SET datetime_start = datetime('now', '-2 days') WHERE number = 3")
    database.close()
    assert len(search(config, tmp_path)) == 4
    assert states(stored(tmp_path)) == ["COMPLETE"] * 3 + ["RUNNING", "COMPLETE"]


def test_of_two_processes_that_start_the_last_trial_at_the_same_time_only_one_runs_it(
    optuna, stored, config, trained, tmp_path, monkeypatch
):
    search(config, tmp_path, trials=3)
    ask = optuna.Study.ask

    def second(study, *arguments):
        monkeypatch.setattr(optuna.Study, "ask", ask)
        start_elsewhere(stored(tmp_path))(1.0)
        return ask(study, *arguments)

    monkeypatch.setattr(optuna.Study, "ask", second)
    assert len(search(config, tmp_path)) == 4
    assert len(trained) == 3
    assert states(stored(tmp_path)) == ["COMPLETE"] * 4 + ["FAIL"]


def test_a_trial_that_another_process_has_given_up_is_replaced(optuna, stored, config, trained, tmp_path, caplog):
    def give_up():
        stored(tmp_path).tell(1, state=optuna.trial.TrialState.FAIL)

    trained.during = interrupt(1, give_up)
    with caplog.at_level(logging.WARNING, "minigpt_jax"):
        results = search(config, tmp_path)
    assert states(stored(tmp_path)) == ["COMPLETE", "FAIL"] + ["COMPLETE"] * 3
    assert of_results(results) == trained[:1] + trained[2:]
    [warning] = logged(caplog)
    assert_says(warning, str(studies.GRACE))


# ---- Real runs ------------------------------------------------------------------------------------------------------------


def test_a_trial_is_the_run_that_a_sweep_makes_of_its_settings(stored, config, tmp_path):
    """With a real divergence in between."""
    config = config.override(max_bad_steps=3, warmup_steps=0)
    results = search(config, tmp_path / "study", trials=3, ranges={"learning_rate": [1e-3, 1e-2, 1e20]})
    tried = {trial.params["learning_rate"]: trial.state.name for trial in stored(tmp_path / "study").trials}
    assert tried == {rate: "PRUNED" if rate == 1e20 else "COMPLETE" for rate in tried}
    best = load_preset(tmp_path / "study" / "best.py")
    [same] = sweep(best, {"seed": [0]}, tmp_path / "sweep", stack=1)
    assert same["loss"] == results[0]["loss"]
    assert same["measures"] == results[0]["measures"]


# Starts tune.py, whose first trial waits for that of another process.
PROGRAM = """
import runpy, sys, time
import optuna
from minigpt_jax.experiments import stacked
script, storage, *arguments = sys.argv[1:]
train = stacked.train
def wait_for_both(*tasks, **hooks):
    while len(optuna.load_study(study_name="shared", storage=storage).trials) < 2:
        time.sleep(0.1)
    return train(*tasks, **hooks)
stacked.train = wait_for_both
sys.argv = [script, *arguments]
runpy.run_path(script, run_name="__main__")
"""
PROGRAMS = ("initdb", "pg_ctl")


def postgres_program(name):
    """The path of one of PostgreSQL's programs, which Debian does not have in PATH. None if it is not installed."""
    folders = sorted(str(path) for path in Path("/usr/lib/postgresql").glob("*/bin"))
    return shutil.which(name, path=os.pathsep.join([os.environ["PATH"], *folders]))


def databases():
    """SQLite, and PostgreSQL where it is installed. A test that is skipped would fail with --no-skips."""
    has_postgres = all(map(postgres_program, PROGRAMS)) and importlib.util.find_spec("psycopg")
    return ["sqlite", "postgresql"] if has_postgres else ["sqlite"]


@pytest.fixture
def postgres():
    """Starts a server of its own. Returns the URL of its database."""
    import pwd  # Windows lacks it

    folder = Path(tempfile.mkdtemp(prefix="postgres"))  # not in pytest's folder, which other users cannot enter
    is_root = os.geteuid() == 0  # whom PostgreSQL refuses
    owner = {"user": "nobody", "group": pwd.getpwnam("nobody").pw_gid} if is_root else {}
    if is_root:
        shutil.chown(folder, **owner)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def call(name, *arguments):
        command = [postgres_program(name), "-D", str(folder / "data"), *arguments]
        subprocess.run(command, check=True, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT, **owner)

    call("initdb", "-U", "tuner", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync")
    call("pg_ctl", "-w", "-l", str(folder / "log"), "-o", f"-p {port} -h 127.0.0.1 -k {folder}", "start")
    try:
        yield f"postgresql+psycopg://tuner:any@127.0.0.1:{port}/postgres"
    finally:
        call("pg_ctl", "-w", "-m", "immediate", "stop")
        shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.parametrize("database", databases())
def test_two_processes_share_a_study_and_repeat_no_trial(optuna, stored, tmp_path, request, database):
    """In folders of their own, as on two machines."""
    url = f"sqlite:///{tmp_path / 'any.db'}" if database == "sqlite" else request.getfixturevalue("postgres")
    options = "--config debug --dataset text.txt --range learning_rate=1e-4..1e-1 --trials 7 --workdir runs/shared"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    processes = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "text.txt").write_text(TEXT)
        command = [sys.executable, "-c", PROGRAM, str(ROOT / "scripts" / "tune.py"), url, *shlex.split(options)]
        processes.append(
            subprocess.Popen(
                [*command, "--storage", url], cwd=tmp_path / name, env=environment, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )
        )  # fmt: skip
    try:
        outputs = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors
        assert "Traceback" not in errors
    ran = [[line.split(":")[0] for line in errors.splitlines() if ": learning_rate=" in line] for _, errors in outputs]
    assert all(ran)
    assert len(ran[0] + ran[1]) == len({*ran[0], *ran[1]}) == 7
    finished = [optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED]
    trials = stored(Path("shared"), url).get_trials(states=finished)
    assert {f"Trial {trial.number}" for trial in trials} == {*ran[0], *ran[1]}
    assert len({trial.params["learning_rate"] for trial in trials}) == 7
    assert outputs[0][0] == outputs[1][0]
    assert len(outputs[0][0].splitlines()) == 1 + min(5, sum(trial.state == finished[0] for trial in trials))
    best = [(tmp_path / name / "runs" / "shared" / "best.py").read_text() for name in ("one", "two")]
    assert best[0] == best[1]
    assert "any@" not in best[0]  # the password


# ---- Refusals -------------------------------------------------------------------------------------------------------------


def test_another_study_is_refused_with_the_differing_fields(stored, config, trained, tmp_path):
    search(config, tmp_path, trials=1)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    wide = {"learning_rate": Interval(1e-5, 1e-1, log=True), "num_layers": [1, 2]}
    for other, ranges, words in [
        (config.override(steps=30, batch_size=8), RANGES, ["steps=20", "30", "batch_size=4", "8"]),
        (config, wide, ["range learning_rate=0.0001..0.1:log", "1e-05..0.1:log"]),
        (config, {"num_layers": [1, 2]}, ["range learning_rate=0.0001..0.1:log", "None"]),
        (config, RANGES | {"bias": [True, False]}, ["range bias=None", "True,False"]),
    ]:
        assert_raises(DataError, search, other, tmp_path, 1, ranges, says=[str(tmp_path), *words, "--workdir"])
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_changed_data_is_refused_but_the_text_may_move(stored, config, trained, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    moved = config.override(dataset=str(tmp_path / "text.txt"))
    search(config, tmp_path / "study", trials=1)
    search(moved, tmp_path / "study", trials=2)
    (tmp_path / "text.txt").write_text(TEXT[::-1])
    assert_raises(DataError, search, moved, tmp_path / "study", says=[str(tmp_path / "study"), "data", "--workdir"])


def test_a_study_of_another_program_is_refused(optuna, stored, config, trained, tmp_path):
    storage = optuna.storages.RDBStorage(f"sqlite:///{tmp_path / 'study.db'}")
    optuna.create_study(storage=storage, study_name=tmp_path.name).add_trial(optuna.create_trial(value=1.0))
    storage.remove_session()
    storage.engine.dispose()
    assert_raises(DataError, search, config, tmp_path, says=[tmp_path.name, "--workdir"])
    assert states(stored(tmp_path)) == ["COMPLETE"]


@pytest.mark.parametrize(
    "options, words",
    [({"trials": 0}, ["trials=0", "1"]), ({"trials": 2.5}, ["trials=2.5"]), ({"minutes": 0}, ["minutes=0"]),
     ({"minutes": math.nan}, ["minutes=nan"])],
)  # fmt: skip
def test_bad_limits_are_usage_errors(config, tmp_path, options, words):
    assert_raises(UsageError, lambda: search(config, tmp_path / "new", **options), says=words)
    assert not (tmp_path / "new").exists()


def test_early_stopping_unusable_data_and_the_folder_of_a_run_are_refused(stored, config, tmp_path):
    new = tmp_path / "new"
    assert_raises(UsageError, search, config.override(patience=2), new, says=["patience=2"])
    assert_raises(DataError, search, config.override(dataset="missing.txt"), new, says=["missing.txt"])
    assert not new.exists()
    (tmp_path / "config.json").write_text("{}")
    assert_raises(DataError, search, config, tmp_path, says=[str(tmp_path), "run", "--workdir"])
    assert_raises(DataError, search, config, tmp_path / "config.json", says=[str(tmp_path / "config.json")])


def test_without_optuna_the_error_says_what_to_install(config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert_raises(UsageError, search, config, tmp_path / "new", says=["python -m pip install -e '.[tune]'"])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "storage, kind, words",
    [
        ("nonsense", UsageError, ["sqlite:///study.db"]),
        ("redis://me:secret@host/1", UsageError, ["redis", "sqlite:///study.db"]),
        ("sqlite:////missing/folder/study.db", DataError, ["sqlite:////missing/folder/study.db", "open"]),
        ("sqlite:///config.json", DataError, ["sqlite:///config.json", "not a database"]),
        ("mysql+missing://me:secret@host/studies", UsageError, ["missing"]),
    ],
)
def test_unusable_databases_are_one_line_errors(stored, config, tmp_path, monkeypatch, storage, kind, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text("{}" * 1000)
    message = assert_raises(kind, search, config, tmp_path / "new", storage=storage, says=words)
    assert "secret" not in message
    assert not (tmp_path / "new").exists()


def test_a_database_that_fails_during_a_trial_is_a_one_line_error(stored, config, trained, tmp_path):
    trained.during = interrupt(1, lambda: (tmp_path / "study.db").write_bytes(b"no" * 100_000))
    assert_raises(DataError, search, config, tmp_path, says=[str(tmp_path), "not a database"])


def test_a_thread_does_not_report_the_database_again(stored, monkeypatch):
    from sqlalchemy.exc import SQLAlchemyError

    def fail(error):
        raise error

    reported = []
    monkeypatch.setattr(threading, "excepthook", lambda thread: reported.append(thread.exc_type))
    with studies.database_errors("study.db"):
        for error in (SQLAlchemyError(), KeyError()):
            thread = threading.Thread(target=fail, args=[error])
            thread.start()
            thread.join()
    assert reported == [KeyError]
    threading.excepthook(threading.ExceptHookArgs([SQLAlchemyError, SQLAlchemyError(), None, None]))
    assert reported == [KeyError, SQLAlchemyError]


def test_without_the_driver_of_a_database_the_error_names_it_but_not_the_password(stored, config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg2", None)
    storage = "postgresql+psycopg2://me:secret@host/studies"
    message = assert_raises(UsageError, search, config, tmp_path, storage=storage, says=["psycopg2", "me", "host"])
    assert "secret" not in message
