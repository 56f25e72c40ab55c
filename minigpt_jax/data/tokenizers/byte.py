"""The 256 bytes of UTF-8, with nothing to learn."""

import dataclasses
from collections.abc import Iterable
from typing import ClassVar

import numpy as np

from minigpt_jax.data.tokenizers.base import Tokenizer, json_text, utf8
from minigpt_jax.data.tokenizers.library import BYTE_SYMBOLS, byte_level, import_tokenizers


@dataclasses.dataclass(frozen=True)
class ByteTokenizer(Tokenizer):
    """The bytes of the text in UTF-8: the same 256 tokens encode any text in any language."""

    kind: ClassVar[str] = "byte"

    @classmethod
    def train(cls, pieces: Iterable[str], vocab_size: int | None = None) -> "ByteTokenizer":
        return cls()

    @property
    def vocab_size(self) -> int:
        return 256

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(utf8(text), np.uint8).astype(np.int32)

    def to_bytes(self, ids: Iterable[int]) -> bytes:
        return np.asarray(ids, np.uint8).tobytes()

    def to_json(self) -> str:
        return json_text({"type": self.kind})

    def to_huggingface(self) -> str:
        return byte_level(import_tokenizers().models.BPE(BYTE_SYMBOLS, [])).to_str()
