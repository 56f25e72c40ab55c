"""From tokens to batches: windows, drawn in an order that is a pure function of the seed."""

import functools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

Batch = dict[str, Any]  # arrays by name, NumPy's before a step and JAX's inside it; of text: inputs_BT, targets_BT, mask_BT


def num_windows(tokens: np.ndarray, context_length: int) -> int:
    """How many windows an epoch has: stretches of T inputs and their targets one further, side by side without overlap."""
    return (len(tokens) - 1) // context_length


def batch_at(tokens: np.ndarray, context_length: int, batch_size: int, seed: int, step: int) -> Batch:
    """The batch of a step: a pure function, so a run resumes with the step's number and nothing else.

    Rows are counted through all steps, and row r takes place r mod W of epoch r // W, where W is the number of windows. So
    each epoch visits every window exactly once, and a batch may end one epoch and begin the next.
    """
    rows = range(step * batch_size, (step + 1) * batch_size)
    starts_B = np.array([window_start(len(tokens), context_length, seed, row) for row in rows])
    return windows(tokens, context_length, starts_B)


def window_start(num_tokens: int, context_length: int, seed: int, row: int) -> int:
    """Where the window of a row starts: a function of the seed and the row alone.

    The windows lie side by side. The first of them starts somewhere in the tokens that would be left over at the end, so
    the cuts are not the same in every epoch.
    """
    count, left_over = divmod(num_tokens - 1, context_length)
    epoch, place = divmod(row, count)
    first, keys = epoch_randomness(seed, epoch, left_over)
    return first + shuffled(place, count, keys) * context_length


NUM_ROUNDS = 10  # even, so that rows end as rows; with 6 a chi-square test still tells small orders from random ones


@functools.lru_cache(maxsize=2)  # a batch can end one epoch and begin the next
def epoch_randomness(seed: int, epoch: int, left_over: int) -> tuple[int, list[list[int]]]:
    """What is drawn for an epoch: the start of its first window, and the numbers that stand for its order."""
    random = np.random.default_rng((seed, epoch))
    return int(random.integers(left_over + 1)), random.integers(2**64, size=(NUM_ROUNDS, 2), dtype=np.uint64).tolist()


def shuffled(place: int, count: int, keys: list[list[int]]) -> int:
    """What stands at a place of 0, 1, ... count - 1 in the random order that the keys stand for.

    Computed for this place alone: the order of a whole epoch may not fit into memory. A number is a row and a column of a
    square of at least `count`. By turns the row is moved by a function of the column and the column by one of the row,
    which is one to one whatever the functions are (a Feistel network; Luby and Rackoff 1988). These are multiply-add-shift
    of random numbers (Dietzfelbinger 1996). What is moved out of the range is moved again until it is back in it, which is
    one to one, too ("cycle walking", Black and Rogaway 2002).
    """
    num_rows = math.isqrt(count - 1) + 1
    num_columns = -(-count // num_rows)
    while True:
        row, column = divmod(place, num_columns)
        for factor, summand in keys:
            row, column = column, (row + ((factor * column + summand) % 2**64 >> 32)) % num_rows
            num_rows, num_columns = num_columns, num_rows
        place = row * num_columns + column
        if place < count:
            return place


def windows(tokens: np.ndarray, context_length: int, starts_B: np.ndarray) -> Batch:
    """The windows that start at these places. What lies past the end of the tokens is masked."""
    places_BT = starts_B[:, None] + np.arange(context_length + 1)[None, :]
    mask_BT = places_BT[:, 1:] < len(tokens)
    tokens_BT = np.asarray(tokens[np.minimum(places_BT, len(tokens) - 1)], np.int32)
    return {"inputs_BT": tokens_BT[:, :-1], "targets_BT": tokens_BT[:, 1:], "mask_BT": mask_BT}


def evaluation_batches(
    tokens: np.ndarray, context_length: int, batch_size: int, limit: int | None = None, stride: int | None = None
) -> Iterator[Batch]:
    """Batches that have every token but the first as a target exactly once, masked where it is not.

    A window begins `stride` tokens after the one before it, by default where that one ends. Of its T targets only the last
    `stride` count, those that are new, so that each is predicted from at least T - `stride` tokens before it (the first ones
    from all that there are). With a `limit` on the number of batches and more text than that, windows evenly spread over
    the text stand for all of it.
    """
    T = context_length
    stride = stride or T
    count = max(-(-(len(tokens) - 1 - (T - stride)) // stride), 1)
    spread = None
    if limit is not None and count > limit * batch_size:
        spread, count = np.linspace(0, count - 1, limit * batch_size).astype(int), limit * batch_size
    for first in range(0, count, batch_size):
        places = np.arange(first, min(first + batch_size, count))
        starts_B = np.full(batch_size, len(tokens))  # past the end: masked
        starts_B[: len(places)] = (places if spread is None else spread[places]) * stride
        batch = windows(tokens, T, starts_B)
        batch["mask_BT"] &= (np.arange(T) >= T - stride)[None, :] | (starts_B == 0)[:, None]
        yield batch
