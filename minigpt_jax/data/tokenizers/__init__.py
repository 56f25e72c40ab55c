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
from typing import Any

from minigpt_jax.data.tokenizers.base import Tokenizer
from minigpt_jax.data.tokenizers.bpe import BpeTokenizer
from minigpt_jax.data.tokenizers.byte import ByteTokenizer
from minigpt_jax.data.tokenizers.char import CharTokenizer
from minigpt_jax.data.tokenizers.word import WordTokenizer
from minigpt_jax.errors import DataError, UsageError, did_you_mean, one_line, shortened
from minigpt_jax.files import local_path

# The two files of GPT-2's tokenizer, as transformers and as OpenAI call them. The library may write a prefix before them.
GPT2_FILES = {"vocab.json": "merges.txt", "encoder.json": "vocab.bpe"}
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
            f"set vocab_size={result.vocab_size}"
        )
    return result


def read_tokenizer(path: str) -> Tokenizer:
    """Reads a tokenizer.json (of a run, or of the library `tokenizers`), or GPT-2's two files by any of their names.

    `path` is the file, or the folder that contains it. Raises UsageError if it does not look like a path, DataError if it
    does not lead to a tokenizer.
    """
    if not re.search(r"[./\\]", path) and not os.path.exists(path):
        raise UsageError(
            f"tokenizer={path!r}{did_you_mean(path, KINDS)} must be one of: {', '.join(KINDS)}, "
            "or the path of a tokenizer.json, or of GPT-2's vocab.json and merges.txt (or encoder.json and vocab.bpe)"
        )
    file = local_path(path)
    if os.path.isdir(file):
        file = next((file / name for name in ("tokenizer.json", *GPT2_FILES) if os.path.exists(file / name)), file)
    for pair in GPT2_FILES.items():
        if named := re.fullmatch(rf"(|.*[-_.])({'|'.join(map(re.escape, pair))})", file.name):
            return BpeTokenizer.from_gpt2_files(*(file.with_name(named[1] + name) for name in pair))
    try:
        return from_json(file.read_text(encoding="utf-8-sig"))  # some editors on Windows write a byte order mark
    except (IsADirectoryError, PermissionError) as error:
        if not os.path.isdir(file):
            raise DataError(f"cannot read the tokenizer {path}: {error.strerror}") from None
        pairs = " or ".join(f"{vocab} and {merges}" for vocab, merges in GPT2_FILES.items())
        raise DataError(f"{path} has no tokenizer: it needs a tokenizer.json, or {pairs}") from None
    except OSError as error:
        raise DataError(f"cannot read the tokenizer {path}: {error.strerror}") from None
    except (DataError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: {error}") from None


def from_json(text: str) -> Tokenizer:
    """Inverse of `to_json`. Raises DataError if the JSON is not a tokenizer."""
    try:
        values = json.loads(text)
        if not isinstance(values, dict):
            raise DataError("it is not a JSON object")
        if isinstance(values.get("model"), dict):
            return from_word_level(values) if values["model"].get("type") == "WordLevel" else BpeTokenizer(text)
        if not isinstance(values.get("type"), str):
            pairs = " or ".join(f"{vocab} beside {merges}" for vocab, merges in GPT2_FILES.items())
            raise DataError(f"it is not a tokenizer.json; a vocabulary alone must be called {pairs}")
        if values["type"] not in KINDS:
            raise DataError(f"its type={shortened(values['type'])} must be one of: {', '.join(KINDS)}")
        kind = KINDS[values.pop("type")]
        fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        return kind(**fields)
    except (UsageError, DataError):
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(f"not a tokenizer that this version can read: {one_line(str(error))}") from error


def from_word_level(values: dict[str, Any]) -> CharTokenizer | WordTokenizer:
    """Inverse of `to_huggingface` for char and word. Raises DataError if this tokenizer would give other ids."""
    words = sorted(values["model"]["vocab"], key=values["model"]["vocab"].get)
    is_characters = all(len(word) == 1 for word in words)
    tokenizer = CharTokenizer("".join(words)) if is_characters else WordTokenizer(tuple(words))
    expected = json.loads(tokenizer.to_huggingface())
    if any(values[part] != expected[part] for part in ("normalizer", "pre_tokenizer", "model")):
        raise DataError("it splits text differently from the char and word tokenizers")
    for added in values.get("added_tokens") or ():
        if values["model"]["vocab"].get(added["content"]) != added["id"] or not added["special"]:
            raise DataError(f"its added token {shortened(added['content'])} is not a special token of its vocabulary")
    return tokenizer
