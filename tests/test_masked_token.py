"""The objective of masked language modelling: which tokens are hidden, how, and what is measured."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_params, random_tokens
from settings import BASE

from minigpt_jax.config import Config
from minigpt_jax.models.attention import attention
from minigpt_jax.models.bert import mask_token
from minigpt_jax.models.kernels import PLAIN
from minigpt_jax.tasks.classification import class_loss
from minigpt_jax.tasks.masked_token import MaskedToken, mask_tokens

V = 1000
CONFIG = dataclasses.replace(BASE, vocab_size=V, vocab_multiple=64)
TOKENS_BT = random_tokens(64, 512, vocab_size=V)
ALL_BT = np.ones(TOKENS_BT.shape, bool)


def masked(seed, tokens_BT=TOKENS_BT, is_token_BT=ALL_BT):
    return map(np.asarray, mask_tokens(jax.random.key(seed), tokens_BT, is_token_BT, CONFIG))


def test_the_shares_of_chosen_hidden_replaced_and_kept_tokens():
    inputs_BT, is_chosen_BT = masked(0)
    assert is_chosen_BT.mean() == pytest.approx(0.15, abs=0.01)
    hidden_N, kept_N = (inputs_BT == mask_token(CONFIG))[is_chosen_BT], (inputs_BT == TOKENS_BT)[is_chosen_BT]
    assert hidden_N.mean() == pytest.approx(0.8, abs=0.02)
    assert kept_N.mean() == pytest.approx(0.1 + 0.1 / V, abs=0.015)
    replaced_N = inputs_BT[is_chosen_BT][~hidden_N & ~kept_N]
    assert len(set(replaced_N.tolist())) > 200
    assert 0 <= replaced_N.min() < 30
    assert V - 30 < replaced_N.max() < V
    np.testing.assert_array_equal(inputs_BT[~is_chosen_BT], TOKENS_BT[~is_chosen_BT])


def test_the_choice_is_a_function_of_the_key_and_independent_of_the_position():
    first, again, other = (np.stack(list(masked(seed))) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first[1] & other[1]).mean() == pytest.approx(0.15**2, abs=0.004)
    assert np.abs(first[1].mean(axis=0) - 0.15).max() < 0.2  # of 64 rows, at each of 512 positions


def test_padding_is_never_chosen_and_every_row_with_tokens_has_a_target():
    num_tokens_B = np.arange(64) % 4
    is_token_BT = np.arange(512)[None, :] < num_tokens_B[:, None]
    inputs_BT, is_chosen_BT = masked(0, is_token_BT=is_token_BT)
    assert not (is_chosen_BT & ~is_token_BT).any()
    np.testing.assert_array_equal(inputs_BT[~is_token_BT], TOKENS_BT[~is_token_BT])
    np.testing.assert_array_equal(is_chosen_BT.any(axis=1), num_tokens_B > 0)


SMALL = dataclasses.replace(BASE, dropout=0.5)
BATCH = {"inputs_BT": random_tokens(4, 16, vocab_size=17), "mask_BT": np.ones((4, 16), bool)}


def objective_and_params(config=SMALL):
    objective = MaskedToken.of(Config(config))
    return objective, random_params(objective.model, BATCH["inputs_BT"])


def test_the_loss_is_summed_over_the_chosen_tokens_only():
    objective, params = objective_and_params(BASE)
    total, count, measures = jax.jit(objective.loss)(params, BATCH, jax.random.key(3))
    mask_key, _ = jax.random.split(jax.random.key(3))
    inputs_BT, is_chosen_BT = mask_tokens(mask_key, BATCH["inputs_BT"], BATCH["mask_BT"], BASE)
    logits_BTV = objective.model.apply({"params": params}, inputs_BT)
    log_probs_NV, targets_N = jax.nn.log_softmax(logits_BTV)[is_chosen_BT], BATCH["inputs_BT"][is_chosen_BT]
    assert count == is_chosen_BT.sum() > 4
    assert total == pytest.approx(float(-log_probs_NV[np.arange(len(targets_N)), targets_N].sum()), rel=1e-4)
    assert measures["accuracy"] == (log_probs_NV.argmax(axis=-1) == targets_N).sum()


def test_evaluation_hides_the_same_tokens_each_time_and_others_in_another_batch():
    objective, params = objective_and_params()
    loss = jax.jit(objective.loss)
    results = [float(loss(params, BATCH, None)[0]) for _ in range(2)]
    assert results[0] == results[1]
    others = [BATCH | {"inputs_BT": (BATCH["inputs_BT"] + n) % 17} for n in range(6)]
    counts = {int(loss(params, batch, None)[1]) for batch in others}
    assert len(counts) > 1


def test_training_hides_other_tokens_with_each_key_and_has_dropout():
    objective, params = objective_and_params(BASE)
    loss = jax.jit(objective.loss)
    first, again, other = (float(loss(params, BATCH, jax.random.key(seed))[0]) for seed in (0, 0, 1))
    assert first == again != other
    with_dropout, _ = objective_and_params()
    assert float(jax.jit(with_dropout.loss)(params, BATCH, jax.random.key(0))[0]) != first


def attention_that_needs_a_key(q_BTHK, k_BTHK, v_BTHK, mask):
    """NaN for rows without a key, which some kernels may give."""
    o_BTHK = attention(q_BTHK, k_BTHK, v_BTHK, mask)
    return jnp.where(mask.padding_BS.any(axis=1)[:, None, None, None], o_BTHK, jnp.nan)


def test_rows_past_the_end_of_the_text_count_nothing_and_give_no_nan():
    _, params = objective_and_params()
    kernels = dataclasses.replace(PLAIN, attention=attention_that_needs_a_key)
    objective = MaskedToken.of(Config(SMALL), kernels)
    grad = jax.jit(jax.value_and_grad(lambda *inputs: objective.loss(*inputs)[0]))
    empty = BATCH | {"mask_BT": np.arange(4)[:, None] < np.ones((1, 16)) * 2}
    value, grads = grad(params, empty, None)
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    total, count, measures = jax.jit(objective.loss)(params, BATCH | {"mask_BT": np.zeros((4, 16), bool)}, None)
    assert (total, count, measures["accuracy"]) == (0, 0, 0)


def test_the_class_loss_is_a_sum_over_unmasked_labels():
    logits_BC = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8], [0.2, 0.6, 0.2]]))
    total, count, measures = class_loss(logits_BC, jnp.array([0, 1, 1]), jnp.array([True, True, False]))
    assert total == pytest.approx(-np.log(0.5) - np.log(0.1))
    assert (count, measures["accuracy"]) == (2, 1)
