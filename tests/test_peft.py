"""LoRA adapters as PEFT's files: peft gives the same logits, its own adapters are read, and invalid folders are rejected."""

import json
import shutil

import jax
import numpy as np
import pytest
from helpers import assert_close, assert_equal, assert_raises
from safetensors.numpy import load_file, save_file

from minigpt_jax.api import load
from minigpt_jax.config import FineTuningConfig, ModelConfig
from minigpt_jax.data.tokenizers import CharTokenizer
from minigpt_jax.errors import DataError
from minigpt_jax.generation.language_model import LanguageModel
from minigpt_jax.interop import hf_writer, peft
from minigpt_jax.interop.load import read_model_config, settings_from
from minigpt_jax.models import lora
from minigpt_jax.models.gpt import GPT
from minigpt_jax.models.initial import init_params

pytestmark = pytest.mark.slow

SHAPE = {
    "num_layers": 2,
    "num_heads": 4,
    "embed_dim": 16,
    "ff_dim": 24,
    "context_length": 8,
    "vocab_size": 9,
    "init": "gpt2",
}
GPT2 = SHAPE | {
    "positions": "learned",
    "norm": "layernorm",
    "activation": "gelu",
    "qk_norm": False,
    "bias": True,
    "init": "gpt2",
}
LLAMA = SHAPE | {"positions": "rotary", "norm": "rmsnorm", "activation": "swiglu", "qk_norm": False, "num_kv_heads": 2}
CASES = {
    "GPT-2": (GPT2, "*attention,*feed_forward"),
    "GPT-2, head and parts of some layers": (GPT2, "head,*block_0*query,*block_1*value,*block_1*query"),
    "Llama": (LLAMA, "*attention,*feed_forward,head"),
    "Llama, one layer": (LLAMA, "*block_1*key"),
}


def base_model(choices):
    config = ModelConfig(**choices)
    params = init_params(jax.random.key(0), GPT(config))
    return LanguageModel(config, CharTokenizer("abcdefgh\n"), jax.tree.map(lambda leaf: leaf * 5 + 0.02, params))


def adapter_of(model, settings):
    layers = lora.target_layers(model.params, settings.lora_targets, settings.lora_rank)
    adapter = lora.init(jax.random.key(1), model.params, layers, settings.lora_rank)
    return jax.tree.map(lambda leaf: leaf + 0.2 * jax.random.normal(jax.random.key(2), leaf.shape), adapter)


def exported(folder, case="GPT-2"):
    """Writes `base` and `adapter` to a folder. Returns the base model and the merged parameters."""
    choices, targets = CASES[case]
    model, settings = base_model(choices), FineTuningConfig(lora_rank=3, lora_alpha=5.0, lora_targets=targets)
    adapter = adapter_of(model, settings)
    hf_writer.write(model, folder / "base")
    peft.write(model, adapter, settings, str(folder / "base"), folder / "adapter")
    return model, lora.merge(model.params, adapter, settings.lora_scale)


def logits(config, params):
    return GPT(config).apply({"params": params}, TOKENS_BT)[0]


TOKENS_BT = np.arange(16).reshape(2, 8) % 9


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore")
def test_peft_gives_the_same_logits_and_its_files_are_read_back(tmp_path, case):
    library, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    model, merged = exported(tmp_path, case)
    theirs = library.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    with torch.no_grad():
        their_logits_BTV = theirs(torch.tensor(TOKENS_BT)).logits.numpy()
    np.testing.assert_allclose(logits(model.config, merged), their_logits_BTV, atol=1e-4, rtol=0)
    assert np.abs(logits(model.config, model.params) - their_logits_BTV).max() > 0.01
    read = load(tmp_path / "adapter")
    assert_close(read.params, merged, atol=1e-6)
    assert (read.config, read.tokenizer) == (model.config, model.tokenizer)
    hf_writer.write(read, tmp_path / "whole")
    assert_equal(load(tmp_path / "whole").params, read.params)


