"""What all tokenizers have in common: their interface, the names of the special tokens, and checks."""

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
    """What all of them have: ids from 0 to `vocab_size` - 1, and the UTF-8 bytes that each of them stands for."""

    @property
    @abc.abstractmethod
    def vocab_size(self) -> int: ...

    @property
    def end_of_text(self) -> int | None:
        """The id between two documents; text that is written like it is ordinary text."""
        return None

    @property
    def unknown(self) -> int | None:
        """The id of what has no id."""
        return None

    @abc.abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """The text's token ids, int32. Raises DataError for text that has none."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each of them."""
        return [self.encode(text) for text in texts]

    @abc.abstractmethod
    def to_bytes(self, ids: Iterable[int]) -> bytes:
        """The text in UTF-8. A token can be a part of a character, so that only bytes can be joined."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text, with � for bytes that are no whole character."""
        return self.to_bytes(ids).decode("utf-8", errors="replace")

    @abc.abstractmethod
    def to_json(self) -> str:
        """JSON, from which `from_json` makes an equal tokenizer."""

    @abc.abstractmethod
    def to_huggingface(self) -> str:
        """The same tokenizer as JSON of the library `tokenizers`, which transformers reads, and `from_json` too."""

    @functools.cached_property
    def sha256(self) -> str:
        """Of its JSON: what the tokens in a file and the weights in a checkpoint were made with."""
        return sha256(self.to_json().encode("utf-8", "surrogatepass"))


def utf8(text: str) -> bytes:
    """The text in UTF-8. Raises DataError for half of a surrogate pair, which is no character but which Python lets pass."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        half = f"U+{ord(text[error.start]):04X} at position {error.start}"
        raise DataError(f"the text has half of a surrogate pair ({half}), which is no character") from None


def require_size(kind: str, vocab_size: int, smallest: int, largest: int = 2**20) -> int:
    if not smallest <= vocab_size <= largest:
        raise UsageError(f"vocab_size={vocab_size} must be at least {smallest} and at most {largest} with tokenizer={kind}")
    return vocab_size


def json_text(values: dict[str, Any]) -> str:
    """The values as JSON that is readable in an editor: indented, and with characters as they are."""
    return json.dumps(values, ensure_ascii=False, indent=2) + "\n"
