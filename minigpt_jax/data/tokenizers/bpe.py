"""Byte-level BPE: parts of words, merged from bytes by the library `tokenizers`."""

import dataclasses
import functools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from minigpt_jax.data.tokenizers.base import END_OF_TEXT, Tokenizer, require_size, utf8
from minigpt_jax.data.tokenizers.library import BYTE_SYMBOLS, byte_level, import_tokenizers, library_errors
from minigpt_jax.data.tokenizers.lossless import check_lossless
from minigpt_jax.errors import DataError, shortened


@dataclasses.dataclass(frozen=True)
class BpeTokenizer(Tokenizer):
    """Byte-level byte-pair encoding by the library `tokenizers`. `definition` is its JSON, which transformers can read, too.

    The tokens are byte strings. GPT-2's pattern first splits the text into words, each with the space before it. The merges
    learnt in training are then applied within each word, in the same order. The names of special tokens in a text are
    encoded as ordinary text.

    Raises DataError if the JSON is not a byte-level BPE tokenizer, or a lossy one, naming the part that loses text.
    """

    kind: ClassVar[str] = "bpe"
    default_vocab_size: ClassVar[int] = 4_096
    # The JSON does not say which token separates documents. These are GPT-2's (and ours), Llama 3's and Llama 2's.
    END_OF_TEXT_NAMES: ClassVar[tuple[str, ...]] = (END_OF_TEXT, "<|end_of_text|>", "</s>")
    # What lossy tokenizers change: case, blanks, the start of a text, composed characters, their own special tokens.
    PROBE: ClassVar[str] = f"Probe  of\r\n\t blanks , ﬁ é e\u0301 漢字 🙂\0 {END_OF_TEXT} </s> <s>[CLS]\n"
    definition: str

    def __post_init__(self):
        values = json.loads(self.definition)
        check_lossless(values)
        for token in values.get("added_tokens") or ():
            if self._model.token_to_id(token["content"]) != token["id"]:
                raise DataError(f"its added token {shortened(token['content'])} cannot have the id {token['id']}")
        probe = self.PROBE + "".join(f"  {token['content']}  x" for token in values.get("added_tokens") or ())
        if self.decode(self.encode(probe)) != probe:  # should never happen after these checks
            raise DataError("it is not a lossless byte-level BPE tokenizer")

    @classmethod
    def train(cls, pieces: Iterable[str], vocab_size: int | None = None) -> "BpeTokenizer":
        """Learns merges from the pieces until the vocabulary is full or every word is one token."""
        size = require_size(cls.kind, vocab_size or cls.default_vocab_size, 256 + 1)
        library = import_tokenizers()
        model = byte_level(library.models.BPE())
        trainer = library.trainers.BpeTrainer(
            vocab_size=size, special_tokens=[END_OF_TEXT], initial_alphabet=sorted(BYTE_SYMBOLS), show_progress=False
        )
        model.train_from_iterator(pieces, trainer)
        return cls(model.to_str())

    @classmethod
    def from_gpt2_files(cls, vocab: Path, merges: Path) -> "BpeTokenizer":
        """Reads GPT-2's vocabulary and merges, vocab.json and merges.txt or encoder.json and vocab.bpe."""
        library = import_tokenizers()
        try:
            with library_errors():
                return cls(byte_level(library.models.BPE.from_file(str(vocab), str(merges))).to_str())
        except DataError as error:
            raise DataError(f"cannot read {vocab} and {merges.name}: {error}") from None

    @functools.cached_property
    def _model(self) -> Any:
        with library_errors():
            model = import_tokenizers().Tokenizer.from_str(self.definition)
        model.encode_special_tokens = True  # encodes them as ordinary text
        model.no_truncation()
        model.no_padding()
        if hasattr(model.model, "dropout"):  # random merges would give different ids each time
            model.model.dropout = None
        return model

    @functools.cached_property
    def _bytes_of_id(self) -> list[bytes]:
        added = {added.content for added in self._model.get_added_tokens_decoder().values()}
        vocabulary = self._model.get_vocab(with_added_tokens=True)
        table = [b""] * (max(vocabulary.values(), default=-1) + 1)
        for token, i in vocabulary.items():
            is_byte_level = token not in added and all(symbol in BYTE_SYMBOLS for symbol in token)
            table[i] = bytes(BYTE_SYMBOLS[symbol] for symbol in token) if is_byte_level else token.encode()
        return table

    @property
    def vocab_size(self) -> int:
        return len(self._bytes_of_id)

    @property
    def end_of_text(self) -> int | None:
        ids = map(self._model.token_to_id, self.END_OF_TEXT_NAMES)
        return next((i for i in ids if i is not None), None)

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        for text in texts:
            utf8(text)
        with library_errors():
            encodings = self._model.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(one.ids, np.int32) for one in encodings]

    def to_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join(self._bytes_of_id[i] for i in np.asarray(ids).tolist())

    def to_json(self) -> str:
        return self.definition

    def to_huggingface(self) -> str:
        return self.definition
