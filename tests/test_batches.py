"""Batches are a pure function of seed and step, and no token is lost or repeated.

Most tests use the tokens 0, 1, 2, ..., which equal their positions, so that a batch shows where it comes from.
"""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from minigpt_jax.data import batches

no_deadline = settings(deadline=None, max_examples=60)
lengths = st.integers(2, 9)
batch_sizes = st.integers(2, 7)
seeds = st.integers(0, 2**32 - 1)


def positions(num_tokens):
    return np.arange(num_tokens, dtype=np.uint16)


def equal(batch, other):
    return all(np.array_equal(batch[name], other[name]) for name in ("inputs_BT", "targets_BT", "mask_BT"))


# ---- Batches for training -------------------------------------------------------------------------------------------------


@no_deadline
@given(num_tokens=st.integers(10, 200), length=lengths, batch_size=batch_sizes, seed=seeds, step=st.integers(0, 10**6))
def test_targets_are_the_inputs_shifted_by_one(num_tokens, length, batch_size, seed, step):
    batch = batches.batch_at(positions(num_tokens), length, batch_size, seed, step)
    inputs_BT, targets_BT, mask_BT = batch["inputs_BT"], batch["targets_BT"], batch["mask_BT"]
    assert inputs_BT.shape == targets_BT.shape == mask_BT.shape == (batch_size, length)
    assert inputs_BT.dtype == targets_BT.dtype == np.int32
    assert mask_BT.dtype == bool
    assert mask_BT.all()  # no window extends past the end
    np.testing.assert_array_equal(targets_BT, inputs_BT + 1)
    np.testing.assert_array_equal(inputs_BT, inputs_BT[:, :1] + np.arange(length))


def test_batch_is_a_pure_function_of_seed_and_step():
    """A resumed run starts at any step, in a new process, and must see the same batches."""
    tokens, arguments = positions(157), (5, 4, 3)
    expected = [batches.batch_at(tokens, *arguments, step) for step in range(30)]
    for step in (29, 0, 17, 17, 8):
        assert equal(batches.batch_at(tokens, *arguments, step), expected[step])
    batches.batch_at(tokens, 5, 4, 99, 0)  # a call with another seed in between
    assert equal(batches.batch_at(tokens, *arguments, 3), expected[3])


def test_modifying_a_batch_does_not_affect_later_calls():
    first = batches.batch_at(positions(100), 5, 4, 0, 2)
    expected = first["inputs_BT"].copy()
    first["inputs_BT"][:] = 0
    np.testing.assert_array_equal(batches.batch_at(positions(100), 5, 4, 0, 2)["inputs_BT"], expected)


