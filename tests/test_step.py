"""The training step: what it computes, that it is a pure function compiled once, and that it learns."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import Fixed, assert_close, assert_equal
from settings import LOOP_SETTINGS, TRAINING, changes_of

from minigpt_jax.config import Config, ModelConfig, TrainingConfig
from minigpt_jax.kernels import SPLIT
from minigpt_jax.models.gpt import GPT
from minigpt_jax.tasks.evaluation import eval_step
from minigpt_jax.tasks.next_token import NextToken, next_token_loss
from minigpt_jax.training.optimizer import make_optimizer
from minigpt_jax.training.state import TrainState, init_state
from minigpt_jax.training.step import train_step

pytestmark = pytest.mark.e2e

CONFIG = ModelConfig(num_layers=1, num_heads=2, embed_dim=16, ff_dim=32, context_length=8, vocab_size=11)
PLAIN = NextToken(GPT(CONFIG, SPLIT))
DROPPING = dataclasses.replace(PLAIN, dropout=0.3)
SGD = Fixed(optax.sgd(1.0))  # with it, a step's change of the parameters is the gradient
ADAMW = make_optimizer(TrainingConfig(learning_rate=1e-2, warmup_steps=5, grad_clip=0.01), num_steps=200)


def random_batch(rows=4, seed=0):
    """Masks differ from row to row, and every row has targets."""
    random = np.random.default_rng(seed)
    tokens_BT = random.integers(0, CONFIG.vocab_size, (rows, 9), np.int32)
    mask_BT = np.arange(8)[None, :] < np.resize([8, 1, 3, 5], rows)[:, None]
    return {"inputs_BT": tokens_BT[:, :-1], "targets_BT": tokens_BT[:, 1:], "mask_BT": mask_BT}


@functools.cache
def some_params():
    """Parameters as NumPy arrays, which a step that donates its state does not delete."""
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(PLAIN.init, jax.random.key(0))
    return jax.tree.map(lambda leaf: 0.3 * random.standard_normal(leaf.shape, np.float32), shapes)


def state_at(step, optimizer):
    params = jax.tree.map(jnp.array, some_params())
    return TrainState(jnp.asarray(step, jnp.int32), params, optimizer.chain.init(params))


@jax.jit
@jax.value_and_grad
def mean_loss_and_gradient(params, batch):
    """The objective, implemented independently with plain kernels."""
    logits_BTV, _ = GPT(CONFIG).apply({"params": params}, batch["inputs_BT"])
    total, count = next_token_loss(logits_BTV, batch["targets_BT"], batch["mask_BT"])
    return total / count


# ---- What it computes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad_accumulation", [1, 2])
def test_a_step_follows_the_gradient_of_the_mean_loss_with_any_number_of_micro_batches(grad_accumulation):
    """The micro-batches have different numbers of targets."""
    batch = random_batch()
    loss, grads = mean_loss_and_gradient(some_params(), batch)
    state, metrics = train_step(
        state_at(3, SGD), batch, jax.random.key(0), objective=PLAIN, optimizer=SGD, grad_accumulation=grad_accumulation
    )
    assert_close(jax.tree.map(jnp.subtract, some_params(), state.params), grads, rtol=1e-4, atol=1e-6)
    assert metrics["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert metrics["grad_norm"] == pytest.approx(float(optax.tree.norm(grads)), rel=1e-5)
    assert state.step == 4


def test_a_batch_without_targets_changes_nothing_and_causes_no_nan():
    batch = random_batch() | {"mask_BT": np.zeros((4, 8), bool)}
    state, metrics = train_step(state_at(0, SGD), batch, jax.random.key(0), objective=PLAIN, optimizer=SGD)
    assert jax.device_get(metrics) == {"loss": 0, "grad_norm": 0, "is_finite": True}
    assert_equal(state.params, some_params())


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_non_finite_step_changes_nothing_but_the_step_number(value):
    """Later steps are not affected either."""
    params = jax.tree.map(np.copy, some_params())
    params["embedding"]["tokens"]["embedding"][0] = value
    state = state_at(3, ADAMW).replace(params=params, average=some_params())
    before = jax.tree.map(np.copy, jax.device_get(state))
    batch, key = random_batch(), jax.random.key(0)
    state, metrics = train_step(state, batch, key, objective=PLAIN, optimizer=ADAMW, ema=0.9)
    assert not metrics["is_finite"]
    assert state.step == 4
    for part in ("params", "opt_state", "average"):
        jax.tree.map(np.testing.assert_array_equal, getattr(state, part), getattr(before, part))

    state, metrics = train_step(state.replace(params=some_params()), batch, key, objective=PLAIN, optimizer=ADAMW, ema=0.9)
    assert metrics["is_finite"]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    assert not np.array_equal(state.params["head"]["kernel"], some_params()["head"]["kernel"])


def test_a_step_is_skipped_if_its_gradient_is_not_finite_but_its_loss_is():
    params = jax.tree.map(np.copy, some_params())
    params["head"]["kernel"] *= 1e22
    state, metrics = train_step(
        state_at(3, SGD).replace(params=params), random_batch(), jax.random.key(0), objective=PLAIN, optimizer=SGD
    )
    assert np.isfinite(metrics["loss"])
    assert not np.isfinite(metrics["grad_norm"])
    assert not metrics["is_finite"]
    assert_equal(state.params, params)


def test_a_step_is_skipped_if_its_new_parameters_are_not_finite():
    huge = Fixed(optax.chain(optax.sgd(1e30), optax.scale(1e20)))
    state, metrics = train_step(state_at(0, huge), random_batch(), jax.random.key(0), objective=PLAIN, optimizer=huge)
    assert np.isfinite([metrics["loss"], metrics["grad_norm"]]).all()
    assert not metrics["is_finite"]
    assert_equal(state.params, some_params())


def test_the_average_follows_the_parameters_and_forgets_their_initial_values():
    state, key = state_at(0, SGD).replace(average=some_params()), jax.random.key(0)
    expected = jax.device_get(some_params())
    for step in range(4):
        state, _ = train_step(state, random_batch(), key, objective=PLAIN, optimizer=SGD, ema=0.25)
        decay = min(0.25, (1 + step) / (10 + step))
        expected = jax.tree.map(lambda old, new, d=decay: d * old + (1 - d) * np.asarray(new), expected, state.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), state.average, expected)
    assert state.eval_params is state.average
    assert state.replace(average=None).eval_params is state.params


@pytest.mark.slow
def test_training_overfits_a_single_batch():
    tokens_BT = np.random.default_rng(1).integers(0, CONFIG.vocab_size, (4, 9), np.int32)
    tokens_BT[:, 0] = np.arange(4)  # the first token identifies the row
    batch = {"inputs_BT": tokens_BT[:, :-1], "targets_BT": tokens_BT[:, 1:], "mask_BT": np.ones((4, 8), bool)}
    state, key = state_at(0, ADAMW), jax.random.key(0)
    history = []
    for _ in range(150):
        state, metrics = train_step(state, batch, key, objective=PLAIN, optimizer=ADAMW)
        history.append(metrics)
    assert history[-1]["loss"] < 0.1
    assert history[0]["grad_norm"] > 0.1  # measured before clipping
    assert state.step == 150


# ---- A pure function, compiled once ---------------------------------------------------------------------------------------


def test_the_same_state_batch_and_key_give_bit_identical_results():
    step = functools.partial(train_step, objective=DROPPING, optimizer=SGD, grad_accumulation=2)
    assert_equal(*(step(state_at(2, SGD), random_batch(), jax.random.key(7)) for _ in range(2)))


def test_later_steps_do_not_recompile():
    state, key = init_state(jax.random.key(0), objective=PLAIN, optimizer=ADAMW), jax.random.key(1)
    before, counts = (train_step._cache_size(), eval_step._cache_size()), []
    for step in range(4):
        state, _ = train_step(state, random_batch(seed=step), key, objective=PLAIN, optimizer=ADAMW)
        total, _, _ = eval_step(state.params, random_batch(seed=step), PLAIN)
        counts.append((train_step._cache_size(), eval_step._cache_size()))
    assert len(set(counts)) == 1
    assert all(now - then <= 1 for now, then in zip(counts[0], before, strict=True))
    assert np.isfinite(total)


def test_a_step_reuses_the_memory_of_the_previous_state():
    before = state_at(0, ADAMW)
    train_step(before, random_batch(), jax.random.key(0), objective=PLAIN, optimizer=ADAMW)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((before.params, before.opt_state)))


def test_the_initial_state_depends_only_on_its_key():
    first, again, other = (init_state(jax.random.key(seed), objective=PLAIN, optimizer=ADAMW) for seed in (0, 0, 1))
    assert_equal(first, again)
    assert not np.array_equal(first.params["head"]["kernel"], other.params["head"]["kernel"])
    assert (first.step.dtype, int(first.step)) == (jnp.int32, 0)


def test_parameters_stay_float32_when_computing_in_bfloat16():
    objective = NextToken(GPT(dataclasses.replace(CONFIG, dtype="bfloat16"), SPLIT))
    state = state_at(0, ADAMW)
    step = functools.partial(train_step, objective=objective, optimizer=ADAMW)
    after, metrics = jax.eval_shape(step, state, random_batch(), jax.random.key(0))
    assert after == jax.eval_shape(lambda: state)
    assert metrics["loss"].dtype == jnp.float32


# ---- Dropout --------------------------------------------------------------------------------------------------------------


def loss_at(step, seed=0, objective=DROPPING, batch=None):
    _, metrics = train_step(
        state_at(step, SGD), batch or random_batch(), jax.random.key(seed),
        objective=objective, optimizer=SGD, grad_accumulation=2,
    )  # fmt: skip
    return float(metrics["loss"])


def test_dropout_differs_from_step_to_step_and_from_run_to_run():
    assert loss_at(0) == loss_at(0)
    assert len({loss_at(0), loss_at(1), loss_at(2), loss_at(0, seed=1)}) == 4


def test_without_dropout_the_key_changes_nothing():
    assert len({loss_at(step, seed, objective=PLAIN) for step, seed in [(0, 0), (1, 0), (0, 1)]}) == 1


def test_micro_batches_have_different_dropout_masks():
    """Two equal micro-batches, of which only one has unmasked targets."""
    twice = jax.tree.map(lambda leaf: np.tile(leaf, (2, 1)), random_batch(rows=2))
    first, second = (twice | {"mask_BT": twice["mask_BT"] & (np.arange(4) // 2 == part)[:, None]} for part in (0, 1))
    assert loss_at(0, batch=first) != loss_at(0, batch=second)
    assert loss_at(0, batch=first, objective=PLAIN) == loss_at(0, batch=second, objective=PLAIN)


def test_evaluation_uses_no_dropout():
    batch = random_batch()
    total, count, _ = dropping = eval_step(some_params(), batch, DROPPING)
    assert dropping == eval_step(some_params(), batch, PLAIN)
    assert total / count == pytest.approx(float(mean_loss_and_gradient(some_params(), batch)[0]), rel=1e-5)


# ---- Numbers are leaves ---------------------------------------------------------------------------------------------------

STRUCTURE = {"grad_accumulation", "optimizer", "schedule"}
NUMBERS = changes_of(TRAINING, but=LOOP_SETTINGS | STRUCTURE)


def run_of(config, num_steps=20, dropout=0.2):
    """A new initial state and the arguments of its steps."""
    optimizer = make_optimizer(config, num_steps)
    objective = dataclasses.replace(NextToken.of(Config(CONFIG, config), SPLIT), dropout=dropout)
    params = jax.tree.map(jnp.array, some_params())
    state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.chain.init(params), jax.tree.map(jnp.array, params))
    return state, {"objective": objective, "optimizer": optimizer, "ema": config.ema}


def three_steps(step, state, arguments):
    for number in range(3):
        state, metrics = step(state, random_batch(seed=number), jax.random.key(0), **arguments)
    return state, metrics


def test_runs_that_differ_only_in_numbers_share_a_compiled_step_but_not_a_result():
    """A number that was a compile-time constant would recompile, and one that nothing uses would not change the result."""
    first, _ = three_steps(train_step, *run_of(TRAINING))
    before = train_step._cache_size()
    others = [run_of(dataclasses.replace(TRAINING, **change)) for change in NUMBERS]
    assert len(others) > 7
    for state, arguments in [*others, run_of(TRAINING, num_steps=4), run_of(TRAINING, dropout=0.3)]:
        state, _ = three_steps(train_step, state, arguments)
        parts = "average" if arguments["ema"] != TRAINING.ema else "params"
        differences = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), getattr(state, parts), getattr(first, parts))
        assert max(jax.tree.leaves(differences)) > 1e-7
    assert train_step._cache_size() == before


@pytest.mark.slow
def test_two_learning_rates_under_vmap_are_two_separate_runs():
    configs = [TRAINING, dataclasses.replace(TRAINING, learning_rate=5 * TRAINING.learning_rate, weight_decay=0.3)]
    separate = [three_steps(train_step, *run_of(config)) for config in configs]
    runs = zip(*map(run_of, configs), strict=True)
    states, arguments = (jax.tree.map(lambda *leaves: jnp.stack(leaves), *each) for each in runs)

    def both(states, batch, key, **arguments):
        def one(state, arguments):
            return train_step(state, batch, key, **arguments)

        return jax.vmap(one)(states, arguments)

    together, metrics = three_steps(both, states, arguments)
    for index, (state, expected) in enumerate(separate):
        assert_close(jax.tree.map(lambda leaf, i=index: leaf[i], together), state, rtol=2e-4, atol=1e-6)
        assert metrics["loss"][index] == pytest.approx(float(expected["loss"]), rel=1e-5)
