"""Benchmarks: interleaved runs, counted FLOPs and bytes, tables and plots."""

import math
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import assert_says

from minigpt_jax.api import choose_kernels
from minigpt_jax.benchmarks import data, generate, interleave, kernels, loss, roofline, scaling, train
from minigpt_jax.config import ModelConfig, load_preset
from minigpt_jax.errors import DataError
from minigpt_jax.models.gpt import GPT
from minigpt_jax.models.initial import init_params
from minigpt_jax.models.kernels import PLAIN
from minigpt_jax.training.run import new_state, train_step_kwargs
from minigpt_jax.training.step import train_step

pytestmark = pytest.mark.slow


class Toy:
    """Appends its letter to a file in each run."""

    needs, letter = "json", "a"

    def __init__(self, path: Path):
        self.path, self.num_runs = path, 0

    def run(self):
        with self.path.open("a") as file:
            file.write(self.letter)
        self.num_runs += 1

    def report(self):
        return {"runs": self.num_runs}


class FirstToy(Toy):
    name = "first"


class SecondToy(Toy):
    name, letter = "second", "b"


class LetteredToy(Toy):
    def __init__(self, path: Path, letter: str):
        super().__init__(path)
        self.letter = letter


def test_a_variant_passes_its_settings_to_the_candidate(tmp_path):
    candidates = [interleave.Variant(LetteredToy, f"toy {letter}", {"letter": letter}) for letter in "xy"]
    results = interleave.interleave(interleave.installed(candidates), (tmp_path / "runs",), rounds=1)
    assert (tmp_path / "runs").read_text() == "xyxy"
    assert list(results) == ["toy x", "toy y"]


class MissingToy(Toy):
    name, needs = "third", "no_such_package"


def test_runs_are_interleaved_and_every_result_is_returned(tmp_path):
    path = tmp_path / "runs"
    results = interleave.interleave((FirstToy, SecondToy), (path,), rounds=3)
    assert path.read_text() == "ab" + "ababab"
    for runs in results.values():
        assert [run["runs"] for run in runs] == [1, 2, 3, 4]
        assert all(run["seconds"] > 0 and run["peak_mb"] > 1 for run in runs)
    assert list(results) == ["first", "second"]


@pytest.mark.parametrize("start_together", [False, True])
def test_results_so_far_are_yielded_after_each_round(tmp_path, start_together):
    path, lengths = tmp_path / "runs", []
    for results in interleave.interleaved((FirstToy, SecondToy), (path,), rounds=2, start_together=start_together):
        lengths.append({name: len(runs) for name, runs in results.items()})
    assert lengths == [{"first": count, "second": count} for count in (1, 2, 3)]
    assert path.read_text()[2:] == "abab"


class BrokenToy(Toy):
    name = "broken"

    def run(self):
        raise ValueError("no memory")


def test_a_guarded_candidate_that_fails_does_not_end_the_others(tmp_path):
    guarded = [interleave.Guarded(toy) for toy in (BrokenToy, FirstToy)]
    results = interleave.interleave(guarded, (tmp_path / "runs",), rounds=2)
    assert {run["error"] for run in results["broken"]} == {"ValueError: no memory"}
    assert [run["runs"] for run in results["first"]] == [1, 2, 3]


class DyingToy(Toy):
    name = "dying"

    def run(self):
        raise SystemExit(3)


def test_error_names_a_candidate_that_exits(tmp_path):
    with pytest.raises(DataError, match="dying"):
        interleave.interleave((DyingToy,), (tmp_path / "runs",), rounds=1)


class KilledToy(Toy):
    """Its process exits while another candidate runs."""

    name = "killed"

    def run(self):
        threading.Timer(0.2, os._exit, (9,)).start()


class SlowToy(Toy):
    name = "slow"

    def run(self):
        time.sleep(1)


def test_error_names_a_candidate_that_exits_while_waiting(tmp_path):
    with pytest.raises(DataError, match="killed"):
        interleave.interleave((KilledToy, SlowToy), (tmp_path / "runs",), rounds=1)


def test_candidates_without_their_package_are_skipped(capsys):
    assert interleave.installed((FirstToy, MissingToy)) == [FirstToy]
    [line] = capsys.readouterr().out.splitlines()
    assert_says(line, "third", "no_such_package")


def test_the_warm_up_run_is_excluded():
    results = [{"seconds": seconds} for seconds in (99, 4, 2, 8)]
    assert interleave.milliseconds(results, num_steps=2) == [2000, 1000, 4000]
    assert_says(interleave.with_spread(interleave.milliseconds(results, num_steps=2)), "2000", "1000", "4000")


