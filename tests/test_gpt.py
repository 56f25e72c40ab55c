"""The complete model: shapes for all combinations of settings, causality, and a cache that changes nothing."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_params as random_params_for
from helpers import random_tokens as random_tokens_below
from settings import BASE, SIZES, other_values

from minigpt_jax.config import ModelConfig, load_preset, preset_names
from minigpt_jax.kernels import BLOCKED, SPLIT
from minigpt_jax.kernels.partitioned_cache import partitioned
from minigpt_jax.models.cache import LayerCache
from minigpt_jax.models.gpt import GPT
from minigpt_jax.models.kernels import PLAIN
from minigpt_jax.models.transformer import Transformer
from minigpt_jax.tasks.next_token import next_token_loss

pytestmark = pytest.mark.slow

TINY = ModelConfig(num_layers=2, num_heads=4, embed_dim=16, ff_dim=24, context_length=8, vocab_size=16)


with_all_kernels = pytest.mark.parametrize("kernels", [PLAIN, SPLIT, BLOCKED], ids=lambda kernels: kernels.name)


def random_tokens(*shape, config=TINY, seed=0):
    return random_tokens_below(*shape, vocab_size=config.vocab_size, seed=seed)


def random_params(model):
    return random_params_for(model, np.zeros((2, 1), np.int32), scale=0.4)


# ---- Shapes and types -----------------------------------------------------------------------------------------------------

# All values of every setting except sizes, probabilities and what matters only in training.
CHOICES = {
    field.name: [getattr(BASE, field.name), *other_values(BASE, field)]
    for field in dataclasses.fields(ModelConfig)
    if field.name not in {*SIZES, "context_length", "dropout", "init", "remat"}
} | {"num_kv_heads": [None, 2, 1]}


def combinations(choices, strength):
    """A few combinations in which all values of any `strength` settings occur together at least once."""
    candidates = [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]
    candidates = [each for each in candidates if each["qk_norm"] or not each["qk_scale"]]
    random = np.random.default_rng(0)

    def interactions(combination):
        return set(itertools.combinations(combination.items(), strength))

    missing = set().union(*map(interactions, candidates))
    while missing:
        sampled = [candidates[i] for i in random.integers(len(candidates), size=50)]
        best = max(sampled, key=lambda combination: len(interactions(combination) & missing))
        missing -= interactions(best)
        yield best


@pytest.mark.parametrize("kernels", [PLAIN, SPLIT], ids=lambda kernels: kernels.name)
def test_all_combinations_of_settings_have_the_right_shapes_and_dtypes(kernels):
    """The forward pass and one step with the cache, for all values of any three settings."""
    B, T, V = 2, 5, TINY.vocab_size
    tokens_BT = jax.ShapeDtypeStruct((B, T), jnp.int32)
    key = jax.eval_shape(jax.random.key, 0)

    def everything(model, key, tokens_BT):
        (logits_BTV, _), variables = model.init_with_output(key, tokens_BT)
        cache = empty_cache(B, model)
        return variables["params"], logits_BTV, cache, model.apply(variables, tokens_BT[:, :1], tokens_BT[:, :1], cache)

    for choices in combinations(CHOICES, strength=3):
        config = dataclasses.replace(TINY, num_layers=1, **choices)
        params, logits_BTV, cache, (next_B1V, next_cache) = jax.eval_shape(
            functools.partial(everything, GPT(config, kernels)), key, tokens_BT
        )
        assert (logits_BTV.shape, logits_BTV.dtype) == ((B, T, V), jnp.float32), choices
        assert (next_B1V.shape, next_B1V.dtype) == ((B, 1, V), jnp.float32), choices
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}, choices
        assert next_cache == cache, choices  # so that a loop can carry it
        G, S, K = config.kv_heads, config.context_length, config.head_size
        slots = (B, S, G, K) if kernels is PLAIN else (B * G, S, K)
        arrays = [(leaf.shape, leaf.dtype.name) for leaf in jax.tree.leaves([layer.kv for layer in cache])]
        assert arrays == [(slots, config.dtype), (slots, config.dtype), ((), "int32")], choices

        names = {path[-1].key for path, _ in jax.tree.leaves_with_path(params)}
        assert ("bias" in names) == config.bias, choices
        assert ("head" in params) == (not config.tie_embeddings), choices
        assert ("positions" in params["embedding"]) == (config.positions == "learned"), choices
        assert ("final_norm" in params["transformer"]) == (config.norm_placement == "pre"), choices


@pytest.mark.parametrize("name", preset_names())
def test_presets_have_the_right_shapes(name):
    config = dataclasses.replace(load_preset(name).model, vocab_size=65)
    tokens_BT = jax.ShapeDtypeStruct((2, config.context_length), jnp.int32)
    (logits_BTV, _), variables = jax.eval_shape(GPT(config).init_with_output, jax.random.key(0), tokens_BT)
    assert logits_BTV.shape == (2, config.context_length, 65)
    assert len(variables["params"]["transformer"]) == config.num_layers + (config.norm_placement == "pre")
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_the_padding_of_the_vocabulary_has_no_logits_no_effect_and_no_gradient(tie_embeddings):
    config = ModelConfig(
        num_layers=1, num_heads=2, embed_dim=8, ff_dim=8, context_length=4, vocab_size=5, vocab_multiple=8,
        tie_embeddings=tie_embeddings,
    )  # fmt: skip
    tokens_BT = np.array([[0, 1, 2, 4], [4, 3, 2, 0]], np.int32)
    params = random_params_for(GPT(config), tokens_BT)

    def logits(params):
        return GPT(config).apply({"params": params}, tokens_BT)[0]

    loud = jax.tree_util.tree_map_with_path(lambda path, leaf: set_padding(path, leaf, 1e6), params)
    assert logits(params).shape == (2, 4, 5)
    np.testing.assert_array_equal(logits(loud), logits(params))
    grads = jax.grad(lambda params: (logits(params) ** 2).sum())(params)
    silent = jax.tree_util.tree_map_with_path(lambda path, leaf: set_padding(path, leaf, 0.0), grads)
    jax.tree.map(np.testing.assert_array_equal, grads, silent)


def set_padding(path, leaf, value):
    """The parameter or gradient with this value in the rows and columns beyond the five tokens."""
    name = jax.tree_util.keystr(path)
    leaf = np.array(leaf)
    if "tokens" in name:
        leaf[5:] = value
    if "head" in name and "heads" not in name:
        leaf[:, 5:] = value
    return leaf


# ---- Initial values -------------------------------------------------------------------------------------------------------

INIT_CONFIG = ModelConfig(
    num_layers=2, num_heads=4, embed_dim=64, ff_dim=96, context_length=64, vocab_size=64,
    positions="learned", norm="layernorm", activation="swiglu", bias=True,
)  # fmt: skip


@pytest.fixture(scope="module", params=["gpt2", "fan_in"])
def initial(request):
    config = dataclasses.replace(INIT_CONFIG, init=request.param)
    return config, jax.jit(GPT(config).init)(jax.random.key(0), np.zeros((2, 1), np.int32))["params"]


def test_initial_weights_have_the_right_standard_deviations(initial):
    """Smaller in the two layers of each block that write to the residual stream. Biases are 0, scales 1."""
    config, params = initial
    for path, leaf in jax.tree.leaves_with_path(params):
        *_, parent, name = (part.key for part in path)
        if name in ("bias", "scale"):
            assert (leaf == (name == "scale")).all(), path
            continue
        stddev = 0.02 if config.init == "gpt2" else 1.0 if name == "embedding" else leaf.shape[0] ** -0.5
        if parent in ("output", "down"):
            stddev /= math.sqrt(2 * config.num_layers)
        assert np.std(leaf) == pytest.approx(stddev, rel=0.07), path
        assert np.mean(leaf) == pytest.approx(0, abs=0.1 * stddev), path


@pytest.mark.parametrize("positions", ["sinusoidal", "learned", "rotary"])
def test_initial_loss_is_near_uniform_guessing(initial, positions):
    """ln V for V tokens with small logits, ln V + 1/2 with normally distributed logits of variance 1."""
    config, params = initial

    def loss(params, tokens_BT, targets_BT, tied):
        model = GPT(dataclasses.replace(config, positions=positions, tie_embeddings=tied))
        logits_BTV, _ = model.apply({"params": params}, tokens_BT)
        total, count = next_token_loss(logits_BTV, targets_BT, jnp.ones_like(targets_BT))
        return total / count

    tokens_BT, targets_BT = random_tokens(32, 64, config=INIT_CONFIG), random_tokens(32, 64, config=INIT_CONFIG, seed=1)
    expected = math.log(INIT_CONFIG.vocab_size) + (0.5 if config.init == "fan_in" else 0.0)
    for tied in (False, True) if config.init == "gpt2" else (False,):  # with fan_in, a token's own tied logit is larger
        run = jax.jit(loss, static_argnames="tied")
        assert run(params, tokens_BT, targets_BT, tied=tied) == pytest.approx(expected, abs=0.1)


# ---- Causality ------------------------------------------------------------------------------------------------------------


@with_all_kernels
@pytest.mark.parametrize("positions", ["sinusoidal", "learned", "rotary"])
def test_gradient_with_respect_to_the_future_is_exactly_zero(positions, kernels):
    """All tokens differ, so the gradient with respect to a token's embedding is that with respect to its position."""
    model = GPT(dataclasses.replace(TINY, positions=positions), kernels)
    params = random_params(model)
    tokens_BT = np.random.default_rng(1).permutation(16).reshape(2, 8).astype(np.int32)

    @jax.jit
    @jax.jacrev
    def jacobian(table_VD):
        embedding = params["embedding"] | {"tokens": {"embedding": table_VD}}
        return model.apply({"params": params | {"embedding": embedding}}, tokens_BT)[0][..., 0]

    gradient_BTVD = jacobian(params["embedding"]["tokens"]["embedding"])
    depends_BTBT = (np.asarray(gradient_BTVD)[:, :, tokens_BT] != 0).any(axis=-1)
    allowed_BTBT = np.eye(2, dtype=bool)[:, None, :, None] & np.tri(8, dtype=bool)[None, :, None, :]
    np.testing.assert_array_equal(depends_BTBT, allowed_BTBT)


