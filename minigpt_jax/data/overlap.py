"""How much of the validation text also occurs in the training text, where a model can have learned it by heart."""

import numpy as np

LENGTH = 64  # tokens of a window; in shorter ones, phrases that every text repeats would count
MAX_WINDOWS = 1000
CHUNK = 2**18  # training tokens hashed at once
BASE = 0x9E3779B97F4A7C15


def overlap(train: np.ndarray, val: np.ndarray) -> float:
    """Share of evenly spaced windows of the validation tokens that occur verbatim anywhere in the training tokens.

    Windows are compared by 64-bit hashes in one pass over the training tokens, which need not fit into memory. A validation
    text shorter than a window counts as one window if it has at least half of its length, and else not at all.
    """
    length = LENGTH if len(val) >= LENGTH else LENGTH // 2
    if min(len(train), len(val)) < length:
        return 0.0
    starts = np.linspace(0, len(val) - length, min(MAX_WINDOWS, len(val) - length + 1)).astype(int)
    hashes = window_hashes(val[starts[:, None] + np.arange(length)], length)[:, 0]
    is_found = np.zeros(len(hashes), bool)
    may_be_wanted = np.zeros(2**16, bool)  # by the first 16 bits, a quick test that leaves few to compare
    may_be_wanted[hashes >> 48] = True
    for first in range(0, len(train) - length + 1, CHUNK):
        candidates = window_hashes(train[first : first + CHUNK + length - 1], length)
        is_found |= np.isin(hashes, candidates[may_be_wanted[candidates >> 48]])
    return float(is_found.mean())


def window_hashes(tokens: np.ndarray, length: int) -> np.ndarray:
    """Polynomial hashes modulo 2^64 of all windows along the last axis. `length` is a power of two, built by doubling."""
    hashes, size = tokens.astype(np.uint64) + np.uint64(1), 1
    while size < length:
        hashes = hashes[..., :-size] + hashes[..., size:] * np.uint64(pow(BASE, size, 2**64))
        size *= 2
    return hashes