@pytest.mark.parametrize("module", ["benchmarks.baselines", "benchmarks.interleave", "compare.torch_gpt"])
def test_baselines_do_not_import_jax(module):
    if module == "compare.torch_gpt":
        pytest.importorskip("torch")
    program = f"import sys, minigpt_jax.{module}; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_rooflines_count_their_work(monkeypatch):
    calls = []
    monkeypatch.setattr(roofline.hardware, "matmul", lambda *shape: (lambda: calls.append(shape), 3 * 10**10))
    matmul = roofline.ShapedMatmul(load_preset("debug").override({"batch_size": 5}), 2)
    matmul.run()
    assert calls == [(5 * 16, 32, 64)] * 3  # about 1e11 FLOPs per run
    assert matmul.report() == {"amount": 9 * 10**10}
    results = [{"amount": 6, "seconds": seconds} for seconds in (99, 2, 3)]
    assert roofline.rates(results) == [3, 2]


def test_a_step_is_compared_with_a_large_matmul(monkeypatch, capsys):
    monkeypatch.setattr(train, "SETTINGS", {"debug": (2, 1)})
    monkeypatch.setattr(train, "flops_per_token", lambda model: 200)  # 6400 FLOPs per step, 640 per second
    runs = [{"seconds": 10.0, "since_start": 1.0, "peak_mb": 1.0, "amount": 16000}] * 2
    monkeypatch.setattr(train, "interleave", lambda candidates, setup, rounds: {one.name: runs for one in candidates})
    train.measure(rounds=1)
    [row] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("minigpt_jax")]
    assert "40%" in row  # of 1600 FLOPs per second


def test_kernels_by_name_replace_only_the_named_op():
    config = load_preset("debug").model
    tuned = choose_kernels(config)
    assert train.kernels_by_name("tuned", config) == tuned
    assert train.kernels_by_name("plain", config) == PLAIN
    mixed = train.kernels_by_name("plain attention", config)
    assert (mixed.attention, mixed.matmul) == (PLAIN.attention, tuned.matmul)


def test_a_kernel_saves_a_share_of_the_step_without_it(monkeypatch, capsys):
    seconds = {"minigpt_jax": 3.0, "plain attention": 4.0}
    compared = []

    def interleave(candidates, setup, rounds):
        compared.extend(candidate.settings["kernels"] for candidate in candidates[1:])
        return {one.name: [{"peak_mb": 1.0, "seconds": seconds.get(one.name, 2.0)}] * 3 for one in candidates}

    monkeypatch.setattr(kernels, "interleave", interleave)
    monkeypatch.setattr(kernels, "SETTINGS", {"debug": (2, 1)})
    figures = kernels.measure(rounds=2)
    assert set(compared) == {f"plain {op}" for op in vars(PLAIN) if op != "name"}  # every kernel is measured
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["plain", "attention"] in [row[:2] for row in rows if "25.0%" in row]
    assert list(figures) == ["training, debug", "training, debug, --remat", "decoding 16 rows, 6 × 256"]


def test_time_to_read_a_batch_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "NUM_STEPS", 2)
    monkeypatch.setattr(data, "load_preset", lambda name: load_preset("debug"))
    np.resize(np.arange(65, dtype="<u2"), 1000).tofile(tmp_path / "tokens")
    figures = data.feed(tmp_path / "tokens", rounds=2)
    assert figures["training"] > figures["reading"] > 0


def test_bytes_of_a_decoding_step_are_weights_and_cache():
    config = ModelConfig(num_layers=3, num_heads=4, num_kv_heads=2, embed_dim=16, ff_dim=32, vocab_size=11, context_length=8)
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(init_params(jax.random.key(0), GPT(config))))
    keys_and_values = 2 * 3 * 5 * 7 * 2 * 4  # 3 layers, 5 rows, 7 positions, 2 heads of 4
    assert generate.bytes_per_step(config, batch_size=5, num_positions=7) == weights + 4 * keys_and_values


def test_seconds_to_a_loss_include_the_first_run():
    results = [{"seconds": 5, "val_loss": 3.0}, {"seconds": 1, "val_loss": 1.9}, {"seconds": 1, "val_loss": 2.1}]
    assert loss.seconds_to(3.0, results) == 5
    assert loss.seconds_to(2.0, results) == 6
    assert loss.seconds_to(1.8, results) is None


def test_time_to_a_loss_uses_all_settings_of_the_preset(tmp_path, monkeypatch):
    preset, text = tmp_path / "preset.py", tmp_path / "text.txt"
    preset.write_text(
        "from minigpt_jax.config import load_preset\n"
        "def get_config(): return load_preset('debug').override({'ema': 0.5, 'grad_accumulation': 2})\n"
    )
    text.write_text("To be, or not to be. " * 50)
    monkeypatch.setattr(loss, "retain_heap", lambda: None)
    monkeypatch.setattr(loss, "STEPS_PER_ROUND", 3)
    monkeypatch.setattr(loss.OurRun, "preset", str(preset))
    run = loss.OurRun(str(text))
    run.run()
    task, state = run.task, new_state(run.task)
    arguments = train_step_kwargs(task) | {"grad_accumulation": 2, "ema": 0.5}
    for step in range(3):
        state, _ = train_step(state, task.batch_at(step), jax.random.key(0), **arguments)
    jax.tree.map(np.testing.assert_array_equal, run.state, state)
    assert run.report() == {"val_loss": task.evaluate(state.average)["loss"]}
    assert run.report() != {"val_loss": task.evaluate(state.params)["loss"]}


