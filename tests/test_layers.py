"""The layers, each compared with a few lines of NumPy."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import normal, random_params

from minigpt_jax.config import ModelConfig
from minigpt_jax.kernels import SPLIT
from minigpt_jax.models.initial import kernel_init, residual_init
from minigpt_jax.models.kernels import PLAIN
from minigpt_jax.models.layers import Dense, FeedForward, Norm, TokenAndPosition
from minigpt_jax.models.ops import rotate, sinusoidal_positions
from minigpt_jax.models.token_shift import shift

CONFIG = ModelConfig(num_layers=3, num_heads=2, embed_dim=8, ff_dim=12, context_length=6, vocab_size=10, bias=True)
with_plain_and_tuned_kernels = pytest.mark.parametrize("kernels", [PLAIN, SPLIT], ids=lambda kernels: kernels.name)


# ---- Token shift ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_continued", [False, True])
def test_shift_takes_the_second_half_of_the_features_from_the_position_before(is_continued):
    x_BTD, before_BD, positions_BT = normal(2, 4, 5), normal(2, 5, seed=1), np.array([[0, 1, 2, 3], [7, 0, 1, 0]])
    shifted_BTD = jax.jit(shift)(x_BTD, positions_BT, before_BD if is_continued else None)
    first_BD = before_BD if is_continued else np.zeros_like(before_BD)
    for b, t in np.ndindex(2, 4):
        before_D = x_BTD[b, t - 1] if t > 0 else first_BD[b]
        later_D = before_D if positions_BT[b, t] > 0 else np.zeros(5)
        np.testing.assert_array_equal(shifted_BTD[b, t], [*x_BTD[b, t, :2], *later_D[2:]])


# ---- Rotary positions -----------------------------------------------------------------------------------------------------

rotate_jitted = jax.jit(rotate)


def test_rotation_multiplies_complex_numbers_made_of_features_half_a_head_apart():
    K, positions_BT = 6, np.array([[0, 1, 2, 3], [7, 60, 600, 5]])
    x_BTHK = normal(2, 4, 3, K)
    complex_BTHh = x_BTHK[..., : K // 2] + 1j * x_BTHK[..., K // 2 :]
    angles_BTh = positions_BT[..., None] * 10000.0 ** (-2 * np.arange(K // 2) / K)
    rotated_BTHh = complex_BTHh * np.exp(1j * angles_BTh)[:, :, None]
    expected_BTHK = np.concatenate([rotated_BTHh.real, rotated_BTHh.imag], axis=-1)
    np.testing.assert_allclose(rotate_jitted(x_BTHK, positions_BT), expected_BTHK, atol=2e-4)


def test_rotation_leaves_position_zero_unchanged():
    x_BTHK = normal(2, 4, 3, 8)
    np.testing.assert_array_equal(rotate_jitted(x_BTHK, np.zeros((2, 4), int)), x_BTHK)


def test_rotation_preserves_norms():
    x_BTHK = normal(2, 4, 3, 8)
    rotated_BTHK = rotate_jitted(x_BTHK, np.array([[0, 1, 50, 999], [3, 2, 1, 0]]))
    np.testing.assert_allclose(np.linalg.norm(rotated_BTHK, axis=-1), np.linalg.norm(x_BTHK, axis=-1), rtol=1e-5)


def test_dot_product_of_rotated_vectors_depends_only_on_their_distance():
    q, k = normal(8), normal(8, seed=1)

    def products(distance):
        """Dot products of q at position `distance` + n and k at position n, for several n."""
        positions_BT = np.array([[0, 1, 7, 40], [3, 100, 200, 2]])
        q_BTHK, k_BTHK = (np.broadcast_to(x, (2, 4, 1, 8)) for x in (q, k))
        q_BTHK, k_BTHK = rotate_jitted(q_BTHK, positions_BT + distance), rotate_jitted(k_BTHK, positions_BT)
        return np.einsum("BTHK,BTHK->BTH", q_BTHK, k_BTHK).ravel()

    means = []
    for distance in (0, 1, 5, 30):
        np.testing.assert_allclose(products(distance), products(distance)[0], atol=1e-3)
        means.append(products(distance).mean())
    assert np.diff(np.sort(means)).min() > 0.01  # and it does depend on the distance


# ---- Embeddings -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 2, 6, 7])
def test_sinusoidal_positions_match_the_formula(dim):
    table_TD = np.asarray(jax.jit(sinusoidal_positions, static_argnums=(0, 1))(9, dim))
    assert table_TD.shape == (9, dim)
    for t, feature in np.ndindex(9, dim):
        i = feature // 2
        wave = np.sin if feature % 2 == 0 else np.cos
        assert table_TD[t, feature] == pytest.approx(wave(t / 10000 ** (2 * i / dim)), abs=1e-5)


@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "rotary"])
def test_embedding_combines_token_and_position(positions):
    module = TokenAndPosition(dataclasses.replace(CONFIG, positions=positions))
    tokens_BT, positions_BT = np.array([[3, 3, 9], [0, 1, 2]]), np.array([[0, 5, 2], [1, 1, 4]])
    params = random_params(module, tokens_BT, positions_BT)
    token_BTD = params["tokens"]["embedding"][tokens_BT]
    expected_BTD = {
        "learned": lambda: token_BTD + params["positions"]["embedding"][positions_BT],
        "sinusoidal": lambda: np.sqrt(8) * token_BTD + np.asarray(sinusoidal_positions(6, 8))[positions_BT],
        "rotary": lambda: token_BTD,
    }[positions]()
    x_BTD = jax.jit(module.apply)({"params": params}, tokens_BT, positions_BT)
    np.testing.assert_allclose(x_BTD, expected_BTD, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_out_of_range_tokens_give_nan(positions):
    module = TokenAndPosition(dataclasses.replace(CONFIG, positions=positions))
    tokens_BT, positions_BT = np.array([[0, 10], [9, 99]]), np.array([[0, 1], [0, 1]])
    params = random_params(module, tokens_BT, positions_BT)
    x_BTD = module.apply({"params": params}, tokens_BT, positions_BT)
    assert np.isnan(x_BTD).all(axis=-1).tolist() == [[False, True], [False, True]]


# ---- Feed-forward ---------------------------------------------------------------------------------------------------------

NUMPY_ACTIVATIONS = {
    "gelu": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "gelu_exact": lambda x: x * (1 + np.vectorize(math.erf)(x / np.sqrt(2))) / 2,
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
}


@with_plain_and_tuned_kernels
@pytest.mark.parametrize("activation", [*NUMPY_ACTIVATIONS, "swiglu"])
def test_feed_forward_matches_the_equation(activation, kernels):
    module, x_BTD = FeedForward(dataclasses.replace(CONFIG, activation=activation), kernels), normal(2, 3, 8)
    params = random_params(module, x_BTD)

    def dense(x, name):
        return x @ params[name]["kernel"] + params[name]["bias"]

    h_BTF = dense(x_BTD, "up")
    if activation == "swiglu":
        gate_BTF = dense(x_BTD, "gate")
        h_BTF = gate_BTF / (1 + np.exp(-gate_BTF)) * h_BTF
    else:
        h_BTF = NUMPY_ACTIVATIONS[activation](h_BTF)
    assert h_BTF.shape == (2, 3, CONFIG.ff_dim)
    y_BTD = jax.jit(module.apply)({"params": params}, x_BTD)
    np.testing.assert_allclose(y_BTD, dense(h_BTF, "down"), rtol=1e-4, atol=1e-4)


# ---- Norms ----------------------------------------------------------------------------------------------------------------


def run_norm(norm, x_BTD, kernels):
    module = Norm(dataclasses.replace(CONFIG, norm=norm), kernels)
    params = random_params(module, x_BTD)
    return params, np.asarray(jax.jit(module.apply)({"params": params}, x_BTD))


@with_plain_and_tuned_kernels
@pytest.mark.parametrize("size", [1.0, 3e-3])  # with the smaller one, epsilon is as large as the variance
def test_layernorm_matches_the_equation(size, kernels):
    x_BTD = size * normal(2, 3, 8) + size
    params, y_BTD = run_norm("layernorm", x_BTD, kernels)
    centred_BTD = x_BTD - x_BTD.mean(axis=-1, keepdims=True)
    unit_BTD = centred_BTD / np.sqrt(np.square(centred_BTD).mean(axis=-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(y_BTD, unit_BTD * params["scale"] + params["bias"], rtol=1e-4, atol=1e-5)


@with_plain_and_tuned_kernels
@pytest.mark.parametrize("size", [1.0, 3e-3])
def test_rmsnorm_matches_the_equation(size, kernels):
    x_BTD = size * normal(2, 3, 8) + size
    params, y_BTD = run_norm("rmsnorm", x_BTD, kernels)
    unit_BTD = x_BTD / np.sqrt(np.square(x_BTD).mean(axis=-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(y_BTD, unit_BTD * params["scale"], rtol=1e-4, atol=1e-5)


@with_plain_and_tuned_kernels
def test_layernorm_is_accurate_far_from_zero(kernels):
    """E[x²] - E[x]² would lose all digits here."""
    x_BTD = normal(2, 3, 8)
    x_BTD = np.round(x_BTD * 64) / 64  # exact when 4096 is added
    _, near_BTD = run_norm("layernorm", x_BTD, kernels)
    _, far_BTD = run_norm("layernorm", x_BTD + 4096, kernels)
    np.testing.assert_allclose(far_BTD, near_BTD, atol=1e-2)


# ---- Parameters -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, with_bias, without",
    [
        (lambda config: Dense(4, config, PLAIN, name=None), {"kernel", "bias"}, {"kernel"}),
        (lambda config: Norm(dataclasses.replace(config, norm="layernorm")), {"scale", "bias"}, {"scale"}),
        (lambda config: Norm(dataclasses.replace(config, norm="rmsnorm")), {"scale"}, {"scale"}),
    ],
    ids=["dense", "layernorm", "rmsnorm"],
)
def test_bias_follows_the_config(make, with_bias, without):
    for bias, expected in ((True, with_bias), (False, without)):
        module = make(dataclasses.replace(CONFIG, bias=bias))
        shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((2, 3, 8)))
        assert set(shapes["params"]) == expected


@pytest.mark.parametrize("inputs", [50, 200])
@pytest.mark.parametrize("init", ["gpt2", "fan_in"])
def test_initial_weights_have_the_standard_deviation_of_the_config(init, inputs):
    """Smaller by √(2 L) in layers that write to the residual stream."""
    config, key = dataclasses.replace(CONFIG, init=init), jax.random.key(0)
    weights = np.asarray(kernel_init(config)(key, (inputs, 100)))
    assert np.std(weights) == pytest.approx({"gpt2": 0.02, "fan_in": 1 / np.sqrt(inputs)}[init], rel=0.05)
    residual = residual_init(config)(jax.random.clone(key), (inputs, 100))
    np.testing.assert_allclose(residual, weights / np.sqrt(2 * CONFIG.num_layers), rtol=1e-5)


def test_the_gradient_of_a_lookup_is_summed_in_float32():
    """A frequent token has thousands of terms. In bfloat16 a sum stops growing once a term is below 1/256 of it."""
    config = dataclasses.replace(CONFIG, dtype="bfloat16", vocab_size=4, positions="learned")
    tokens_BT = np.resize([0, 1, 1, 3], (1024, CONFIG.context_length))
    positions_BT = np.broadcast_to(np.arange(CONFIG.context_length), tokens_BT.shape)
    module = TokenAndPosition(config)
    params = random_params(module, tokens_BT, positions_BT)

    def total(params):
        return module.apply({"params": params}, tokens_BT, positions_BT).astype(jnp.float32).sum()

    grads = jax.grad(total)(params)
    counts_V = np.bincount(tokens_BT.ravel(), minlength=4)
    np.testing.assert_array_equal(grads["tokens"]["embedding"], np.tile(counts_V[:, None], CONFIG.embed_dim))
    np.testing.assert_array_equal(grads["positions"]["embedding"], np.full((CONFIG.context_length, CONFIG.embed_dim), 1024))


@pytest.mark.parametrize("positions", ["sinusoidal", "learned", "rotary"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("init", ["gpt2", "fan_in"])
def test_initial_embeddings_have_the_right_standard_deviation(init, tied, positions):
    """1, or smaller: as in GPT-2, before a factor of √D, or if tied, so that the logits have unit variance."""
    D = 64
    config = dataclasses.replace(
        CONFIG, embed_dim=D, vocab_size=500, context_length=250, init=init, tie_embeddings=tied, positions=positions
    )
    tokens_BT = np.arange(500).reshape(2, 250)
    module = TokenAndPosition(config)
    variables = module.init(jax.random.key(0), tokens_BT, tokens_BT % 250)
    table_VD = np.asarray(variables["params"]["tokens"]["embedding"])
    expected = 0.02 if init == "gpt2" or positions == "sinusoidal" else 1 / D**0.5 if tied else 1.0
    assert np.std(table_VD) == pytest.approx(expected, rel=0.05)
    if positions == "learned":
        assert np.std(variables["params"]["positions"]["embedding"]) == pytest.approx(expected, rel=0.05)
