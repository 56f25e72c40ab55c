"""From a text to its tokens, in a file that is mapped into memory: made once, found again by what it was made from."""

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
from minigpt_jax.files import replaced, sha256

log = logging.getLogger(__name__)

GROUP = 32  # pieces that a tokenizer gets at a time
WORTH_TELLING = 10_000_000  # bytes; less is done before anyone has read of it


@dataclasses.dataclass(frozen=True)
class Tokens:
    """A text as token ids, and what it had of everything."""

    ids: np.ndarray  # of a read-only file that is mapped into memory
    num_characters: int
    num_bytes: int  # of the text in UTF-8
    num_unknown: int  # ids that stand for what the vocabulary lacks

    @property
    def unknown_share(self) -> float:
        return self.num_unknown / max(len(self.ids), 1)


def tokenize(text: Text, scan: Scan, tokenizer: Tokenizer, data_dir: Path) -> Tokens:
    """The text's tokens, from a file in `data_dir` that is written where it is missing or damaged.

    `scan` is of all the documents. Its sum and the tokenizer's give the file its name. The ids have the smallest type that
    holds the vocabulary. Beside them lies a JSON file with counts and checksum; both are written aside and renamed. Raises
    DataError where the text cannot be read or encoded, has changed since the scan, or the folder cannot be written.
    """
    dtype = np.dtype("<u2") if tokenizer.vocab_size <= 2**16 else np.dtype("<u4")
    key = sha256(f"{scan.sha256} {text.start} {text.end} {tokenizer.sha256}".encode())[:16]
    path = data_dir / f"tokens-{key}.{dtype.name}"
    try:
        tokens = _read(path, dtype)
        if tokens is None:
            data_dir.mkdir(parents=True, exist_ok=True)
            with replaced(path) as aside, replaced(_about(path)) as about_aside:  # of which the second gets its name first
                counts, total = _write(aside, text, tokenizer, dtype, size_of(text, scan))
                if text.stamp() != scan.stamp:
                    raise DataError(f"{text.name} changed while it was read; begin again")
                about_aside.write_text(json.dumps(counts | {"sha256": total}) + "\n", encoding="utf-8")
            tokens = Tokens(map_ids(path, dtype), **counts)
        return tokens
    except OSError as error:
        raise DataError(f"cannot write tokens to {data_dir} ({error.strerror}); choose a folder with --data_dir") from error


def size_of(text: Text, scan: Scan) -> int:
    """Bytes of a part of what was scanned, roughly."""
    end = scan.num_characters if text.end is None else text.end
    return scan.num_bytes * (end - text.start) // scan.num_characters


def _about(path: Path) -> Path:
    return path.with_suffix(".json")


def _read(path: Path, dtype: np.dtype) -> Tokens | None:
    """The tokens in a file, or None where it is missing or not as it was written."""
    if not path.exists():
        return None
    try:
        about = json.loads(_about(path).read_text(encoding="utf-8"))
        sha256 = about.pop("sha256")
        with path.open("rb") as file:
            if _sum(hashlib.file_digest(file, "sha256"), about) == sha256:
                return Tokens(map_ids(path, dtype), **about)
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        pass  # counts that are missing, or none of ours, are damage like a wrong sum
    log.warning("%s is damaged: making it anew", path)
    return None


def _sum(digest_of_ids: "hashlib._Hash", counts: dict[str, int]) -> str:
    digest_of_ids.update(json.dumps(counts).encode())
    return digest_of_ids.hexdigest()


def map_ids(path: Path, dtype: np.dtype) -> np.ndarray:
    """A file's ids, read-only, mapped into memory: what is not used need not fit."""
    if path.stat().st_size == 0:  # which cannot be mapped
        return np.zeros(0, dtype)
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_RANDOM"):  # not on Windows
        mapped.madvise(mmap.MADV_RANDOM)  # else each window that is not in memory yet brings megabytes after it along
    return np.frombuffer(mapped, dtype)


def _write(path: Path, text: Text, tokenizer: Tokenizer, dtype: np.dtype, size: int) -> tuple[dict[str, int], str]:
    """Writes the ids; returns counts, and the sum of both. `size` is for the progress bar."""
    began, digest = time.monotonic(), hashlib.sha256()
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
    if num_bytes >= WORTH_TELLING:
        log.info(
            "Tokenized %.0f MB of %s in %.0f s, %.0f MB/s: %.2f M tokens.",
            num_bytes / 1e6, text.name, seconds := time.monotonic() - began, num_bytes / 1e6 / seconds, num_tokens / 1e6,
        )  # fmt: skip
    return counts, _sum(digest, counts)


def _encode(text: Text, tokenizer: Tokenizer) -> Iterator[tuple[str, np.ndarray]]:
    """The pieces of a text with their ids, and between documents the end-of-text token.

    Where the tokenizer has none, a line break stands there.
    """
    pieces, last = text.pieces(), None
    while group := list(itertools.islice(pieces, GROUP)):
        for (document, piece), ids in zip(group, tokenizer.encode_batch([piece for _, piece in group]), strict=True):
            if last not in (None, document):
                end = tokenizer.end_of_text
                yield "", tokenizer.encode("\n") if end is None else np.array([end])
            last = document
            yield piece, ids
