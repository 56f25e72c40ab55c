"""The token ids of a text in a memory-mapped file, which is cached under the hashes of the text and the tokenizer."""

import dataclasses
import hashlib
import itertools
import json
import logging
import mmap
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from minigpt_jax.data.text_files import Scan, Text, progress
from minigpt_jax.data.tokenizers import Tokenizer
from minigpt_jax.errors import DataError
from minigpt_jax.files import atomic_path, sha256

log = logging.getLogger(__name__)

PIECES_PER_BATCH = 32
MIN_LOGGED_BYTES = 10_000_000  # smaller texts take no noticeable time


@dataclasses.dataclass(frozen=True)
class Tokens:
    """A text as token ids, with counts."""

    ids: np.ndarray  # read-only and memory-mapped
    num_characters: int
    num_bytes: int  # of the text in UTF-8
    num_unknown: int  # tokens that are <unk>

    @property
    def unknown_share(self) -> float:
        return self.num_unknown / max(len(self.ids), 1)


def tokenize(text: Text, scan: Scan, tokenizer: Tokenizer, data_dir: Path) -> Tokens:
    """The tokens of a text, from a file in `data_dir` that is written if it is missing or corrupt.

    `scan` covers all the documents, even if `text` is a part of them. Its hash and the tokenizer's name the file. The ids
    have the smallest type that holds the vocabulary. A JSON file beside them has counts and checksum. Both are written under
    temporary names and then renamed. Raises DataError if the text cannot be read or encoded or has changed since the scan,
    or if the folder is not writable.
    """
    dtype = np.dtype("<u2") if tokenizer.vocab_size <= 2**16 else np.dtype("<u4")
    key = sha256(f"{scan.sha256} {text.start} {text.end} {tokenizer.sha256}".encode())[:16]
    path = data_dir / f"tokens-{key}.{dtype.name}"
    try:
        tokens = _read(path, dtype)
        if tokens is None:
            data_dir.mkdir(parents=True, exist_ok=True)
            with (
                atomic_path(path) as ids_file,
                atomic_path(_counts_path(path)) as counts_file,
            ):  # the second is renamed first
                counts, checksum = _write(ids_file, text, tokenizer, dtype, size_of(text, scan))
                if text.stamp() != scan.stamp:
                    raise DataError(f"{text.name} changed while it was being read; run the command again")
                counts_file.write_text(json.dumps(counts | {"sha256": checksum}) + "\n", encoding="utf-8")
            tokens = Tokens(map_ids(path, dtype), **counts)
        return tokens
    except OSError as error:
        raise DataError(f"cannot write tokens to {data_dir} ({error.strerror}); choose a folder with --data_dir") from error


def size_of(text: Text, scan: Scan) -> int:
    """Approximate size in bytes of a part of the scanned text."""
    end = scan.num_characters if text.end is None else text.end
    return scan.num_bytes * (end - text.start) // scan.num_characters


def _counts_path(path: Path) -> Path:
    return path.with_suffix(".json")


def _read(path: Path, dtype: np.dtype) -> Tokens | None:
    """The tokens in a file, or None if it is missing or corrupt."""
    if not path.exists():
        return None
    try:
        counts = json.loads(_counts_path(path).read_text(encoding="utf-8"))
        expected = counts.pop("sha256")
        with path.open("rb") as file:
            if _checksum(hashlib.file_digest(file, "sha256"), counts) == expected:
                return Tokens(map_ids(path, dtype), **counts)
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        pass  # missing or unknown counts are corruption, like a wrong checksum
    log.warning("%s is corrupt; rebuilding it", path)
    return None


def _checksum(digest_of_ids: "hashlib._Hash", counts: dict[str, int]) -> str:
    digest_of_ids.update(json.dumps(counts).encode())
    return digest_of_ids.hexdigest()


def map_ids(path: Path, dtype: np.dtype) -> np.ndarray:
    """The ids in a file, read-only and memory-mapped, so that they need not fit into memory."""
    if path.stat().st_size == 0:  # an empty file cannot be mapped
        return np.zeros(0, dtype)
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_RANDOM"):  # not on Windows
        mapped.madvise(mmap.MADV_RANDOM)  # without it, each window read from disk also reads megabytes after it
    return np.frombuffer(mapped, dtype)


def _write(path: Path, text: Text, tokenizer: Tokenizer, dtype: np.dtype, size: int) -> tuple[dict[str, int], str]:
    """Writes the ids. Returns counts, and the checksum of ids and counts. `size` is for the progress bar."""
    start, digest = time.monotonic(), hashlib.sha256()
    num_tokens = num_characters = num_bytes = num_unknown = 0
    with path.open("wb") as file, progress(f"tokenizing {text.name}", size) as bar:
        for piece, ids in _encode(text, tokenizer):
            data = ids.astype(dtype).tobytes()
            file.write(data)
            digest.update(data)
            num_tokens, num_characters = num_tokens + len(ids), num_characters + len(piece)
            num_bytes += (length := len(piece.encode()))
            bar.update(length)
            if tokenizer.unknown is not None:
                num_unknown += int(np.count_nonzero(ids == tokenizer.unknown))
    counts = {"num_characters": num_characters, "num_bytes": num_bytes, "num_unknown": num_unknown}
    if num_bytes >= MIN_LOGGED_BYTES:
        log.info(
            "Tokenized %.0f MB of %s in %.0f s (%.0f MB/s): %.2f M tokens.",
            num_bytes / 1e6, text.name, seconds := time.monotonic() - start, num_bytes / 1e6 / seconds, num_tokens / 1e6,
        )  # fmt: skip
    return counts, _checksum(digest, counts)


def _encode(text: Text, tokenizer: Tokenizer) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the pieces of a text with their ids. Documents are separated by end-of-text, or else by a line break."""
    pieces, last = text.pieces(), None
    while batch := list(itertools.islice(pieces, PIECES_PER_BATCH)):
        for (document, piece), ids in zip(batch, tokenizer.encode_batch([piece for _, piece in batch]), strict=True):
            if last not in (None, document):
                end = tokenizer.end_of_text
                yield "", tokenizer.encode("\n") if end is None else np.array([end])
            last = document
            yield piece, ids
