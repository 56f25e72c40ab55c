"""The fast implementations against the equations: every kernel, with every mask, at every size that matters."""

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
from helpers import KERNELS, MASKS, assert_close, masks, normal, random_params

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
    """All that the kernels of this package have for an op, without the equation itself."""
    found = {getattr(each, field) for each in KERNELS.values()} - {getattr(PLAIN, field)}
    return sorted(found, key=lambda function: function.__name__)


def with_gradients(function, *inputs):
    """Its value, and the gradients of a weighted sum of it by each input."""
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


# What each op makes of some inputs, its gradients with them: for every implementation what it is for the equation.
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
@pytest.mark.usefixtures("cudnn_on_a_cpu")
def test_every_implementation_of_an_op_is_its_equation(op):
    assert implementations(op)
    expected = EXAMPLES[op](getattr(PLAIN, op))
    for implementation in implementations(op):
        assert_close(EXAMPLES[op](implementation), expected, rtol=1e-4, atol=1e-5)


def test_no_set_of_kernels_forgets_one():
    """What is an equation in a set is meant to be: accelerators keep a cache's rows and heads apart, as meshes need them."""
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


def test_each_file_says_what_it_computes_what_it_saves_and_what_proves_it():
    for path in Path(kernels.__file__).parent.glob("[a-z]*.py"):
        header = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        op, proof, test = HEADER.match(f'"""{header}').groups()
        assert op in vars(PLAIN) or op in ("center", "KVCache"), path.name
        assert f"def {test}(" in (ROOT / proof).read_text(encoding="utf-8"), path.name
        assert "20" in header or "not measured" in header  # the date of a figure


def test_kernels_are_values_that_jit_can_tell_apart():
    assert len(set(KERNELS.values())) == len(KERNELS) == len({each.name for each in KERNELS.values()})
    assert hash(dataclasses.replace(kernels.SPLIT)) == hash(kernels.SPLIT)
    assert Kernels() == PLAIN


# ---- Which suit a device --------------------------------------------------------------------------------------------------

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
def test_the_kernels_that_suit_a_device(device, changes, expected):
    config = dataclasses.replace(CONFIG, **changes)
    assert kernels.select(config, device) is expected
    assert kernels.select(config, device, "plain") is PLAIN


def test_another_choice_is_refused():
    with pytest.raises(UsageError, match=r"kernels='fast'.*tuned, plain"):
        kernels.select(CONFIG, CPU, "fast")


# ---- Attention ------------------------------------------------------------------------------------------------------------


def test_masks_of_all_kinds_are_tried():
    """A field that no mask here has would be one that a kernel may forget; one that changes nothing is not read."""
    qkv_BTHK = [normal(3, 200, 2, 4, seed=seed) for seed in range(3)]
    for field in dataclasses.fields(Mask):
        used = [mask for mask in masks(3, 200, 2).values() if getattr(mask, field.name) is not field.default]
        assert used, field.name
        without = used[0].replace(**{field.name: field.default})
        assert np.abs(attention(*qkv_BTHK, used[0]) - attention(*qkv_BTHK, without)).max() > 1e-3, field.name


def value_and_grads(attend, qkv_BTHK, mask, weights_BTHK):
    def loss(*qkv_BTHK):
        return jnp.sum(attend(*qkv_BTHK, mask) * weights_BTHK)

    return jax.jit(lambda *qkv_BTHK: (attend(*qkv_BTHK, mask), jax.grad(loss, (0, 1, 2))(*qkv_BTHK)))(*qkv_BTHK)


@pytest.mark.parametrize("num_positions", [5, BLOCK, BLOCK + 1, 150])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.usefixtures("cudnn_on_a_cpu")
def test_attention_follows_every_mask(kind, num_positions):
    """Values and gradients of each implementation, for three rows, which do not divide into halves."""
    mask, shape = masks(3, num_positions, 2)[kind], (3, num_positions, 2, 4)
    qkv_BTHK = 3 * normal(*shape), normal(*shape, seed=1), normal(*shape, seed=2)
    expected = value_and_grads(attention, qkv_BTHK, mask, normal(*shape, seed=3))
    for attend in implementations("attention"):
        found = value_and_grads(attend, qkv_BTHK, mask, normal(*shape, seed=3))
        assert_close(found, expected, rtol=1e-4, atol=3e-5)


def test_cudnn_is_asked_for_the_causal_mask_alone(monkeypatch):
    asked = []
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda q, k, v, **how: asked.append(how) or v)
    qkv_BTHK = [normal(2, 6, 2, 4, seed=seed) for seed in range(3)]
    for mask in masks(2, 6, 2).values():
        kernels.CUDNN.attention(*qkv_BTHK, mask)
    assert asked == [{"is_causal": True, "implementation": "cudnn"}]


def test_queries_may_be_fewer_than_keys():
    q_BTHK, k_BSHK, v_BSHK = normal(2, 3, 2, 4), normal(2, 5, 2, 4, seed=1), normal(2, 5, 2, 4, seed=2)
    for attend in implementations("attention"):
        for mask in (Mask(), Mask(causal=True)):
            expected_BTHK = attention(q_BTHK, k_BSHK, v_BSHK, mask)
            np.testing.assert_allclose(attend(q_BTHK, k_BSHK, v_BSHK, mask), expected_BTHK, rtol=1e-5, atol=1e-6)