SETTINGS_OF_PEFT = {
    "GPT-2": {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "alpha_pattern": {"mlp.c_proj": 7}},
    "Llama": {"target_modules": "all-linear", "use_rslora": True, "init_lora_weights": "gaussian"},
}


@pytest.mark.parametrize("case", SETTINGS_OF_PEFT)
@pytest.mark.filterwarnings("ignore")
def test_adapters_that_peft_has_written_are_read(tmp_path, case):
    library, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    import torch

    model = base_model(CASES[case][0])
    hf_writer.write(model, tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = library.LoraConfig(r=2, lora_alpha=3, lora_dropout=0.5, task_type="CAUSAL_LM", **SETTINGS_OF_PEFT[case])
    theirs = library.get_peft_model(base, config).eval()
    torch.manual_seed(0)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    theirs.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        their_logits_BTV = theirs(torch.tensor(TOKENS_BT)).logits.numpy()
    read = load(tmp_path / "adapter")
    np.testing.assert_allclose(logits(read.config, read.params), their_logits_BTV, atol=1e-4, rtol=0)
    assert np.abs(logits(model.config, model.params) - their_logits_BTV).max() > 0.01


def test_settings_are_short_where_all_layers_are_alike(tmp_path):
    exported(tmp_path)
    values = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert values["base_model_name_or_path"] == str(tmp_path / "base")
    assert sorted(values["target_modules"]) == ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    assert (values["rank_pattern"], values["alpha_pattern"]) == ({"attn.c_attn": 9}, {"attn.c_attn": 15.0})
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    names = [f"base_model.model.transformer.h.1.attn.c_attn.lora_{factor}.weight" for factor in "AB"]
    assert [tensors[name].shape for name in names] == [(9, 16), (48, 9)]


@pytest.mark.parametrize("reason", ["not a Hugging Face folder", "an adapter", "padded head"])
def test_the_base_model_is_written_too_unless_its_folder_serves(tmp_path, reason):
    model, merged = exported(tmp_path, "Llama")
    source = {"not a Hugging Face folder": "nowhere", "an adapter": "adapter", "padded head": "base"}[reason]
    if reason == "padded head":
        path = tmp_path / "base" / "config.json"
        path.write_text(path.read_text().replace('"vocab_size": 9', '"vocab_size": 16'))
    settings = FineTuningConfig(lora_rank=3, lora_alpha=5.0, lora_targets=CASES["Llama"][1])
    out = tmp_path / "new"
    written = peft.write(model, adapter_of(model, settings), settings, str(tmp_path / source), out)
    assert written == str(out / "base")
    assert_equal(load(out / "base").params, model.params)
    shutil.move(out, tmp_path / "moved")
    assert_close(load(tmp_path / "moved").params, merged, atol=1e-6)


def test_the_padding_of_the_vocabulary_is_left_out(tmp_path):
    model = base_model(LLAMA | {"vocab_multiple": 4})
    settings = FineTuningConfig(lora_rank=2, lora_targets="head")
    adapter = adapter_of(model, settings)
    peft.write(model, adapter, settings, str(tmp_path / "nowhere"), tmp_path / "new")
    read, merged = load(tmp_path / "new"), lora.merge(model.params, adapter, settings.lora_scale)
    assert_close(logits(read.config, read.params), logits(model.config, merged), atol=1e-5)
    assert read.params["head"]["kernel"].shape == (16, 9)
    assert merged["head"]["kernel"].shape == (16, 12)


def test_a_run_may_start_from_an_adapter(tmp_path):
    model, _ = exported(tmp_path)
    assert read_model_config(tmp_path / "adapter") == model.config
    settings = settings_from(str(tmp_path / "adapter"))
    assert settings["tokenizer"] == f"{tmp_path / 'base'}/"
    assert settings["init_from"] == str(tmp_path / "adapter")


def edit(**changes):
    def change(folder):
        path = folder / "adapter" / "adapter_config.json"
        values = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({name: value for name, value in values.items() if value is not ...}))

    return change


