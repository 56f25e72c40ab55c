"""The fast implementations against the equations: every kernel, every mask, every size that matters."""

import ast
import dataclasses
import functools
import re
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import KERNELS, MASKS, assert_close, assert_raises, masks, normal, random_params

from minigpt_jax import kernels
from minigpt_jax.config import ModelConfig
from minigpt_jax.errors import UsageError
from minigpt_jax.kernels import partitioned_cache
from minigpt_jax.kernels.blocked_attention import BLOCK
from minigpt_jax.models import ops
from minigpt_jax.models.attention import attention
from minigpt_jax.models.cache import KVCache
from minigpt_jax.models.kernels import PLAIN, Kernels
from minigpt_jax.models.masks import Mask
from minigpt_jax.models.transformer import Transformer

pytestmark = pytest.mark.slow

CONFIG = ModelConfig(num_layers=1, num_heads=4, embed_dim=16, ff_dim=16, context_length=8, vocab_size=5)
ROOT = Path(__file__).resolve().parents[1]


def implementations(field):
    """All implementations of an op in this package, without the equation itself."""
    functions = {getattr(each, field) for each in KERNELS.values()} - {getattr(PLAIN, field)}
    return sorted(functions, key=lambda function: function.__name__)


def with_gradients(function, *inputs):
    """The function's value, and the gradients of a weighted sum of it by each input."""
    outputs, gradient = jax.vjp(function, *inputs)
    return outputs, gradient(jax.tree.map(lambda leaf: normal(*leaf.shape, seed=9), outputs))


def through_a_cache(empty_cache):
    config = dataclasses.replace(CONFIG, num_kv_heads=2)
    cache = empty_cache(3, config).append(normal(3, 4, 2, 4), normal(3, 4, 2, 4, seed=1))
    return cache.attend(normal(3, 4, 4, 4, seed=2), Mask(causal=True), jnp.broadcast_to(jnp.arange(4), (3, 4)))


def through_a_block(recompute):
    model = Transformer(dataclasses.replace(CONFIG, remat=True), dataclasses.replace(PLAIN, recompute=recompute))
    inputs = normal(2, 5, 16), Mask(causal=True), jnp.broadcast_to(jnp.arange(5), (2, 5))
    params = random_params(model, *inputs)
    return with_gradients(lambda params, x_BTD: model.apply({"params": params}, x_BTD, *inputs[1:])[0], params, inputs[0])


# Outputs and, where there are any, gradients of each op for some inputs. Every implementation must match the equation.
EXAMPLES = {
    "matmul": lambda matmul: with_gradients(matmul, normal(2, 3, 4), normal(4, 5, seed=1)),
    "center": lambda center: with_gradients(center, 1 + normal(2, 3, 8)),
    "unit_rms": lambda unit_rms: with_gradients(lambda x: unit_rms(x, 1e-5), 1 + normal(2, 3, 8)),
    "activate": lambda activate: [
        with_gradients(functools.partial(activate, activation=name), 3 * normal(2, 5, 8)) for name in ops.ACTIVATIONS
    ],
    "attention": lambda attention: [
        with_gradients(lambda q_BTHK: attention(q_BTHK, q_BTHK, q_BTHK, mask), normal(2, 6, 2, 4))  # noqa: B023
        for mask in masks(2, 6, 2).values()
    ],
    "empty_cache": through_a_cache,
    "recompute": through_a_block,
}


@pytest.mark.parametrize("op", [field.name for field in dataclasses.fields(Kernels) if field.name != "name"])
@pytest.mark.usefixtures("fake_cudnn")
def test_every_implementation_of_an_op_matches_its_equation(op):
    assert implementations(op)
    expected = EXAMPLES[op](getattr(PLAIN, op))
    for implementation in implementations(op):
        assert_close(EXAMPLES[op](implementation), expected, rtol=1e-4, atol=1e-5)


def test_sets_of_kernels_fall_back_to_equations_only_on_purpose():
    """Accelerators keep a cache's rows and heads on two axes, as meshes need them, and so use the plain cache."""
    equations = {
        name: {
            field.name for field in dataclasses.fields(Kernels) if getattr(each, field.name) == getattr(PLAIN, field.name)
        }
        for name, each in KERNELS.items()
    }
    fields = {field.name for field in dataclasses.fields(Kernels)}
    on_cpus = {"PLAIN": fields, "BLOCKED": set(), "SPLIT": set()}
    assert equations == on_cpus | {"TUNED": {"attention", "empty_cache"}, "CUDNN": {"empty_cache"}}


