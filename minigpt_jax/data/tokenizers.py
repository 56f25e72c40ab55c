"""From text to token ids and back: characters, bytes, words, or byte-level BPE.

    char   one token for each character of the training text: exact, and a character that it lacks is an error
    byte   the 256 bytes of UTF-8: exact for every text, with nothing to learn
    word   words, punctuation marks and white space; what is not among the most frequent becomes <unk>
    bpe    parts of words, learnt by merging the most frequent pairs (Sennrich et al. 2016) of bytes (GPT-2): exact

A tokenizer is a frozen value. Texts of any length come in pieces, which text_files.py cuts where no word spans two of them.
"""

import abc
import dataclasses
import functools
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from minigpt_jax.errors import DataError, UsageError, did_you_mean

END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "<unk>"


class Tokenizer(abc.ABC):
    """What all of them have: ids from 0 to `vocab_size` - 1, and the UTF-8 bytes that each of them stands for."""

    vocab_size: int
    end_of_text: int | None = None  # the id between two documents; text that is written like it is ordinary text
    unknown: int | None = None  # the id of what has no id

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
        return hashlib.sha256(self.to_json().encode("utf-8", "surrogatepass")).hexdigest()


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
        return _json({"type": self.kind, "characters": self.characters})

    def to_huggingface(self) -> str:
        return word_level(self.characters, r"[\s\S]")


def code_points(text: str) -> np.ndarray:
    """The numbers of a text's characters, uint32."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


@dataclasses.dataclass(frozen=True)
class ByteTokenizer(Tokenizer):
    """The bytes of the text in UTF-8: every text has tokens, and of every language the same 256."""

    kind: ClassVar[str] = "byte"
    vocab_size: ClassVar[int] = 256

    @classmethod
    def train(cls, pieces: Iterable[str], vocab_size: int | None = None) -> "ByteTokenizer":
        return cls()

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(utf8(text), np.uint8).astype(np.int32)

    def to_bytes(self, ids: Iterable[int]) -> bytes:
        return np.asarray(ids, np.uint8).tobytes()

    def to_json(self) -> str:
        return _json({"type": self.kind})

    def to_huggingface(self) -> str:
        return byte_level(import_tokenizers().models.BPE(BYTE_SYMBOLS, [])).to_str()


def utf8(text: str) -> bytes:
    """The text in UTF-8. Raises DataError for half of a surrogate pair, which is no character but which Python lets pass."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        half = f"U+{ord(text[error.start]):04X} at position {error.start}"
        raise DataError(f"the text has half of a surrogate pair ({half}), which is no character") from None


@dataclasses.dataclass(frozen=True)
class WordTokenizer(Tokenizer):
    """The most frequent words and punctuation marks, and each character of white space. The rest is <unk>, and lost."""

    kind: ClassVar[str] = "word"
    default_vocab_size: ClassVar[int] = 10_000
    end_of_text: ClassVar[int] = 0
    unknown: ClassVar[int] = 1
    SPECIAL: ClassVar[tuple[str, ...]] = (END_OF_TEXT, UNKNOWN, " ", "\n", "\r", "\t")  # white space is never unknown
    PIECES: ClassVar[re.Pattern] = re.compile(r"\w+(?:['’]\w+)*|\W")
    MOST_COUNTED: ClassVar[int] = 2**20  # different words; where there are more, the rarest are forgotten
    words: tuple[str, ...]

    def __post_init__(self):
        words = self.words
        if not all(isinstance(word, str) and word for word in words) or len(set(words)) < len(words):
            raise DataError("words must be different strings, none of them empty")
        if tuple(words[: len(self.SPECIAL)]) != self.SPECIAL:
            raise DataError(f"words must begin with {self.SPECIAL}")

    @classmethod
    def train(cls, pieces: Iterable[str], vocab_size: int | None = None) -> "WordTokenizer":
        """The `vocab_size` most frequent, or all that there are; of equally frequent ones the first in code-point order."""
        size = require_size(cls.kind, vocab_size or cls.default_vocab_size, len(cls.SPECIAL) + 1)
        counts, too_rare = Counter(), 1
        for piece in pieces:
            counts.update(cls.PIECES.findall(piece))
            while len(counts) > cls.MOST_COUNTED:
                counts = Counter({word: count for word, count in counts.items() if count > too_rare})
                too_rare += 1
        frequent = sorted(set(counts) - set(cls.SPECIAL), key=lambda word: (-counts[word], word))
        return cls((*cls.SPECIAL, *frequent[: size - len(cls.SPECIAL)]))

    @property
    def vocab_size(self) -> int:
        return len(self.words)

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
        return _json({"type": self.kind, "words": self.words})

    def to_huggingface(self) -> str:
        # There \w includes accents that stand alone, which Python's does not.
        return word_level(self.words, self.PIECES.pattern.replace(r"\w", r"[\p{L}\p{N}_]").replace(r"\W", r"[^\p{L}\p{N}_]"))


