"""Several conversations in one row of a batch, so that little of it is padding. They do not see each other.

    inputs     User : Hi <end> Assistant : Hello  User : Bye <end> Assistant : Farewell  ·
    targets    : Hi <end> Assistant : Hello <end> : Bye <end> Assistant : Farewell <end> ·
    segments   1    1 1  1     1         1 1      2    2 2   2     2         2 2         0
    positions  0    1 2  3     4         5 6      0    1 2   3     4         5 6         0
    mask       0    0 0  0     0         1 1      0    0 0   0     0         1 1         0

A conversation of n tokens fills n - 1 columns, since its last token is only a target. `segments_BT` is for the attention
mask (models/masks.py), `positions_BT` restart in each conversation, and `mask_BT` is true where the target is the
assistant's. Padding is segment 0.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from minigpt_jax.data.batches import Batch
from minigpt_jax.data.conversations import Encoded


def cut(conversation: Encoded, context_length: int) -> Encoded | None:
    """The conversation as far as a row holds it. None if no answer is left."""
    ids, is_answer = (values[: context_length + 1] for values in (conversation.ids, conversation.is_answer))
    return Encoded(ids, is_answer) if is_answer[1:].any() else None


def fit(conversations: Iterable[Encoded], context_length: int) -> tuple[list[Encoded], int, int]:
    """(conversations that fit into a row, how many of them were cut to fit, how many were dropped since they lost every
    answer)."""
    fitting = [(cut(conversation, context_length), len(conversation.ids)) for conversation in conversations]
    kept = [(conversation, size) for conversation, size in fitting if conversation is not None]
    num_cut = sum(len(conversation.ids) < size for conversation, size in kept)
    return [conversation for conversation, _ in kept], num_cut, len(fitting) - len(kept)


def pack(conversations: Iterable[Encoded], context_length: int) -> Iterator[list[Encoded]]:
    """The conversations that share a row, in order: each row takes the next ones until one does not fit. Those that are too
    long for any row are left out."""
    row, left = [], context_length
    for conversation in conversations:
        size = len(conversation.ids) - 1
        if row and size > left:
            yield row
            row, left = [], context_length
        if size <= left:
            row.append(conversation)
            left -= size
    if row:
        yield row


def batch(packs: Sequence[Sequence[Encoded]], context_length: int) -> Batch:
    """A batch with one row for each pack of conversations, which may be empty."""
    shape = len(packs), context_length
    numbers = ("inputs_BT", "targets_BT", "positions_BT", "segments_BT")
    arrays: Batch = {name: np.zeros(shape, np.int32) for name in numbers} | {"mask_BT": np.zeros(shape, bool)}
    for row, pack in enumerate(packs):
        start = 0
        for segment, conversation in enumerate(pack, 1):
            ids, size = conversation.ids, len(conversation.ids) - 1
            values = ids[:-1], ids[1:], np.arange(size), segment, conversation.is_answer[1:]
            for array, value in zip(arrays.values(), values, strict=True):
                array[row, start : start + size] = value
            start += size
    return arrays
