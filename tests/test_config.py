"""Configs: validation and its error messages, overrides, reference results, JSON and presets."""

import dataclasses
import inspect
import json
import math
import os
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_raises, assert_says

from minigpt_jax import commands
from minigpt_jax.api import evaluate, train
from minigpt_jax.config import (
    SECTIONS,
    SETTINGS,
    TASKS,
    Config,
    DataConfig,
    ModelConfig,
    ReferenceResult,
    TrainingConfig,
    differences,
    get_setting,
    load_preset,
    preset_names,
    setting_type,
    settings_of,
)
from minigpt_jax.errors import OUR_NAMES, DataError, UsageError, did_you_mean
from minigpt_jax.generation.language_model import LanguageModel
from minigpt_jax.generation.strategy import BeamConfig, DecodingConfig

REFERENCE_RESULT = ReferenceResult(mean=1.7, spread=0.01, seeds=3)


def config_of(name):
    """A config of the first task that has this setting."""
    sections = [section for section in TASKS.values() if name in settings_of(SECTIONS | {"data": section})]
    return Config(data=sections[0]()) if sections else Config()


def with_setting(name, value):
    return config_of(name).override({name: value})


def names(condition):
    """The settings for which `condition(rules, kind)` is true."""
    return [name for name, entry in SETTINGS.items() if condition(entry.field.metadata, setting_type(entry.field))]


# ---- One field at a time --------------------------------------------------------------------------------------------------


def test_settings_have_unique_names_and_a_help_text():
    for data in TASKS.values():
        sections = SECTIONS | {"data": data}
        assert len(settings_of(sections)) == sum(len(dataclasses.fields(section)) for section in sections.values())
    assert all(entry.field.metadata["help"] for entry in SETTINGS.values())


def test_public_settings_keep_their_names():
    public = """
        num_layers num_heads num_kv_heads embed_dim ff_dim context_length dropout bias positions norm norm_placement
        activation qk_norm tie_embeddings dtype
        batch_size steps epochs grad_accumulation learning_rate min_learning_rate warmup_steps weight_decay beta1 beta2
        grad_clip seed eval_every checkpoint_every sample_every log_every keep_checkpoints
        dataset data_dir tokenizer vocab_size
    """
    assert set(public.split()) <= set(SETTINGS)


def test_only_settings_that_do_not_affect_completed_steps_may_change_on_resuming():
    expected = """steps epochs eval_every checkpoint_every sample_every log_every keep_checkpoints data_dir patience
    max_bad_steps dataset val_dataset encoding"""
    assert sorted(names(lambda rules, kind: rules["may_change"])) == sorted(expected.split())


@pytest.mark.parametrize("name", names(lambda rules, kind: rules["choices"]))
def test_all_choices_are_accepted_and_a_typo_gets_a_suggestion(name):
    choices = SETTINGS[name].field.metadata["choices"]
    for choice in choices:
        assert get_setting(with_setting(name, choice), name) == choice
    typo = choices[0][:-1]
    suggestion = choices[0]
    assert_raises(UsageError, with_setting, name, typo, says=(f"{name}={typo!r}", suggestion, *choices))


@pytest.mark.parametrize("name", names(lambda rules, kind: rules["at_least"] is not None))
def test_inclusive_lower_bounds(name):
    bound, kind = SETTINGS[name].field.metadata["at_least"], setting_type(SETTINGS[name].field)
    # Other settings that must fit the smallest value.
    companions = {
        "embed_dim": {"num_heads": 1, "positions": "learned"},
        "batch_size": {"grad_accumulation": 1},
        "image_size": {"patch_size": 1},
    }
    config = config_of(name).override({name: bound} | companions.get(name, {}))
    assert get_setting(config, name) == bound
    assert_raises(UsageError, with_setting, name, kind(bound - 1), says=(f"{name}={kind(bound - 1)}", str(bound)))


@pytest.mark.parametrize("name", names(lambda rules, kind: rules["above"] is not None))
def test_exclusive_lower_bounds(name):
    bound = SETTINGS[name].field.metadata["above"]
    for value in (bound, bound - 1.0):
        assert_raises(UsageError, with_setting, name, value, says=(f"{name}={value}", str(bound)))


@pytest.mark.parametrize("name", names(lambda rules, kind: rules["below"] is not None))
def test_exclusive_upper_bounds(name):
    bound, kind = SETTINGS[name].field.metadata["below"], setting_type(SETTINGS[name].field)
    just_below = bound - 1 if kind is int else math.nextafter(bound, 0)
    assert get_setting(with_setting(name, just_below), name) == just_below
    assert_raises(UsageError, with_setting, name, bound, says=(f"{name}={bound}", str(bound)))


