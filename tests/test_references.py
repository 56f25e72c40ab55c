"""References: the expected band, which runs it applies to, the shipped files, and the likely causes of another loss."""

import dataclasses
import json
import logging
from types import MappingProxyType

import numpy as np
import pytest
from helpers import assert_raises, assert_says, logged
from scipy import stats

from minigpt_jax.config import NAME_THE_TEXT, ChatConfig, Config, TrainingConfig, differences, load_preset, preset_names
from minigpt_jax.data.corpora import CORPORA
from minigpt_jax.errors import DataError
from minigpt_jax.runs import references
from minigpt_jax.runs.references import MIN_SEEDS, REFERENCES_DIR, T_QUANTILES, Evaluation, Reference, expected
from minigpt_jax.training.causes import Evidence, likely_causes

SOURCES = {"text": "1" * 64, "tokenizer": "2" * 64}
FACTS = {"unknown": 0.02, "also_in_training": 0.01}
MADE_WITH = {"python": "3.11", "machine": "x86_64", "jax": "0.10.2", "jax_default_matmul_precision": "None"}
CONFIG = Config(training=TrainingConfig(steps=20, log_every=5, eval_every=10)).override(vocab_size=65)
REFERENCE = Reference(
    preset="toy", command="python scripts/reference.py", date="2026-01-01", machine="a laptop", made_with=MADE_WITH,
    sources=SOURCES, data_facts=FACTS, seeds=(0, 1, 2, 3, 4), final={"loss": (3.0, 3.1, 3.2, 3.3, 3.4)}, config=CONFIG,
    evaluations=(
        Evaluation(10, (4.0, 4.1, 4.2, 4.3, 4.4), (3.8, 3.9, 4.0, 4.1, 4.2), (1.0, 1.2, 1.4, 1.6, 2.0), 1e-3),
        Evaluation(20, (3.0, 3.1, 3.2, 3.3, 3.4), (2.8, 2.9, 3.1, 3.0, 3.2), (0.6, 0.7, 0.8, 0.9, 1.0), 1e-4),
    ),
)  # fmt: skip


# ---- The band -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", T_QUANTILES)
def test_the_band_is_the_prediction_interval_of_students_t(n):
    values = np.random.default_rng(n).normal(1.6, 0.01, n)
    scale = values.std(ddof=1) * np.sqrt(1 + 1 / n)
    band = expected([*values])
    assert (band.lowest, band.highest) == pytest.approx(stats.t.interval(0.99, n - 1, values.mean(), scale), abs=1e-5)


def test_beyond_ten_seeds_the_band_is_too_wide_rather_than_too_narrow():
    values = np.random.default_rng(0).normal(1.6, 0.01, 15)
    lowest, highest = stats.t.interval(0.99, 14, values.mean(), values.std(ddof=1) * np.sqrt(1 + 1 / 15))
    band = expected([*values])
    assert band.lowest < lowest < highest < band.highest


def test_of_100_further_seeds_one_is_outside():
    random = np.random.default_rng(0)
    seeds = random.normal(1.6, 0.01, (3000, MIN_SEEDS + 1))
    assert np.mean([another in expected([*five]) for *five, another in seeds]) == pytest.approx(0.99, abs=0.005)


def test_a_step_that_was_not_evaluated_has_no_band():
    assert REFERENCE.band(15) is None
    assert REFERENCE.band(20) == expected(REFERENCE.evaluations[1].val_loss)


# ---- Which runs can be compared -------------------------------------------------------------------------------------------

OTHER_TEXT = SOURCES | {"text": "3" * 64}


@pytest.mark.parametrize(
    "changes, sources, is_comparable",
    [
        ({}, SOURCES, True),
        ({"seed": 9, "log_every": 2, "eval_every": 4, "sample_every": 0, "data_dir": "there", "patience": 3}, SOURCES, True),
        ({"dataset": "the/same.txt", "encoding": "utf-16"}, SOURCES, True),
        ({}, OTHER_TEXT, True),  # the text of this name has changed
        ({"vocab_size": 66}, OTHER_TEXT, True),  # and so have its characters
        ({"vocab_size": 66}, SOURCES | {"tokenizer": "3" * 64}, False),
        ({"dataset": "another.txt"}, OTHER_TEXT, False),
        ({"val_dataset": "another.txt"}, OTHER_TEXT, False),
        *(
            ({name: value}, SOURCES, False)
            for name, value in {
                "learning_rate": 2e-3, "batch_size": 8, "steps": 21, "epochs": 1.0, "eval_batches": 3, "num_layers": 2,
                "tokenizer": "byte", "ema": 0.9, "init_from": "there", "freeze": "*", "vocab_size": 66,
            }.items()
        ),
    ],
    ids=str,
)  # fmt: skip
def test_a_run_is_compared_if_its_settings_and_data_are_the_same(changes, sources, is_comparable):
    assert REFERENCE.is_comparable(CONFIG.override(changes), sources) == is_comparable
    assert REFERENCE.has_data(sources) == (sources == SOURCES)


