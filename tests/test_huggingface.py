"""Hugging Face folders: exports are read back bit for bit, transformers agrees, and invalid folders are rejected."""

import codecs
import dataclasses
import errno
import json
import os
import pickle
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from helpers import assert_raises, blocking_settings
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from minigpt_jax.api import load
from minigpt_jax.config import ModelConfig
from minigpt_jax.data.tokenizers import make_tokenizer
from minigpt_jax.errors import DataError, UsageError
from minigpt_jax.generation.language_model import LanguageModel
from minigpt_jax.interop import hf_reader, hf_writer
from minigpt_jax.interop.architectures import SAME_ACTIVATION, with_vocab_rows
from minigpt_jax.interop.load import read_model_config
from minigpt_jax.models.gpt import GPT
from minigpt_jax.models.initial import init_params

pytestmark = pytest.mark.slow

SHAPE = {"num_layers": 2, "num_heads": 4, "embed_dim": 16, "ff_dim": 24, "context_length": 32}
GPT2 = SHAPE | {"positions": "learned", "norm": "layernorm", "activation": "gelu", "qk_norm": False, "init": "gpt2"}
LLAMA = SHAPE | {"positions": "rotary", "norm": "rmsnorm", "activation": "swiglu", "qk_norm": False, "init": "gpt2"}
CASES = {
    "GPT-2": (GPT2 | {"bias": True, "tie_embeddings": True}, "char"),
    "GPT-2 without biases, with a head": (GPT2, "byte"),
    "Llama with grouped queries": (LLAMA | {"num_kv_heads": 2}, "word"),
    "Llama with biases, tied": (LLAMA | {"bias": True, "tie_embeddings": True}, "bpe"),
}
PROSE = "To be, or not to be:\r\n\tdon't  suffer é½ — 漢字 the\u0301 end . "


def model(case):
    choices, kind = CASES[case]
    tokenizer = make_tokenizer(kind, [PROSE * 3], 290 if kind == "bpe" else None)
    config = ModelConfig(**choices, vocab_size=tokenizer.vocab_size)
    params = init_params(jax.random.key(0), GPT(config))
    noise = iter(jax.random.split(jax.random.key(1), 1000))  # so that no scale is 1 and no bias 0
    return LanguageModel(
        config, tokenizer, jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(next(noise), leaf.shape), params)
    )


@pytest.fixture
def folder(tmp_path):
    """An export of the first case."""
    hf_writer.write(model("GPT-2"), tmp_path / "model")
    return tmp_path / "model"


def edit_json(path, **changes):
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not ...}))


def edit_tensors(folder, **changes):
    tensors = load_file(folder / "model.safetensors") | {name.replace("__", "."): value for name, value in changes.items()}
    save_file({name: value for name, value in tensors.items() if value is not ...}, folder / "model.safetensors")


def assert_same_bits(params, others):
    assert jax.tree.structure(params) == jax.tree.structure(others)
    for (path, leaf), other in zip(jax.tree.leaves_with_path(params), jax.tree.leaves(others), strict=True):
        assert np.asarray(other).dtype == np.float32
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(other), err_msg=str(path))


@pytest.mark.parametrize("case", CASES)
def test_exported_models_are_read_back_bit_for_bit(tmp_path, case):
    written = model(case)
    hf_writer.write(written, tmp_path / "new" / "model")
    read = hf_reader.read(tmp_path / "new" / "model")
    assert_same_bits(written.params, read.params)
    assert read.config == written.config
    assert read.tokenizer.encode(PROSE).tolist() == written.tokenizer.encode(PROSE).tolist()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model"]
    with safe_open(tmp_path / "new" / "model" / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}  # transformers has rejected files without it
    assert len({path.stat().st_mode for path in (tmp_path / "new" / "model").iterdir()}) == 1