def edit_tensors(**changes):
    def change(folder):
        path = folder / "adapter" / "adapter_model.safetensors"
        tensors = load_file(path)
        for name, value in changes.items():
            name = f"base_model.model.{name.replace('__', '.')}.weight"
            tensors = {key: array for key, array in tensors.items() if key != name}
            tensors |= {} if value is ... else {name: value}
        save_file(tensors, path)

    return change


def other_base(**changes):
    def change(folder):
        shutil.rmtree(folder / "base")
        hf_writer.write(base_model(GPT2 | changes), folder / "base")

    return change


def only_pickle(folder):
    (folder / "adapter" / "adapter_model.safetensors").rename(folder / "adapter" / "adapter_model.bin")


def zeros(*shape):
    return np.zeros(shape, np.float32)


INVALID = {
    "other width": (other_base(embed_dim=32), ["base", "embed_dim=32", "16"]),
    "other depth": (other_base(num_layers=1), ["base", "num_layers=1", "2"]),
    "other hidden width": (other_base(ff_dim=20), ["ff_dim=20", "24"]),
    "missing B": (
        edit_tensors(transformer__h__0__mlp__c_fc__lora_B=...),
        ["adapter_model.safetensors", "base_model.model.transformer.h.0.mlp.c_fc.lora_B.weight"],
    ),
    "unknown layer": (
        edit_tensors(transformer__wte__lora_A=zeros(3, 9)),
        ["transformer.wte.lora_A.weight"],
    ),
    "ranks that differ": (
        edit_tensors(transformer__h__0__mlp__c_fc__lora_B=zeros(24, 2)),
        ["transformer.h.0.mlp.c_fc", "(3, 16)", "(24, 2)"],
    ),
    "not a matrix": (edit_tensors(transformer__h__0__mlp__c_fc__lora_B=zeros(24)), ["transformer.h.0.mlp.c_fc", "(24,)"]),
    "whole numbers": (
        edit_tensors(transformer__h__0__mlp__c_fc__lora_B=np.zeros((24, 3), np.int8)),
        ["base_model.model.transformer.h.0.mlp.c_fc.lora_B.weight", "I8", "F32", "F16", "BF16"],
    ),
    "other method": (edit(peft_type="IA3"), ["adapter_config.json", "peft_type='IA3'", "'LORA'"]),
    "DoRA with biases": (edit(use_dora=True, bias="all"), ["use_dora=True", "bias='all'"]),
    "initial values that change the base": (edit(init_lora_weights="pissa"), ["init_lora_weights='pissa'"]),
    "setting of a later version": (edit(use_novelty=3), ["use_novelty=3"]),
    "no alpha": (edit(lora_alpha=...), ["adapter_config.json", "lora_alpha"]),
    "invalid pattern": (edit(alpha_pattern={"(": 3}), ["alpha_pattern"]),
    "base elsewhere": (edit(base_model_name_or_path="gpt2"), ["adapter_config.json", "base_model_name_or_path='gpt2'"]),
    "no base": (edit(base_model_name_or_path=None), ["adapter_config.json", "base_model_name_or_path=None"]),
    "not JSON": (
        lambda folder: (folder / "adapter" / "adapter_config.json").write_text("{"),
        ["adapter_config.json", "JSON"],
    ),
    "pickle": (only_pickle, ["adapter_model.safetensors", "adapter_model.bin", "pickle"]),
}


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    folder = tmp_path_factory.mktemp("valid")
    exported(folder)
    return folder


@pytest.mark.parametrize("name", INVALID)
def test_an_invalid_adapter_is_rejected_with_the_reason(valid, tmp_path, name):
    folder = shutil.copytree(valid, tmp_path / "folder")
    edit(base_model_name_or_path=str(folder / "base"))(folder)
    corrupt, words = INVALID[name]
    corrupt(folder)
    assert_raises(DataError, load, folder / "adapter", says=words)