@dataclasses.dataclass(frozen=True)
class BpeTokenizer(Tokenizer):
    """Byte-level byte-pair encoding by the library `tokenizers`, whose JSON it is: transformers reads it, too.

    The tokens are byte strings. GPT-2's pattern first cuts the text into words with the blank before them; within a word the
    pairs that were merged in training are merged again, in the same order. Special tokens that are written out in a text are
    ordinary text.

    Raises DataError where the JSON is not such a tokenizer, or one that does not give a text back as it was.
    """

    kind: ClassVar[str] = "bpe"
    default_vocab_size: ClassVar[int] = 4_096
    # Which token stands between documents is not in the JSON: GPT-2's and ours, Llama 3's, Llama 2's.
    END_OF_TEXT_NAMES: ClassVar[tuple[str, ...]] = (END_OF_TEXT, "<|end_of_text|>", "</s>")
    # What tokenizers that are not exact change: case, blanks, the beginning, composed characters, their own special tokens.
    PROBE: ClassVar[str] = f"Probe  of\r\n\t blanks , ﬁ é e\u0301 漢字 🙂\0 {END_OF_TEXT} </s> <s>[CLS]\n"
    definition: str

    def __post_init__(self):
        has_all_bytes = all(bytes([value]) in self._bytes_of_id for value in range(256))
        if not has_all_bytes or self.decode(self.encode(self.PROBE)) != self.PROBE:
            raise DataError("it is no byte-level BPE that gives every text back as it was")

    @classmethod
    def train(cls, pieces: Iterable[str], vocab_size: int | None = None) -> "BpeTokenizer":
        """Merges learnt from the pieces, until the vocabulary is full or every word is one token."""
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
        """From GPT-2's own two files."""
        library = import_tokenizers()
        try:
            bpe = library.models.BPE.from_file(str(vocab), str(merges))
        except Exception as error:  # the library raises this and no other
            raise DataError(f"{vocab} and {merges.name} cannot be read: {error}") from None
        return cls(byte_level(bpe).to_str())

    @functools.cached_property
    def _model(self) -> Any:
        try:
            model = import_tokenizers().Tokenizer.from_str(self.definition)
        except UsageError:
            raise
        except Exception as error:  # the library raises this and no other
            raise DataError(str(error)) from None
        model.encode_special_tokens = True  # as ordinary text
        model.no_truncation()
        model.no_padding()
        if hasattr(model.model, "dropout"):  # of merges, which would give other ids each time
            model.model.dropout = None
        return model

    @functools.cached_property
    def _bytes_of_id(self) -> list[bytes]:
        added = {added.content for added in self._model.get_added_tokens_decoder().values()}
        vocabulary = self._model.get_vocab(with_added_tokens=True)
        table = [b""] * (max(vocabulary.values(), default=-1) + 1)
        for token, i in vocabulary.items():
            is_symbols = token not in added and all(symbol in BYTE_SYMBOLS for symbol in token)
            table[i] = bytes(BYTE_SYMBOLS[symbol] for symbol in token) if is_symbols else token.encode()
        return table

    @property
    def vocab_size(self) -> int:
        return len(self._bytes_of_id)

    @functools.cached_property
    def end_of_text(self) -> int | None:
        found = map(self._model.token_to_id, self.END_OF_TEXT_NAMES)
        return next((i for i in found if i is not None), None)

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        for text in texts:
            utf8(text)
        return [np.array(one.ids, np.int32) for one in self._model.encode_batch_fast(texts, add_special_tokens=False)]

    def to_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join(self._bytes_of_id[i] for i in np.asarray(ids).tolist())

    def to_json(self) -> str:
        return self.definition

    def to_huggingface(self) -> str:
        return self.definition