def test_transposed_views_are_written_correctly(tmp_path):
    written = model("Llama with grouped queries")
    views = jax.tree.map(lambda leaf: np.asarray(leaf).T.copy().T, written.params)
    assert not any(leaf.flags.c_contiguous for leaf in jax.tree.leaves(views) if leaf.ndim == 2)
    hf_writer.write(dataclasses.replace(written, params=views), tmp_path / "model")
    assert_same_bits(written.params, hf_reader.read(tmp_path / "model").params)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore")
def test_transformers_gives_the_same_logits_tokens_and_text(tmp_path, case):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    ours = model(case)
    hf_writer.write(ours, tmp_path / "model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    ids = ours.tokenizer.encode(PROSE)
    assert tokenizer(PROSE)["input_ids"] == ids.tolist()
    assert tokenizer.decode(ids) == ours.tokenizer.decode(ids) == PROSE
    tokens_BT = np.stack([ids[:30], ids[-30:]])
    logits_BTV, _ = GPT(ours.config).apply({"params": ours.params}, tokens_BT)
    with torch.no_grad():
        their_logits_BTV = theirs(torch.tensor(tokens_BT, dtype=torch.long)).logits
        generated = theirs.generate(torch.tensor(tokens_BT[:1, :5], dtype=torch.long), max_new_tokens=20, do_sample=False)
    np.testing.assert_allclose(logits_BTV, their_logits_BTV, atol=1e-4, rtol=0)
    assert np.std(logits_BTV) > 0.1
    assert ours.generate(ours.tokenizer.decode(ids[:5]), 20, greedy=True) == tokenizer.decode(generated[0])
    # And back: an export by transformers, in shards.
    theirs.save_pretrained(tmp_path / "again", max_shard_size="4KB")
    tokenizer.save_pretrained(tmp_path / "again")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 2
    again = hf_reader.read(tmp_path / "again")
    assert_same_bits(ours.params, again.params)
    assert again.tokenizer.encode(PROSE).tolist() == ids.tolist()


# ---- What other people's folders say --------------------------------------------------------------------------------------


def with_end(folder, config, generation):
    """The end tokens of a folder whose two files have this `eos_token_id`; `...` leaves it out."""
    edit_json(folder / "config.json", eos_token_id=config)
    edit_json(folder / "generation_config.json", eos_token_id=generation)
    return hf_reader.read(folder).end_tokens


@pytest.mark.parametrize(
    "config, generation, ends",
    [
        (5, ..., (5,)),
        ([5, 7], ..., (5, 7)),
        (..., 7, (7,)),
        (5, [7, 5], (7, 5)),
        (None, None, ()),
        (..., ..., ()),
        ([], 3, (3,)),
        (50256, -1, ()),  # GPT-2's, left in the config of a small model, and "none"
    ],
)
def test_end_tokens_are_those_of_both_configs(folder, config, generation, ends):
    assert with_end(folder, config, generation) == ends


def test_an_end_token_that_only_the_tokenizer_lacks_is_refused(tmp_path):
    """As where it is in added_tokens.json alone: the model would never end its texts."""
    hf_writer.write(model("GPT-2"), tmp_path / "padded")
    with safe_open(tmp_path / "padded" / "model.safetensors", "numpy") as file:
        table = file.get_tensor("transformer.wte.weight")
    edit_tensors(tmp_path / "padded", transformer__wte__weight=np.pad(table, ((0, 64 - len(table)), (0, 0))))
    edit_json(tmp_path / "padded" / "config.json", vocab_size=64, eos_token_id=len(table))
    assert_raises(DataError, hf_reader.read, tmp_path / "padded", says=(f"eos_token_id={len(table)}",))


def test_a_missing_vocabulary_size_and_a_byte_order_mark(folder):
    config = (folder / "config.json").read_bytes()
    (folder / "config.json").write_bytes(codecs.BOM_UTF8 + config)
    assert hf_reader.read(folder)
    (folder / "config.json").write_bytes(config)
    edit_json(folder / "config.json", vocab_size=None)
    assert_raises(DataError, hf_reader.read, folder, says=("vocab_size",))


def test_end_tokens_end_texts_and_are_exported(folder, tmp_path):
    plain = hf_reader.read(folder)
    tokens = [step.token for step in next(plain.complete("to be", 20, seed=1)).steps]
    end = tokens[9]
    first = tokens.index(end)
    with_end(folder, [end], ...)
    (folder / "generation_config.json").unlink()
    read = hf_reader.read(folder)
    [completion] = read.complete("to be", 20, seed=1)
    assert completion.reason == "stop"
    assert [step.token for step in completion.steps] == tokens[: first + 1]
    assert completion.text == "to be" + plain.tokenizer.decode(tokens[:first]) == "".join(read.stream("to be", 20, seed=1))
    hf_writer.write(read, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["eos_token_id"] == end
    assert hf_reader.read(tmp_path / "again").end_tokens == (end,)


@pytest.mark.parametrize("value", ["<|im_end|>", [3, "</s>"], 3.0, True, {"a": 1}])
def test_an_end_token_that_is_not_an_id_is_rejected(folder, value):
    edit_json(folder / "config.json", eos_token_id=value)
    assert_raises(DataError, hf_reader.read, folder, says=(str(folder / "config.json"), "eos_token_id="))


@pytest.mark.parametrize("name", ["gelu_pytorch_tanh", "gelu_fast", "gelu_python_tanh", "gelu_accurate"])
def test_other_names_of_the_same_activation_are_read(folder, name):
    before = hf_reader.read(folder)
    edit_json(folder / "config.json", activation_function=name)
    assert hf_reader.read(folder).config == before.config


def test_names_of_activations_are_the_same_functions_in_transformers():
    torch = pytest.importorskip("torch")
    functions = pytest.importorskip("transformers.activations").ACT2FN
    x = torch.linspace(-6, 6, 2001, dtype=torch.float64)
    for other, name in SAME_ACTIVATION.items():
        if other in functions:  # some are recent
            torch.testing.assert_close(functions[other](x), functions[name](x), atol=1e-9, rtol=0)


@pytest.mark.parametrize("tied", [True, False])
def test_a_padded_vocabulary_is_read_without_its_padding(folder, tmp_path, tied):
    before = model("GPT-2" if tied else "Llama with grouped queries")
    hf_writer.write(before, tmp_path / "padded")
    size, name = before.config.vocab_size, "transformer.wte.weight" if tied else "model.embed_tokens.weight"
    with safe_open(tmp_path / "padded" / "model.safetensors", "numpy") as file:
        tables = {key: file.get_tensor(key) for key in ([name] if tied else [name, "lm_head.weight"])}
    padded = {
        key.replace(".", "__"): np.pad(table, ((0, 64 - size), (0, 0)), constant_values=9) for key, table in tables.items()
    }
    edit_tensors(tmp_path / "padded", **padded)
    edit_json(tmp_path / "padded" / "config.json", vocab_size=64)
    read = hf_reader.read(tmp_path / "padded")
    assert read.config == before.config == read_model_config(tmp_path / "padded")
    assert_same_bits(before.params, read.params)
    for wrong in (63, 64 + 1024):
        edit_json(tmp_path / "padded" / "config.json", vocab_size=wrong)
        assert_raises(DataError, hf_reader.read, tmp_path / "padded", says=(str(size), str(wrong), "8", "1024"))


@pytest.mark.parametrize("tied", [True, False])
def test_a_padded_model_is_written_without_its_padding(tmp_path, tied):
    plain = model("GPT-2" if tied else "Llama with grouped queries")
    config = dataclasses.replace(plain.config, vocab_multiple=64)
    padded = dataclasses.replace(plain, config=config, params=with_vocab_rows(plain.params, config.num_embeddings))
    assert len(padded.params["embedding"]["tokens"]["embedding"]) == 64
    hf_writer.write(padded, tmp_path / "model")
    read = hf_reader.read(tmp_path / "model")
    assert read.config == plain.config
    assert_same_bits(plain.params, read.params)


def test_a_token_beyond_the_models_vocabulary_is_named(folder):
    (folder / "tokenizer.json").write_text(make_tokenizer("char", [PROSE + "ⱥ\U0001f600"]).to_huggingface())
    assert_raises(DataError, hf_reader.read, folder, says=("26", "28"))


@pytest.mark.parametrize("listed", [True, False])
def test_a_tied_head_may_be_listed_and_not_stored_or_the_reverse(folder, listed):
    before = hf_reader.read(folder)
    split_in_two(folder)
    path, shard = folder / "model.safetensors.index.json", folder / "model-00001-of-00002.safetensors"
    if listed:
        index = json.loads(path.read_text())
        index["weight_map"]["lm_head.weight"] = shard.name
        path.write_text(json.dumps(index))
    else:
        save_file(load_file(shard) | {"lm_head.weight": np.zeros((26, 16), np.float32)}, shard)
    assert_same_bits(before.params, hf_reader.read(folder).params)


def split_in_two(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    shards = {f"model-0000{i + 1}-of-00002.safetensors": sorted(tensors)[i::2] for i in range(2)}
    for file, names in shards.items():
        save_file({name: tensors[name] for name in names}, folder / file)
    weight_map = {name: file for file, names in shards.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_sharded_weights_are_read(folder):
    before = hf_reader.read(folder)
    split_in_two(folder)
    assert_same_bits(before.params, hf_reader.read(folder).params)


def test_names_and_masks_of_the_original_gpt2_files_are_read(folder):
    before = hf_reader.read(folder)
    tensors = load_file(folder / "model.safetensors")
    old = {name.removeprefix("transformer."): array for name, array in tensors.items()}
    old |= {"h.0.attn.bias": np.ones((1, 1, 32, 32), np.float32), "h.1.attn.masked_bias": np.array(-1e4, np.float32)}
    save_file(old | {"lm_head.weight": old["wte.weight"]}, folder / "model.safetensors")
    edit_json(folder / "config.json", n_inner=..., bias=..., tie_word_embeddings=...)
    # Settings missing from config.json get the defaults of transformers.
    assert_raises(
        DataError, hf_reader.read, folder, says=(str(folder), "c_fc.weight", "(16, 24)", "config.json", "(16, 64)")
    )
    edit_json(folder / "config.json", n_inner=24)
    assert_same_bits(before.params, hf_reader.read(folder).params)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_becomes_float32_exactly(folder, dtype):
    tensors = {name: array.astype(dtype) for name, array in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    params = hf_reader.read(folder).params
    table = params["embedding"]["tokens"]["embedding"]
    assert table.dtype == np.float32
    np.testing.assert_array_equal(np.asarray(table), tensors["transformer.wte.weight"].astype(np.float32))


def test_models_that_no_architecture_can_express_are_rejected_by_name(tmp_path):
    plain = model("Llama with grouped queries")
    like_gpt2 = {"positions": "learned", "norm": "layernorm", "activation": "gelu"}
    for changes, model_type, named, allowed in [
        ({"activation": "relu2", "qk_norm": True}, "llama", {"activation": "relu2", "qk_norm": "True"}, ["swiglu", "False"]),
        ({"positions": "sinusoidal"}, "llama", {"positions": "sinusoidal"}, ["learned", "rotary"]),
        ({"norm_placement": "post"}, "llama", {"norm_placement": "post"}, ["pre", "pre"]),
        (like_gpt2, "gpt2", {"num_kv_heads": "2"}, ["4"]),
    ]:
        changed = dataclasses.replace(plain, config=dataclasses.replace(plain.config, **changes))
        message = assert_raises(DataError, hf_writer.write, changed, tmp_path / "a", says=allowed)
        assert blocking_settings(message, model_type) == named
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(folder):
    before = {path: path.read_bytes() for path in folder.iterdir()}
    below = folder / "config.json" / "below"
    for path in (folder, folder / "config.json"):
        assert_raises(DataError, hf_writer.write, model("GPT-2"), path, says=(str(path),))
    assert_raises(DataError, hf_writer.write, model("GPT-2"), below, says=(str(below), os.strerror(errno.EEXIST)))
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("the pickle was loaded",)


def only_pickle(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])


def escape(folder):
    split_in_two(folder)
    shutil.copy(folder / "model-00002-of-00002.safetensors", folder.parent / "outside.safetensors")
    path = folder / "model.safetensors.index.json"
    path.write_text(path.read_text().replace("model-00002-of-00002", "../outside"))


def lose_a_shard(folder):
    split_in_two(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def mix_up_shards(folder):
    split_in_two(folder)
    shutil.copy(folder / "model-00002-of-00002.safetensors", folder / "model-00001-of-00002.safetensors")


def corrupt_index(folder):
    (folder / "model.safetensors").rename(folder / "elsewhere.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": 1}')


def config(**changes):
    return lambda folder: edit_json(folder / "config.json", **changes)


def tensors(**changes):
    return lambda folder: edit_tensors(folder, **changes)


def other_tokenizer(folder):
    (folder / "tokenizer.json").write_text(make_tokenizer("char", ["abc"]).to_huggingface())


INVALID_FOLDERS = {
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        ["model.safetensors", "model.safetensors.index.json"],
    ),
    "pickle": (only_pickle, ["pytorch_model.bin", "pickle", "safetensors"]),
    "truncated": (truncate, ["/model.safetensors"]),
    "not safetensors": (lambda folder: (folder / "model.safetensors").write_bytes(b"\0" * 40), ["/model.safetensors"]),
    "path in the index": (escape, ["/model.safetensors.index.json", "'../outside.safetensors'"]),
    "missing shard": (lose_a_shard, ["model.safetensors.index.json", "model-00002-of-00002.safetensors"]),
    "wrong shard": (mix_up_shards, ["model.safetensors.index.json", "model-00001-of-00002.safetensors"]),
    "corrupt index": (corrupt_index, ["/model.safetensors.index.json"]),
    "missing key": (tensors(transformer__ln_f__bias=...), ["config.json", "'transformer.ln_f.bias'"]),
    "missing keys": (
        tensors(transformer__wpe__weight=..., transformer__wte__weight=...),
        ["config.json", "'transformer.wpe.weight'", "1"],
    ),
    "extra key": (tensors(transformer__extra=np.zeros(3, np.float32)), ["config.json", "'transformer.extra'"]),
    "key that is a path": (tensors(**{"../../etc": np.zeros(3, np.float32)}), ["config.json", "'../../etc'"]),
    "wrong shape": (
        tensors(transformer__wte__weight=np.zeros((3, 4), np.float32)),
        ["transformer.wte.weight", "(3, 4)", "config.json", "(26, 16)"],
    ),
    "wrong type": (
        tensors(transformer__ln_f__bias=np.zeros(16, np.int8)),
        ["transformer.ln_f.bias", "I8", "F32", "F16", "BF16"],
    ),
    "non-zero biases": (config(bias=False), ["config.json", "bias=false", "/bias"]),
    "no config": (lambda folder: (folder / "config.json").unlink(), ["config.json", os.strerror(errno.ENOENT)]),
    "not JSON": (lambda folder: (folder / "config.json").write_text("{"), ["/config.json", "JSON"]),
    "JSON list": (lambda folder: (folder / "config.json").write_text("[]"), ["/config.json", "JSON"]),
    "JSON too deep": (lambda folder: (folder / "config.json").write_text("[" * 10**5), ["/config.json", "JSON"]),
    "no architecture": (config(model_type=...), ["/config.json", "model_type=None", "gpt2", "llama"]),
    "list of architectures": (config(model_type=["gpt2"]), ["/config.json", "model_type=['gpt2']", "gpt2", "llama"]),
    "absurd context": (config(n_positions=10**9), ["/config.json", f"{10**9}", f"{2**20}"]),
    "other architecture": (config(model_type="mistral"), ["/config.json", "model_type='mistral'", "gpt2", "llama"]),
    "other activation": (
        config(activation_function="relu"),
        ["/config.json", "gpt2", "activation_function='relu'", "'gelu_new'"],
    ),
    "indivisible width": (config(n_embd=15), ["/config.json", "embed_dim=15", "num_heads=4"]),
    "string for a number": (config(n_layer="2"), ["/config.json", "num_layers='2'", "int"]),
    "absurd depth": (config(n_layer=10**12), ["config.json", f"{10**12}", "28"]),
    "absurd width": (config(n_inner=10**30), ["transformer.h.0.mlp.c_fc.weight", "(16, 24)", f"(16, {10**30})"]),
    "absurd embedding": (config(n_embd=10**30), ["transformer.wte.weight", "(26, 16)", f"(26, {10**30})"]),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), ["tokenizer.json"]),
    "other tokenizer": (other_tokenizer, ["3", "26"]),
}


@pytest.mark.parametrize("name", INVALID_FOLDERS)
def test_an_invalid_folder_is_rejected_with_the_reason(folder, name):
    corrupt, words = INVALID_FOLDERS[name]
    corrupt(folder)
    assert_raises(DataError, load, folder, says=(str(folder), *words))


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}},
            ["rope_theta=500000.0", "10000.0", "rope_type='llama3'", "'default'"],
        ),
        ({"rope_parameters": ..., "rope_scaling": {"type": "linear"}}, ["rope_type='linear'", "'default'"]),
        ({"rope_parameters": [1]}, ["rope_parameters=[1]"]),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, ["rope_type='linear'"]),  # in addition to rope_parameters
        ({"rope_parameters": {"hidden_size": 32, "rope_theta": 2.0}}, ["rope_theta=2.0", "10000.0"]),
        ({"rms_norm_eps": ...}, ["rms_norm_eps=1e-06", "1e-05"]),
        ({"mlp_bias": True}, ["attention_bias", "mlp_bias"]),
        ({"head_dim": "4"}, ["head_dim='4'", "hidden_size/num_attention_heads=4"]),
    ],
    ids=str,
)
def test_an_unsupported_llama_is_rejected(tmp_path, changes, words):
    hf_writer.write(model("Llama with grouped queries"), tmp_path / "model")
    edit_json(tmp_path / "model" / "config.json", **changes)
    message = assert_raises(
        DataError, hf_reader.read, tmp_path / "model", says=(str(tmp_path / "model" / "config.json"), *words)
    )
    assert ("hidden_size" in message) == ("head_dim" in changes)