@pytest.mark.parametrize(
    "name, value, allowed",
    [
        ("num_layers", 0, "1"),
        ("num_layers", -1, "1"),
        ("dropout", 1.0, "1.0"),
        ("dropout", -0.1, "0.0"),
        ("learning_rate", 0.0, "0.0"),
        ("epochs", 0, "0.0"),
        ("steps", 0, "1"),
        ("beta2", 1.0, "1.0"),
        ("grad_clip", 0.0, "0.0"),
        ("keep_checkpoints", 0, "1"),
        ("seed", -1, "0"),
        ("seed", 2**32, f"{2**32}"),  # JAX would truncate it to 0
        ("positions", "", "sinusoidal learned rotary"),
    ],
)
def test_important_bounds_are_enforced(name, value, allowed):
    assert_raises(UsageError, with_setting, name, value, says=(f"{name}={value!r}", *allowed.split()))


@pytest.mark.parametrize("name", names(lambda rules, kind: kind is float))
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_must_be_finite(name, value):
    assert_raises(UsageError, with_setting, name, value, says=(f"{name}={value}",))


@pytest.mark.parametrize("name", SETTINGS)
def test_values_of_the_wrong_type_are_rejected(name):
    kind = setting_type(SETTINGS[name].field)
    wrong = {int: (1.0, "1", True), float: ("0.5", True), bool: (1, "true"), str: (1, True)}[kind]
    for value in wrong:
        assert_raises(UsageError, with_setting, name, value, says=(f"{name}={value!r}", kind.__name__))


def test_only_optional_settings_accept_none():
    for name, entry in SETTINGS.items():
        if entry.field.default is None:
            assert get_setting(with_setting(name, None), name) is None
        else:
            assert_raises(UsageError, with_setting, name, None, says=(f"{name}=None", setting_type(entry.field).__name__))


def test_integers_are_accepted_for_floats():
    assert TrainingConfig(learning_rate=1, epochs=2).epochs == 2


def test_scalars_of_numpy_and_jax_become_numbers_of_python_and_paths_become_strings():
    numbers = {
        "num_layers": np.int64(3),
        "batch_size": jnp.int32(7),
        "dropout": np.float32(0.5),
        "learning_rate": np.array(0.25),
    }
    given = numbers | {"bias": np.bool_(True), "norm": np.str_("layernorm"), "dataset": Path("a") / "b.txt"}
    config = Config().override(given)
    values = {name: get_setting(config, name) for name in given}
    assert list(values.values()) == [3, 7, 0.5, 0.25, True, "layernorm", os.path.join("a", "b.txt")]
    assert [type(value) for value in values.values()] == [int, int, float, float, bool, str, str]
    assert Config.from_json(config.to_json()) == config == Config().override(**values)
    assert_raises(UsageError, with_setting, "num_layers", np.float64(3), says=("num_layers=3.0", "int"))
    assert_raises(UsageError, with_setting, "num_layers", np.array([3, 4]), says=("num_layers", "int"))
    assert_raises(UsageError, with_setting, "seed", jax.random.key(0), says=("seed", "int"))


@pytest.mark.parametrize(
    "theirs, ours", [("n_layer", "num_layers"), ("lr", "learning_rate"), ("block_size", "context_length")]
)
def test_names_of_other_libraries_are_answered_with_ours(theirs, ours):
    assert_raises(UsageError, Config().override, {theirs: 3}, says=(theirs, f"'{ours}'"))
    assert did_you_mean(theirs, ["other"]) == ""


