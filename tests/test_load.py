"""What was trained before: behind one door, and as the beginning of a run, only where it fits."""

import dataclasses

import jax
import numpy as np
import pytest
from helpers import assert_equal, error_message

from minigpt_jax.api import load, train
from minigpt_jax.config import Config, DataConfig, ModelConfig, TrainingConfig
from minigpt_jax.data.tokenizers import CharTokenizer
from minigpt_jax.errors import DataError, UsageError
from minigpt_jax.generation.language_model import LanguageModel
from minigpt_jax.interop import hf_writer
from minigpt_jax.interop.load import read_model_config, settings_from
from minigpt_jax.kernels import SPLIT
from minigpt_jax.models.gpt import GPT
from minigpt_jax.models.initial import init_params
from minigpt_jax.models.kernels import PLAIN
from minigpt_jax.runs import checkpoints
from minigpt_jax.tasks import prepare
from minigpt_jax.training.run import new_state

pytestmark = pytest.mark.e2e

GPT2 = ModelConfig(
    num_layers=1, num_heads=2, embed_dim=8, ff_dim=12, context_length=8, vocab_size=4, positions="learned", norm="layernorm",
    activation="gelu", qk_norm=False, bias=True, tie_embeddings=True, init="gpt2",
)  # fmt: skip

HERE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


@pytest.fixture(scope="module")
def model():
    params = init_params(jax.random.key(3), GPT(GPT2))
    return LanguageModel(GPT2, CharTokenizer("abc\n"), jax.tree.map(lambda leaf: leaf + 0.25, params))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model):
    """With the model as of Hugging Face, a text, and a run of another kind."""
    folder = tmp_path_factory.mktemp("pretrained")
    hf_writer.write(model, folder / "gpt2")
    (folder / "text.txt").write_text("abcab\ncab" * 30)
    train(plain(folder), folder / "run")
    return folder


def plain(folder):
    return Config(
        model=ModelConfig(num_layers=1, num_heads=2, embed_dim=8, ff_dim=8, context_length=8, dropout=0.5),
        training=TrainingConfig(steps=2, sample_every=0, eval_batches=1),
        data=DataConfig(dataset=str(folder / "text.txt"), data_dir=str(folder)),
    )


def begun(folder, name="gpt2", **changes):
    """The task that begins with the model of a name."""
    return prepare(plain(folder).override(settings_from(str(folder / name)) | changes))


def test_one_door_for_both(folder, model):
    assert_equal(load(folder / "gpt2").params, model.params)
    assert_equal(load(str(folder / "run")).params, load(folder / "run").params)
    assert read_model_config(folder / "gpt2") == GPT2
    assert read_model_config(folder / "run").activation == "relu2"


@pytest.mark.slow
def test_a_model_is_loaded_with_the_kernels_that_suit_the_machine_or_with_plain_ones(folder):
    for name in ("gpt2", "run"):
        tuned, plain = load(folder / name), load(folder / name, kernels="plain")
        assert (tuned.kernels, plain.kernels) == (SPLIT, PLAIN)
        assert tuned.devices == plain.devices == tuple(jax.local_devices())
        assert tuned.generate("ab", 20) == plain.generate("ab", 20)
    with pytest.raises(UsageError, match="kernels='fast'"):
        load(folder / "run", kernels="fast")


@pytest.mark.parametrize("name", ["gpt2", "run"])
def test_a_run_begins_with_the_weights_the_tokenizer_and_the_architecture(folder, name):
    task, theirs = begun(folder, name), load(folder / name)
    assert_equal(new_state(task, task.initial_params(HERE)).params, theirs.params)
    assert task.tokenizer == theirs.tokenizer
    ours = dataclasses.replace(task.config.model, dropout=theirs.config.dropout, init=theirs.config.init)
    assert ours == theirs.config
    assert task.config.model.dropout == 0.5  # this one is the run's to choose


def test_without_it_parameters_are_drawn(folder):
    assert prepare(plain(folder)).initial_params(HERE) is None


def test_a_shorter_context_takes_the_first_positions(folder, model):
    params = begun(folder, context_length=5).initial_params(HERE)
    assert_equal(params["embedding"]["positions"]["embedding"], model.params["embedding"]["positions"]["embedding"][:5])
    assert_equal(params["transformer"], model.params["transformer"])
    tokens_BT = np.array([[0, 1, 2, 3, 0]] * 2)
    shorter = dataclasses.replace(GPT2, context_length=5)
    both = (GPT(config).apply({"params": tree}, tokens_BT)[0] for config, tree in ((GPT2, model.params), (shorter, params)))
    assert_equal(*both)


def test_a_folder_may_be_called_like_a_tokenizer(folder, tmp_path, model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hf_writer.write(model, tmp_path / "bpe")
    assert prepare(plain(folder).override(settings_from("bpe"))).tokenizer == model.tokenizer


def test_nothing_begins_in_the_folder_that_it_comes_from(folder):
    for name in ("gpt2", "run"):
        before = {path: path.read_bytes() for path in (folder / name).rglob("*") if path.is_file()}
        config = plain(folder).override(settings_from(str(folder / name)))
        itself = folder / "gpt2" / ".." / name
        error_message(UsageError, train, config, itself, overwrite=True, says=(f"init_from={folder / name}", "--workdir"))
        assert {path: path.read_bytes() for path in (folder / name).rglob("*") if path.is_file()} == before
    for overwrite in (False, True):
        error_message(DataError, train, plain(folder), folder / "gpt2", overwrite, says=(f"--init_from {folder / 'gpt2'}",))


def test_what_does_not_fit_is_named(folder):
    for changes, words in [
        ({"ff_dim": 16, "bias": False}, ["ff_dim=16", "12", "bias=False", "True"]),
        ({"context_length": 9}, ["context_length=9", "8"]),
        ({"tokenizer": "char"}, ["tokenizer"]),  # with as many characters, in another order
    ]:
        task = begun(folder, **changes)
        error_message(DataError, task.initial_params, HERE, says=(f"init_from={folder / 'gpt2'}", *words))


def test_a_run_that_goes_on_needs_its_beginning_no_more(folder, tmp_path, model):
    hf_writer.write(model, tmp_path / "gpt2")
    config = plain(folder).override(settings_from(str(tmp_path / "gpt2")))
    train(config, tmp_path / "run")
    (tmp_path / "gpt2" / "model.safetensors").unlink()
    train(config.override({"steps": 3}), tmp_path / "run")
    assert checkpoints.steps(tmp_path / "run")[-1] == 3
