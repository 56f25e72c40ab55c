"""Prints how a tokenizer splits a text into tokens.

python scripts/tokens.py --tokenizer word --text "To be, or not to be"
python scripts/tokens.py --tokenizer bpe --vocab_size 1024 --dataset my_text.txt --text "naïve 漢字"
python scripts/tokens.py --tokenizer runs/shakespeare_char/tokenizer.json --text "To be"

A tokenizer that needs training is trained on the dataset, as in train.py.
"""

import os
import sys
from collections import Counter

from absl import flags

from minigpt_jax import cli
from minigpt_jax.config import Config
from minigpt_jax.data.splits import read_texts, train_tokenizer
from minigpt_jax.data.tokenizers import KINDS, read_tokenizer
from minigpt_jax.errors import UsageError

TEXT = flags.DEFINE_string("text", "", "text to split into tokens")
cli.define_setting_flags("tokenizer", "vocab_size", "dataset", "val_dataset", "encoding", "data_dir")

COLOURS = (24, 54, 22, 94)  # backgrounds, from the 256-colour palette of terminals


def main() -> None:
    if not TEXT.value:
        raise UsageError("no text to split: give --text TEXT")
    config = Config().override(cli.given_settings())
    kind = config.data.tokenizer
    if kind in KINDS:
        tokenizer = train_tokenizer(config.data, config.model.vocab_size, read_texts(config.data))
    else:
        tokenizer = read_tokenizer(kind)
    ids = tokenizer.encode(TEXT.value).tolist()
    pieces = [shown(tokenizer.to_bytes([i])) for i in ids]
    if sys.stdout.isatty() and "NO_COLOR" not in os.environ:
        print("".join(f"\033[48;5;{COLOURS[n % len(COLOURS)]}m{piece}" for n, piece in enumerate(pieces)) + "\033[0m")
    else:
        print("|".join(pieces))
    print("\n     id  count  piece")
    for i, count in Counter(ids).items():
        print(f"{i:7d} {count:6d}  '{shown(tokenizer.to_bytes([i]))}'{' (unknown)' if i == tokenizer.unknown else ''}")
    length, V = len(TEXT.value), tokenizer.vocab_size
    print(
        f"\n{len(ids)} tokens for {length} characters ({len(TEXT.value.encode())} bytes), "
        f"{length / len(ids):.2f} characters per token; {V} tokens in the vocabulary"
    )


def shown(piece: bytes) -> str:
    """A token as printable text: partial characters, line breaks and the like are escaped."""
    text = piece.decode("utf-8", errors="backslashreplace")
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


if __name__ == "__main__":
    cli.run(main, __doc__)
