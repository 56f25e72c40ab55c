"""The Hugging Face library `tokenizers`, imported only when needed, and the two of its models that we convert to."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from minigpt_jax.commands import install_command
from minigpt_jax.data.tokenizers.base import UNKNOWN, utf8
from minigpt_jax.errors import DataError, UsageError, one_line


def import_tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise UsageError(
            f"byte-level BPE and Hugging Face files need the package tokenizers: {install_command('bpe')}"
        ) from error
    return tokenizers


@contextlib.contextmanager
def library_errors() -> Iterator[None]:
    """Turns whatever the library raises into a DataError: bare Exceptions, and panics of Rust, which are not even those."""
    try:
        yield
    except (UsageError, DataError, KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        raise DataError(f"the library tokenizers cannot use it: {one_line(str(error))}") from None


def byte_symbols() -> dict[str, int]:
    """The printable characters that GPT-2's byte-level BPE uses for the 256 bytes: most bytes are their own character."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_SYMBOLS = byte_symbols()


def byte_level(bpe: Any) -> Any:
    """A tokenizer of the library that splits text with GPT-2's pattern and applies the model's merges to each part."""
    library = import_tokenizers()
    model = library.Tokenizer(bpe)
    model.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = library.decoders.ByteLevel()
    return model


def word_level(words: Sequence[str], pattern: str) -> str:
    """JSON of a tokenizer of the library that splits text into the matches of a pattern and looks up each one."""
    library = import_tokenizers()
    utf8("".join(words))
    model = library.Tokenizer(library.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNKNOWN))
    model.pre_tokenizer = library.pre_tokenizers.Split(library.Regex(pattern), "isolated")
    model.decoder = library.decoders.Fuse()
    return model.to_str()