@pytest.mark.parametrize("name", scaling.TRAINING)
def test_scaling_points_change_only_one_size(name):
    def sizes(config):
        model = config.model
        return {
            "width": (model.embed_dim, model.ff_dim / 4, 32 * model.num_heads),
            "depth": (model.num_layers,),
            "context": (model.context_length,),
            "batch": (config.training.batch_size,),
        }

    base = sizes(scaling.BASE)
    for value in scaling.TRAINING[name]:
        config = scaling.train_config(name, value)
        changed = name.split(",")[0]
        assert set(sizes(config).pop(changed)) == {value}
        others = {other for other, size in sizes(config).items() if size != base[other]} - {changed}
        assert others <= ({"batch"} if changed == "context" else set())
        assert config.model.remat == ("remat" in name)
        if changed == "context":
            assert config.model.context_length * config.training.batch_size == 2048


def test_ideal_memory_scales_with_state_activations_and_cache():
    points = [
        {"value": 64, "megabytes": 10, "state_megabytes": 2, "bytes": 1e6},
        {"value": 256, "megabytes": 99, "state_megabytes": 3, "bytes": 5e6},
    ]
    assert scaling.ideal_megabytes("training", "depth", points) == [10, 3 + 4 * 8]
    assert scaling.ideal_megabytes("training", "context, --remat", points) == [10, 3 + 8]
    assert scaling.ideal_megabytes("decoding", "batch", points) == [10, 14]
    assert scaling.ideal_megabytes("decoding", "length", points) == [10, 10]


def test_a_scaling_point_is_measured(monkeypatch):
    monkeypatch.setattr(scaling, "SECONDS", 0.0)
    config = scaling.train_config("width", 64)
    point = scaling.train_point(config)
    params = jax.eval_shape(lambda: init_params(jax.random.key(0), GPT(config.model)))
    state_megabytes = 3 * 4 * sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e6  # including both of AdamW's moments
    assert state_megabytes < point["megabytes"] < 20 * state_megabytes
    assert point["seconds"] > 0


def test_each_title_has_a_panel_in_the_plot():
    pytest.importorskip("matplotlib")
    from minigpt_jax.benchmarks.plots import draw

    results = {"ours": [{"seconds": 9.0}, {"seconds": 1.0}, {"seconds": 3.0}], "theirs": [{"seconds": 1.0}] * 3}
    points = [
        {"value": value, "seconds": 1.0, "ideal": 0.5, "megabytes": 3.0, "state_megabytes": 1.0, "bytes": 1.0}
        for value in (1, 2)
    ]
    figures = {
        "train": {
            preset: {"answers": results, "num_steps": 2, "flops_per_step": 1.0, "large_matmul_rates": [9.0, 10.0, 10.0]}
            for preset in train.SETTINGS
        },
        "generate": {f"batch_{size}": {"answers": results, "bound_ms": 0.1} for size in generate.BATCH_SIZES},
        "loss": {"races": [{"ours": [{"seconds": 1.0, "val_loss": 2.0}, {"seconds": 1.0, "val_loss": 1.5}]}]},
        "kernels": {"training, debug": {"answers": results, "steps": 2}},
        "data": {kind: {"megabytes_per_second": {"tokenizing": [1.0]}} for kind in ("char", "byte", "word", "bpe")},
        "startup": {"debug": {"first": [{"first_step": 4.0}], "later": [{"first_step": 2.0}]}},
        "scaling": {
            "training": {"context": points, "context, --remat": points},
            "decoding": {"batch": points},
        },
    }
    figure = draw(figures)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert len(titles) == len(set(titles)) == 2 + 2 + 1 + 1 + 1 + 1 + 4

    def panel(*words):
        [axes] = [axes for axes, title in zip(figure.axes, titles, strict=True) if {*words} <= {*re.findall(r"\w+", title)}]
        return axes

    steps, context_time = panel("mini_gpt", "ms"), panel("context", "ms")
    assert [bar.get_width() for bar in steps.patches] == [1000.0, 500.0]
    labels = [text.get_text() for text in context_time.get_legend().get_texts()]
    assert len(set(labels)) == 3
    assert labels[-1] == "--remat"
    positions = {axes.get_subplotspec().num1 for axes in figure.axes}
    assert len(positions) == len(figure.axes) <= 4 * math.ceil(len(figure.axes) / 4)
