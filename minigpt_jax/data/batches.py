"""From a text to batches: tokens in a memory-mapped file, cut into windows, drawn in an order that is a pure function."""

import functools
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from minigpt_jax.data.tokenizers import Tokenizer
from minigpt_jax.errors import DataError

Batch = dict[str, np.ndarray]  # inputs_BT, targets_BT: int32; mask_BT: bool

TRAIN_FRACTION = 0.9


def tokenize(text: str, tokenizer: Tokenizer, data_dir: Path) -> np.ndarray:
    """The text's tokens as a read-only memory map, from a file in `data_dir` that is written where it is missing.

    The file's name is a hash of text and tokenizer; its type the smallest that holds the vocabulary. It is written aside
    and renamed, so it is whole or absent. Raises DataError where the folder cannot be written.
    """
    dtype = np.dtype("<u2") if tokenizer.vocab_size <= 2**16 else np.dtype("<u4")
    key = hashlib.sha256(tokenizer.to_json().encode() + b"\0" + text.encode()).hexdigest()[:16]
    path = data_dir / f"tokens-{key}.{dtype.name}"
    if not path.exists():
        tokens = tokenizer.encode(text).astype(dtype)
        try:
            data_dir.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=data_dir) as folder:
                aside = Path(folder, path.name)
                aside.write_bytes(tokens.tobytes())
                os.replace(aside, path)
        except OSError as error:
            raise DataError(
                f"cannot write tokens to {data_dir} ({error.strerror}); choose a folder with --data_dir"
            ) from error
    return np.memmap(path, dtype, mode="r")


def split(tokens: np.ndarray, context_length: int) -> dict[str, np.ndarray]:
    """{"train": the first 90 % of the tokens, "val": the rest}. Raises DataError where either is shorter than one window."""
    num_train = int(len(tokens) * TRAIN_FRACTION)
    splits = {"train": tokens[:num_train], "val": tokens[num_train:]}
    for name, part in splits.items():
        if len(part) <= context_length:
            raise DataError(
                f"the {name} split has {len(part)} tokens and context_length={context_length} needs at least "
                f"{context_length + 1}: use a longer text, or a context_length of at most {len(splits['val']) - 1}"
                if len(splits["val"]) > 1
                else f"the text has only {len(tokens)} tokens: use a longer one"
            )
    return splits


def num_windows(tokens: np.ndarray, context_length: int) -> int:
    """How many windows an epoch has: stretches of T inputs and their targets one further, side by side without overlap."""
    return (len(tokens) - 1) // context_length


@functools.lru_cache(maxsize=4)
def epoch_starts(num_tokens: int, context_length: int, seed: int, epoch: int) -> np.ndarray:
    """Where the windows of an epoch start, in the order of their visit: a function of the seed and the epoch alone.

    The windows lie side by side. The first of them starts somewhere in the tokens that would be left over at the end, so
    the cuts are not the same in every epoch.
    """
    random = np.random.default_rng((seed, epoch))
    count, left_over = divmod(num_tokens - 1, context_length)
    return random.integers(left_over + 1) + random.permutation(count) * context_length


def batch_at(tokens: np.ndarray, context_length: int, batch_size: int, seed: int, step: int) -> Batch:
    """The batch of a step: a pure function, so a run resumes with the step's number and nothing else.

    Rows are counted through all steps, and row r takes place r mod W of epoch r // W, where W is the number of windows. So
    each epoch visits every window exactly once, and a batch may end one epoch and begin the next.
    """
    count = num_windows(tokens, context_length)
    rows = range(step * batch_size, (step + 1) * batch_size)
    starts_B = np.array([epoch_starts(len(tokens), context_length, seed, row // count)[row % count] for row in rows])
    return windows(tokens, context_length, starts_B)


def windows(tokens: np.ndarray, context_length: int, starts_B: np.ndarray) -> Batch:
    """The windows that start at these places. What lies past the end of the tokens is masked."""
    places_BT = starts_B[:, None] + np.arange(context_length + 1)[None, :]
    mask_BT = places_BT[:, 1:] < len(tokens)
    tokens_BT = np.asarray(tokens[np.minimum(places_BT, len(tokens) - 1)], np.int32)
    return {"inputs_BT": tokens_BT[:, :-1], "targets_BT": tokens_BT[:, 1:], "mask_BT": mask_BT}


def evaluation_batches(
    tokens: np.ndarray, context_length: int, batch_size: int, limit: int | None = None
) -> Iterator[Batch]:
    """Batches that have every token but the first as a target exactly once, masked where the last ones are not full.

    With a `limit` on their number and more text than that, windows evenly spread over the text stand for all of it.
    """
    starts = np.arange(0, len(tokens) - 1, context_length)
    if limit is not None and len(starts) > limit * batch_size:
        starts = starts[np.linspace(0, len(starts) - 1, limit * batch_size).astype(int)]
    for first in range(0, len(starts), batch_size):
        starts_B = np.full(batch_size, len(tokens))  # past the end: masked
        part = starts[first : first + batch_size]
        starts_B[: len(part)] = part
        yield windows(tokens, context_length, starts_B)
