"""Ablations: what is changed, at equal tokens and at equal time, resuming, and the statistics of the report."""

import dataclasses
import json
import logging
import statistics

import jax
import numpy as np
import pytest
from helpers import assert_raises, assert_says, logged
from scipy import stats
from test_sweep import TEXT, KilledError, kill_after, without_times

from minigpt_jax.config import Config, ModelConfig, differences, load_preset, preset_names
from minigpt_jax.errors import DataError, UsageError
from minigpt_jax.experiments import ablation, ablation_report, stacked
from minigpt_jax.experiments.ablation import Outcome, Variant, ablate
from minigpt_jax.experiments.ablation_report import T_QUANTILES, compared, difference
from minigpt_jax.experiments.changes import CHANGES, changes
from minigpt_jax.experiments.grid import Point, named
from minigpt_jax.experiments.sweep import sweep
from minigpt_jax.kernels import BLOCKED, TUNED
from minigpt_jax.models.flops import num_weights
from minigpt_jax.models.gpt import GPT
from minigpt_jax.models.initial import init_params
from minigpt_jax.models.kernels import PLAIN
from minigpt_jax.tasks import prepare
from minigpt_jax.tasks.fine_tuning import num_values

BASES = {
    name: config.override(vocab_size=config.model.vocab_size or 85)
    for name in preset_names()
    if (config := load_preset(name)).task == "language_modelling"
} | {
    "swiglu": Config().override(vocab_size=50, activation="swiglu", ff_dim=100, num_kv_heads=2, tie_embeddings=True),
    "odd": Config().override(vocab_size=50, num_layers=3, num_heads=3, embed_dim=75, ff_dim=190, positions="learned"),
}  # fmt: skip


# ---- Changes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BASES)
def test_each_change_differs_from_the_base_only_in_what_it_names(name):
    base = BASES[name]
    found = changes(base)
    configs = [base.override(settings) for settings in found]
    assert all([base, *configs].count(config) == 1 for config in [base, *configs])
    for settings, config in zip(found, configs, strict=True):
        assert settings == {name: new for name, (_, new) in differences(base, config).items()}


def test_every_switch_of_the_model_is_changed():
    """A new one fails here until it has a line in the table."""
    fields = dataclasses.fields(ModelConfig)
    switches = {field.name for field in fields if field.metadata["choices"] or field.type is bool} - {"dtype", "remat"}
    changed = {name for settings in changes(BASES["shakespeare_char"]) for name in settings}
    assert changed >= switches | {"num_layers", "num_heads", "num_kv_heads", "dropout", "learning_rate"}


def test_the_base_is_not_a_change_but_what_replaces_it_is():
    base = BASES["shakespeare_char"].override(positions="learned", dropout=0.1, activation="swiglu", num_kv_heads=2)
    found = changes(base, ["positions", "dropout", "activation", "kv_heads"])
    values = [(name, value) for settings in found for name, value in settings.items() if name != "ff_dim"]
    assert values == [
        ("positions", "rotary"), ("positions", "sinusoidal"), ("dropout", 0.0), ("dropout", 0.2), ("activation", "relu2"),
        ("activation", "gelu"), ("activation", "relu"), ("num_kv_heads", 4), ("num_kv_heads", 1),
    ]  # fmt: skip


def test_as_many_key_value_heads_as_before_are_not_a_change():
    assert changes(BASES["shakespeare_char"], ["kv_heads"]) == [{"num_kv_heads": 2}, {"num_kv_heads": 1}]


def test_a_depth_without_a_width_of_equal_parameters_is_left_out():
    base = Config().override(vocab_size=5, num_layers=2, num_heads=4, embed_dim=8, ff_dim=8)
    assert changes(base, ["depth"]) == [{"num_layers": 1, "ff_dim": 32}]


def shapes(config):
    return jax.eval_shape(lambda key: init_params(key, GPT(config.model)), jax.random.key(0))


