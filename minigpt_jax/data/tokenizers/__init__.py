"""From text to token ids and back: characters, bytes, words, or byte-level BPE.

    char   one token for each character of the training text: exact, and a character that it lacks is an error
    byte   the 256 bytes of UTF-8: exact for every text, with nothing to learn
    word   words, punctuation marks and white space; what is not among the most frequent becomes <unk>
    bpe    parts of words, learnt by merging the most frequent pairs (Sennrich et al. 2016) of bytes (GPT-2): exact

A tokenizer is a frozen value. Texts of any length come in pieces, which text_files.py cuts where no word spans two of them.
Each kind has a file of its own and a row in `KINDS`. Read base.py first.
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
        fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        return kind(**fields)
    except UsageError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(f"not a tokenizer of this version: {error}") from error


def from_word_level(values: dict[str, Any]) -> CharTokenizer | WordTokenizer:
    """Inverse of `to_huggingface` for both. Raises DataError where the words, or the way to them, are others."""
    words = sorted(values["model"]["vocab"], key=values["model"]["vocab"].get)
    is_characters = all(len(word) == 1 for word in words)
    tokenizer = CharTokenizer("".join(words)) if is_characters else WordTokenizer(tuple(words))
    ours = json.loads(tokenizer.to_huggingface())
    if any(values[part] != ours[part] for part in ("normalizer", "pre_tokenizer", "model")):
        raise DataError("it makes words in another way than this program's tokenizers do")
    return tokenizer