@with_all_kernels
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_later_tokens_leave_earlier_logits_bit_identical(dtype, kernels):
    model = GPT(dataclasses.replace(TINY, dtype=dtype), kernels)
    params, tokens_BT = random_params(model), random_tokens(2, 8)
    run = jax.jit(lambda tokens_BT: model.apply({"params": params}, tokens_BT)[0])
    for t in range(8):
        changed_BT = tokens_BT.copy()
        changed_BT[:, t:] = (changed_BT[:, t:] + 1) % TINY.vocab_size
        same_BT = (run(tokens_BT) == run(changed_BT)).all(axis=-1)
        assert same_BT.tolist() == [[s < t for s in range(8)]] * 2


def test_token_order_changes_the_logits():
    """A model that ignored positions could not distinguish two rows with the same tokens in a different order."""

    @jax.jit
    def run(tokens_BT):
        models = [GPT(dataclasses.replace(TINY, num_layers=1, positions=positions)) for positions in CHOICES["positions"]]
        return [model.apply({"params": random_params(model)}, tokens_BT)[0][:, -1] for model in models]

    for logits_BV in run(np.array([[1, 2, 3, 4], [2, 1, 3, 4]], np.int32)):
        assert np.abs(logits_BV[0] - logits_BV[1]).max() > 1e-3