@pytest.mark.parametrize("name", ["shakespeare_char", "debug", "swiglu", "odd"])
def test_depth_and_activation_are_compared_at_equal_parameters(name):
    base = BASES[name]
    total = num_values(shapes(base))
    found = changes(base, ["depth", "activation"])
    depths = [settings["num_layers"] / base.model.num_layers for settings in found if "num_layers" in settings]
    assert depths == ([1 / 3, 2] if name == "odd" else [0.5, 2])
    for settings in found:
        model = base.override(settings).model
        if "num_layers" in settings:
            assert model.ff_dim / model.embed_dim == pytest.approx(base.model.ff_dim / base.model.embed_dim, rel=0.2)
        assert num_values(shapes(base.override(settings))) == pytest.approx(total, rel=0.05)
        if base.override(settings).model.activation != "swiglu" != base.model.activation and "num_layers" not in settings:
            assert "ff_dim" not in settings
    assert any("ff_dim" in settings for settings in found if "activation" in settings)


@pytest.mark.parametrize(
    "changed", [{}, {"positions": "learned", "tie_embeddings": True}, {"vocab_multiple": 64, "bias": True}]
)
def test_weights_are_counted_as_in_the_model(changed):
    for name in ("swiglu", "odd"):
        config = BASES[name].override(changed)
        matrices = [leaf for leaf in jax.tree.leaves(shapes(config)) if leaf.ndim > 1]
        assert num_weights(config.model) == num_values(matrices)


def test_what_the_base_does_not_allow_is_left_out_with_a_log_line(caplog):
    base = Config().override(vocab_size=5, embed_dim=6, num_heads=3)
    with caplog.at_level(logging.INFO):
        assert changes(base, ["heads"]) == [{"num_heads": 1}]
    [message] = logged(caplog)
    assert_says(message, "num_heads=6")
    base = base.override(embed_dim=2, num_heads=1)
    assert_raises(UsageError, changes, base, ["heads", "kv_heads"], says=["only=heads,kv_heads", *CHANGES])


# ---- Equal tokens and equal time ------------------------------------------------------------------------------------------


class Clock:
    """A machine on which a step of `Runs` takes as long as it says, times a load that grows."""

    now = 0.0
    load = 1.0

    def perf_counter(self):
        return self.now


class Runs:
    state = ()

    def __init__(self, clock, seconds):
        self.clock, self.seconds = clock, seconds

    def advance(self):
        self.clock.now += self.seconds * self.clock.load
        self.clock.load *= 1.003


