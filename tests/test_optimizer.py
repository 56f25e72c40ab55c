"""The learning-rate schedule at its edge cases, and the whole Optax chain against AdamW and Muon written in NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from minigpt_jax.config import ModelConfig, TrainingConfig
from minigpt_jax.models.gpt import GPT
from minigpt_jax.training.muon import RMS, orthogonal
from minigpt_jax.training.optimizer import make_optimizer
from minigpt_jax.training.schedule import DECAYS, learning_rate_schedule

CONFIG = TrainingConfig(learning_rate=1e-2, min_learning_rate=1e-3, warmup_steps=10, weight_decay=0.1, grad_clip=1.0)


def learning_rates(num_steps, **changes):
    return np.asarray(learning_rate_schedule(dataclasses.replace(CONFIG, **changes), num_steps)(np.arange(num_steps)))


# ---- The schedule ---------------------------------------------------------------------------------------------------------


def test_warmup_is_linear_and_starts_above_zero():
    np.testing.assert_allclose(learning_rates(100)[:10], CONFIG.learning_rate * np.arange(1, 11) / 10, rtol=1e-6)


def test_cosine_decay_reaches_the_minimum_at_the_last_step():
    falling = learning_rates(100)[10:]
    assert falling[0] == pytest.approx(CONFIG.learning_rate)
    assert falling[-1] == pytest.approx(CONFIG.min_learning_rate)
    assert (np.diff(falling) < 0).all()
    np.testing.assert_allclose(falling + falling[::-1], CONFIG.learning_rate + CONFIG.min_learning_rate, rtol=1e-5)
    assert falling[22] > np.linspace(falling[0], falling[-1], 90)[22]  # in its first half above a straight line


def test_the_learning_rate_stays_at_the_minimum_after_the_last_step():
    assert learning_rate_schedule(CONFIG, 100)(5000) == pytest.approx(CONFIG.min_learning_rate)


def test_without_warmup_the_first_step_has_the_peak_learning_rate():
    no_warmup = learning_rates(50, warmup_steps=0)
    assert no_warmup[0] == pytest.approx(CONFIG.learning_rate)
    assert no_warmup[-1] == pytest.approx(CONFIG.min_learning_rate)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 9, 10])
def test_a_warmup_as_long_as_the_run_or_longer_is_shortened_to_it(num_steps):
    expected = CONFIG.learning_rate * np.arange(1, num_steps + 1) / num_steps
    np.testing.assert_allclose(learning_rates(num_steps), expected, rtol=1e-6)


def test_a_linear_schedule_decays_linearly_and_a_constant_one_does_not_decay():
    line = np.linspace(CONFIG.learning_rate, CONFIG.min_learning_rate, 90)
    np.testing.assert_allclose(learning_rates(100, schedule="linear")[10:], line, rtol=1e-5)
    np.testing.assert_allclose(learning_rates(100, schedule="constant")[10:], CONFIG.learning_rate, rtol=1e-6)
    for schedule in DECAYS:
        np.testing.assert_array_equal(learning_rates(100, schedule=schedule)[:10], learning_rates(100)[:10])


def test_every_choice_of_schedule_has_a_decay():
    [field] = [field for field in dataclasses.fields(TrainingConfig) if field.name == "schedule"]
    assert tuple(DECAYS) == field.metadata["choices"]


@pytest.mark.parametrize("num_steps", [1, 2, 10, 11, 12])
@pytest.mark.parametrize("warmup_steps", [0, 1, 10])
def test_the_learning_rate_is_above_zero_before_the_last_step_and_never_above_the_peak(num_steps, warmup_steps):
    values = learning_rates(num_steps, warmup_steps=warmup_steps, min_learning_rate=0.0)
    assert (values[:-1] > 0).all()
    assert values[0] > 0
    assert values.max() == pytest.approx(CONFIG.learning_rate)


# ---- The chain ------------------------------------------------------------------------------------------------------------


def test_weight_decay_applies_to_matrices_only():
    config = ModelConfig(
        num_layers=2, num_heads=2, embed_dim=8, ff_dim=8, vocab_size=5, positions="learned", norm="layernorm", bias=True
    )
    shapes = jax.eval_shape(GPT(config).init, jax.random.key(0), jnp.zeros((2, 1), jnp.int32))["params"]
    optimizer, params = make_optimizer(CONFIG, 100), jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes)
    updates, _ = jax.jit(optimizer.chain.update)(jax.tree.map(np.zeros_like, params), optimizer.chain.init(params), params)
    names = {True: set(), False: set()}
    for path, update in jax.tree.leaves_with_path(updates):  # with zero gradients, the update is weight decay alone
        [value] = set(np.asarray(update).ravel().tolist())
        names[value < 0].add(path[-1].key)
    assert names == {True: {"kernel", "embedding"}, False: {"bias", "scale"}}


def test_the_chain_is_clipping_followed_by_adamw():
    """Five steps, with gradients far above and below the clipping norm, against the equations of the paper."""
    config = dataclasses.replace(CONFIG, warmup_steps=2, beta1=0.8, beta2=0.95)
    optimizer, random = make_optimizer(config, 5), np.random.default_rng(0)
    params = {"matrix": random.standard_normal((3, 4)), "vector": random.standard_normal(4)}
    expected = {name: value.copy() for name, value in params.items()}
    moments = {name: (np.zeros_like(value), np.zeros_like(value)) for name, value in params.items()}
    params = jax.tree.map(jnp.float32, params)
    state, update = optimizer.chain.init(params), jax.jit(optimizer.chain.update)

    for step, size in enumerate([100.0, 0.01, 1.0, 1e-4, 10.0]):
        grads = {name: size * random.standard_normal(value.shape) for name, value in expected.items()}
        updates, state = update(jax.tree.map(jnp.float32, grads), state, params)
        params = optax.apply_updates(params, updates)

        norm = np.sqrt(sum(np.square(grad).sum() for grad in grads.values()))
        learning_rate = learning_rates(5, warmup_steps=2)[step]
        for name, grad in grads.items():
            grad = grad * min(1, config.grad_clip / norm)
            mean, square = moments[name]
            mean = config.beta1 * mean + (1 - config.beta1) * grad
            square = config.beta2 * square + (1 - config.beta2) * grad**2
            moments[name] = mean, square
            unbiased = mean / (1 - config.beta1 ** (step + 1)), square / (1 - config.beta2 ** (step + 1))
            decay = config.weight_decay * expected[name] if name == "matrix" else 0
            expected[name] = expected[name] - learning_rate * (unbiased[0] / (np.sqrt(unbiased[1]) + 1e-8) + decay)
        for name in params:
            np.testing.assert_allclose(params[name], expected[name], rtol=1e-4, atol=1e-6)


# ---- Muon -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 6), (4, 16), (16, 4), (1, 5)])
def test_orthogonal_keeps_singular_vectors_and_makes_singular_values_about_one(shape):
    random = np.random.default_rng(0)
    x = random.standard_normal(shape).astype(np.float32)
    left, values, right = np.linalg.svd(x, full_matrices=False)
    assert len(values) == 1 or values.max() / values.min() > 1.5
    actual = left.T @ np.asarray(jax.jit(orthogonal)(1e-3 * x)) @ right.T
    np.testing.assert_allclose(actual - np.diag(np.diag(actual)), 0, atol=1e-4)
    assert 0.87 < np.diag(actual).min() <= np.diag(actual).max() < 1.13


def test_singular_values_down_to_a_thousandth_become_about_one_and_zeros_stay_zeros():
    for values in (np.array([1.0, 0.001]), np.geomspace(0.001, 0.3, 12), np.array([0.7, 0.7, 0.05])):
        values = values / np.linalg.norm(values)
        grown = np.diag(np.asarray(orthogonal(jnp.float32(np.diag(values)))))
        large = grown[values >= 0.00099]
        assert 0.87 < large.min() <= large.max() < 1.13
    np.testing.assert_array_equal(orthogonal(np.zeros((3, 5), np.float32)), np.zeros((3, 5)))


def test_muon_moves_the_matrices_of_blocks_and_adamw_all_else():
    """Three steps: the mean gradient, a step ahead, made orthogonal; decay and learning rate as AdamW's."""
    muon = dataclasses.replace(CONFIG, optimizer="muon", warmup_steps=0, schedule="constant", beta1=0.8, grad_clip=1e6)
    random = np.random.default_rng(0)
    params = {"block_0": {"kernel": np.ones((4, 16)), "bias": np.ones(4)}, "head": {"kernel": np.ones((4, 16))}}
    params = jax.tree.map(jnp.float32, params)
    all_grads = [jax.tree.map(lambda x: jnp.float32(random.standard_normal(x.shape)), params) for _ in range(3)]
    after = {}
    for kind in ("muon", "adamw"):
        optimizer, moved = make_optimizer(dataclasses.replace(muon, optimizer=kind), 10), params
        state = optimizer.chain.init(params)
        for grads in all_grads:
            updates, state = jax.jit(optimizer.chain.update)(grads, state, moved)
            moved = optax.apply_updates(moved, updates)
        after[kind] = moved
    for path in (("block_0", "bias"), ("head", "kernel")):
        np.testing.assert_array_equal(*(after[kind][path[0]][path[1]] for kind in after))

    mean, expected = np.zeros((4, 16)), np.ones((4, 16))
    for grads in all_grads:
        grad = np.asarray(grads["block_0"]["kernel"])
        mean = 0.8 * mean + 0.2 * grad
        update = RMS * 4 * np.asarray(orthogonal(jnp.float32(0.8 * mean + 0.2 * grad)))
        assert np.sqrt(np.square(update).mean()) == pytest.approx(0.2, rel=0.15)
        expected = expected - CONFIG.learning_rate * (update + CONFIG.weight_decay * expected)
    np.testing.assert_allclose(after["muon"]["block_0"]["kernel"], expected, rtol=1e-4, atol=1e-6)