HEADER = re.compile(r'"""Computes .*`(\w+)`.*(?:[Ss]aves|not measured).*Proof: (tests/\w+\.py), (\w+)', re.DOTALL)


def test_each_file_states_its_op_its_saving_and_its_proof():
    for path in Path(kernels.__file__).parent.glob("[a-z]*.py"):
        header = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        op, proof, test = HEADER.match(f'"""{header}').groups()
        assert op in vars(PLAIN) or op in ("center", "KVCache"), path.name
        assert f"def {test}(" in (ROOT / proof).read_text(encoding="utf-8"), path.name
        assert "20" in header or "not measured" in header  # the date of the measurement


def test_kernels_are_distinct_static_arguments_of_jit():
    assert len(set(KERNELS.values())) == len(KERNELS) == len({each.name for each in KERNELS.values()})
    assert hash(dataclasses.replace(kernels.SPLIT)) == hash(kernels.SPLIT)
    assert Kernels() == PLAIN


# ---- Selection by device --------------------------------------------------------------------------------------------------

CPU = types.SimpleNamespace(platform="cpu")
TPU = types.SimpleNamespace(platform="tpu")


def gpu(capability):
    return types.SimpleNamespace(platform="gpu", compute_capability=capability)


@pytest.mark.parametrize(
    "device, changes, expected",
    [
        (CPU, {}, kernels.SPLIT),
        (CPU, {"context_length": 64}, kernels.SPLIT),
        (CPU, {"context_length": 65}, kernels.BLOCKED),
        (CPU, {"context_length": 65, "dtype": "bfloat16", "embed_dim": 32}, kernels.BLOCKED),
        (gpu("8.0"), {"dtype": "bfloat16", "embed_dim": 32}, kernels.CUDNN),
        (gpu("10.0"), {"dtype": "bfloat16", "embed_dim": 512}, kernels.CUDNN),
        (gpu("9.0"), {"dtype": "bfloat16", "embed_dim": 544}, kernels.TUNED),  # heads of 136
        (gpu("9.0"), {"dtype": "bfloat16", "embed_dim": 16}, kernels.TUNED),  # heads of 4
        (gpu("9.0"), {"dtype": "float32", "embed_dim": 32}, kernels.TUNED),
        (gpu("7.5"), {"dtype": "bfloat16", "embed_dim": 32}, kernels.TUNED),  # Turing
        (gpu("gfx942"), {"dtype": "bfloat16", "embed_dim": 32}, kernels.TUNED),  # AMD
        (TPU, {"dtype": "bfloat16", "embed_dim": 32}, kernels.TUNED),
    ],
)
def test_select_returns_the_kernels_for_a_device(device, changes, expected):
    config = dataclasses.replace(CONFIG, **changes)
    assert kernels.select(config, device) is expected
    assert kernels.select(config, device, "plain") is PLAIN


def test_unknown_kernels_are_rejected():
    assert_raises(UsageError, kernels.select, CONFIG, CPU, "fast", says=("kernels", "fast", "tuned", "plain"))


# ---- Attention ------------------------------------------------------------------------------------------------------------


def test_every_field_of_a_mask_is_covered_and_has_an_effect():
    """If no mask here set a field, a kernel could ignore it unnoticed."""
    qkv_BTHK = [normal(3, 200, 2, 4, seed=seed) for seed in range(3)]
    for field in dataclasses.fields(Mask):
        with_field = [mask for mask in masks(3, 200, 2).values() if getattr(mask, field.name) is not field.default]
        assert with_field, field.name
        without_field = with_field[0].replace(**{field.name: field.default})
        assert np.abs(attention(*qkv_BTHK, with_field[0]) - attention(*qkv_BTHK, without_field)).max() > 1e-3, field.name


def value_and_grads(attend, qkv_BTHK, mask, weights_BTHK):
    def loss(*qkv_BTHK):
        return jnp.sum(attend(*qkv_BTHK, mask) * weights_BTHK)

    return jax.jit(lambda *qkv_BTHK: (attend(*qkv_BTHK, mask), jax.grad(loss, (0, 1, 2))(*qkv_BTHK)))(*qkv_BTHK)


