"""One token per character of the training text."""

import dataclasses
import functools
from collections.abc import Iterable
from typing import ClassVar

import numpy as np

from minigpt_jax.data.tokenizers.base import Tokenizer, json_text
from minigpt_jax.data.tokenizers.library import word_level
from minigpt_jax.errors import DataError, shortened

NUM_NAMED = 10  # unknown characters named in an error


@dataclasses.dataclass(frozen=True)
class CharTokenizer(Tokenizer):
    """One token per character (Unicode code point) of the training text, numbered in code-point order."""

    kind: ClassVar[str] = "char"
    characters: str

    def __post_init__(self):
        if not isinstance(self.characters, str) or not self.characters or len(set(self.characters)) < len(self.characters):
            raise DataError(f"characters={shortened(self.characters)} must be a non-empty string without duplicates")

    @classmethod
    def train(cls, pieces: Iterable[str], vocab_size: int | None = None) -> "CharTokenizer":
        """Collects all characters of the pieces. `vocab_size` is not used."""
        occurs = np.zeros(0x110000, bool)
        for piece in pieces:
            occurs[code_points(piece)] = True
        return cls("".join(map(chr, np.flatnonzero(occurs))))

    @property
    def vocab_size(self) -> int:
        return len(self.characters)

    @functools.cached_property
    def _id_of_code_point(self) -> np.ndarray:
        """Table from code point to id, or -1: an array of code points is encoded by indexing it once."""
        known = code_points(self.characters)
        table = np.full(known.max() + 2, -1, np.int32)  # one extra entry for all higher code points
        table[known] = np.arange(len(known))
        return table

    def encode(self, text: str) -> np.ndarray:
        """One id per character. Raises DataError that names the unknown characters."""
        table = self._id_of_code_point
        ids = table[np.minimum(code_points(text), len(table) - 1)]
        if ids.size and ids.min() < 0:
            unknown = sorted(set(text) - set(self.characters))
            named, more = ", ".join(map(repr, unknown[:NUM_NAMED])), len(unknown) - NUM_NAMED
            raise DataError(
                f"not in the vocabulary: {named}{f' and {more} more characters' if more > 0 else ''}; use only the "
                f"{self.vocab_size} characters that the model was trained on (listed in tokenizer.json)"
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
    """The code points of a text, uint32."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