def test_training_needs_a_config_and_evaluation_a_whole_stride(tmp_path):
    for wrong in ("shakespeare_char", ModelConfig(), None):
        assert_raises(UsageError, train, wrong, tmp_path / "run", says=("config=", "Config", "load_preset"))
    assert_raises(UsageError, evaluate, tmp_path / "run", stride="3", says=("stride='3'", "integer"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("section", ["model", "training", "data"])
def test_sections_have_their_types(section):
    assert_raises(UsageError, Config, **{section: {"num_layers": 2}}, says=(f"{section}=", "num_layers"))


def test_a_preset_may_be_given_as_a_path():
    assert load_preset(Path("debug")) == load_preset("debug") == load_preset(commands.CONFIGS_DIR / "debug.py")


def test_every_answer_is_a_setting_and_no_setting_is_a_name_of_another_library():
    ours = {*SETTINGS, *(field.name for section in (DecodingConfig, BeamConfig) for field in dataclasses.fields(section))}
    ours |= inspect.signature(LanguageModel.prepare).parameters.keys()
    assert set(OUR_NAMES.values()) <= ours
    assert not set(OUR_NAMES) & ours


# ---- Combinations of fields -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "section, values, words",
    [
        (ModelConfig, {"embed_dim": 10, "num_heads": 3}, "embed_dim=10 num_heads=3"),
        (ModelConfig, {"num_heads": 4, "num_kv_heads": 3}, "num_heads=4 num_kv_heads=3"),
        (ModelConfig, {"num_heads": 4, "num_kv_heads": 8}, "num_heads=4 num_kv_heads=8"),
        (ModelConfig, {"embed_dim": 12, "num_heads": 4}, "positions=rotary embed_dim/num_heads=3 learned sinusoidal"),
        (TrainingConfig, {"steps": 5, "epochs": 1.0}, "steps=5 epochs=1.0"),
        (TrainingConfig, {"batch_size": 12, "grad_accumulation": 5}, "batch_size=12 grad_accumulation=5"),
        (
            TrainingConfig,
            {"learning_rate": 1e-4, "min_learning_rate": 1e-3},
            "min_learning_rate=0.001 learning_rate=0.0001",
        ),
    ],
)
def test_conflicting_settings_are_named_with_their_values(section, values, words):
    assert_raises(UsageError, section, **values, says=words.split())


def test_only_rotary_positions_need_an_even_head_size():
    for positions in ("learned", "sinusoidal"):
        assert ModelConfig(embed_dim=12, num_heads=4, positions=positions).head_size == 3


def test_kv_heads_default_to_num_heads():
    assert ModelConfig(num_heads=4).kv_heads == 4
    assert ModelConfig(num_heads=4, num_kv_heads=2).kv_heads == 2


# ---- Override -------------------------------------------------------------------------------------------------------------


def test_override_changes_only_the_given_settings():
    preset = Config(model=ModelConfig(num_layers=3), data=DataConfig(dataset="a.txt"))
    changed = preset.override({"num_heads": 2, "batch_size": 7})
    assert differences(preset, changed) == {"num_heads": (4, 2), "batch_size": (12, 7)}
    assert (changed.model.num_layers, changed.data.dataset) == (3, "a.txt")
    assert preset.override({}) == preset


def test_overrides_take_precedence_over_the_preset_and_that_over_defaults():
    default, preset = ModelConfig(), load_preset("debug").model
    assert default.num_layers != preset.num_layers != 5
    assert load_preset("debug").override({"num_layers": 5}).model == dataclasses.replace(preset, num_layers=5)


def test_override_validates_combinations():
    assert_raises(UsageError, with_setting, "num_heads", 3, says=("embed_dim=128", "num_heads=3"))
    # The two are valid together, though num_heads=3 alone is not.
    assert Config().override({"num_heads": 3, "embed_dim": 96}).model.head_size == 32


def test_unknown_settings_get_a_suggestion():
    assert_raises(UsageError, with_setting, "num_layer", 3, says=("num_layer", "num_layers"))
    message = assert_raises(UsageError, with_setting, "xyzzy", 3, says=("xyzzy",))
    assert not set(re.findall(r"\w+", message)) & set(SETTINGS)


@pytest.mark.parametrize("before, after", [("steps", "epochs"), ("epochs", "steps")])
def test_steps_and_epochs_replace_each_other(before, after):
    training = Config().override({before: 20}).override({after: 3}).training
    assert getattr(training, after) == 3
    assert getattr(training, before) is None


def test_steps_and_epochs_are_mutually_exclusive():
    assert_raises(UsageError, Config().override, {"steps": 20, "epochs": 1.0}, says=("steps=20", "epochs=1.0"))


# ---- The reference result -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes", [{}, {"seed": 5}, {"eval_every": 7}, {"sample_every": 0}, {"data_dir": "elsewhere"}, {"num_layers": 4}]
)
def test_the_reference_result_is_kept_if_nothing_changes_that_affects_it(changes):
    assert Config(reference_result=REFERENCE_RESULT).override(changes).reference_result == REFERENCE_RESULT


@pytest.mark.parametrize(
    "changes",
    [
        {"num_layers": 5},
        {"batch_size": 4},
        {"steps": 3},
        {"epochs": 3.0},
        {"dataset": "a.txt"},
        {"val_dataset": "a.txt"},
        {"dropout": 0.1},
    ],
)
def test_the_reference_result_is_dropped_if_a_change_affects_it(changes):
    assert Config(reference_result=REFERENCE_RESULT).override(changes).reference_result is None