@pytest.mark.parametrize("num_positions", [5, BLOCK, BLOCK + 1, 150])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.usefixtures("fake_cudnn")
def test_attention_follows_every_mask(kind, num_positions):
    """Values and gradients of each implementation, for three rows, which do not split evenly in two."""
    mask, shape = masks(3, num_positions, 2)[kind], (3, num_positions, 2, 4)
    qkv_BTHK = 3 * normal(*shape), normal(*shape, seed=1), normal(*shape, seed=2)
    expected = value_and_grads(attention, qkv_BTHK, mask, normal(*shape, seed=3))
    for attend in implementations("attention"):
        actual = value_and_grads(attend, qkv_BTHK, mask, normal(*shape, seed=3))
        assert_close(actual, expected, rtol=1e-4, atol=3e-5)


def test_cudnn_is_called_for_the_causal_mask_only(monkeypatch):
    calls = []
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda q, k, v, **kwargs: calls.append(kwargs) or v)
    qkv_BTHK = [normal(2, 6, 2, 4, seed=seed) for seed in range(3)]
    for mask in masks(2, 6, 2).values():
        kernels.CUDNN.attention(*qkv_BTHK, mask)
    assert calls == [{"is_causal": True, "implementation": "cudnn"}]


def test_there_may_be_fewer_queries_than_keys():
    q_BTHK, k_BSHK, v_BSHK = normal(2, 3, 2, 4), normal(2, 5, 2, 4, seed=1), normal(2, 5, 2, 4, seed=2)
    for attend in implementations("attention"):
        for mask in (Mask(), Mask(causal=True)):
            expected_BTHK = attention(q_BTHK, k_BSHK, v_BSHK, mask)
            np.testing.assert_allclose(attend(q_BTHK, k_BSHK, v_BSHK, mask), expected_BTHK, rtol=1e-5, atol=1e-6)


def test_blocked_attention_handles_large_scores_and_keeps_the_dtype():
    q_BTHK = k_BTHK = jnp.asarray(100 * normal(2, 100, 2, 4), jnp.bfloat16)
    v_BTHK = jnp.asarray(normal(2, 100, 2, 4), jnp.bfloat16)
    attend = functools.partial(kernels.BLOCKED.attention, mask=Mask(causal=True))
    grads = jax.grad(lambda *qkv: attend(*qkv).astype(jnp.float32).sum(), (0, 1, 2))(q_BTHK, k_BTHK, v_BTHK)
    for array in (attend(q_BTHK, k_BTHK, v_BTHK), *grads):
        assert array.dtype == jnp.bfloat16
        assert jnp.isfinite(array).all()


def test_blocked_attention_stores_residuals_that_grow_linearly_with_the_context():
    qkv_BTHK = [normal(2, 256, 2, 4, seed=seed) for seed in range(3)]
    _, gradient = jax.vjp(lambda *qkv: kernels.BLOCKED.attention(*qkv, Mask(causal=True)), *qkv_BTHK)
    assert 0 < max(leaf.size for leaf in jax.tree.leaves(gradient)) <= qkv_BTHK[0].size


def test_blocked_attention_needs_temporary_memory_that_grows_linearly_with_the_context():
    def temporary_bytes(num_positions):
        qkv = [jax.ShapeDtypeStruct((2, num_positions, 2, 4), jnp.float32)] * 3
        gradient = jax.grad(lambda *qkv: kernels.BLOCKED.attention(*qkv, Mask(causal=True)).sum(), (0, 1, 2))
        return jax.jit(gradient).lower(*qkv).compile().memory_analysis().temp_size_in_bytes

    assert 0 < temporary_bytes(2048) < 2.2 * temporary_bytes(1024)


# ---- Caches ---------------------------------------------------------------------------------------------------------------


def empty_caches(batch_size, config):
    """The plain ring buffer, those of the kernels, and caches in parts, which `empty_cache` makes only at larger sizes."""
    yield KVCache.empty(batch_size, config)
    yield from (empty(batch_size, config) for empty in implementations("empty_cache"))
    yield from (partitioned_cache.partitioned(batch_size, config, num_parts) for num_parts in (2, 4))


CACHE_MASKS = [kind for kind, mask in masks(2, 8, 4).items() if mask.only_past]


