"""Batches: tokens on the disk, the split, and batches as a pure function in which nothing is lost or seen twice.

Most tests use tokens that are their own places, 0, 1, 2, ..., so that a batch shows where it was cut.
"""

import hashlib
import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt_jax.data import batches
from minigpt_jax.data.tokenizers import CharTokenizer
from minigpt_jax.errors import DataError

TINY_SHAKESPEARE = Path(__file__).resolve().parents[2] / "shared" / "data" / "tinyshakespeare.txt"
TEXT = "To be, or not to be: that is the question.\n"

without_time_limit = settings(deadline=None, max_examples=60)
lengths = st.integers(2, 9)
batch_sizes = st.integers(2, 7)
seeds = st.integers(0, 2**32 - 1)


def places(num_tokens):
    return np.arange(num_tokens, dtype=np.uint16)


def equal(batch, other):
    return all(np.array_equal(batch[name], other[name]) for name in ("inputs_BT", "targets_BT", "mask_BT"))


# ---- The file of tokens ---------------------------------------------------------------------------------------------------


def test_tokens_are_those_of_the_tokenizer_and_cannot_be_changed(tmp_path):
    tokenizer = CharTokenizer.train(TEXT)
    tokens = batches.tokenize(TEXT, tokenizer, tmp_path / "made" / "on" / "the" / "way")
    assert isinstance(tokens, np.memmap)
    np.testing.assert_array_equal(tokens, tokenizer.encode(TEXT))
    with pytest.raises(ValueError, match="read-only"):
        tokens[0] = 1


@pytest.mark.parametrize("vocab_size, dtype", [(2, "uint16"), (65_535, "uint16"), (65_536, "uint16"), (65_537, "uint32")])
def test_type_is_the_smallest_that_holds_the_vocabulary(tmp_path, vocab_size, dtype):
    """A type too small would wrap around without a word: id 65,536 would become 0."""
    characters = "".join(chr(code_point) for code_point in range(0x10000, 0x10000 + vocab_size))
    tokens = batches.tokenize(characters, CharTokenizer(characters), tmp_path)
    assert tokens.dtype == dtype
    assert tokens[-1] == vocab_size - 1
    assert [path.suffix for path in tmp_path.iterdir()] == [f".{dtype}"]


def test_file_is_written_once_and_then_only_read(tmp_path):
    tokenizer = CharTokenizer.train(TEXT)
    first = np.array(batches.tokenize(TEXT, tokenizer, tmp_path))
    (path,) = tmp_path.iterdir()
    # What can be read back was not made anew: a mark on the file is still there.
    path.write_bytes(b"\1\0" + path.read_bytes()[2:])
    again = batches.tokenize(TEXT, tokenizer, tmp_path)
    assert again[0] == 1 != first[0]
    np.testing.assert_array_equal(again[1:], first[1:])


def test_another_text_or_vocabulary_has_a_file_of_its_own(tmp_path):
    tokenizer, other = CharTokenizer.train(TEXT), CharTokenizer.train(TEXT + "z")
    for text, by in ((TEXT, tokenizer), (TEXT[:-1], tokenizer), (TEXT, other)):
        np.testing.assert_array_equal(batches.tokenize(text, by, tmp_path), by.encode(text))
    assert len(list(tmp_path.iterdir())) == 3


def test_a_write_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    """Neither half a file under the final name, which the next start would take for the tokens, nor one beside it."""

    def fill_the_disk(path, data):
        with path.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    tokenizer = CharTokenizer.train(TEXT)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", fill_the_disk)
        with pytest.raises(DataError, match=r"No space left on device.*--data_dir"):
            batches.tokenize(TEXT, tokenizer, tmp_path)
    assert list(tmp_path.iterdir()) == []
    np.testing.assert_array_equal(batches.tokenize(TEXT, tokenizer, tmp_path), tokenizer.encode(TEXT))


def test_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the folder's place")
    with pytest.raises(DataError, match=r"^cannot write tokens to .*file \(.*\); choose a folder with --data_dir$"):
        batches.tokenize(TEXT, CharTokenizer.train(TEXT), tmp_path / "file")


# ---- The split ------------------------------------------------------------------------------------------------------------


