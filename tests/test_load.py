"""Trained models: one function loads them all, and a run starts from them only where they fit."""

import dataclasses

import jax
import numpy as np
import pytest
from helpers import assert_equal, assert_raises

from minigpt_jax.api import first_device, load, train
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
from minigpt_jax.runs.metrics import read_metrics
from minigpt_jax.tasks import prepare
from minigpt_jax.training.run import new_state

pytestmark = pytest.mark.e2e

GPT2 = ModelConfig(
    num_layers=1, num_heads=2, embed_dim=8, ff_dim=12, context_length=8, vocab_size=4, positions="learned", norm="layernorm",
    activation="gelu", qk_norm=False, bias=True, tie_embeddings=True, init="gpt2",
)  # fmt: skip

SHARDING = jax.sharding.SingleDeviceSharding(jax.devices()[0])


@pytest.fixture(scope="module")
def model():
    params = init_params(jax.random.key(3), GPT(GPT2))
    return LanguageModel(GPT2, CharTokenizer("abc\n"), jax.tree.map(lambda leaf: leaf + 0.25, params))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model):
    """Contains the model in Hugging Face's format, a text, and a run of another architecture."""
    folder = tmp_path_factory.mktemp("pretrained")
    hf_writer.write(model, folder / "gpt2")
    (folder / "text.txt").write_text("abcab\ncab" * 30)
    train(preset(folder), folder / "run")
    return folder


def preset(folder):
    return Config(
        model=ModelConfig(num_layers=1, num_heads=2, embed_dim=8, ff_dim=8, context_length=8, dropout=0.5),
        training=TrainingConfig(steps=2, sample_every=0, eval_batches=1),
        data=DataConfig(dataset=str(folder / "text.txt"), data_dir=str(folder)),
    )


def task_from(folder, name="gpt2", **changes):
    """The task of a run that starts from the model of this name."""
    return prepare(preset(folder).override(settings_from(str(folder / name)) | changes))


def test_load_reads_runs_and_hugging_face_folders(folder, model):
    assert_equal(load(folder / "gpt2").params, model.params)
    assert_equal(load(str(folder / "run")).params, load(folder / "run").params)
    assert read_model_config(folder / "gpt2") == GPT2
    assert read_model_config(folder / "run").activation == "relu2"


@pytest.mark.slow
def test_models_are_loaded_with_tuned_or_plain_kernels(folder):
    for name in ("gpt2", "run"):
        tuned, plain = load(folder / name), load(folder / name, kernels="plain")
        assert (tuned.kernels, plain.kernels) == (SPLIT, PLAIN)
        assert tuned.devices == plain.devices == tuple(jax.local_devices())
        assert tuned.generate("ab", 20) == plain.generate("ab", 20)
    with pytest.raises(UsageError, match="kernels='fast'"):
        load(folder / "run", kernels="fast")


@pytest.mark.parametrize("name", ["gpt2", "run"])
def test_a_run_starts_with_the_weights_tokenizer_and_architecture(folder, name):
    task, theirs = task_from(folder, name), load(folder / name)
    assert_equal(new_state(task, task.initial_params(SHARDING)).params, theirs.params)
    assert task.tokenizer == theirs.tokenizer
    ours = dataclasses.replace(task.config.model, dropout=theirs.config.dropout, init=theirs.config.init)
    assert ours == theirs.config
    assert task.config.model.dropout == 0.5  # the run keeps its own


def test_without_init_from_there_are_no_initial_params(folder):
    assert prepare(preset(folder)).initial_params(SHARDING) is None


def test_a_run_from_a_model_is_also_evaluated_before_its_first_step(folder, tmp_path, model):
    train(preset(folder).override(settings_from(str(folder / "gpt2"))), tmp_path)
    evaluations = [row for row in read_metrics(tmp_path / "metrics.jsonl") if "val_loss" in row]
    assert [row["step"] for row in evaluations] == [0, 2]
    expected = task_from(folder).evaluate(model.params, limit=1)
    assert evaluations[0]["val_loss"] == pytest.approx(expected["loss"])
    assert [row["step"] for row in read_metrics(folder / "run" / "metrics.jsonl") if "val_loss" in row] == [2]


def test_a_shorter_context_takes_the_first_positions(folder, model):
    params = task_from(folder, context_length=5).initial_params(SHARDING)
    assert_equal(params["embedding"]["positions"]["embedding"], model.params["embedding"]["positions"]["embedding"][:5])
    assert_equal(params["transformer"], model.params["transformer"])
    tokens_BT = np.array([[0, 1, 2, 3, 0]] * 2)
    shorter = dataclasses.replace(GPT2, context_length=5)
    both = (GPT(config).apply({"params": tree}, tokens_BT)[0] for config, tree in ((GPT2, model.params), (shorter, params)))
    assert_equal(*both)


