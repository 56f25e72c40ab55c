"""From text to token ids and back.

A tokenizer is a frozen value with `vocab_size`, `encode(text) -> ids`, `decode(ids) -> text`, `to_bytes(ids) -> UTF-8` and
`to_json()`, which names its kind under "type"; `from_json` makes it again.
"""

import dataclasses
import functools
import json
from collections.abc import Iterable

import numpy as np

from minigpt_jax.errors import DataError


@dataclasses.dataclass(frozen=True)
class CharTokenizer:
    """One token for each character (Unicode code point) that occurs in the training text, numbered in code-point order."""

    characters: str

    def __post_init__(self):
        if not isinstance(self.characters, str) or not self.characters or len(set(self.characters)) < len(self.characters):
            raise DataError(f"characters={self.characters!r} must be a string of one or more different characters")

    @classmethod
    def train(cls, text: str) -> "CharTokenizer":
        return cls("".join(sorted(set(text))))

    @property
    def vocab_size(self) -> int:
        return len(self.characters)

    @functools.cached_property
    def _id_of_code_point(self) -> np.ndarray:
        """Table from code point to id, -1 where there is none: looking up an array of them is one indexing."""
        code_points = np.array([ord(character) for character in self.characters])
        table = np.full(code_points.max() + 2, -1, np.int32)  # one more: the place for all code points above
        table[code_points] = np.arange(len(code_points))
        return table

    def encode(self, text: str) -> np.ndarray:
        """Token ids, int32, one for each character. Raises DataError naming the characters that have none."""
        table = self._id_of_code_point
        code_points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        ids = table[np.minimum(code_points, len(table) - 1)]
        if ids.size and ids.min() < 0:
            unknown = ", ".join(repr(character) for character in sorted(set(text) - set(self.characters)))
            raise DataError(
                f"the vocabulary has no {unknown}; leave it out or write it with the {self.vocab_size} characters "
                "that the model was trained on (they are in tokenizer.json)"
            )
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.characters[i] for i in np.asarray(ids).tolist())

    def to_bytes(self, ids: Iterable[int]) -> bytes:
        """The text in UTF-8. A token of other tokenizers can be a part of a character, so that only bytes can be joined."""
        return self.decode(ids).encode("utf-8")

    def to_json(self) -> str:
        return json.dumps({"type": "char", "characters": self.characters}, ensure_ascii=False, indent=2) + "\n"


Tokenizer = CharTokenizer
TOKENIZERS = {"char": CharTokenizer}


def train_tokenizer(kind: str, text: str) -> Tokenizer:
    """The tokenizer of this kind (a key of TOKENIZERS) for a text."""
    return TOKENIZERS[kind].train(text)


def from_json(text: str) -> Tokenizer:
    """Inverse of `to_json`. Raises DataError where the JSON is not a tokenizer's."""
    try:
        values = json.loads(text)
        return TOKENIZERS[values.pop("type")](**values)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"not a tokenizer of this version: {error}") from error