@without_time_limit
@given(num_tokens=st.integers(50, 3000))
def test_split_is_nine_tenths_and_the_rest_in_order(num_tokens):
    tokens = places(num_tokens)
    parts = batches.split(tokens, context_length=2)
    np.testing.assert_array_equal(np.concatenate([parts["train"], parts["val"]]), tokens)
    assert abs(len(parts["train"]) - 0.9 * num_tokens) < 1


@pytest.mark.skipif(not TINY_SHAKESPEARE.exists(), reason=f"there is no {TINY_SHAKESPEARE}")
def test_tiny_shakespeare_is_split_as_in_published_figures(tmp_path):
    data = TINY_SHAKESPEARE.read_bytes()
    assert hashlib.sha256(data).hexdigest().startswith("86c4e6aa")
    text = data.decode()
    tokenizer = CharTokenizer.train(text)
    parts = batches.split(batches.tokenize(text, tokenizer, tmp_path), context_length=256)
    assert tokenizer.vocab_size == 65
    assert (len(parts["train"]), len(parts["val"])) == (1_003_854, 111_540)


@pytest.mark.parametrize("num_tokens, longest", [(100, 9), (1000, 99), (101, 10)])
def test_longest_context_is_one_less_than_the_validation_split_and_named(num_tokens, longest):
    tokens = places(num_tokens)
    assert len(batches.split(tokens, longest)["val"]) == longest + 1
    for too_long in (longest + 1, num_tokens - 1, num_tokens, 10 * num_tokens):
        with pytest.raises(DataError, match=f"context_length={too_long} needs .*context_length of at most {longest}$"):
            batches.split(tokens, too_long)


@pytest.mark.parametrize("num_tokens", [1, 2, 9, 10])
def test_text_too_short_for_any_context_is_named_with_its_length(num_tokens):
    with pytest.raises(DataError, match=f"^the text has only {num_tokens} tokens"):
        batches.split(places(num_tokens), context_length=1)


# ---- Batches for training -------------------------------------------------------------------------------------------------


@without_time_limit
@given(num_tokens=st.integers(10, 200), length=lengths, batch_size=batch_sizes, seed=seeds, step=st.integers(0, 10**6))
def test_batch_has_inputs_and_the_tokens_after_them_as_targets(num_tokens, length, batch_size, seed, step):
    batch = batches.batch_at(places(num_tokens), length, batch_size, seed, step)
    inputs_BT, targets_BT, mask_BT = batch["inputs_BT"], batch["targets_BT"], batch["mask_BT"]
    assert inputs_BT.shape == targets_BT.shape == mask_BT.shape == (batch_size, length)
    assert inputs_BT.dtype == targets_BT.dtype == np.int32
    assert mask_BT.dtype == bool
    assert mask_BT.all()  # nothing past the end
    np.testing.assert_array_equal(targets_BT, inputs_BT + 1)
    np.testing.assert_array_equal(inputs_BT, inputs_BT[:, :1] + np.arange(length))


def test_batch_is_a_pure_function_of_seed_and_step():
    """A resumed run starts in the middle, in a process that has seen nothing: it must draw what the first one drew."""
    tokens, arguments = places(157), (5, 4, 3)
    straight = [batches.batch_at(tokens, *arguments, step) for step in range(30)]
    for step in (29, 0, 17, 17, 8):
        batches.epoch_starts.cache_clear()
        assert equal(batches.batch_at(tokens, *arguments, step), straight[step])
    batches.batch_at(tokens, 5, 4, 99, 0)  # a call with another seed in between
    assert equal(batches.batch_at(tokens, *arguments, 3), straight[3])


def test_a_batch_given_away_may_be_changed_without_harm():
    first = batches.batch_at(places(100), 5, 4, 0, 2)
    expected = first["inputs_BT"].copy()
    first["inputs_BT"][:] = 0
    np.testing.assert_array_equal(batches.batch_at(places(100), 5, 4, 0, 2)["inputs_BT"], expected)


