"""The tables of Hugging Face architectures are complete: no part of a model is dropped silently."""

import dataclasses
import json
import re

import numpy as np
import pytest
from flax import traverse_util
from helpers import assert_raises, blocking_settings, random_params, random_tokens
from settings import other_values

from minigpt_jax.config import ModelConfig, setting
from minigpt_jax.data.tokenizers import CharTokenizer
from minigpt_jax.errors import DataError
from minigpt_jax.generation.language_model import LanguageModel
from minigpt_jax.interop.architectures import ARCHITECTURES, NOT_STORED, parameter_shapes, tensors, with_vocab_rows
from minigpt_jax.interop.hf_reader import read
from minigpt_jax.interop.hf_writer import model_type_of, write
from minigpt_jax.models.gpt import GPT

pytestmark = pytest.mark.slow

SIZES = {"num_layers": 2, "num_heads": 4, "embed_dim": 8, "ff_dim": 12, "context_length": 16, "vocab_size": 3}
TOKENS_BT = random_tokens(2, 16, vocab_size=3)
BLOCK = "transformer/block_0"


def config(model_type, **changes):
    return ModelConfig(**SIZES | ARCHITECTURES[model_type].choices | changes)


def changed(model_type, name):
    """The architecture's config with one setting changed, once for each other value."""
    plain = config(model_type)
    (field,) = (field for field in dataclasses.fields(plain) if field.name == name)
    return [dataclasses.replace(plain, **{name: value}) for value in other_values(plain, field)]


def model(model_type, **changes):
    model_config = config(model_type, **changes)
    return LanguageModel(model_config, CharTokenizer("abc"), random_params(GPT(model_config), TOKENS_BT))


def with_parameters(written, changes):
    """The model with parameters added by path, or removed where the value is `...`."""
    parameters = traverse_util.flatten_dict(written.params, sep="/") | changes
    kept = {path: value for path, value in parameters.items() if value is not ...}
    return dataclasses.replace(written, params=traverse_util.unflatten_dict(kept, sep="/"))


def parameters(message):
    """The parameter paths named in a message."""
    return re.findall(r"\w+(?:/\w+)+", message)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_no_setting_is_in_two_tables_and_none_is_unknown(model_type):
    """A setting in no table is rejected unless it has its default, so a new setting needs no row."""
    table = ARCHITECTURES[model_type]
    named = [*table.choices, *table.settings, *NOT_STORED]
    assert len(named) == len(set(named))
    assert set(named) <= {field.name for field in dataclasses.fields(ModelConfig)}


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_transformers_knows_the_names_of_the_settings(model_type):
    """Except `bias` for GPT-2, which always has biases."""
    transformers = pytest.importorskip("transformers")
    theirs, table = transformers.AutoConfig.for_model(model_type), ARCHITECTURES[model_type]
    assert [name for name in {*table.settings.values(), *table.defaults} - {"bias"} if not hasattr(theirs, name)] == []


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_other_choices_are_rejected_by_name_but_other_settings_are_not(model_type):
    table = ARCHITECTURES[model_type]
    for name in table.choices:
        for other in changed(model_type, name):
            message = assert_raises(DataError, model_type_of, other)
            assert blocking_settings(message, model_type)[name] == str(getattr(other, name))
    for name in (*table.settings, *NOT_STORED):
        assert [model_type_of(other) for other in changed(model_type, name)] == [model_type]


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_settings_that_are_not_stored_do_not_change_the_logits(model_type):
    written = model(model_type)
    logits_BTV, _ = GPT(written.config).apply({"params": written.params}, TOKENS_BT)
    for name in NOT_STORED:
        for other in changed(model_type, name):
            params = with_vocab_rows(written.params, other.num_embeddings)
            others_BTV, _ = GPT(other).apply({"params": params}, TOKENS_BT)
            tolerance = 0.1 if name == "dtype" else 1e-6  # bfloat16 has 8 bits of precision
            np.testing.assert_allclose(others_BTV, logits_BTV, atol=tolerance * np.std(logits_BTV), rtol=0, err_msg=name)