def test_blocked_attention_survives_large_scores_and_keeps_the_type():
    q_BTHK = k_BTHK = jnp.asarray(100 * normal(2, 100, 2, 4), jnp.bfloat16)
    v_BTHK = jnp.asarray(normal(2, 100, 2, 4), jnp.bfloat16)
    attend = functools.partial(kernels.BLOCKED.attention, mask=Mask(causal=True))
    grads = jax.grad(lambda *qkv: attend(*qkv).astype(jnp.float32).sum(), (0, 1, 2))(q_BTHK, k_BTHK, v_BTHK)
    for array in (attend(q_BTHK, k_BTHK, v_BTHK), *grads):
        assert array.dtype == jnp.bfloat16
        assert jnp.isfinite(array).all()


def test_what_blocked_attention_keeps_for_the_gradient_does_not_grow_with_the_square_of_the_context():
    qkv_BTHK = [normal(2, 256, 2, 4, seed=seed) for seed in range(3)]
    _, gradient = jax.vjp(lambda *qkv: kernels.BLOCKED.attention(*qkv, Mask(causal=True)), *qkv_BTHK)
    assert 0 < max(leaf.size for leaf in jax.tree.leaves(gradient)) <= qkv_BTHK[0].size


def test_what_blocked_attention_takes_for_a_moment_does_not_grow_with_the_square_of_the_context():
    def temporary_bytes(num_positions):
        qkv = [jax.ShapeDtypeStruct((2, num_positions, 2, 4), jnp.float32)] * 3
        gradient = jax.grad(lambda *qkv: kernels.BLOCKED.attention(*qkv, Mask(causal=True)).sum(), (0, 1, 2))
        return jax.jit(gradient).lower(*qkv).compile().memory_analysis().temp_size_in_bytes

    assert 0 < temporary_bytes(2048) < 2.2 * temporary_bytes(1024)


# ---- Caches ---------------------------------------------------------------------------------------------------------------


def empty_caches(batch_size, config):
    """The plain ring, what the kernels give, and the same in parts, which these are too small for."""
    yield KVCache.empty(batch_size, config)
    yield from (empty(batch_size, config) for empty in implementations("empty_cache"))
    yield from (partitioned_cache.partitioned(batch_size, config, num_parts) for num_parts in (2, 4))


CACHE_MASKS = [kind for kind, mask in masks(2, 8, 4).items() if mask.only_past]


@pytest.mark.parametrize(
    ("num_kv_heads", "T", "kind"),
    [*((2, T, kind) for T in (1, 2) for kind in CACHE_MASKS), (1, 1, "causal"), (4, 2, "causal")],
)
def test_caches_are_the_plain_ring(num_kv_heads, T, kind):
    """Through every operation: filling, going round, rows in another order, rows of another cache. Parts that hold nothing
    yet are made unreadable.
    """
    config = dataclasses.replace(CONFIG, num_kv_heads=num_kv_heads)
    H, G, S, K = config.num_heads, num_kv_heads, config.context_length, config.head_size
    mask = masks(2, S, H)[kind]

    @jax.jit
    def step_of(cache, q_BTHK, k_BTGK, v_BTGK, positions_BT):
        cache = cache.append(k_BTGK, v_BTGK)
        return cache, cache.attend(q_BTHK, mask, positions_BT)

    def all_outputs(cache):
        parts = getattr(cache, "k_parts", ())
        if len(parts) > 1:
            unreadable = tuple(part if c == 0 else jnp.full_like(part, jnp.nan) for c, part in enumerate(parts))
            begun = cache.replace(k_parts=unreadable, v_parts=unreadable)
            q_BTHK, new_BTGK = normal(2, T, H, K), normal(2, T, G, K)
            positions_BT = np.broadcast_to(np.arange(T), (2, T))
            assert jnp.isfinite(step_of(begun, q_BTHK, new_BTGK, new_BTGK, positions_BT)[1]).all()
        other, append = cache, jax.jit(type(cache).append)
        for step in range(3):
            other = append(other, normal(2, T, G, K, seed=90 + step), normal(2, T, G, K, seed=80 + step))
        num_steps = (2 * S + 3 if T == 1 else S) // T
        for step in range(num_steps):
            q_BTHK, k_BTGK = normal(2, T, H, K, seed=70 + step), normal(2, T, G, K, seed=step)
            positions_BT = np.maximum(step * T + np.arange(T)[None, :] - np.array([[0], [2]]), 0)
            cache, o_BTHK = step_of(cache, q_BTHK, k_BTGK, normal(2, T, G, K, seed=50 + step), positions_BT)
            yield o_BTHK
            if step == 2:
                cache = cache.rows(jnp.array([1, 0]))
            if T == 1 and step == num_steps - 3:
                cache = cache.with_rows_of(other, jnp.array([False, True]))

    expected, *others = (list(all_outputs(cache)) for cache in empty_caches(2, config))
    assert len(others) == len(implementations("empty_cache")) + 2
    for found in others:
        assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_parts", [1, 2, 4])
def test_parts_hold_what_the_ring_holds(num_parts):
    """Around a ring of eight slots, one position after another and two at once, whatever part they go to."""
    ring, cache = KVCache.empty(2, CONFIG), partitioned_cache.partitioned(2, CONFIG, num_parts)
    assert cache.append_unit == 8 // num_parts
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
        (128, {"context_length": 260}, 1),  # whose quarters have no piece of a prompt but 1, 5, 13, 65
        (64, {"context_length": 256, "num_kv_heads": 2}, 1),
    ],
)
def test_a_large_cache_has_parts(batch_size, changes, num_parts):
    cache = partitioned_cache.empty_cache(batch_size, dataclasses.replace(CONFIG, **changes))
    assert len(cache.k_parts) == len(cache.v_parts) == num_parts
