"""Making a reference, and what runs that are compared with it log. Also: nothing else is combined or compared."""

import dataclasses
import json
import logging
import math
import shutil

import numpy as np
import pytest
from helpers import assert_raises, assert_says, logged

from minigpt_jax.api import train
from minigpt_jax.config import Config, DataConfig, ModelConfig, TrainingConfig
from minigpt_jax.errors import DataError, StoppedError, UsageError
from minigpt_jax.experiments import reference_runs
from minigpt_jax.experiments.reference_runs import make_reference
from minigpt_jax.runs import references
from minigpt_jax.runs.metrics import read_metrics
from minigpt_jax.runs.references import Reference
from minigpt_jax.training.callbacks import summary

pytestmark = pytest.mark.e2e

TEXT = "".join(np.random.default_rng(0).choice(list("abcd \n"), 400)) + "abcd \n"
SEEDS = 5
MADE_WITH_COMMAND = "python scripts/reference.py --config toy"


@pytest.fixture(autouse=True)
def fixed_matmul_rate(monkeypatch):
    """Measuring it at the end of each run would take longer than all of the steps."""
    monkeypatch.setattr(summary.hardware, "matmul_rate", lambda *_: 1e15)


@pytest.fixture(autouse=True)
def own_references(tmp_path, monkeypatch):
    """Where references are looked for. Empty unless a test writes one."""
    folder = tmp_path / "references"
    folder.mkdir()
    monkeypatch.setattr(references, "REFERENCES_DIR", folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the text and, from the first test that needs them, the runs of a reference."""
    folder = tmp_path_factory.mktemp("references")
    (folder / "text.txt").write_text(TEXT)
    return folder


@pytest.fixture
def config(folder):
    """The evaluation batches cover the whole validation split."""
    return Config(
        model=ModelConfig(num_layers=1, num_heads=2, embed_dim=8, ff_dim=8, context_length=8),
        training=TrainingConfig(
            batch_size=4,
            steps=6,
            warmup_steps=2,
            eval_every=3,
            log_every=3,
            checkpoint_every=6,
            sample_every=2,
            patience=1,
        ),
        data=DataConfig(dataset=str(folder / "text.txt"), data_dir=str(folder)),
    )


@pytest.fixture
def made(folder, config, monkeypatch):
    """(The reference, the folder of its runs), which the first test trains, with an interruption after two runs."""
    runs, path = folder / "runs", folder / "toy.json"
    if not path.exists():
        trained = []

        def interrupted(config, *arguments):
            if config.training.seed == 2:
                raise StoppedError(2)
            trained.append(config.training.seed)
            train(config, *arguments)

        with monkeypatch.context() as patched:
            patched.setattr(reference_runs, "train", interrupted)
            with pytest.raises(StoppedError):
                make_reference("toy", config, runs, SEEDS, MADE_WITH_COMMAND)
        assert trained == [0, 1]
        path.write_text(make_reference("toy", config, runs, SEEDS, MADE_WITH_COMMAND).to_json())
    return Reference.read(path), runs


@pytest.fixture
def runs_to_change(made, tmp_path):
    return shutil.copytree(made[1], tmp_path / "runs")


def files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"}


# ---- Making it ------------------------------------------------------------------------------------------------------------


def test_a_reference_has_what_each_seed_measured(made, config):
    reference, runs = made
    assert reference.seeds == tuple(range(SEEDS))
    assert [each.step for each in reference.evaluations] == [3, 6]
    for seed in reference.seeds:
        rows = read_metrics(runs / str(seed) / "metrics.jsonl")
        for name in ("val_loss", "train_loss", "grad_norm"):
            measured = [row[name] for row in rows if name in row]
            assert [getattr(each, name)[seed] for each in reference.evaluations] == pytest.approx(measured, abs=1e-5)
        rates = [row["learning_rate"] for row in rows if "learning_rate" in row]
        assert [each.learning_rate for each in reference.evaluations] == pytest.approx(rates, rel=1e-5)
    assert reference.final["loss"] == pytest.approx(reference.evaluations[-1].val_loss, abs=2e-5)
    assert len(set(reference.final["loss"])) == SEEDS


def test_a_reference_records_how_it_was_made(made, config):
    reference, _ = made
    assert reference.is_comparable(config.override(vocab_size=6), reference.sources)
    assert (reference.preset, reference.command) == ("toy", MADE_WITH_COMMAND)
    assert (reference.config.training.sample_every, reference.config.training.patience) == (0, 0)
    assert reference.config.data.data_dir is None
    assert set(reference.sources) == {"text", "tokenizer"}
    assert set(reference.data_facts) == {"unknown", "also_in_training"}
    assert {"jax", "python", "device"} <= set(reference.made_with)
    assert "cores" in reference.machine


def test_complete_runs_are_kept_and_give_the_same_reference(made, config):
    reference, runs = made
    before = files(runs)
    assert make_reference("toy", config, runs, SEEDS, MADE_WITH_COMMAND) == reference
    assert files(runs) == before


@pytest.mark.parametrize("changes", [{"learning_rate": 2e-3}, {"steps": 8}, {"eval_every": 2}, {"log_every": 1}], ids=str)
def test_runs_with_other_settings_are_refused_and_left_unchanged(made, config, changes):
    _, runs = made
    before = files(runs)
    [(name, value)] = changes.items()
    words = (str(runs / "0"), f"{name}=", str(value), "--workdir", "--overwrite")
    assert_raises(DataError, make_reference, "toy", config.override(changes), runs, SEEDS, MADE_WITH_COMMAND, says=words)
    assert files(runs) == before


def edit(path, change):
    """Changes a JSON file, or each line of a .jsonl."""
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    path.write_text("".join(json.dumps(change(json.loads(line))) + "\n" for line in lines))


def collect(config, runs):
    config = config.override(sample_every=0)
    return reference_runs.collect("toy", config, [runs / str(seed) for seed in range(SEEDS)], MADE_WITH_COMMAND)


def test_runs_of_other_versions_or_data_are_not_combined(config, runs_to_change):
    info = runs_to_change / "3" / "checkpoints" / "6" / "checkpoint.json"
    original = info.read_text()
    edit(info, lambda values: values | {"made_with": values["made_with"] | {"jax": "0.0.1"}})
    assert_raises(DataError, collect, config, runs_to_change, says=(str(runs_to_change / "3"), "jax", "--overwrite"))
    info.write_text(original)
    edit(info, lambda values: values | {"sources": values["sources"] | {"text": "0"}})
    assert_raises(DataError, collect, config, runs_to_change, says=(str(runs_to_change / "3"), "data", "--overwrite"))
    info.write_text(original)
    assert collect(config, runs_to_change).seeds == tuple(range(SEEDS))


def test_runs_evaluated_at_other_steps_or_not_finite_are_not_combined(config, runs_to_change):
    metrics = runs_to_change / "4" / "metrics.jsonl"
    original = metrics.read_text()
    edit(metrics, lambda row: row | {"step": 4 if row["step"] == 3 else row["step"]})
    assert_raises(DataError, collect, config, runs_to_change, says=(str(runs_to_change), "--overwrite"))
    metrics.write_text(original)
    edit(metrics, lambda row: row | ({"val_loss": None} if "val_loss" in row else {}))
    assert_raises(DataError, collect, config, runs_to_change, says=(str(runs_to_change / "4"), "3"))


def test_too_few_seeds_are_refused(config, tmp_path):
    words = ("seeds=4", "5")
    assert_raises(UsageError, make_reference, "toy", config, tmp_path / "new", 4, MADE_WITH_COMMAND, says=words)
    assert not (tmp_path / "new").exists()


# ---- Runs that are compared with it ---------------------------------------------------------------------------------------


def evaluations_and_warnings(config, workdir, caplog):
    caplog.clear()
    with caplog.at_level(logging.INFO):
        train(config.override(sample_every=0, patience=0), workdir)
    return [line for line in logged(caplog) if "  validation loss " in line], logged(caplog, "WARNING")


def shifted(reference, by):
    evaluations = [
        dataclasses.replace(each, val_loss=tuple(loss + by for loss in each.val_loss)) for each in reference.evaluations
    ]
    return dataclasses.replace(reference, evaluations=tuple(evaluations))


def test_each_evaluation_says_whether_the_loss_is_expected(made, config, tmp_path, own_references, caplog):
    reference, _ = made
    path = own_references / "toy.json"
    another = config.override(seed=7)

    path.write_text(reference.to_json())
    lines, warnings = evaluations_and_warnings(another, tmp_path / "normal", caplog)
    assert warnings == []
    for line, step in zip(lines, (3, 6), strict=True):
        assert_says(line, f"{step}/6", "as expected", str(reference.band(step)))

    path.write_text(shifted(reference, 3.0).to_json())
    lines, warnings = evaluations_and_warnings(another, tmp_path / "low", caplog)
    assert not any("expected" in line for line in lines)
    for warning, step in zip(warnings, (3, 6), strict=True):
        assert_says(warning, "lower", "5", "toy", str(shifted(reference, 3.0).band(step)), "Likely causes", "easier")

    path.write_text(shifted(reference, -3.0).to_json())
    _, warnings = evaluations_and_warnings(another, tmp_path / "high", caplog)
    for warning in warnings:
        assert_says(warning, "higher", "Likely causes", "overfitting")
    assert len(warnings) == 2


def test_a_run_that_cannot_be_compared_is_silent(made, config, tmp_path, own_references, caplog, folder):
    reference, _ = made
    (own_references / "toy.json").write_text(shifted(reference, 3.0).to_json())
    lines, warnings = evaluations_and_warnings(config.override(learning_rate=0.5), tmp_path / "settings", caplog)
    (folder / "other.txt").write_text(TEXT[::-1])
    others, more = evaluations_and_warnings(config.override(dataset=str(folder / "other.txt")), tmp_path / "text", caplog)
    assert warnings + more == []
    assert len(lines + others) == 4
    assert not any("expected" in line for line in lines + others)


@pytest.mark.slow
def test_a_text_of_the_same_name_that_has_changed_is_named_only_if_the_loss_is_unusual(
    made, config, tmp_path, own_references, caplog
):
    reference, _ = made
    other = dataclasses.replace(reference, sources=reference.sources | {"text": "0" * 64})
    (own_references / "toy.json").write_text(other.to_json())
    lines, warnings = evaluations_and_warnings(config, tmp_path / "normal", caplog)
    assert (len(lines), warnings) == (2, [])
    assert not any("expected" in line for line in lines)
    (own_references / "toy.json").write_text(shifted(other, 3.0).to_json())
    _, warnings = evaluations_and_warnings(config, tmp_path / "low", caplog)
    assert_says(warnings[0], "another text", "checksum")


def test_a_loss_that_is_not_finite_is_not_compared(made, config, tmp_path, own_references, caplog, monkeypatch):
    reference, _ = made
    (own_references / "toy.json").write_text(reference.to_json())
    monkeypatch.setattr(
        "minigpt_jax.tasks.language_modelling.LanguageModelling.evaluate", lambda *_, **__: {"loss": math.nan}
    )
    lines, warnings = evaluations_and_warnings(config, tmp_path / "run", caplog)
    assert (len(lines), warnings) == (2, [])


def test_the_reference_of_a_run_is_found_from_its_folder(made, config, own_references, tmp_path):
    reference, runs = made
    assert references.of_run(runs / "0") is None
    path = own_references / "toy.json"
    path.write_text(reference.to_json())
    assert references.of_run(runs / "0") == Reference.read(path)
    assert references.of_run(runs) is None
    (tmp_path / "config.json").write_text(config.to_json())  # a run without a checkpoint
    assert references.of_run(tmp_path) is None
    path.write_text(dataclasses.replace(reference, sources=reference.sources | {"text": "0" * 64}).to_json())
    assert references.of_run(runs / "0") is None