def test_a_gpt2_is_exported_without_dropout(tmp_path):
    write(model("gpt2"), tmp_path / "model")
    values = json.loads((tmp_path / "model" / "config.json").read_text())
    assert [values[name] for name in ("embd_pdrop", "resid_pdrop", "attn_pdrop")] == [0.0] * 3  # not 0.1, the default


@dataclasses.dataclass(frozen=True)
class LaterConfig(ModelConfig):
    later_gain: bool = setting(False, "a setting in no table")


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_setting_in_no_table_is_rejected_unless_it_has_its_default(tmp_path, model_type):
    plain = model(model_type)
    later = LaterConfig(**dataclasses.asdict(plain.config))
    assert write(dataclasses.replace(plain, config=later), tmp_path / "default") == model_type
    used = dataclasses.replace(plain, config=dataclasses.replace(later, later_gain=True))
    message = assert_raises(DataError, write, used, tmp_path / "used")
    assert blocking_settings(message, model_type) == {"later_gain": "True"}


@pytest.mark.parametrize("model_type", ARCHITECTURES)
@pytest.mark.parametrize("bias", [False, True])
def test_an_unmapped_parameter_is_rejected_by_name(tmp_path, model_type, bias):
    extended = with_parameters(model(model_type, bias=bias), {f"{BLOCK}/attention/gain": np.ones(8, np.float32)})
    message = assert_raises(DataError, write, extended, tmp_path / "new" / "model", says=(model_type,))
    assert parameters(message) == [f"{BLOCK}/attention/gain"]
    assert list(tmp_path.iterdir()) == []


def test_many_unmapped_parameters_are_counted(tmp_path):
    extended = with_parameters(model("llama"), {f"gain/{letter}": np.ones(8, np.float32) for letter in "edcba"})
    message = assert_raises(DataError, write, extended, tmp_path / "model", says=("llama", "2"))
    assert parameters(message) == ["gain/a", "gain/b", "gain/c"]


@pytest.mark.parametrize("model_type", ARCHITECTURES)
@pytest.mark.parametrize(
    "changes, path", [({}, f"{BLOCK}/attention/key/bias"), ({"tie_embeddings": True}, "head/kernel")], ids=["bias", "head"]
)
def test_a_parameter_that_contradicts_the_settings_is_rejected(tmp_path, model_type, changes, path):
    contradictory = with_parameters(model(model_type, **changes), {path: np.ones(8, np.float32)})
    message = assert_raises(DataError, write, contradictory, tmp_path / "model", says=(model_type,))
    assert parameters(message) == [path]


@pytest.mark.parametrize("model_type", ARCHITECTURES)
@pytest.mark.parametrize("part", ["kernel", "bias"])
def test_a_missing_parameter_is_named(tmp_path, model_type, part):
    """Including a bias: only biases that the settings turn off are stored as zeros."""
    path = f"{BLOCK}/attention/query/{part}"
    message = assert_raises(DataError, write, with_parameters(model(model_type, bias=True), {path: ...}), tmp_path / "model")
    assert parameters(message) == [path]


@pytest.mark.parametrize("model_type", ARCHITECTURES)
@pytest.mark.parametrize("path", ["feed_forward/up/kernel", "attention/value/kernel", "attention_norm/scale"])
def test_a_table_that_lacks_a_parameter_neither_writes_nor_reads(tmp_path, monkeypatch, model_type, path):
    write(model(model_type), tmp_path / "before")
    table = ARCHITECTURES[model_type]
    layer = tuple(row for row in table.layer if not any(parameter.endswith(path) for parameter in row.parameters))
    monkeypatch.setitem(ARCHITECTURES, model_type, dataclasses.replace(table, layer=layer))
    for use in (lambda: write(model(model_type), tmp_path / "after"), lambda: read(tmp_path / "before")):
        assert_raises(DataError, use, says=(model_type, path))


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_row_of_a_table_has_parameters(model_type):
    table, with_everything = ARCHITECTURES[model_type], config(model_type, bias=True)
    rows = len(table.outside) + SIZES["num_layers"] * len(table.layer) + len(["head"])
    assert len(tensors(with_everything, model_type, parameter_shapes(with_everything))) == rows