@no_deadline
@given(num_tokens=st.integers(12, 150), length=lengths, batch_size=batch_sizes, seed=seeds)
def test_each_epoch_visits_every_window_exactly_once_without_overlap(num_tokens, length, batch_size, seed):
    tokens = positions(num_tokens)
    num_windows, epochs = batches.num_windows(tokens, length), 4
    num_steps = -(-epochs * num_windows // batch_size)  # a batch may span two epochs
    rows = np.concatenate(
        [batches.batch_at(tokens, length, batch_size, seed, step)["targets_BT"] for step in range(num_steps)]
    )
    for epoch in range(epochs):
        targets = np.sort(rows[epoch * num_windows : (epoch + 1) * num_windows].ravel())
        # Adjacent, and together all tokens but the first and a remainder shorter than a window.
        np.testing.assert_array_equal(targets, targets[0] + np.arange(num_windows * length))
        assert num_tokens - 1 - len(targets) < length


def test_batch_size_does_not_change_the_order_of_the_windows():
    tokens = positions(200)

    def first_rows(batch_size):
        return np.concatenate(
            [batches.batch_at(tokens, 4, batch_size, 1, step)["inputs_BT"] for step in range(60 // batch_size)]
        )

    np.testing.assert_array_equal(first_rows(4), first_rows(5))


def test_each_epoch_and_seed_has_its_own_order():
    tokens, length, batch_size = positions(401), 4, 10  # 100 windows: an epoch is 10 batches

    def epoch(seed, number):
        steps = range(number * 10, number * 10 + 10)
        return tuple(
            np.concatenate([batches.batch_at(tokens, length, batch_size, seed, step)["inputs_BT"][:, 0] for step in steps])
        )

    orders = [epoch(seed, number) for seed, number in itertools.product((0, 1, 2), (0, 1, 2))]
    assert len(set(orders)) == len(orders)
    assert all(order != tuple(sorted(order)) for order in orders)
    assert all(sorted(order) == sorted(orders[0]) for order in orders)


def test_window_boundaries_differ_between_epochs():
    """Otherwise the first tokens of a window would never be predicted from those before them."""
    tokens, length = positions(8 * 20), 8  # 7 tokens are left over
    offsets = {batches.batch_at(tokens, length, 19, 0, step)["inputs_BT"].min() for step in range(40)}
    assert offsets == set(range(8))


# ---- Batches for evaluation -----------------------------------------------------------------------------------------------


def unmasked_targets(batches_):
    return np.concatenate([batch["targets_BT"][batch["mask_BT"]] for batch in batches_])


@no_deadline
@given(num_tokens=st.integers(2, 150), length=lengths, batch_size=batch_sizes)
def test_evaluation_covers_every_token_but_the_first_exactly_once(num_tokens, length, batch_size):
    parts = list(batches.evaluation_batches(positions(num_tokens), length, batch_size))
    assert {part[name].shape for part in parts for name in part} == {(batch_size, length)}  # one shape, so one compilation
    np.testing.assert_array_equal(unmasked_targets(parts), np.arange(1, num_tokens))
    for part in parts:
        mask_BT = part["mask_BT"]
        np.testing.assert_array_equal(part["targets_BT"][mask_BT], part["inputs_BT"][mask_BT] + 1)
        assert part["targets_BT"].max() < num_tokens  # masked targets are valid ids, too


@no_deadline
@given(num_tokens=st.integers(2, 150), length=lengths, batch_size=batch_sizes, data=st.data())
def test_with_a_stride_each_target_appears_once_and_late_in_its_window(num_tokens, length, batch_size, data):
    stride = data.draw(st.integers(1, length))
    parts = list(batches.evaluation_batches(positions(num_tokens), length, batch_size, stride=stride))
    np.testing.assert_array_equal(unmasked_targets(parts), np.arange(1, num_tokens))
    num_windows = 1 + max(0, -(-(num_tokens - 1 - length) // stride))
    assert len(parts) == -(-num_windows // batch_size)  # no superfluous batch
    for part in parts:
        for inputs_T, targets_T, mask_T in zip(
            *(part[name] for name in ("inputs_BT", "targets_BT", "mask_BT")), strict=True
        ):
            for position in np.flatnonzero(mask_T):
                num_before = position + 1
                assert num_before == targets_T[position] - inputs_T[0]  # the window is contiguous
                assert num_before >= min(targets_T[position], length - stride + 1)


def order(count, seed):
    _, keys = batches.epoch_randomness(seed, 0, 0)
    return [batches.shuffled(position, count, keys) for position in range(count)]


@no_deadline
@given(count=st.integers(1, 300), seed=seeds)
def test_shuffled_is_a_permutation(count, seed):
    assert sorted(order(count, seed)) == list(range(count))


@pytest.mark.parametrize("count", [2, 3, 4, 5, 7, 8, 64, 100])
def test_shuffled_is_uniform(count):
    """Chi-square over 4000 permutations, at the 0.1 % level: first element, last, and difference of the first two."""
    keys = [batches.epoch_randomness(seed, count, 0)[1] for seed in range(4000)]
    first, second, last = (np.array([batches.shuffled(i, count, one) for one in keys]) for i in (0, 1, count - 1))
    for values, num_values in ((first, count), (last, count), ((second - first) % count - 1, count - 1)):
        observed, expected = np.bincount(values, minlength=num_values), len(keys) / num_values
        if num_values > 1:
            assert stats.chi2.sf(((observed - expected) ** 2 / expected).sum(), num_values - 1) > 1e-3


def test_window_starts_are_correct_and_cheap_beyond_four_billion_tokens():
    """A narrow integer type would overflow silently; a stored permutation would not fit into memory."""
    length, num_tokens = 1000, 10**15 + 1
    starts = np.array([batches.window_start(num_tokens, length, 0, row) for row in range(1000)])
    assert len(set(starts)) == 1000
    assert set(starts % length) == {0}
    assert starts.max() < num_tokens
    assert abs(starts.mean() / num_tokens - 0.5) < 0.05


def test_limited_evaluation_spreads_windows_evenly_over_the_text():
    tokens, length, batch_size, limit = positions(10_001), 10, 5, 4  # 1000 windows, of which 20 are taken
    parts = list(batches.evaluation_batches(tokens, length, batch_size, limit))
    starts = np.concatenate([part["inputs_BT"][:, 0] for part in parts])
    assert len(parts) == limit
    assert (starts[0], starts[-1]) == (0, 9990)
    assert np.ptp(np.diff(starts)) <= length  # as even as whole windows allow
    assert len(unmasked_targets(parts)) == limit * batch_size * length


def test_limited_evaluation_is_deterministic():
    first, second = (list(batches.evaluation_batches(positions(999), 10, 3, 4)) for _ in range(2))
    assert all(equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("limit", [4, 5, 100, None])
def test_a_limit_that_is_not_exceeded_has_no_effect(limit):
    tokens = positions(10 * 4 * 3)  # 12 windows, the last of them one token short: 4 batches of 3
    np.testing.assert_array_equal(unmasked_targets(batches.evaluation_batches(tokens, 10, 3, limit)), tokens[1:])
