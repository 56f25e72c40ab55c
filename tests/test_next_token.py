"""The next-token loss, against the definition of cross-entropy, and the objective."""

import jax
import numpy as np
import pytest
from helpers import assert_equal, random_params
from settings import BASE

from minigpt_jax.config import Config
from minigpt_jax.tasks.next_token import NextToken, next_token_loss

B, T, V = 3, 4, 5
RANDOM = np.random.default_rng(0)
LOGITS_BTV = 3 * RANDOM.standard_normal((B, T, V)).astype(np.float32)
TARGETS_BT = RANDOM.integers(0, V, (B, T))
MASK_BT = np.array([[1, 1, 1, 1], [1, 0, 0, 1], [0, 0, 0, 0]], bool)
loss = jax.jit(next_token_loss)


def test_the_loss_is_the_sum_of_negative_log_probabilities_of_unmasked_targets():
    probs_BTV = np.exp(LOGITS_BTV) / np.exp(LOGITS_BTV).sum(axis=-1, keepdims=True)
    expected = sum(-np.log(probs_BTV[b, t, TARGETS_BT[b, t]]) for b, t in zip(*np.nonzero(MASK_BT), strict=True))
    total, count = loss(LOGITS_BTV, TARGETS_BT, MASK_BT)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    assert count == 6


def test_losses_of_rows_add_up_to_the_loss_of_the_batch():
    total = loss(LOGITS_BTV, TARGETS_BT, MASK_BT)
    rows = [loss(LOGITS_BTV[i : i + 1], TARGETS_BT[i : i + 1], MASK_BT[i : i + 1]) for i in range(B)]
    np.testing.assert_allclose(np.sum(rows, axis=0), total, rtol=1e-6)


def test_masked_targets_do_not_count():
    changed_BTV, changed_BT = LOGITS_BTV.copy(), TARGETS_BT.copy()
    changed_BTV[~MASK_BT], changed_BT[~MASK_BT] = 77, 0
    np.testing.assert_array_equal(loss(changed_BTV, changed_BT, MASK_BT), loss(LOGITS_BTV, TARGETS_BT, MASK_BT))
    assert loss(LOGITS_BTV, TARGETS_BT, np.zeros_like(MASK_BT)) == (0, 0)


@pytest.mark.parametrize("key", [None, jax.random.key(0)], ids=["in evaluation", "in training"])
def test_the_objective_ignores_masked_targets(key):
    objective = NextToken.of(Config(BASE))
    params = random_params(objective.model, np.zeros((B, T), np.int32))
    batch = {"inputs_BT": TARGETS_BT, "targets_BT": TARGETS_BT, "mask_BT": MASK_BT}
    changed = batch | {"targets_BT": np.where(MASK_BT, TARGETS_BT, 16 - TARGETS_BT)}
    run = jax.jit(objective.loss)
    assert_equal(run(params, changed, key), run(params, batch, key))
    unmasked = run(params, changed | {"mask_BT": np.ones_like(MASK_BT)}, key)
    assert unmasked[0] != run(params, batch | {"mask_BT": np.ones_like(MASK_BT)}, key)[0]


def test_large_logits_do_not_overflow():
    total, _ = loss(np.full((2, 1, V), 1e4, np.float32), np.zeros((2, 1), int), np.ones((2, 1), bool))
    np.testing.assert_allclose(total, 2 * np.log(V), rtol=1e-3)


def test_objectives_with_and_without_accuracy_are_different_trees():
    """Otherwise jit could call the program of one with the other."""
    with_it, without = (NextToken.of(Config(BASE), with_accuracy=value) for value in (True, False))
    assert jax.tree.structure(with_it) != jax.tree.structure(without)