def test_step_times_are_compared_in_pairs_so_that_a_growing_load_cancels(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(ablation, "time", clock)
    monkeypatch.setattr(ablation, "SAMPLE_SECONDS", 0.004)
    low, ratio, high = ablation.relative_step_time(Runs(clock, 0.002), Runs(clock, 0.001))
    assert clock.load > 1.4
    assert low < 2 < high  # the order in a pair alternates
    assert high / low < 1.03
    assert low <= ratio <= high


def test_the_bounds_contain_the_median_with_96_percent():
    n, lower, upper = ablation.PAIRS, ablation.LOWER, ablation.UPPER
    assert lower + upper == n - 1
    assert 1 - 2 * stats.binom.cdf(lower, n, 0.5) == pytest.approx(0.965, abs=0.001)


@pytest.fixture
def config(tmp_path, monkeypatch):
    """The preset `debug` with fewer layers and steps, on a small text. Runs are not trained side by side."""
    monkeypatch.setattr(stacked, "choose_size", lambda *_: 1)
    (tmp_path / "text.txt").write_text(TEXT)
    data = {"dataset": str(tmp_path / "text.txt"), "data_dir": str(tmp_path)}
    return load_preset("debug").override(data).override(num_layers=1, dropout=0.0, steps=8, eval_every=8)


@pytest.fixture
def timed(monkeypatch):
    """Sets the relative step time that is measured, as (lower bound, median, upper bound). Returns the list of measurements,
    by the settings of the model."""
    calls = []

    def timed(low, ratio, high):
        def measure(runs, base):
            calls.append(runs.tasks[0].config.model)
            return low, ratio, high

        monkeypatch.setattr(ablation, "relative_step_time", measure)
        return calls

    return timed


def saved(workdir):
    return [json.loads(line) for line in (workdir / "results.jsonl").read_text().splitlines()]


def steps_of(results):
    return [(result["settings"]["seed"], result["settings"]["steps"], result["step"]) for result in results]


@pytest.mark.e2e
def test_each_run_is_the_run_of_a_sweep_and_a_slower_change_has_fewer_steps_at_equal_time(config, timed, tmp_path):
    timed(1.9, 2.0, 2.1)
    base, change = ablate(config, tmp_path / "ablation", only=["qk_norm"])
    assert (base.variant.settings, change.variant.settings) == ({}, {"qk_norm": False})
    assert base.variant.parameters == change.variant.parameters > 1000
    assert (base.variant.steps, change.variant.steps) == (8, 4)
    assert base.equal_time == base.equal_tokens
    expected = sweep(config, {"qk_norm": [True, False], "seed": [0, 1, 2], "steps": [8, 4]}, tmp_path / "sweep", stack=1)
    by_run = {tuple(result["settings"].values()): result for result in expected}
    runs = [(True, 8, base.equal_tokens), (False, 8, change.equal_tokens), (False, 4, change.equal_time)]
    for qk_norm, steps, results in runs:
        assert steps_of(results) == [(seed, steps, steps) for seed in range(3)]
        for seed, result in enumerate(results):
            ours, theirs = without_times([result, by_run[qk_norm, seed, steps]])
            assert ours | {"settings": {}} == theirs | {"settings": {}}
    assert len(saved(tmp_path / "ablation")) == 9


def test_each_change_has_the_kernels_that_fit_its_model(config, monkeypatch):
    """On a GPU another number of heads can need another kernel than the base has."""
    fitting = {1: TUNED, 2: PLAIN, 4: BLOCKED}
    monkeypatch.setattr(ablation, "choose_kernels", lambda model, kernels: fitting[model.num_heads])
    task = prepare(config.override(num_heads=2), kernels=fitting[2])
    for settings in changes(task.config, ["heads"]):
        point = Point(settings, task.config.override(settings))
        model = ablation.task_of(point, task, "tuned").objective.model
        assert (model.config, model.kernels) == (point.config.model, fitting[settings["num_heads"]])


@pytest.mark.e2e
def test_a_change_within_the_error_of_the_measurement_has_one_run_for_both(config, timed, tmp_path):
    measured = timed(0.99, 1.2, 1.3)
    _, *outcomes = ablate(config.override(steps=4), tmp_path / "new", only=["qk_norm", "beta2"])
    assert len(measured) == 1  # another beta2 is the same program
    assert [each.variant.relative_step_time for each in outcomes] == [(0.99, 1.2, 1.3), (1, 1, 1), (1, 1, 1)]
    for outcome in outcomes:
        assert outcome.variant.steps == 4
        assert outcome.equal_time == outcome.equal_tokens
    assert len(saved(tmp_path / "new")) == 4 * 3


@pytest.mark.e2e
def test_a_killed_ablation_resumes_with_the_same_steps_and_more_seeds_and_topics(config, timed, tmp_path, monkeypatch):
    timed(1.9, 2.0, 2.1)
    workdir = tmp_path / "new"
    with monkeypatch.context() as patched:
        kill_after(patched, 4)
        with pytest.raises(KilledError):
            ablate(config, workdir, only=["qk_norm"])
    before = saved(workdir)
    assert len(before) == 4
    measured = timed(0.45, 0.5, 0.55)
    parts = kill_after(monkeypatch, 99)
    _, change, shifted = ablate(config, workdir, only=["qk_norm", "token_shift"], num_seeds=4)
    assert [model.token_shift for model in measured] == [False, True]  # each change once
    assert sum(map(len, parts)) == 4 * (1 + 2 + 2) - 4
    assert saved(workdir)[:4] == before
    assert (change.variant.steps, shifted.variant.steps) == (4, 16)
    assert steps_of(change.equal_time) == [(seed, 4, 4) for seed in range(4)]
    written = {path: path.read_bytes() for path in workdir.iterdir()}
    again = ablate(config, workdir, only=["qk_norm", "token_shift"], num_seeds=4)
    assert again[1:] == [change, shifted]
    assert {path: path.read_bytes() for path in workdir.iterdir()} == written
    ablate(config, workdir, only=["qk_norm"], overwrite=True)
    assert [row["settings"] for row in json.loads((workdir / "changes.json").read_text())] == [{}, {"qk_norm": False}]
    assert len(saved(workdir)) == 9

    def measure(*_):
        raise KilledError

    monkeypatch.setattr(ablation, "measure", measure)
    with pytest.raises(KilledError):
        ablate(config.override(steps=4), workdir, only=["qk_norm"], overwrite=True)
    assert not (workdir / "changes.json").exists()  # steps of another base


# ---- Mistakes -------------------------------------------------------------------------------------------------------------


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.e2e
def test_the_folder_of_another_ablation_of_a_sweep_and_of_a_run_is_refused(config, tmp_path):
    config = config.override(steps=2)
    ablate(config, tmp_path / "ablation", only=["beta2"])
    sweep(config, {"seed": [0]}, tmp_path / "sweep", stack=1)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    before = files(tmp_path)
    for base, name, words in [
        (
            config.override(steps=3, num_heads=1),
            "ablation",
            ["an ablation", "steps=2", "3", "num_heads=2", "1", "--overwrite"],
        ),
        (config, "sweep", ["a sweep", "--workdir"]),
        (config, "run", ["a run", "--workdir"]),
    ]:
        for overwrite in {False, name != "ablation"}:
            options = {"only": ["beta2"], "overwrite": overwrite, "says": [str(tmp_path / name), *words]}
            assert_raises(DataError, ablate, base, tmp_path / name, **options)
    assert_raises(DataError, sweep, config, {"seed": [0]}, tmp_path / "ablation", says=["an ablation", "--workdir"])
    assert files(tmp_path) == before
    (tmp_path / "text.txt").write_text(TEXT[::-1])
    words = [str(tmp_path / "ablation"), "data", "--overwrite"]
    assert_raises(DataError, ablate, config, tmp_path / "ablation", only=["beta2"], says=words)
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "ablation" / "changes.json").write_text('[{"settings": {}}]')
    assert_raises(DataError, ablate, config, tmp_path / "ablation", only=["beta2"], says=["changes.json", "--overwrite"])


