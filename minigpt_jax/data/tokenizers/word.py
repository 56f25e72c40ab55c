"""The most frequent words of the training text, and <unk> for all others."""

import dataclasses
import functools
import re
from collections import Counter
from collections.abc import Iterable
from typing import ClassVar

import numpy as np

from minigpt_jax.data.tokenizers.base import END_OF_TEXT, UNKNOWN, Tokenizer, json_text, require_size, utf8
from minigpt_jax.data.tokenizers.library import word_level
from minigpt_jax.errors import DataError


@dataclasses.dataclass(frozen=True)
class WordTokenizer(Tokenizer):
    """The most frequent words and punctuation marks, and white space. Everything else becomes <unk>, which is lossy."""

    kind: ClassVar[str] = "word"
    default_vocab_size: ClassVar[int] = 10_000
    SPECIAL: ClassVar[tuple[str, ...]] = (END_OF_TEXT, UNKNOWN, " ", "\n", "\r", "\t")  # white space is never unknown
    PIECES: ClassVar[re.Pattern] = re.compile(r"\w+(?:['’]\w+)*|\W")
    MAX_COUNTED: ClassVar[int] = 2**20  # distinct words; beyond this limit the rarest are dropped
    words: tuple[str, ...]

    def __post_init__(self):
        words = self.words
        if not all(isinstance(word, str) and word for word in words) or len(set(words)) < len(words):
            raise DataError("words must be distinct, non-empty strings")
        if tuple(words[: len(self.SPECIAL)]) != self.SPECIAL:
            raise DataError(f"words must start with {self.SPECIAL}")

    @classmethod
    def train(cls, pieces: Iterable[str], vocab_size: int | None = None) -> "WordTokenizer":
        """Takes the `vocab_size` most frequent words, or all if there are fewer. Ties are broken by code-point order."""
        size = require_size(cls.kind, vocab_size or cls.default_vocab_size, len(cls.SPECIAL) + 1)
        counts, threshold = Counter(), 1
        for piece in pieces:
            counts.update(cls.PIECES.findall(piece))
            while len(counts) > cls.MAX_COUNTED:
                counts = Counter({word: count for word, count in counts.items() if count > threshold})
                threshold += 1
        frequent = sorted(set(counts) - set(cls.SPECIAL), key=lambda word: (-counts[word], word))
        return cls((*cls.SPECIAL, *frequent[: size - len(cls.SPECIAL)]))

    @property
    def vocab_size(self) -> int:
        return len(self.words)

    @property
    def end_of_text(self) -> int:
        return self.SPECIAL.index(END_OF_TEXT)

    @property
    def unknown(self) -> int:
        return self.SPECIAL.index(UNKNOWN)

    @functools.cached_property
    def _id_of_word(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self.words)}

    def encode(self, text: str) -> np.ndarray:
        utf8(text)
        id_of, unknown = self._id_of_word.get, self.unknown
        return np.array([id_of(word, unknown) for word in self.PIECES.findall(text)], np.int32)

    def to_bytes(self, ids: Iterable[int]) -> bytes:
        return "".join(self.words[i] for i in np.asarray(ids).tolist()).encode()

    def to_json(self) -> str:
        return json_text({"type": self.kind, "words": self.words})

    def to_huggingface(self) -> str:
        # In the library's regex, \w also matches combining marks; in Python's it does not.
        return word_level(self.words, self.PIECES.pattern.replace(r"\w", r"[\p{L}\p{N}_]").replace(r"\W", r"[^\p{L}\p{N}_]"))
