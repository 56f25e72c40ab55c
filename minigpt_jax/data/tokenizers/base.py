"""The interface of all tokenizers, the names of special tokens, and checks."""

import abc
import functools
import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from minigpt_jax.errors import DataError, UsageError
from minigpt_jax.files import sha256

END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "<unk>"


class Tokenizer(abc.ABC):
    """Maps text to ids from 0 to `vocab_size` - 1, each of which stands for some UTF-8 bytes."""

    @property
    @abc.abstractmethod
    def vocab_size(self) -> int: ...

    @property
    def end_of_text(self) -> int | None:
        """The id that separates documents, if there is one. Its name in a text is encoded as ordinary text."""
        return None

    @property
    def unknown(self) -> int | None:
        """The id of everything outside the vocabulary, if there is one."""
        return None

    @abc.abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """The text's token ids, int32. Raises DataError for text that cannot be encoded."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` for each text."""
        return [self.encode(text) for text in texts]

    @abc.abstractmethod
    def to_bytes(self, ids: Iterable[int]) -> bytes:
        """The text in UTF-8. Bytes, because a token can be part of a character."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text, with � for invalid UTF-8."""
        return self.to_bytes(ids).decode("utf-8", errors="replace")

    @abc.abstractmethod
    def to_json(self) -> str:
        """JSON from which `from_json` builds an equal tokenizer."""

    @abc.abstractmethod
    def to_huggingface(self) -> str:
        """The same tokenizer as JSON of the library `tokenizers`. Both transformers and `from_json` can read it."""

    @functools.cached_property
    def sha256(self) -> str:
        """Hash of the JSON, by which token files and checkpoints identify their tokenizer."""
        return sha256(self.to_json().encode("utf-8", "surrogatepass"))


def utf8(text: str) -> bytes:
    """The text in UTF-8. Raises DataError for an unpaired surrogate, which Python allows in a string but UTF-8 does not."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        surrogate = f"U+{ord(text[error.start]):04X} at position {error.start}"
        raise DataError(f"the text has an unpaired surrogate, {surrogate}") from None


def require_size(kind: str, vocab_size: int, smallest: int, largest: int = 2**20) -> int:
    if not smallest <= vocab_size <= largest:
        raise UsageError(f"vocab_size={vocab_size} must be between {smallest} and {largest} with tokenizer={kind}")
    return vocab_size


def json_text(values: dict[str, Any]) -> str:
    """Human-readable JSON: indented, and with non-ASCII characters unescaped."""
    return json.dumps(values, ensure_ascii=False, indent=2) + "\n"