@with_all_kernels
def test_shifting_all_rotary_positions_does_not_change_the_logits(kernels):
    model, positions_BT = GPT(TINY, kernels), np.tile(np.arange(8), (2, 1))
    params, tokens_BT, run = random_params(model), random_tokens(2, 8), jax.jit(model.apply)
    logits_BTV, shifted_BTV = (run({"params": params}, tokens_BT, positions_BT + shift)[0] for shift in (0, 13))
    np.testing.assert_allclose(shifted_BTV, logits_BTV, atol=1e-3)


# ---- The output layer -----------------------------------------------------------------------------------------------------


def test_tied_logits_are_products_with_the_token_embeddings():
    model, tokens_BT = GPT(dataclasses.replace(TINY, tie_embeddings=True)), random_tokens(2, 5)
    params = random_params(model)

    @jax.jit
    def run(params, tokens_BT):
        return model.apply(
            {"params": params}, tokens_BT, capture_intermediates=lambda module, _: type(module) is Transformer
        )

    (logits_BTV, _), state = run(params, tokens_BT)
    [(x_BTD, _)] = state["intermediates"]["transformer"]["__call__"]
    np.testing.assert_allclose(logits_BTV, x_BTD @ params["embedding"]["tokens"]["embedding"].T, rtol=1e-5, atol=1e-5)


