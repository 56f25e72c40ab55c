"""The tables of Hugging Face's architectures are complete: nothing of a model is dropped in silence."""

import dataclasses

import numpy as np
import pytest
from flax import traverse_util
from helpers import random_params, random_tokens

from minigpt_jax.config import ModelConfig
from minigpt_jax.data.tokenizers import CharTokenizer
from minigpt_jax.errors import DataError
from minigpt_jax.generation.language_model import LanguageModel
from minigpt_jax.interop.architectures import ARCHITECTURES, parameter_shapes, tensors
from minigpt_jax.interop.hf_reader import read
from minigpt_jax.interop.hf_writer import write
from minigpt_jax.models.gpt import GPT

SIZES = {"num_layers": 2, "num_heads": 2, "embed_dim": 8, "ff_dim": 12, "context_length": 16, "vocab_size": 3}
TOKENS_BT = random_tokens(2, 16, vocab_size=3)
BLOCK = "transformer/block_0"


def config(model_type, **changes):
    return ModelConfig(**SIZES | ARCHITECTURES[model_type].choices | changes)


def model(model_type, **changes):
    made = config(model_type, **changes)
    return LanguageModel(made, CharTokenizer("abc"), random_params(GPT(made), TOKENS_BT))


def with_parameters(written, changes):
    """The model with parameters added by their paths, or taken out where the value is `...`."""
    parameters = traverse_util.flatten_dict(written.params, sep="/") | changes
    kept = {path: value for path, value in parameters.items() if value is not ...}
    return dataclasses.replace(written, params=traverse_util.unflatten_dict(kept, sep="/"))


@pytest.mark.parametrize("model_type", ARCHITECTURES)
@pytest.mark.parametrize("bias", [False, True])
def test_a_parameter_without_a_place_is_refused_by_name(tmp_path, model_type, bias):
    stray = with_parameters(model(model_type, bias=bias), {f"{BLOCK}/attention/gain": np.ones(8, np.float32)})
    with pytest.raises(DataError, match=f"^{model_type} has no place for the model's parameters {BLOCK}/attention/gain$"):
        write(stray, tmp_path / "new" / "model")
    assert list(tmp_path.iterdir()) == []


def test_many_parameters_without_a_place_are_counted(tmp_path):
    stray = with_parameters(model("llama"), {f"gain/{letter}": np.ones(8, np.float32) for letter in "edcba"})
    with pytest.raises(DataError, match=r"parameters gain/a, gain/b, gain/c and 2 more$"):
        write(stray, tmp_path / "model")


@pytest.mark.parametrize("model_type", ARCHITECTURES)
@pytest.mark.parametrize(
    "changes, path", [({}, f"{BLOCK}/attention/key/bias"), ({"tie_embeddings": True}, "head/kernel")], ids=["bias", "head"]
)
def test_a_parameter_that_the_settings_deny_is_refused(tmp_path, model_type, changes, path):
    denied = with_parameters(model(model_type, **changes), {path: np.ones(8, np.float32)})
    with pytest.raises(DataError, match=f"has no place for the model's parameters {path}$"):
        write(denied, tmp_path / "model")


@pytest.mark.parametrize("model_type", ARCHITECTURES)
@pytest.mark.parametrize("part", ["kernel", "bias"])
def test_a_missing_parameter_is_named(tmp_path, model_type, part):
    """A bias, too: only those that the settings do without become zeros."""
    path = f"{BLOCK}/attention/query/{part}"
    with pytest.raises(DataError, match=f"lacks the parameters {path}, which"):
        write(with_parameters(model(model_type, bias=True), {path: ...}), tmp_path / "model")


@pytest.mark.parametrize("model_type", ARCHITECTURES)
@pytest.mark.parametrize("path", ["feed_forward/up/kernel", "attention/value/kernel", "attention_norm/scale"])
def test_nothing_is_written_or_read_by_a_table_that_lacks_a_parameter(tmp_path, monkeypatch, model_type, path):
    write(model(model_type), tmp_path / "before")
    table = ARCHITECTURES[model_type]
    layer = tuple(row for row in table.layer if not any(parameter.endswith(path) for parameter in row.parameters))
    monkeypatch.setitem(ARCHITECTURES, model_type, dataclasses.replace(table, layer=layer))
    for use in (lambda: write(model(model_type), tmp_path / "after"), lambda: read(tmp_path / "before")):
        with pytest.raises(DataError, match=f"^{model_type} has no place for the model's parameters .*{path}"):
            use()


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_row_of_a_table_holds_parameters(model_type):
    table, with_everything = ARCHITECTURES[model_type], config(model_type, bias=True)
    rows = len(table.outside) + SIZES["num_layers"] * len(table.layer) + len(["head"])
    assert len(tensors(with_everything, model_type, parameter_shapes(with_everything))) == rows
