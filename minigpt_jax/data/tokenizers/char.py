"""Characters: one token for each that the training text has."""

import dataclasses
import functools
from collections.abc import Iterable
from typing import ClassVar

import numpy as np

from minigpt_jax.data.tokenizers.base import Tokenizer, json_text
from minigpt_jax.data.tokenizers.library import word_level
from minigpt_jax.errors import DataError


@dataclasses.dataclass(frozen=True)
class CharTokenizer(Tokenizer):
    """One token for each character (Unicode code point) that occurs in the training text, numbered in code-point order."""

    kind: ClassVar[str] = "char"
    characters: str

    def __post_init__(self):
        if not isinstance(self.characters, str) or not self.characters or len(set(self.characters)) < len(self.characters):
            raise DataError(f"characters={self.characters!r} must be a string of one or more different characters")

    @classmethod
    def train(cls, pieces: Iterable[str], vocab_size: int | None = None) -> "CharTokenizer":
        """All characters of the pieces; how many they are is not for `vocab_size` to say."""
        occurs = np.zeros(0x110000, bool)
        for piece in pieces:
            occurs[code_points(piece)] = True
        return cls("".join(map(chr, np.flatnonzero(occurs))))

    @property
    def vocab_size(self) -> int:
        return len(self.characters)

    @functools.cached_property
    def _id_of_code_point(self) -> np.ndarray:
        """Table from code point to id, -1 where there is none: looking up an array of them is one indexing."""
        known = code_points(self.characters)
        table = np.full(known.max() + 2, -1, np.int32)  # one more: the place for all code points above
        table[known] = np.arange(len(known))
        return table

    def encode(self, text: str) -> np.ndarray:
        """One id for each character. Raises DataError naming the characters that have none."""
        table = self._id_of_code_point
        ids = table[np.minimum(code_points(text), len(table) - 1)]
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
        return self.decode(ids).encode("utf-8")

    def to_json(self) -> str:
        return json_text({"type": self.kind, "characters": self.characters})

    def to_huggingface(self) -> str:
        return word_level(self.characters, r"[\s\S]")


def code_points(text: str) -> np.ndarray:
    """The numbers of a text's characters, uint32."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
