"""The vision transformer: patches, the trunk that it shares with GPT, and what its class token sees."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import KERNELS, assert_close, assert_equal, normal, random_params
from settings import BASE, MODEL_CHANGES

from minigpt_jax.models.gpt import GPT
from minigpt_jax.models.masks import Mask
from minigpt_jax.models.transformer import Transformer
from minigpt_jax.models.vit import ViT, to_patches

CONFIG = dataclasses.replace(BASE, num_layers=2, positions="learned")
MODEL = ViT(CONFIG, num_classes=3, patch_size=2)
IMAGES_BHWC = normal(2, 6, 4, 3)


def shapes(module, *inputs):
    tree = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)


def test_patches_are_squares_in_reading_order():
    patches_BNP = to_patches(IMAGES_BHWC, 2)
    squares = [IMAGES_BHWC[:, y : y + 2, x : x + 2].reshape(2, -1) for y in (0, 2, 4) for x in (0, 2)]
    assert_equal(patches_BNP, np.stack(squares, axis=1))


@pytest.mark.parametrize("change", MODEL_CHANGES, ids=str)
def test_the_trunk_has_the_parameters_of_gpt(change):
    config = dataclasses.replace(BASE, **change)
    gpt = shapes(GPT(config), jnp.zeros((1, 1), jnp.int32))
    vit = shapes(ViT(config, 3, 2), IMAGES_BHWC)
    assert vit["transformer"] == gpt["transformer"]
    assert set(vit) == {"transformer", "patches", "class_token", "positions", "head"}


def test_the_logits_are_those_of_the_class_token_after_the_trunk():
    params = random_params(MODEL, IMAGES_BHWC)
    patches_BND = to_patches(IMAGES_BHWC, 2) @ params["patches"]["kernel"]
    class_token_B1D = np.stack(2 * [params["class_token"]])
    x_BTD = np.concatenate([class_token_B1D, patches_BND], axis=1) + params["positions"][None]
    positions_BT = np.stack(2 * [np.arange(7)])
    y_BTD, _ = Transformer(CONFIG).apply({"params": params["transformer"]}, x_BTD, Mask(), positions_BT)
    logits_BV = MODEL.apply({"params": params}, IMAGES_BHWC)
    assert logits_BV.shape == (2, 3)
    assert_close(logits_BV, y_BTD[:, 0] @ params["head"]["kernel"], rtol=1e-5)


def test_the_class_token_and_every_patch_see_the_whole_image():
    _, state = MODEL.apply({"params": random_params(MODEL, IMAGES_BHWC)}, IMAGES_BHWC, mutable=["intermediates"])
    for block in ("block_0", "block_1"):
        [weights_BHTS] = state["intermediates"]["transformer"][block]["attention"]["weights_BHTS"]
        assert weights_BHTS.shape[2:] == (7, 7)
        assert (np.asarray(weights_BHTS) > 0).all()


def test_the_order_of_patches_matters_only_through_their_positions():
    params = random_params(MODEL, IMAGES_BHWC)
    swapped = np.concatenate([IMAGES_BHWC[:, 2:4], IMAGES_BHWC[:, :2], IMAGES_BHWC[:, 4:]], axis=1)
    order = np.array([0, 3, 4, 1, 2, 5, 6])  # the class token, then rows of two patches
    moved = params | {"positions": params["positions"][order]}
    logits_BV = MODEL.apply({"params": params}, IMAGES_BHWC)
    assert_close(MODEL.apply({"params": moved}, swapped), logits_BV, rtol=1e-4, atol=1e-5)
    assert not np.allclose(MODEL.apply({"params": params}, swapped), logits_BV, rtol=1e-2)


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_agree_with_the_equations(name, fake_cudnn):
    params = random_params(MODEL, IMAGES_BHWC)

    @jax.jit
    def value_and_grad(params):
        model = ViT(CONFIG, 3, 2, KERNELS[name])
        return jax.value_and_grad(lambda params: (model.apply({"params": params}, IMAGES_BHWC) ** 2).sum())(params)

    def plain(params):
        return (MODEL.apply({"params": params}, IMAGES_BHWC) ** 2).sum()

    assert_close(value_and_grad(params), jax.jit(jax.value_and_grad(plain))(params), rtol=1e-3, atol=1e-3)


def test_logits_are_float32_in_every_dtype():
    model = ViT(dataclasses.replace(CONFIG, dtype="bfloat16"), 3, 2)
    assert model.apply({"params": random_params(model, IMAGES_BHWC)}, IMAGES_BHWC).dtype == jnp.float32