def byte_symbols() -> dict[str, int]:
    """The printable characters by which byte-level BPE writes the 256 bytes, after GPT-2: most stand for themselves."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_SYMBOLS = byte_symbols()


def import_tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise UsageError(
            "byte-level BPE and Hugging Face's files need the package tokenizers: python -m pip install -e '.[bpe]'"
        ) from error
    return tokenizers


def byte_level(bpe: Any) -> Any:
    """The library's tokenizer that cuts a text with GPT-2's pattern and merges the bytes of each part by this model."""
    library = import_tokenizers()
    model = library.Tokenizer(bpe)
    model.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = library.decoders.ByteLevel()
    return model


def word_level(words: Sequence[str], pattern: str) -> str:
    """JSON of the library's tokenizer that cuts a text into all matches of a pattern, each of which is to be a word."""
    library = import_tokenizers()
    utf8("".join(words))
    model = library.Tokenizer(library.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNKNOWN))
    model.pre_tokenizer = library.pre_tokenizers.Split(library.Regex(pattern), "isolated")
    model.decoder = library.decoders.Fuse()
    return model.to_str()


def from_word_level(values: dict[str, Any]) -> CharTokenizer | WordTokenizer:
    """Inverse of `to_huggingface` for both. Raises DataError where the words, or the way to them, are others."""
    words = sorted(values["model"]["vocab"], key=values["model"]["vocab"].get)
    is_characters = all(len(word) == 1 for word in words)
    tokenizer = CharTokenizer("".join(words)) if is_characters else WordTokenizer(tuple(words))
    ours = json.loads(tokenizer.to_huggingface())
    if any(values[part] != ours[part] for part in ("normalizer", "pre_tokenizer", "model")):
        raise DataError("it makes words in another way than this program's tokenizers do")
    return tokenizer


def require_size(kind: str, vocab_size: int, smallest: int, largest: int = 2**20) -> int:
    if not smallest <= vocab_size <= largest:
        raise UsageError(f"vocab_size={vocab_size} must be at least {smallest} and at most {largest} with tokenizer={kind}")
    return vocab_size


KINDS = {cls.kind: cls for cls in (CharTokenizer, ByteTokenizer, WordTokenizer, BpeTokenizer)}


def make_tokenizer(tokenizer: str, pieces: Iterable[str], vocab_size: int | None = None) -> Tokenizer:
    """A tokenizer of one of the KINDS, trained on a text, or the one that lies at a path.

    `vocab_size` is how large it should be: None for as large as is usual. Raises UsageError for an unknown kind, DataError
    where the text does not support a vocabulary of that size, or the path holds no tokenizer.
    """
    made = KINDS[tokenizer].train(pieces, vocab_size) if tokenizer in KINDS else read_tokenizer(tokenizer)
    if vocab_size not in (None, made.vocab_size):
        reason = f"that text supports {made.vocab_size}" if tokenizer in ("word", "bpe") else f"it has {made.vocab_size}"
        raise DataError(
            f"vocab_size={vocab_size} does not fit tokenizer={tokenizer}: {reason}; leave vocab_size out, or give as many"
        )
    return made


def read_tokenizer(path: str) -> Tokenizer:
    """The tokenizer in a tokenizer.json (of a run, or of the library `tokenizers`), or in GPT-2's vocab.json and merges.txt.

    The path is that of the file, or of the folder with it. Raises UsageError for what is neither a kind nor a path,
    DataError where there is no tokenizer.
    """
    if not re.search(r"[./\\]", path) and not os.path.exists(path):
        raise UsageError(
            f"tokenizer={path!r}{did_you_mean(path, KINDS)} must be one of: {', '.join(KINDS)}, "
            "or the path of a tokenizer.json, or of GPT-2's vocab.json with merges.txt"
        )
    file = Path(path)
    if os.path.isdir(file):
        file = next((file / name for name in ("tokenizer.json", "vocab.json") if (file / name).exists()), file)
    if file.name in ("vocab.json", "merges.txt"):
        return BpeTokenizer.from_gpt2_files(file.with_name("vocab.json"), file.with_name("merges.txt"))
    try:
        return from_json(file.read_text(encoding="utf-8"))
    except IsADirectoryError:
        raise DataError(f"{path} holds no tokenizer.json, nor vocab.json") from None
    except OSError as error:
        raise DataError(f"cannot read the tokenizer {path}: {error.strerror}") from None
    except (DataError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: {error}") from None


def from_json(text: str) -> Tokenizer:
    """Inverse of `to_json`. Raises DataError where the JSON is not a tokenizer's."""
    try:
        values = json.loads(text)
        if "model" in values:
            return from_word_level(values) if values["model"].get("type") == "WordLevel" else BpeTokenizer(text)
        kind = KINDS[values.pop("type")]
        return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
    except UsageError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(f"not a tokenizer of this version: {error}") from error


def _json(values: dict[str, Any]) -> str:
    return json.dumps(values, ensure_ascii=False, indent=2) + "\n"
