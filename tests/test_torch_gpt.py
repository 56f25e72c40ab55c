"""The PyTorch twin: same model and same training step for every config, and deviations are detected."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from settings import BASE, CONTEXTS, LOOP_SETTINGS, MODEL_CHANGES, changes_of

pytestmark = pytest.mark.slow

torch = pytest.importorskip("torch")

from minigpt_jax.api import choose_kernels
from minigpt_jax.compare import agreement, torch_gpt
from minigpt_jax.config import Config, ModelConfig, TrainingConfig
from minigpt_jax.models.gpt import GPT
from minigpt_jax.models.initial import init_params

torch.set_num_threads(1)  # one core per test process

SHAPE = {"num_layers": 1, "num_heads": 4, "embed_dim": 16, "ff_dim": 24, "context_length": 8, "vocab_size": 11}
TRAINING = TrainingConfig(batch_size=3, steps=7, learning_rate=1e-2, min_learning_rate=1e-3, warmup_steps=3, grad_clip=0.2)
# Like GPT-2: the biases of its keys have no effect.
GPT2 = {"positions": "learned", "norm": "layernorm", "bias": True, "activation": "gelu", "qk_norm": False}
NOT_COMPARED = "dropout", "dtype"  # the twins draw different random numbers and round bfloat16 differently


def config_with(**choices):
    return Config(model=ModelConfig(**SHAPE | choices), training=TRAINING)


def random_batches(num_batches, context_length=8, vocab_size=11):
    rng, shape = np.random.default_rng(0), (3, context_length + 1)
    for _ in range(num_batches):
        tokens_BT = rng.integers(0, vocab_size, shape, np.int32)
        mask_BT = np.ones((3, context_length), bool)
        yield {"inputs_BT": tokens_BT[:, :-1], "targets_BT": tokens_BT[:, 1:], "mask_BT": mask_BT}


def assert_twins_agree(config, num_steps, without_effect=()):
    """Every quantity is compared and within its limit."""
    batches = list(random_batches(num_steps, config.model.context_length, config.model.vocab_size))
    differences = agreement.compare(config, batches, choose_kernels(config.model))
    assert [difference for difference in differences if not difference.is_within_limit] == []
    shapes = jax.eval_shape(functools.partial(init_params, model=GPT(config.model)), jax.random.key(0))
    parameters = {agreement.torch_name(path) for path, _ in jax.tree.leaves_with_path(shapes)}
    trained = {name for name in parameters if not name.endswith(without_effect)}
    expected = {"logits", "loss"} | {f"gradient of {name}" for name in parameters}
    for step in {1, 5, num_steps} & set(range(num_steps + 1)):
        expected |= {f"step {step}: {quantity}" for quantity in {"learning rate", "loss", "gradient norm", *trained}}
        if config.training.ema:
            expected |= {f"step {step}: average of {name}" for name in trained}
    assert {difference.quantity for difference in differences} == expected
    assert expected > {f"step {num_steps}: loss"}


@pytest.mark.parametrize("context_length", CONTEXTS)
@pytest.mark.parametrize("change", [change for change in MODEL_CHANGES if not set(change) & set(NOT_COMPARED)], ids=str)
def test_twins_agree_for_every_model_setting(change, context_length):
    """In logits, gradients and training."""
    assert_twins_agree(Config(dataclasses.replace(BASE, context_length=context_length, **change), TRAINING), num_steps=2)


@pytest.mark.parametrize("change", [{}, *changes_of(TRAINING, but=LOOP_SETTINGS)], ids=str)
def test_twins_agree_for_every_training_setting(change):
    assert_twins_agree(config_with().override(change), num_steps=7)


def test_parameters_without_effect_are_not_compared_after_steps():
    assert_twins_agree(config_with(**GPT2), num_steps=7, without_effect=("key.bias",))


CLIP, LAYER_NORM, ADAMW = torch.nn.utils.clip_grad_norm_, torch.nn.LayerNorm, torch.optim.AdamW
DEVIATIONS = {
    "different epsilon": (torch.nn, "LayerNorm", lambda size, eps, bias: LAYER_NORM(size, eps=1e-3, bias=bias)),
    "exact GELU": (torch_gpt.ACTIVATIONS, "gelu", torch.nn.functional.gelu),
    "decayed norms": (torch_gpt, "AdamW", lambda groups, **keywords: ADAMW([groups[0], groups[1] | DECAY], **keywords)),
    "no clipping": (torch.nn.utils, "clip_grad_norm_", lambda parameters, limit: CLIP(parameters, 1e9)),
}
DECAY = {"weight_decay": 0.1}


@pytest.mark.parametrize("name", DEVIATIONS)
def test_a_small_deviation_is_detected(monkeypatch, name):
    owner, attribute, value = DEVIATIONS[name]
    (monkeypatch.setitem if isinstance(owner, dict) else monkeypatch.setattr)(owner, attribute, value)
    differences = agreement.compare(config_with(**GPT2), list(random_batches(7)))
    assert any(not difference.is_within_limit for difference in differences)


def test_nan_exceeds_the_limit():
    assert not agreement.Difference("loss", float("nan"), float("nan"), 1.0, is_relative=False).is_within_limit


def test_initial_weights_of_the_twin_have_the_same_mean_and_standard_deviation():
    for init, tied, positions in itertools.product(("gpt2", "fan_in"), (False, True), ("sinusoidal", "learned")):
        choices = {"init": init, "tie_embeddings": tied, "positions": positions, "qk_scale": True}
        config = config_with(**choices, embed_dim=128, ff_dim=256, num_layers=2, bias=True, norm="layernorm").model
        ours = agreement.by_torch_name(init_params(jax.random.key(0), GPT(config)))
        torch.manual_seed(0)
        theirs = {name: parameter.detach().numpy() for name, parameter in torch_gpt.GPT(config).named_parameters()}
        assert {name: array.shape for name, array in ours.items()} == {name: array.shape for name, array in theirs.items()}
        for name in ours:
            assert ours[name].std() == pytest.approx(theirs[name].std(), rel=0.1), name
            assert ours[name].mean() == pytest.approx(theirs[name].mean(), abs=float(0.1 * ours[name].std() + 1e-6)), name


def test_twins_sample_the_same_tokens_from_the_same_uniform_numbers():
    logits_BV = np.random.default_rng(0).normal(size=(500, 11)).astype(np.float32) * 2
    key = jax.random.key(0)
    uniform_BV = jax.random.uniform(jax.random.clone(key), logits_BV.shape, minval=jnp.finfo(jnp.float32).tiny)
    ours = np.asarray(jax.random.categorical(key, jnp.asarray(logits_BV)))
    theirs = torch_gpt.sample(torch.tensor(logits_BV), torch.tensor(np.asarray(uniform_BV))).numpy()
    np.testing.assert_array_equal(ours, theirs)
    assert len(set(ours.tolist())) == 11
