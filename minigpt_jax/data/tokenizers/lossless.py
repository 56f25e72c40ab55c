"""Whether a tokenizer.json of the library `tokenizers` gives every text back: a proof from its parts."""

from collections.abc import Iterator, Mapping
from typing import Any

from minigpt_jax.data.tokenizers.library import BYTE_SYMBOLS
from minigpt_jax.errors import DataError, shortened

LARGEST_ID = 2**20  # bounds the table of ids: the file is untrusted

# These split a text without losing a character, unless their `behavior` is to remove what they split at. UnicodeScripts
# is not among them: it drops characters newer than its table.
SPLITS = ("ByteLevel", "Split", "Digits", "Punctuation", "FixedLength")


def check_lossless(values: Mapping[str, Any]) -> None:
    """Raises DataError, naming the part that loses text or is unknown, unless this is lossless byte-level BPE.

    It is lossless if the text is only split, each byte has a token of its own, and merges only join tokens. The names of
    special tokens are encoded as ordinary text, so only the other added tokens matter.
    """
    if problem := next(problems(values), None):
        raise DataError(f"it is not a lossless byte-level BPE tokenizer: {problem}")


def problems(values: Mapping[str, Any]) -> Iterator[str]:
    model = values["model"]
    if model.get("type", "BPE") != "BPE":  # older files leave it out
        yield f"its model is {shortened(model['type'])}"
        return
    for part in parts(values.get("normalizer"), "normalizers"):
        yield f"its normalizer {shortened(part.get('type'))} changes text"
    splits = parts(values.get("pre_tokenizer"), "pretokenizers")
    kinds = [part.get("type") for part in splits]
    for kind, part in zip(kinds, splits, strict=True):
        if kind not in SPLITS:
            yield f"its pre_tokenizer {shortened(kind)} drops or changes text"
        if str(part.get("behavior")).lower() == "removed":
            yield f"its pre_tokenizer {kind} has behavior={part['behavior']!r}"
        if part.get("add_prefix_space"):
            yield f"its pre_tokenizer {kind} has add_prefix_space=true"
        if part.get("length") == 0:
            yield f"its pre_tokenizer {kind} has length=0"
    if kinds.count("ByteLevel") != 1:
        yield f"its pre_tokenizer has ByteLevel {kinds.count('ByteLevel')} times (must be once)"
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            yield f"its model has {name}={shortened(model[name])}"
    vocabulary = model["vocab"]
    if any(type(i) is not int or not 0 <= i < LARGEST_ID for i in vocabulary.values()):
        yield f"its vocabulary has ids that are not integers from 0 to {LARGEST_ID - 1}"
    if len(set(vocabulary.values())) < len(vocabulary):
        yield "its vocabulary has two tokens with the same id"
    if missing := [value for symbol, value in BYTE_SYMBOLS.items() if symbol not in vocabulary]:
        yield f"its vocabulary lacks {len(missing)} of the 256 bytes, such as 0x{min(missing):02X}"
    for token in values.get("added_tokens") or ():
        content = token["content"]
        if not token.get("special") and (token.get("lstrip") or token.get("rstrip")):
            yield f"its added token {shortened(content)} takes the blanks beside it (lstrip, rstrip)"
        if content in vocabulary and not content.isascii():  # the vocabulary writes other bytes with these characters
            yield f"its added token {shortened(content)} is also the name of other bytes"


def parts(value: Any, key: str) -> list[Mapping[str, Any]]:
    """The steps of a normalizer or pre_tokenizer: it may be null, or a sequence of them."""
    if value is None:
        return []
    if value.get("type") != "Sequence":
        return [value]
    return [part for step in value[key] for part in parts(step, key)]