@pytest.mark.parametrize(
    "changed, options, words",
    [
        ({}, {"num_seeds": 2}, ["seeds=2", "3"]),
        ({}, {"only": ["postions"]}, ["only='postions'", "'positions'", *CHANGES]),
        ({"init_from": "runs/mine"}, {}, ["init_from=runs/mine"]),
        ({"freeze": "embedding"}, {}, ["freeze=embedding"]),
    ],
)
def test_bad_arguments_are_one_line_errors(config, tmp_path, changed, options, words):
    options = {"only": ["beta2"]} | options
    assert_raises(UsageError, ablate, config.override(changed), tmp_path / "new", **options, says=words)
    assert not (tmp_path / "new").exists()


def test_other_tasks_are_refused(tmp_path):
    words = ["image_classification", "language_modelling"]
    assert_raises(UsageError, ablate, load_preset("vit_digits"), tmp_path / "new", says=words)


# ---- Report ---------------------------------------------------------------------------------------------------------------


def results(losses):
    """Made-up results of runs that end with these losses; None if they diverged."""
    return [{"settings": {"seed": seed}, "loss": loss, "diverged": loss is None} for seed, loss in enumerate(losses)]


def outcome(settings, tokens, time=None, ratio=1.0):
    variant = Variant(settings, 1234567, (0.9 * ratio, ratio, 1.1 * ratio), 100)
    return Outcome(variant, results(tokens), results(tokens if time is None else time))


OUTCOMES = [
    outcome({}, [2.0, 2.2, 2.1]),
    outcome({"norm": "layernorm"}, [2.03, 2.22, 2.12]),
    outcome({"bias": True}, [1.97, 2.19, 2.09], [2.08, 2.28, 2.18], 1.25),
    outcome({"positions": "learned"}, [1.99, None, 2.11], [None, None, 2.1]),
    outcome({"norm_placement": "post"}, [2.9, 3.1, 3.0]),
    outcome({"learning_rate": 1.0}, [None, None, None]),
    outcome({"qk_norm": False}, [1.01, 1.19, 1.1]),
    *(outcome({"dropout": rate}, [2.0 + rate, 2.2 + rate, 2.1 + rate]) for rate in (0.05, 0.06, 0.07, 0.08)),
]


@pytest.mark.parametrize("n", T_QUANTILES)
def test_the_interval_is_that_of_students_t_for_pairs(n):
    random = np.random.default_rng(n)
    base = random.normal(1.6, 0.02, n)
    runs = base + random.normal(0.01, 0.004, n)
    shown = difference(results(runs), results(base))
    low, high = stats.ttest_rel(runs, base).confidence_interval(0.95)
    assert (shown.mean - shown.margin, shown.mean + shown.margin) == pytest.approx((low, high), abs=1e-5)


