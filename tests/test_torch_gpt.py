"""The PyTorch twin: whatever the config chooses, it is the same model and the same step, and a difference is found."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from minigpt_jax.api import choose_kernels
from minigpt_jax.compare import agreement, torch_gpt
from minigpt_jax.config import Config, ModelConfig, TrainingConfig
from minigpt_jax.models.gpt import GPT, init_params

SHAPE = {"num_layers": 1, "num_heads": 4, "embed_dim": 16, "ff_dim": 24, "context_length": 8, "vocab_size": 11}
TRAINING = TrainingConfig(batch_size=3, steps=7, learning_rate=1e-2, min_learning_rate=1e-3, warmup_steps=3, grad_clip=0.2)

# Every value of every choice, two or three to a model.
CHOICES = [
    {"positions": "learned", "norm": "layernorm", "bias": True, "activation": "gelu", "qk_norm": False},
    {"positions": "rotary", "norm": "rmsnorm", "num_kv_heads": 2, "activation": "swiglu", "init": "gpt2", "qk_norm": True},
    {"positions": "sinusoidal", "norm": "layernorm", "norm_placement": "post", "tie_embeddings": True, "qk_norm": True},
    {"positions": "learned", "num_kv_heads": 1, "tie_embeddings": True, "activation": "relu", "bias": True, "qk_norm": True},
]


def config_with(**choices):
    return Config(model=ModelConfig(**SHAPE | choices), training=TRAINING)


def some_batches(number):
    random = np.random.default_rng(0)
    for _ in range(number):
        tokens_BT = random.integers(0, SHAPE["vocab_size"], (3, 9), np.int32)
        yield {"inputs_BT": tokens_BT[:, :-1], "targets_BT": tokens_BT[:, 1:], "mask_BT": np.ones((3, 8), bool)}


@pytest.mark.parametrize("choices", CHOICES, ids=str)
def test_logits_gradients_and_training_agree(choices):
    config = config_with(**choices)
    found = agreement.compare(config, list(some_batches(7)), choose_kernels(config.model))
    assert [difference for difference in found if not difference.is_within] == []
    places = {difference.place for difference in found}
    parameters = agreement.by_torch_name(init_params(jax.random.key(0), GPT(config_with(**choices).model)))
    assert places >= {"logits", "loss"} | {f"gradient of {name}" for name in parameters}
    without_effect = {name for name in parameters if name.endswith("key.bias") and choices["qk_norm"] is False}
    for step in (1, 5, 7):
        compared = {"learning rate", "loss", "gradient norm", *parameters} - without_effect
        assert {place for place in places if place.startswith(f"step {step}:")} == {
            f"step {step}: {what}" for what in compared
        }


@pytest.mark.parametrize("change", [{"grad_accumulation": 3}, {"ema": 0.2}, {"weight_decay": 0.5}, {"beta1": 0.5}], ids=str)
def test_the_twin_has_the_whole_training_section(change):
    config = config_with(**CHOICES[1]).override(change)
    found = agreement.compare(config, list(some_batches(7)))
    assert [difference for difference in found if not difference.is_within] == []
    averages = [difference for difference in found if "average of" in difference.place]
    assert bool(averages) == ("ema" in change)


def test_all_values_of_all_choices_are_compared():
    for field in dataclasses.fields(ModelConfig):
        if allowed := field.metadata["choices"]:
            used = {choices.get(field.name, field.default) for choices in CHOICES}
            assert used >= set(allowed) - {"bfloat16"}


CLIP, LAYER_NORM, ADAMW = torch.nn.utils.clip_grad_norm_, torch.nn.LayerNorm, torch.optim.AdamW
DEVIATIONS = {
    "another epsilon": (torch.nn, "LayerNorm", lambda size, eps, bias: LAYER_NORM(size, eps=1e-3, bias=bias)),
    "the exact GELU": (torch_gpt.ACTIVATIONS, "gelu", torch.nn.functional.gelu),
    "decay of norms": (torch_gpt, "AdamW", lambda groups, **keywords: ADAMW([groups[0], groups[1] | DECAY], **keywords)),
    "no clipping": (torch.nn.utils, "clip_grad_norm_", lambda parameters, limit: CLIP(parameters, 1e9)),
}
DECAY = {"weight_decay": 0.1}


@pytest.mark.parametrize("name", DEVIATIONS)
def test_a_small_deviation_is_found(monkeypatch, name):
    owner, attribute, value = DEVIATIONS[name]
    (monkeypatch.setitem if isinstance(owner, dict) else monkeypatch.setattr)(owner, attribute, value)
    found = agreement.compare(config_with(**CHOICES[0]), list(some_batches(7)))
    assert any(not difference.is_within for difference in found)


def test_a_nan_is_a_difference():
    assert not agreement.Difference("loss", float("nan"), float("nan"), 1.0, is_relative=False).is_within


def test_the_twin_draws_its_own_weights_as_widely_as_the_linen_model():
    for init, tied, positions in itertools.product(("gpt2", "fan_in"), (False, True), ("sinusoidal", "learned")):
        choices = {"init": init, "tie_embeddings": tied, "positions": positions}
        config = config_with(**choices, embed_dim=128, ff_dim=256, num_layers=2, bias=True, norm="layernorm").model
        ours = agreement.by_torch_name(init_params(jax.random.key(0), GPT(config)))
        torch.manual_seed(0)
        theirs = {name: parameter.detach().numpy() for name, parameter in torch_gpt.GPT(config).named_parameters()}
        assert {name: array.shape for name, array in ours.items()} == {name: array.shape for name, array in theirs.items()}
        for name in ours:
            assert ours[name].std() == pytest.approx(theirs[name].std(), rel=0.1), name


def test_the_same_logits_and_uniform_numbers_give_the_same_tokens():
    logits_BV = np.random.default_rng(0).normal(size=(500, 11)).astype(np.float32) * 2
    key = jax.random.key(0)
    uniform_BV = jax.random.uniform(jax.random.clone(key), logits_BV.shape, minval=jnp.finfo(jnp.float32).tiny)
    ours = np.asarray(jax.random.categorical(key, jnp.asarray(logits_BV)))
    theirs = torch_gpt.sample(torch.tensor(logits_BV), torch.tensor(np.asarray(uniform_BV))).numpy()
    np.testing.assert_array_equal(ours, theirs)
    assert len(set(ours.tolist())) == 11