@without_time_limit
@given(num_tokens=st.integers(12, 150), length=lengths, batch_size=batch_sizes, seed=seeds)
def test_each_epoch_visits_every_window_exactly_once_without_overlap(num_tokens, length, batch_size, seed):
    tokens = places(num_tokens)
    num_windows, epochs = batches.num_windows(tokens, length), 4
    num_steps = -(-epochs * num_windows // batch_size)  # batches need not end where an epoch ends
    rows = np.concatenate(
        [batches.batch_at(tokens, length, batch_size, seed, step)["targets_BT"] for step in range(num_steps)]
    )
    for epoch in range(epochs):
        targets = np.sort(rows[epoch * num_windows : (epoch + 1) * num_windows].ravel())
        # Side by side, and together all tokens but the first and what is less than one more window.
        np.testing.assert_array_equal(targets, targets[0] + np.arange(num_windows * length))
        assert num_tokens - 1 - len(targets) < length


def test_batch_size_does_not_change_the_order_of_the_windows():
    tokens = places(200)

    def first_rows(batch_size):
        return np.concatenate(
            [batches.batch_at(tokens, 4, batch_size, 1, step)["inputs_BT"] for step in range(60 // batch_size)]
        )

    np.testing.assert_array_equal(first_rows(4), first_rows(5))


def test_epochs_and_seeds_have_orders_of_their_own():
    tokens, length, batch_size = places(401), 4, 10  # 100 windows: an epoch is 10 batches

    def epoch(seed, number):
        steps = range(number * 10, number * 10 + 10)
        return tuple(
            np.concatenate([batches.batch_at(tokens, length, batch_size, seed, step)["inputs_BT"][:, 0] for step in steps])
        )

    orders = [epoch(seed, number) for seed, number in itertools.product((0, 1, 2), (0, 1, 2))]
    assert len(set(orders)) == len(orders)
    assert all(order != tuple(sorted(order)) for order in orders)
    assert all(sorted(order) == sorted(orders[0]) for order in orders)


def test_windows_are_cut_at_other_places_in_other_epochs():
    """Otherwise the first characters of a window would never be seen with those before them."""
    tokens, length = places(8 * 20), 8  # 7 tokens are left over
    first_places = {batches.batch_at(tokens, length, 19, 0, step)["inputs_BT"].min() for step in range(40)}
    assert first_places == set(range(8))


# ---- Batches for evaluation -----------------------------------------------------------------------------------------------


def seen_targets(batches_):
    return np.concatenate([batch["targets_BT"][batch["mask_BT"]] for batch in batches_])


@without_time_limit
@given(num_tokens=st.integers(2, 150), length=lengths, batch_size=batch_sizes)
def test_evaluation_has_every_token_but_the_first_as_target_exactly_once(num_tokens, length, batch_size):
    parts = list(batches.evaluation_batches(places(num_tokens), length, batch_size))
    assert {part[name].shape for part in parts for name in part} == {(batch_size, length)}  # one shape, so one compilation
    np.testing.assert_array_equal(seen_targets(parts), np.arange(1, num_tokens))
    for part in parts:
        mask_BT = part["mask_BT"]
        np.testing.assert_array_equal(part["targets_BT"][mask_BT], part["inputs_BT"][mask_BT] + 1)
        assert part["targets_BT"].max() < num_tokens  # what is masked is a token, too


def test_limited_evaluation_takes_windows_from_the_whole_text_evenly():
    tokens, length, batch_size, limit = places(10_001), 10, 5, 4  # 1000 windows, of which 20 are taken
    parts = list(batches.evaluation_batches(tokens, length, batch_size, limit))
    starts = np.concatenate([part["inputs_BT"][:, 0] for part in parts])
    assert len(parts) == limit
    assert (starts[0], starts[-1]) == (0, 9990)
    assert np.ptp(np.diff(starts)) <= length  # as even as whole windows can be
    assert len(seen_targets(parts)) == limit * batch_size * length


def test_limited_evaluation_is_the_same_each_time():
    first, second = (list(batches.evaluation_batches(places(999), 10, 3, 4)) for _ in range(2))
    assert all(equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("limit", [4, 5, 100, None])
def test_a_limit_that_is_not_reached_changes_nothing(limit):
    tokens = places(10 * 4 * 3)  # 12 windows, the last of them one token short: 4 batches of 3
    np.testing.assert_array_equal(seen_targets(batches.evaluation_batches(tokens, 10, 3, limit)), tokens[1:])