def test_another_task_is_not_compared():
    assert not REFERENCE.is_comparable(dataclasses.replace(CONFIG, data=ChatConfig()), SOURCES)


def test_the_reference_with_the_same_data_is_preferred_and_corrupt_files_are_logged(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(references, "REFERENCES_DIR", tmp_path)
    assert references.find(CONFIG, SOURCES) is None
    for name, sources in {"a": OTHER_TEXT, "b": SOURCES, "c": OTHER_TEXT}.items():
        (tmp_path / f"{name}.json").write_text(dataclasses.replace(REFERENCE, preset=name, sources=sources).to_json())
    (tmp_path / "broken.json").write_text("{")
    with caplog.at_level(logging.INFO):
        found = references.find(CONFIG, SOURCES)
    assert found.preset == "b"
    [warning] = logged(caplog, "WARNING")
    assert_says(warning, str(tmp_path / "broken.json"))
    assert references.find(CONFIG.override(learning_rate=2e-3), SOURCES) is None


# ---- Files ----------------------------------------------------------------------------------------------------------------


def test_json_round_trip_gives_an_equal_reference_with_the_seeds_on_one_line(tmp_path):
    path = tmp_path / "toy.json"
    path.write_text(REFERENCE.to_json())
    assert Reference.read(path) == REFERENCE
    assert '"val_loss": [4.0, 4.1, 4.2, 4.3, 4.4],\n' in path.read_text()


def changed(**changes):
    return lambda values: json.dumps(values | changes)


@pytest.mark.parametrize(
    "damage",
    [
        lambda values: "[]",
        lambda values: json.dumps(values)[:-2],
        lambda values: json.dumps({name: value for name, value in values.items() if name != "seeds"}),
        changed(more=1),
        changed(seeds=[0, 1, 2, 3], final={}, evaluations=[]),
        changed(final={"loss": [3.0, 3.1, 3.2, 3.3]}),
        changed(final={"loss": [3.0, 3.1, 3.2, 3.3, float("nan")]}),
        changed(evaluations=[{"step": 10, "val_loss": [4.0, 4.1, 4.2, 4.3, None]}]),
        changed(evaluations=[{"step": 10, "val_loss": [4.0, 4.1, 4.2, 4.3, 4.4], "train_loss": ["4"] * 5}]),
        changed(evaluations=[{"step": 10}]),
        changed(config={"task": "language_modelling"}),
    ],
)
def test_a_file_that_is_not_a_reference_is_an_error_that_names_it(tmp_path, damage):
    path = tmp_path / "toy.json"
    path.write_text(damage(json.loads(REFERENCE.to_json())))
    assert_raises(DataError, Reference.read, path, says=(str(path),))


def test_a_missing_file_is_an_error_that_names_it(tmp_path):
    assert_raises(DataError, Reference.read, tmp_path / "none.json", says=(str(tmp_path / "none.json"),))


SHIPPED = sorted(REFERENCES_DIR.glob("*.json"))


def test_references_are_shipped():
    assert {path.stem for path in SHIPPED} >= {"debug"}
    assert {path.stem for path in SHIPPED} <= set(preset_names())


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_reference_has_the_present_settings_of_its_preset(path):
    """If this fails after a change of the preset or the defaults, make the reference again with its command."""
    reference = Reference.read(path)
    preset = load_preset(path.stem).with_data_settings_of(reference.config)
    assert reference.preset == path.stem
    assert set(differences(preset, reference.config)) - preset.neutral_settings <= NAME_THE_TEXT
    every, last = preset.training.eval_every, reference.evaluations[-1].step
    assert [each.step for each in reference.evaluations] == sorted({*range(every, last, every), last})
    assert preset.training.steps in (last, None)
    if reference.config.task == "language_modelling" and reference.config.data.dataset in CORPORA:
        assert reference.sources["text"] == CORPORA[reference.config.data.dataset].sha256
    assert f"--config {path.stem}" in reference.command
    assert all((reference.date, reference.machine, reference.made_with["jax"]))


# ---- Likely causes --------------------------------------------------------------------------------------------------------

ROWS = (
    {"step": 5, "train_loss": 4.5, "learning_rate": 2e-3, "grad_norm": 2.0},
    {"step": 10, "train_loss": 4.0, "learning_rate": 1e-3, "grad_norm": 1.4},
    {"step": 10, "val_loss": 4.2},
    {"step": 15, "train_loss": 3.5, "learning_rate": 5e-4, "grad_norm": 1.0},
    {"step": 20, "train_loss": 3.0, "learning_rate": 1e-4, "grad_norm": 0.8},
    {"step": 20, "val_loss": 9.0},
)
NORMAL = Evidence(
    20, 9.0, is_low=False, rows=ROWS, log_every=5, sources=SOURCES, data_facts=MappingProxyType(FACTS), made_with=MADE_WITH
)


def with_row(step, **changes):
    """The rows, with other training metrics at this step."""
    return tuple(row | changes if row["step"] == step and "train_loss" in row else row for row in ROWS)


def causes_of(**changes):
    return likely_causes(REFERENCE, dataclasses.replace(NORMAL, **changes))


@pytest.mark.parametrize(
    "val_loss, train_loss, word",
    [
        (9.0, 3.0, "overfitting"),
        (9.0, 8.8, "optimizer"),
        (9.0, 9.9, "easier"),
        (1.0, 0.1, "overfitting"),
        (1.0, 0.8, "mask"),
        (1.0, 3.0, "easier"),
    ],
)
def test_the_gap_to_the_training_loss_says_where_to_look(val_loss, train_loss, word):
    rows, usual = with_row(20, train_loss=train_loss), expected([0.2, 0.2, 0.1, 0.3, 0.2])
    [cause] = causes_of(val_loss=val_loss, rows=rows, is_low=val_loss < 2)
    assert_says(cause, "training loss", f"{val_loss - train_loss:.3f}", str(usual), word)


@pytest.mark.parametrize(
    "changes, has_gap",
    [
        ({"sources": OTHER_TEXT}, False),
        ({"rows": with_row(20, learning_rate=3e-4)}, False),
        ({"rows": with_row(20, grad_norm=3.1)}, True),
        ({"made_with": MADE_WITH | {"jax": "0.11.0"}}, True),
    ],
    ids=str,
)
def test_other_data_or_learning_rates_are_conclusive_without_the_gap(changes, has_gap):
    assert ["training loss" in cause for cause in causes_of(**changes)].count(True) == has_gap


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"sources": OTHER_TEXT}, ["text"]),
        ({"sources": {"text": SOURCES["text"]}}, ["tokenizer"]),
        ({"data_facts": FACTS | {"unknown": 0.05}}, ["unknown", "5.0%", "2.0%"]),
        ({"data_facts": FACTS | {"also_in_training": 0.9}, "is_low": True}, ["training text", "90.0%", "1.0%"]),
        ({"rows": with_row(20, learning_rate=3e-4)}, ["learning rate", "3.0e-04", "20", "1.0e-04"]),
        ({"rows": with_row(10, learning_rate=9.8e-4)}, ["learning rate", "9.8e-04", "10", "1.0e-03"]),
        ({"rows": with_row(20, skipped_steps=7)}, ["7", "finite"]),
        ({"rows": with_row(20, grad_norm=2.1)}, ["gradient norm", "2.1", "0.6", "1"]),
        ({"rows": with_row(20, grad_norm=0.29)}, ["gradient norm", "0.29", "0.6", "1"]),
        ({"made_with": MADE_WITH | {"jax": "0.11.0"}}, ["jax", "0.11.0", "0.10.2"]),
    ],
    ids=str,
)
def test_what_differs_from_the_reference_is_a_likely_cause(changes, words):
    [cause] = [cause for cause in causes_of(**changes) if "training loss" not in cause]
    assert_says(cause, *words)


