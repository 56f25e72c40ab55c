"""The block and the stack of blocks: norm placement, causality, dropout and recomputation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, normal
from helpers import random_params as random_params_for
from jax.test_util import check_grads

from minigpt_jax.config import ModelConfig
from minigpt_jax.kernels import BLOCKED, SPLIT
from minigpt_jax.models.kernels import PLAIN
from minigpt_jax.models.layers import FeedForward, MultiHeadAttention, Norm
from minigpt_jax.models.masks import Mask
from minigpt_jax.models.transformer import Block, Transformer

pytestmark = pytest.mark.slow

CONFIG = ModelConfig(num_layers=2, num_heads=2, embed_dim=8, ff_dim=12, context_length=4, vocab_size=5, bias=True)
B, T, D = 2, 4, CONFIG.embed_dim
POSITIONS_BT = np.broadcast_to(np.arange(T), (B, T))


X_BTD = normal(B, T, D)


def random_params(module):
    return random_params_for(module, X_BTD, Mask(), POSITIONS_BT)


def configured(**changes):
    return dataclasses.replace(CONFIG, **changes)


# ---- Norms and the residual stream ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", ["pre", "post"])
def test_block_is_attention_then_feed_forward_with_norms_as_configured(placement):
    config = configured(norm_placement=placement, norm="layernorm")
    params = random_params(Block(config))
    mask = Mask(causal=True)

    @jax.jit
    def by_hand(params, x_BTD):
        def norm(x, name):
            return Norm(config).apply({"params": params[name]}, x)

        def attention(x):
            return MultiHeadAttention(config).apply({"params": params["attention"]}, x, mask, POSITIONS_BT)[0]

        def feed_forward(x):
            return FeedForward(config).apply({"params": params["feed_forward"]}, x)

        if placement == "pre":
            x_BTD = x_BTD + attention(norm(x_BTD, "attention_norm"))
            return x_BTD + feed_forward(norm(x_BTD, "feed_forward_norm"))
        x_BTD = norm(x_BTD + attention(x_BTD), "attention_norm")
        return norm(x_BTD + feed_forward(x_BTD), "feed_forward_norm")

    y_BTD, _ = jax.jit(Block(config).apply)({"params": params}, X_BTD, mask, POSITIONS_BT)
    np.testing.assert_allclose(y_BTD, by_hand(params, X_BTD), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("placement", ["pre", "post"])
def test_stack_is_its_blocks_and_with_pre_norms_a_final_norm(placement):
    config = configured(norm_placement=placement)
    params = random_params(Transformer(config))
    assert set(params) == {"block_0", "block_1"} | ({"final_norm"} if placement == "pre" else set())

    @jax.jit
    def by_hand(params, x_BTD):
        for name in ("block_0", "block_1"):
            x_BTD, _ = Block(config).apply({"params": params[name]}, x_BTD, Mask(), POSITIONS_BT)
        if placement == "pre":
            x_BTD = Norm(config).apply({"params": params["final_norm"]}, x_BTD)
        return x_BTD

    y_BTD, no_cache = jax.jit(Transformer(config).apply)({"params": params}, X_BTD, Mask(), POSITIONS_BT)
    np.testing.assert_allclose(y_BTD, by_hand(params, X_BTD), rtol=1e-5, atol=1e-5)
    assert no_cache is None


# ---- Causality ------------------------------------------------------------------------------------------------------------


with_all_kernels = pytest.mark.parametrize("kernels", [PLAIN, SPLIT, BLOCKED], ids=lambda kernels: kernels.name)


@with_all_kernels
@pytest.mark.parametrize(
    "changes", [{}, {"norm_placement": "post", "num_kv_heads": 1}, {"norm": "layernorm", "positions": "learned"}], ids=str
)
def test_output_depends_only_on_what_the_mask_allows(changes, kernels):
    """The full Jacobian of the stack under a causal mask is exactly zero for the future and for other rows."""
    model = Transformer(configured(**changes), kernels)
    params = random_params(model)

    @jax.jit
    @jax.jacrev
    def jacobian(x_BTD):
        y_BTD, _ = model.apply({"params": params}, x_BTD, Mask(causal=True), POSITIONS_BT)
        return y_BTD[..., 0]

    depends_BTBT = (jacobian(X_BTD) != 0).any(axis=-1)
    allowed_BTBT = np.eye(B, dtype=bool)[:, None, :, None] & np.tri(T, dtype=bool)[None, :, None, :]
    np.testing.assert_array_equal(depends_BTBT, allowed_BTBT)


@with_all_kernels
def test_without_a_mask_every_position_sees_every_other(kernels):
    model = Transformer(CONFIG, kernels)
    params = random_params(model)
    run = jax.jit(lambda x_BTD: model.apply({"params": params}, x_BTD, Mask(), POSITIONS_BT)[0])
    changed_BTD = X_BTD.copy()
    changed_BTD[0, -1] += 1
    differs_BT = (run(X_BTD) != run(changed_BTD)).any(axis=-1)
    assert differs_BT.tolist() == [[True] * T, [False] * T]


# ---- Dropout --------------------------------------------------------------------------------------------------------------


def zeroed(params, *path):
    """The parameters, with everything under a path set to zero."""
    name, *rest = path
    return params | {name: zeroed(params[name], *rest) if rest else jax.tree.map(jnp.zeros_like, params[name])}


@pytest.mark.parametrize("part", ["embeddings", "attention", "feed_forward"])
def test_dropout_zeroes_the_right_share_and_rescales_the_rest(part):
    """With the other parts set to zero, each output of a part is either zero or scaled by 1 / (1 - p)."""
    p = 0.25
    config = configured(num_layers=1)
    model = Transformer(config) if part == "embeddings" else Block(config)
    x_BTD = np.tile(X_BTD, (64, 1, 1))
    positions_BT = np.tile(POSITIONS_BT, (64, 1))

    params = random_params(model)
    if part == "embeddings":
        params = zeroed(zeroed(params, "block_0", "attention", "output"), "block_0", "feed_forward", "down")
    else:
        other_part = {"attention": ("feed_forward", "down"), "feed_forward": ("attention", "output")}[part]
        params = zeroed(params, *other_part)

    @jax.jit
    def outputs(key):
        def run(**kwargs):
            y_BTD, _ = model.apply({"params": params}, x_BTD, Mask(), positions_BT, **kwargs)
            return y_BTD if part == "embeddings" else y_BTD - x_BTD

        return run(dropout=p, rngs={"dropout": key}), run()

    dropped_BTD, full_BTD = map(np.asarray, outputs(jax.random.key(0)))
    is_zero_BTD = np.abs(dropped_BTD) < 1e-6
    assert is_zero_BTD.mean() == pytest.approx(p, abs=0.03)
    if part != "embeddings":  # which pass through the final norm
        np.testing.assert_allclose(dropped_BTD[~is_zero_BTD], full_BTD[~is_zero_BTD] / (1 - p), rtol=1e-3, atol=1e-5)


def test_dropout_follows_its_key_and_is_off_by_default_for_any_config():
    plain = configured(num_layers=1)
    model = Transformer(dataclasses.replace(plain, dropout=0.5))
    params = random_params(model)

    @jax.jit
    def run(key):
        return model.apply({"params": params}, X_BTD, Mask(), POSITIONS_BT, dropout=0.5, rngs={"dropout": key})[0]

    first_BTD, again_BTD, other_BTD = (run(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first_BTD, again_BTD)
    assert not np.array_equal(first_BTD, other_BTD)

    @jax.jit
    def run_without(params):
        return [m.apply({"params": params}, X_BTD, Mask(), POSITIONS_BT)[0] for m in (model, Transformer(plain))]

    np.testing.assert_array_equal(*run_without(params))


# ---- Recomputation --------------------------------------------------------------------------------------------------------


def test_recomputed_blocks_give_the_same_gradients():
    """By parameters and by input, of a sum over the output."""

    def gradients(config):
        def loss(params, x_BTD):
            y_BTD, _ = Transformer(config).apply({"params": params}, x_BTD, Mask(causal=True), POSITIONS_BT)
            return jnp.sum(y_BTD**3)

        return jax.jit(jax.grad(loss, (0, 1)))(random_params(Transformer(config)), X_BTD)

    assert_close(gradients(configured(remat=True)), gradients(CONFIG), rtol=1e-4, atol=1e-4)


def test_recomputed_blocks_use_the_same_dropout_mask_again():
    """Compared with finite differences: with another mask it would be the gradient of a different function."""
    model = Transformer(configured(remat=True))
    params, kwargs = random_params(model), {"dropout": 0.5, "rngs": {"dropout": jax.random.key(0)}}

    def value(x_BTD):
        y_BTD, _ = model.apply({"params": params}, x_BTD, Mask(causal=True), POSITIONS_BT, **kwargs)
        return jnp.sum(y_BTD * normal(B, T, D, seed=1))

    check_grads(jax.jit(value), (X_BTD,), order=1, modes=["rev"], rtol=1e-2, atol=1e-2)