def test_the_padding_of_the_vocabulary_is_that_of_the_new_run(folder, tmp_path, model):
    task = task_from(folder, vocab_multiple=16)
    params = task.initial_params(SHARDING)
    table = params["embedding"]["tokens"]["embedding"]
    assert table.shape[0] == task.config.model.num_embeddings == 16 > GPT2.vocab_size
    assert_equal(table[: GPT2.vocab_size], model.params["embedding"]["tokens"]["embedding"])
    tokens_BT, padded = np.array([[0, 1, 2, 3, 0]] * 2), task.config.model
    both = [GPT(config).apply({"params": tree}, tokens_BT)[0] for config, tree in ((GPT2, model.params), (padded, params))]
    np.testing.assert_allclose(*both, rtol=1e-5, atol=1e-5)
    train(preset(folder).override(settings_from(str(folder / "gpt2")) | {"vocab_multiple": 16}), tmp_path / "padded")
    cut = prepare(preset(folder).override(settings_from(str(tmp_path / "padded")))).initial_params(SHARDING)
    trained = load(tmp_path / "padded").params["embedding"]["tokens"]["embedding"]
    assert_equal(cut["embedding"]["tokens"]["embedding"], trained[: GPT2.vocab_size])


def test_a_folder_may_be_named_like_a_tokenizer(folder, tmp_path, model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hf_writer.write(model, tmp_path / "bpe")
    assert prepare(preset(folder).override(settings_from("bpe"))).tokenizer == model.tokenizer


def test_a_run_cannot_start_in_the_folder_of_its_initial_model(folder):
    for name in ("gpt2", "run"):
        before = {path: path.read_bytes() for path in (folder / name).rglob("*") if path.is_file()}
        config = preset(folder).override(settings_from(str(folder / name)))
        itself = folder / "gpt2" / ".." / name
        kind, says = {
            "gpt2": (DataError, [str(itself), f"--init_from {itself}"]),
            "run": (UsageError, [f"init_from={folder / name}", "--workdir"]),
        }[name]
        assert_raises(kind, train, config, itself, overwrite=True, says=says)
        assert {path: path.read_bytes() for path in (folder / name).rglob("*") if path.is_file()} == before
    for overwrite in (False, True):
        assert_raises(DataError, train, preset(folder), folder / "gpt2", overwrite, says=(f"--init_from {folder / 'gpt2'}",))


def test_settings_that_do_not_fit_are_named(folder):
    for changes, words in [
        ({"ff_dim": 16, "bias": False}, ["ff_dim=16", "12", "bias=False", "True"]),
        ({"context_length": 9}, ["context_length=9", "8"]),
        ({"tokenizer": "char"}, ["tokenizer"]),  # the same number of characters, in another order
    ]:
        task = task_from(folder, **changes)
        assert_raises(DataError, task.initial_params, SHARDING, says=(f"init_from={folder / 'gpt2'}", *words))


def test_a_resumed_run_does_not_need_its_initial_model(folder, tmp_path, model):
    hf_writer.write(model, tmp_path / "gpt2")
    config = preset(folder).override(settings_from(str(tmp_path / "gpt2")))
    train(config, tmp_path / "run")
    (tmp_path / "gpt2" / "model.safetensors").unlink()
    train(config.override({"steps": 3}), tmp_path / "run")
    assert checkpoints.steps(tmp_path / "run")[-1] == 3


# ---- JAX's own settings ---------------------------------------------------------------------------------------------------


def test_settings_that_models_do_not_support_are_refused():
    with jax.enable_x64(True):
        assert_raises(UsageError, first_device, says=("jax_enable_x64=True", "JAX_ENABLE_X64=False"))
    with jax.numpy_dtype_promotion("strict"):
        assert_raises(UsageError, first_device, says=("jax_numpy_dtype_promotion=strict", "standard"))
    with jax.transfer_guard("disallow"):
        assert_raises(UsageError, first_device, says=("jax_transfer_guard=disallow", "JAX_TRANSFER_GUARD=log"))
    with jax.transfer_guard("log"):
        assert first_device() == jax.devices()[0]
    assert first_device() == jax.devices()[0]


@pytest.mark.parametrize("error", [RuntimeError("Unable to initialize\nbackend 'cuda'"), AssertionError()])
def test_a_platform_that_is_not_available_is_refused(error, monkeypatch):
    def no_devices():
        raise error

    monkeypatch.setattr(jax, "devices", no_devices)
    monkeypatch.setattr(type(jax.config), "jax_platforms", "cuda")
    assert_raises(UsageError, first_device, says=("JAX_PLATFORMS=cuda", "cpu"))