def test_beyond_ten_seeds_the_interval_is_too_wide_rather_than_too_narrow():
    runs, base = np.random.default_rng(0).normal(1.6, 0.01, (2, 15))
    low, high = stats.ttest_rel(runs, base).confidence_interval(0.95)
    assert difference(results(runs), results(base)).margin > (high - low) / 2


def test_pairs_with_a_diverged_run_do_not_count():
    shown = difference(results([1.5, None, 1.7, 1.8, None]), results([1.4, 1.5, 1.5, None, None]))
    assert shown.mean == pytest.approx(0.15)
    assert shown.margin == pytest.approx(12.706 * statistics.stdev([0.1, 0.2]) / 2**0.5)
    assert shown.diverged == (1, 4)
    one = difference(results([1.5, None]), results([1.4, 1.5]))
    assert (str(one), one.margin) == ("+0.1000", None)
    none = difference(results([None]), results([1.5]))
    assert (str(none), none.mean, none.diverged) == ("", None, (0,))


def test_the_table_is_sorted_by_effect_and_names_diverged_runs():
    base, header, *rows, explanation = ablation_report.table(OUTCOMES).splitlines()
    assert_says(base, "2.1000", "0.1000", "3", "1,234,567", "100")
    assert_says(header, "parameters", "step time", "equal tokens", "equal time")
    assert [row.split()[0] for row in rows] == [
        "qk_norm=False", "bias=True", "norm=layernorm", "dropout=0.05", "dropout=0.06", "dropout=0.07", "dropout=0.08",
        "norm_placement=post", "positions=learned", "learning_rate=1.0",
    ]  # fmt: skip
    by_name = {row.split()[0]: row for row in rows}
    assert_says(by_name["bias=True"], "1,234,567", "1.250", "1.125", "1.375", "-0.0167 ± 0.0287", "+0.0800 ± 0.0000")
    assert_says(by_name["positions=learned"], "+0.0000", "diverged", "seed 1 at equal tokens", "seed 0, 1 at equal time")
    assert_says(by_name["learning_rate=1.0"], "seed 0, 1, 2 at equal tokens")
    assert_says(explanation, "seed", "95")
    diverged = ablation_report.table([outcome({}, [None, 2.2, 2.1]), *OUTCOMES[1:]]).splitlines()[0]
    assert_says(diverged, "2.1500", "seed 0")


def test_the_plot_has_a_row_for_each_change_and_arrows_for_outliers():
    pytest.importorskip("matplotlib")
    figure = ablation_report.draw(OUTCOMES)
    [axes] = figure.axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == [named(each.variant.settings) for each, _ in compared(OUTCOMES)]
    low, high = axes.get_xlim()
    assert low < -0.05 < 0.08 < high < 0.5  # the intervals, but not the outliers
    drawn = {(round(float(x), 4), round(float(y), 2), line.get_marker(), line.get_color())
             for line in axes.get_lines() for x, y in line.get_xydata() if line.get_marker() != "None"}  # fmt: skip
    edges = {"<": round(float(low), 4), ">": round(float(high), 4), "x": round(float(high), 4)}
    assert {(y, marker, colour) for x, y, marker, colour in drawn if edges.get(marker) == x} == {
        (-0.17, "<", "C0"), (0.17, "<", "C1"), (6.83, ">", "C0"), (7.17, ">", "C1"), (7.83, "x", "C0"), (8.17, "x", "C1"),
        (8.83, "x", "C0"), (9.17, "x", "C1"),
    }  # fmt: skip
    points = {(x, y, colour) for x, y, marker, colour in drawn if marker == "o"}
    assert points >= {(-0.0167, 0.83, "C0"), (0.08, 1.17, "C1"), (0.0233, 1.83, "C0"), (0.0233, 2.17, "C1")}
    assert len(points) == 2 * 7  # two rows are outliers, and one has only diverged runs
    notes = [text.get_text() for text in axes.texts]
    assert_says("; ".join(notes), "-1.0000 ± 0.0248", "+0.9000 ± 0.0000", "1 diverged", "2 diverged", "3 diverged")
    figure.draw_without_rendering()
    visible = figure.get_tightbbox()
    assert visible.x0 >= 0  # long names are not cut off
    assert visible.x1 <= figure.get_figwidth()