def test_equivalent_older_config_files_are_read(tmp_path):
    written = model("Llama with grouped queries")
    hf_writer.write(written, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    edit_json(path, rope_parameters=..., rope_theta=10000.0, rope_scaling=None, head_dim=4)
    assert hf_reader.read(tmp_path / "model").config == written.config
    edit_json(path, rope_scaling={"type": "default", "hidden_size": 32})  # not a setting of the positions
    assert hf_reader.read(tmp_path / "model").config == written.config


def test_as_many_key_heads_as_query_heads_are_read_as_none(tmp_path):
    written = model("Llama with biases, tied")
    hf_writer.write(written, tmp_path / "model")
    edit_json(tmp_path / "model" / "config.json", num_key_value_heads=4)
    assert hf_reader.read(tmp_path / "model").config == written.config


def test_a_missing_library_is_reported_with_how_to_install_it(folder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "safetensors.numpy", None)
    for use in (lambda: hf_reader.read(folder), lambda: hf_writer.write(model("GPT-2"), folder.parent / "new")):
        assert_raises(UsageError, use, says=("safetensors", "python -m pip install -e '.[hf]'"))


def test_a_file_in_place_of_a_folder_is_rejected(tmp_path):
    for name, word in (("model.bin", "pickle"), ("model.safetensors", "config.json")):
        (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
        assert_raises(DataError, load, tmp_path / name, says=(str(tmp_path / name), word))