@pytest.mark.parametrize(
    ("num_kv_heads", "T", "kind"),
    [*((2, T, kind) for T in (1, 2) for kind in CACHE_MASKS), (1, 1, "causal"), (4, 2, "causal")],
)
def test_caches_match_the_plain_ring_buffer(num_kv_heads, T, kind):
    """In every operation: filling, wrapping around, selecting rows, taking rows of another cache. Parts that are still empty
    are set to NaN to prove that they are not read.
    """
    config = dataclasses.replace(CONFIG, num_kv_heads=num_kv_heads)
    H, G, S, K = config.num_heads, num_kv_heads, config.context_length, config.head_size
    mask = masks(2, S, H)[kind]

    @jax.jit
    def append_and_attend(cache, q_BTHK, k_BTGK, v_BTGK, positions_BT):
        cache = cache.append(k_BTGK, v_BTGK)
        return cache, cache.attend(q_BTHK, mask, positions_BT)

    def all_outputs(cache):
        parts = getattr(cache, "k_parts", ())
        if len(parts) > 1:
            nan_parts = tuple(part if c == 0 else jnp.full_like(part, jnp.nan) for c, part in enumerate(parts))
            nan_cache = cache.replace(k_parts=nan_parts, v_parts=nan_parts)
            q_BTHK, new_BTGK = normal(2, T, H, K), normal(2, T, G, K)
            positions_BT = np.broadcast_to(np.arange(T), (2, T))
            assert jnp.isfinite(append_and_attend(nan_cache, q_BTHK, new_BTGK, new_BTGK, positions_BT)[1]).all()
        other, append = cache, jax.jit(type(cache).append)
        for step in range(3):
            other = append(other, normal(2, T, G, K, seed=90 + step), normal(2, T, G, K, seed=80 + step))
        num_steps = (2 * S + 3 if T == 1 else S) // T
        for step in range(num_steps):
            q_BTHK, k_BTGK = normal(2, T, H, K, seed=70 + step), normal(2, T, G, K, seed=step)
            positions_BT = np.maximum(step * T + np.arange(T)[None, :] - np.array([[0], [2]]), 0)
            cache, o_BTHK = append_and_attend(cache, q_BTHK, k_BTGK, normal(2, T, G, K, seed=50 + step), positions_BT)
            yield o_BTHK
            if step == 2:
                cache = cache.rows(jnp.array([1, 0]))
            if T == 1 and step == num_steps - 3:
                cache = cache.with_rows_of(other, jnp.array([False, True]))

    expected, *others = (list(all_outputs(cache)) for cache in empty_caches(2, config))
    assert len(others) == len(implementations("empty_cache")) + 2
    for outputs in others:
        assert_close(outputs, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_parts", [1, 2, 4])
def test_parts_together_hold_the_ring_buffer(num_parts):
    """Two positions per append, around a ring of eight slots in any number of parts."""
    ring, cache = KVCache.empty(2, CONFIG), partitioned_cache.partitioned(2, CONFIG, num_parts)
    assert cache.append_divisor == 8 // num_parts
    for step in range(6):
        k_BTGK, v_BTGK = normal(2, 2, 4, 4, seed=step), normal(2, 2, 4, 4, seed=50 + step)
        ring, cache = ring.append(k_BTGK, v_BTGK), cache.append(k_BTGK, v_BTGK)
        np.testing.assert_array_equal(np.concatenate(cache.k_parts, axis=1).reshape(2, 4, 8, 4).swapaxes(1, 2), ring.k_BSGK)
        np.testing.assert_array_equal(np.concatenate(cache.v_parts, axis=1).reshape(2, 4, 8, 4).swapaxes(1, 2), ring.v_BSGK)


@pytest.mark.parametrize(
    ("batch_size", "changes", "num_parts"),
    [
        (64, {"context_length": 256}, 4),
        (63, {"context_length": 256}, 1),
        (64, {"context_length": 254}, 1),
        (128, {"context_length": 384}, 4),
        (128, {"context_length": 260}, 1),  # parts of 65 would take only chunks of 1, 5, 13 or 65 positions
        (64, {"context_length": 256, "num_kv_heads": 2}, 1),
    ],
)
def test_only_a_large_cache_is_split_into_parts(batch_size, changes, num_parts):
    cache = partitioned_cache.empty_cache(batch_size, dataclasses.replace(CONFIG, **changes))
    assert len(cache.k_parts) == len(cache.v_parts) == num_parts