# ---- The cache ------------------------------------------------------------------------------------------------------------

CACHED = [
    {"positions": "rotary"},
    {"positions": "rotary", "qk_norm": False, "num_kv_heads": 2, "norm": "layernorm", "tie_embeddings": True, "bias": True},
    {"positions": "learned", "num_kv_heads": 1, "norm_placement": "post", "activation": "swiglu"},
    {"positions": "sinusoidal", "norm": "layernorm", "norm_placement": "post", "num_kv_heads": 2, "activation": "gelu"},
    {"positions": "rotary", "token_shift": True},
    {"positions": "rotary", "qk_scale": True, "num_kv_heads": 2},
    {"positions": "learned", "norm_placement": "post", "token_shift": True},
]


def two_parts(batch_size, config):
    return partitioned(batch_size, config, 2)


TWO_PARTS = dataclasses.replace(SPLIT, name="two parts", empty_cache=two_parts)


def empty_cache(B, model):
    kv = model.kernels.empty_cache(B, model.config)
    return (LayerCache.empty(kv, B, model.config),) * model.config.num_layers


@pytest.mark.parametrize(
    ("changes", "kernels"),
    [*itertools.product(CACHED, (PLAIN, SPLIT)), (CACHED[0], TWO_PARTS), (CACHED[2], TWO_PARTS)],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_cached_and_uncached_logits_agree_at_every_position(changes, kernels):
    """Rows start in different columns. Four columns are processed at once, the rest one at a time: beyond the context if the
    model can slide. The reference is the plain model on the full sequences.
    """
    config = dataclasses.replace(TINY, **changes)
    model, plain, S, T = GPT(config, kernels), GPT(config), config.context_length, 4
    params, start_B = random_params(model), np.array([0, 1, 6])
    N = 3 * S if config.positions == "rotary" else S
    tokens_BN = random_tokens(3, N, config=config)
    # Column n of row b holds the token at position n - start_B[b]. Columns before position 0 are padding.
    positions_BN = np.arange(N)[None] - start_B[:, None]
    columns_BN = np.where(positions_BN < 0, 0, np.take_along_axis(tokens_BN, np.maximum(positions_BN, 0), axis=1))

    @jax.jit
    def uncached(tokens_BN):
        return plain.apply({"params": params}, tokens_BN)[0]

    @jax.jit
    def cached(columns_BN, positions_BN):
        def run(cache, column_and_position):
            logits_BTV, cache = model.apply({"params": params}, *column_and_position, cache)
            return cache, logits_BTV

        def single(columns_BN):
            return columns_BN[:, T:].T[:, :, None]

        cache, first_BTV = run(empty_cache(3, model), (columns_BN[:, :T], positions_BN[:, :T]))
        _, others_NB1V = jax.lax.scan(run, cache, (single(columns_BN), single(positions_BN)))
        return jnp.concatenate([first_BTV, others_NB1V[:, :, 0].swapaxes(0, 1)], axis=1)

    expected_BNV = np.asarray(uncached(tokens_BN))
    logits_BNV = np.asarray(cached(columns_BN, np.maximum(positions_BN, 0)))
    for row, start in enumerate(start_B):
        np.testing.assert_allclose(logits_BNV[row, start:], expected_BNV[row, : N - start], atol=1e-4)