# ---- JSON -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        Config(),
        Config(reference_result=REFERENCE_RESULT),
        Config().override({"num_kv_heads": 2, "vocab_size": 65, "epochs": 0.5, "bias": True, "data_dir": "é"}),
    ],
)
def test_json_round_trip_gives_an_equal_config(config):
    assert Config.from_json(config.to_json()) == config


def test_the_old_names_of_the_reference_result_and_its_mean_are_still_read():
    config = Config(reference_result=REFERENCE_RESULT)
    assert Config.from_json(config.to_json().replace('"reference_result"', '"expectation"')) == config
    old = json.loads(config.to_json())
    del old["reference_result"]["measure"]
    old["reference_result"]["val_loss"] = old["reference_result"].pop("mean")
    assert Config.from_json(json.dumps(old)) == config


def test_a_setting_that_tasks_share_is_that_of_the_first():
    assert SETTINGS["dataset"].field.default == "shakespeare"
    assert set(SETTINGS) >= {"tokenizer", "patch_size"}


def changed_json(**changes):
    """The JSON of a config with some top-level values replaced, or removed if None."""
    values = json.loads(Config().to_json()) | changes
    return json.dumps({name: value for name, value in values.items() if value is not None} | {"reference_result": None})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '"text"',
        "{}",
        Config().to_json()[:-20],
        changed_json(model={"num_layers": 0}),
        changed_json(model={"num_layers": "4"}),
        changed_json(model={"dropout": math.nan}),
        changed_json(model={"embed_dim": 10, "num_heads": 3}),
        changed_json(model={"layers": 4}),
        changed_json(model=[1, 2]),
        changed_json(models={}),
        changed_json(model=None),
        json.dumps({"reference_result": {"val_loss": 1.0}}),
    ],
)
def test_corrupt_json_is_a_data_error(text):
    """Not a UsageError, even for an invalid setting: the file is at fault, not the command."""
    assert_raises(DataError, Config.from_json, text)


# ---- Presets --------------------------------------------------------------------------------------------------------------


def test_the_presets_named_in_commands_exist():
    assert set(preset_names()) >= {"shakespeare_char", "mini_gpt", "nanogpt_cpu", "debug"}


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_loads_and_round_trips_through_json(name):
    config = load_preset(name)
    assert Config.from_json(config.to_json()) == config
    assert config == load_preset(name)


def test_a_preset_loads_from_a_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("from minigpt_jax import Config\ndef get_config(): return Config().override({'num_layers': 7})\n")
    assert load_preset(str(path)).model.num_layers == 7


def test_an_unknown_preset_gets_a_suggestion_and_the_list(tmp_path):
    assert_raises(UsageError, load_preset, "shakespear_char", says=("shakespear_char", "shakespeare_char", *preset_names()))
    assert_raises(
        UsageError, load_preset, str(tmp_path / "missing.py"), says=(str(tmp_path / "missing.py"), *preset_names())
    )


@pytest.mark.parametrize("source", ["", "get_config = None\n", "def get_config(): return {'num_layers': 7}\n"])
def test_a_preset_file_must_return_a_config(tmp_path, source):
    path = tmp_path / "mine.py"
    path.write_text(source)
    assert_raises(UsageError, load_preset, str(path), says=(str(path), "get_config()", "Config"))


@pytest.mark.parametrize(
    "source, reason",
    [
        ("x = (", "SyntaxError"),
        ("import no_such_package", "ModuleNotFoundError: No module named 'no_such_package'"),
        ("def get_config(): 1 / 0", "ZeroDivisionError: division by zero"),
    ],
)
def test_a_failing_preset_file_is_named_with_the_reason(tmp_path, source, reason):
    path = tmp_path / "mine.py"
    path.write_text(source)
    assert_raises(UsageError, load_preset, str(path), says=(str(path), reason))


# ---- Differences and suggestions ------------------------------------------------------------------------------------------


def test_differences_give_both_values_of_settings_in_every_section():
    changes = {"num_layers": 9, "batch_size": 3, "dataset": "a.txt"}
    assert differences(Config(), Config().override(changes)) == {
        "num_layers": (4, 9),
        "batch_size": (12, 3),
        "dataset": ("shakespeare", "a.txt"),
    }
    assert differences(Config(), Config()) == {}


def test_only_similar_names_are_suggested():
    suggestion = did_you_mean("rotery", ("learned", "rotary"))
    assert_says(suggestion, "rotary")
    assert "learned" not in suggestion
    assert did_you_mean("xyzzy", ("learned", "rotary")) == ""
