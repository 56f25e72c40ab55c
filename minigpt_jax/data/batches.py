"""From tokens to batches: windows in a shuffled order that is a pure function of the seed."""

import functools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

Batch = dict[str, Any]  # arrays by name, NumPy's before a step and JAX's inside it; of text: inputs_BT, targets_BT, mask_BT


def num_windows(tokens: np.ndarray, context_length: int) -> int:
    """Windows per epoch. They are adjacent, do not overlap, and have T inputs and T targets, shifted by one token."""
    return (len(tokens) - 1) // context_length


def batch_at(tokens: np.ndarray, context_length: int, batch_size: int, seed: int, step: int) -> Batch:
    """The batch of a step. This is a pure function, so resuming a run needs only the step number.

    Rows are numbered across all steps: row r is number r mod W in the order of epoch r // W, where W is the number of
    windows. Each epoch visits every window exactly once, and a batch may span two epochs.
    """
    rows = range(step * batch_size, (step + 1) * batch_size)
    starts_B = np.array([window_start(len(tokens), context_length, seed, row) for row in rows])
    return windows(tokens, context_length, starts_B)


def window_start(num_tokens: int, context_length: int, seed: int, row: int) -> int:
    """Start of the window of a row: a function of the seed and the row only.

    The W adjacent windows leave up to T - 1 tokens over. Each epoch shifts its windows by a random part of that remainder,
    so that their boundaries vary.
    """
    count, left_over = divmod(num_tokens - 1, context_length)
    epoch, position = divmod(row, count)
    first, keys = epoch_randomness(seed, epoch, left_over)
    return first + shuffled(position, count, keys) * context_length


NUM_ROUNDS = 10  # even, so that rows end as rows; with 6, short permutations still fail a chi-square test


@functools.lru_cache(maxsize=2)  # a batch can span two epochs
def epoch_randomness(seed: int, epoch: int, left_over: int) -> tuple[int, list[list[int]]]:
    """Random values of an epoch: the start of its first window, and the keys of its permutation."""
    random = np.random.default_rng((seed, epoch))
    return int(random.integers(left_over + 1)), random.integers(2**64, size=(NUM_ROUNDS, 2), dtype=np.uint64).tolist()


def shuffled(position: int, count: int, keys: list[list[int]]) -> int:
    """The element at `position` of the permutation of 0, 1, ... count - 1 that `keys` define.

    Computed for this position alone, because the permutation of an epoch may not fit into memory. A number is written as row
    and column of a grid with at least `count` cells. A Feistel network (Luby and Rackoff 1988) alternately shifts the row by
    a function of the column, and the column by a function of the row. This is a bijection for any functions; here they are
    multiply-add-shift hashes (Dietzfelbinger 1996). A result outside the range is permuted again until it is inside, which
    keeps the bijection ("cycle walking", Black and Rogaway 2002).
    """
    num_rows = math.isqrt(count - 1) + 1
    num_columns = -(-count // num_rows)
    while True:
        row, column = divmod(position, num_columns)
        for multiplier, addend in keys:
            row, column = column, (row + ((multiplier * column + addend) % 2**64 >> 32)) % num_rows
            num_rows, num_columns = num_columns, num_rows
        position = row * num_columns + column
        if position < count:
            return position


def shuffled_rows(count: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """The examples, of `count` that are not windows of a text, in the batch of a step: as in `batch_at`."""

    def example(row: int) -> int:
        epoch, position = divmod(row, count)
        return shuffled(position, count, epoch_randomness(seed, epoch, 0)[1])

    return np.array([example(row) for row in range(step * batch_size, (step + 1) * batch_size)])


def windows(tokens: np.ndarray, context_length: int, starts_B: np.ndarray) -> Batch:
    """The windows with these starts. Targets past the end of the tokens are masked."""
    positions_BT = starts_B[:, None] + np.arange(context_length + 1)[None, :]
    mask_BT = positions_BT[:, 1:] < len(tokens)
    tokens_BT = np.asarray(tokens[np.minimum(positions_BT, len(tokens) - 1)], np.int32)
    return {"inputs_BT": tokens_BT[:, :-1], "targets_BT": tokens_BT[:, 1:], "mask_BT": mask_BT}


def evaluation_batches(
    tokens: np.ndarray, context_length: int, batch_size: int, limit: int | None = None, stride: int | None = None
) -> Iterator[Batch]:
    """Yields batches in which every token but the first is a target exactly once. All others are masked.

    Each window starts `stride` tokens after the previous one, by default T. In the first window all targets count, and in
    each other one the last `stride`, which are new: they are predicted from more than T - `stride` tokens. `limit` is the
    maximum number of batches; a longer text is represented by windows that are evenly spaced over it.
    """
    T = context_length
    stride = stride or T
    count = max(-(-(len(tokens) - 1 - (T - stride)) // stride), 1)
    selected = None
    if limit is not None and count > limit * batch_size:
        selected, count = np.linspace(0, count - 1, limit * batch_size).astype(int), limit * batch_size
    for first in range(0, count, batch_size):
        indices = np.arange(first, min(first + batch_size, count))
        starts_B = np.full(batch_size, len(tokens))  # past the end: masked
        starts_B[: len(indices)] = (indices if selected is None else selected[indices]) * stride
        batch = windows(tokens, T, starts_B)
        batch["mask_BT"] &= (np.arange(T) >= T - stride)[None, :] | (starts_B == 0)[:, None]
        yield batch
