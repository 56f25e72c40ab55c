"""From text to token ids and back: characters, bytes, words, or byte-level BPE.

    char   one token per character of the training text: lossless; unknown characters are an error
    byte   the 256 bytes of UTF-8: lossless for any text, with nothing to learn
    word   words, punctuation marks and white space: lossy, because rare words become <unk>
    bpe    parts of words, learnt by merging the most frequent pairs (Sennrich et al. 2016) of bytes (GPT-2): lossless

Tokenizers are immutable. They process long texts in pieces, which text_files.py splits so that no word spans two of them.
Each kind has its own file and a row in `KINDS`. Read base.py first.
"""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from minigpt_jax.data.tokenizers.base import Tokenizer
from minigpt_jax.data.tokenizers.bpe import BpeTokenizer
from minigpt_jax.data.tokenizers.byte import ByteTokenizer
from minigpt_jax.data.tokenizers.char import CharTokenizer
from minigpt_jax.data.tokenizers.word import WordTokenizer
from minigpt_jax.errors import DataError, UsageError, did_you_mean

KINDS = {cls.kind: cls for cls in (CharTokenizer, ByteTokenizer, WordTokenizer, BpeTokenizer)}


def make_tokenizer(tokenizer: str, pieces: Iterable[str], vocab_size: int | None = None) -> Tokenizer:
    """Trains one of the KINDS on a text, or reads a tokenizer from a path.

    `vocab_size` is the required size; None takes the default of the kind. Raises UsageError for an unknown kind, DataError
    if the text does not support a vocabulary of that size, or the path has no tokenizer.
    """
    result = KINDS[tokenizer].train(pieces, vocab_size) if tokenizer in KINDS else read_tokenizer(tokenizer)
    if vocab_size not in (None, result.vocab_size):
        reason = "the text supports only" if tokenizer in ("word", "bpe") else "it has"
        raise DataError(
            f"vocab_size={vocab_size} does not fit tokenizer={tokenizer}: {reason} {result.vocab_size} tokens; "
            "omit vocab_size or set it to that number"
        )
    return result


def read_tokenizer(path: str) -> Tokenizer:
    """Reads a tokenizer.json (of a run, or of the library `tokenizers`), or GPT-2's vocab.json and merges.txt.

    `path` is the file, or the folder that contains it. Raises UsageError if it does not look like a path, DataError if it
    does not lead to a tokenizer.
    """
    if not re.search(r"[./\\]", path) and not os.path.exists(path):
        raise UsageError(
            f"tokenizer={path!r}{did_you_mean(path, KINDS)} must be one of: {', '.join(KINDS)}, "
            "or the path of a tokenizer.json, or of GPT-2's vocab.json and merges.txt"
        )
    file = Path(path)
    if os.path.isdir(file):
        file = next((file / name for name in ("tokenizer.json", "vocab.json") if (file / name).exists()), file)
    if file.name in ("vocab.json", "merges.txt"):
        return BpeTokenizer.from_gpt2_files(file.with_name("vocab.json"), file.with_name("merges.txt"))
    try:
        return from_json(file.read_text(encoding="utf-8"))
    except IsADirectoryError:
        raise DataError(f"{path} has neither a tokenizer.json nor a vocab.json") from None
    except OSError as error:
        raise DataError(f"cannot read the tokenizer {path}: {error.strerror}") from None
    except (DataError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: {error}") from None


def from_json(text: str) -> Tokenizer:
    """Inverse of `to_json`. Raises DataError if the JSON is not a tokenizer."""
    try:
        values = json.loads(text)
        if "model" in values:
            return from_word_level(values) if values["model"].get("type") == "WordLevel" else BpeTokenizer(text)
        kind = KINDS[values.pop("type")]
        fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        return kind(**fields)
    except UsageError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(f"not a tokenizer that this version can read: {error}") from error


def from_word_level(values: dict[str, Any]) -> CharTokenizer | WordTokenizer:
    """Inverse of `to_huggingface` for char and word. Raises DataError if this tokenizer would give other ids."""
    words = sorted(values["model"]["vocab"], key=values["model"]["vocab"].get)
    is_characters = all(len(word) == 1 for word in words)
    tokenizer = CharTokenizer("".join(words)) if is_characters else WordTokenizer(tuple(words))
    expected = json.loads(tokenizer.to_huggingface())
    if any(values[part] != expected[part] for part in ("normalizer", "pre_tokenizer", "model")):
        raise DataError("it splits text differently from the char and word tokenizers")
    return tokenizer