@pytest.mark.parametrize(
    "changes",
    [
        {"data_facts": FACTS | {"unknown": 0.029}},
        {"data_facts": FACTS | {"also_in_training": 0.9}},  # would make the loss lower, not higher
        {"data_facts": FACTS | {"also_in_training": 0.019}, "is_low": True},
        {"rows": with_row(20, learning_rate=1.005e-4)},
        {"rows": with_row(5, learning_rate=9.0)},  # the reference has no evaluation at this step
        {"rows": with_row(20, grad_norm=1.9)},
        {"rows": with_row(20, grad_norm=0.31)},
        {"made_with": MADE_WITH | {"python": "3.13", "machine": "arm64"}},
    ],
    ids=str,
)
def test_what_is_usual_is_not_a_cause(changes):
    assert [cause for cause in causes_of(**changes) if "training loss" not in cause] == []


@pytest.mark.parametrize(
    "changes", [{"rows": ROWS[-1:]}, {"log_every": 10}, {"rows": with_row(20, train_loss=None, grad_norm=None)}], ids=str
)
def test_metrics_that_are_missing_or_not_comparable_are_not_used(changes):
    """The training loss is a mean since the previous row."""
    assert causes_of(**changes) == []


def test_a_reference_without_training_metrics_has_only_its_losses():
    evaluations = tuple(Evaluation(each.step, each.val_loss) for each in REFERENCE.evaluations)
    assert likely_causes(dataclasses.replace(REFERENCE, evaluations=evaluations), NORMAL) == []
