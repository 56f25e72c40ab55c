"""From the names of texts to tokens for training and for validation."""

import dataclasses
import itertools
from pathlib import Path

from minigpt_jax.config import DataConfig
from minigpt_jax.data import corpora
from minigpt_jax.data.text_files import Scan, Text, scan
from minigpt_jax.data.token_file import Tokens, tokenize
from minigpt_jax.data.tokenizers import Tokenizer, make_tokenizer
from minigpt_jax.errors import DataError
from minigpt_jax.files import cache_dir, sha256

TRAIN_FRACTION = 0.9  # of the characters, where there is no text for validation


@dataclasses.dataclass(frozen=True)
class Texts:
    """A config's texts for training and validation, each with what is known of the text of which it is a part."""

    train: Text
    val: Text
    train_scan: Scan
    val_scan: Scan
    data_dir: Path

    @property
    def sha256(self) -> str:
        """Of the text, or of both where there are two."""
        if self.train_scan is self.val_scan:
            return self.train_scan.sha256
        return sha256(f"{self.train_scan.sha256} {self.val_scan.sha256}".encode())


def read_texts(config: DataConfig) -> Texts:
    """Where the config names no text for validation, the first 90 % of the characters are for training.

    Of the characters and not of the tokens, so that whatever the tokenizer the same text is predicted. Raises DataError.
    """
    data_dir = Path(config.data_dir or cache_dir())

    def read(dataset: str) -> tuple[Text, Scan]:
        text = corpora.open_text(dataset, data_dir, config.encoding)
        return text, scan(text)

    text, seen = read(config.dataset)
    if config.val_dataset is not None:
        val_text, val_seen = read(config.val_dataset)
        return Texts(text, val_text, seen, val_seen, data_dir)
    end = int(seen.num_characters * TRAIN_FRACTION)
    return Texts(dataclasses.replace(text, end=end), dataclasses.replace(text, start=end), seen, seen, data_dir)


def train_tokenizer(config: DataConfig, vocab_size: int | None, texts: Texts) -> Tokenizer:
    """Words and merges are learnt from the training text alone; but every character of both texts gets its id."""
    parts = [texts.train, texts.val] if config.tokenizer == "char" else [texts.train]
    is_one_document = texts.train_scan.num_documents == texts.val_scan.num_documents == 1
    breaks = [] if is_one_document else ["\n"]  # what may stand between documents
    pieces = itertools.chain(breaks, (piece for part in parts for _, piece in part.pieces()))
    return make_tokenizer(config.tokenizer, pieces, vocab_size)


def tokenize_splits(texts: Texts, tokenizer: Tokenizer, context_length: int) -> dict[str, Tokens]:
    """The splits `train` and `val`. Raises DataError where one is shorter than a window of context_length + 1 tokens."""
    splits = {
        "train": tokenize(texts.train, texts.train_scan, tokenizer, texts.data_dir),
        "val": tokenize(texts.val, texts.val_scan, tokenizer, texts.data_dir),
    }
    shortest = min(len(part.ids) for part in splits.values())
    for name, part in splits.items():
        if len(part.ids) <= context_length:
            raise DataError(
                f"the {name} split has {len(part.ids)} tokens and context_length={context_length} needs at least "
                f"{context_length + 1}: use a longer text"
                + (f", or a context_length of at most {shortest - 1}" if shortest > 1 else "")
            )
    return splits
