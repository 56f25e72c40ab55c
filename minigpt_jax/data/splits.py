"""From dataset names to training and validation tokens."""

import dataclasses
import itertools
import logging
from pathlib import Path

import numpy as np

from minigpt_jax.config import DataConfig
from minigpt_jax.data import corpora
from minigpt_jax.data.text_files import Scan, Text, scan
from minigpt_jax.data.token_file import Tokens, tokenize
from minigpt_jax.data.tokenizers import Tokenizer, make_tokenizer
from minigpt_jax.errors import DataError
from minigpt_jax.files import cache_dir, local_path, sha256

log = logging.getLogger(__name__)

TRAIN_FRACTION = 0.9  # of the characters, without a separate validation text


@dataclasses.dataclass(frozen=True)
class Texts:
    """A config's training and validation texts, each with the scan of the full text it is part of."""

    train: Text
    val: Text
    train_scan: Scan
    val_scan: Scan
    data_dir: Path

    @property
    def sha256(self) -> str:
        """Hash of the text; if there are two, the hash of both hashes."""
        if self.train_scan is self.val_scan:
            return self.train_scan.sha256
        return sha256(f"{self.train_scan.sha256} {self.val_scan.sha256}".encode())

    def shared_documents(self) -> float:
        """Share of the validation documents, by characters, that are also training documents."""
        train, val = whole_documents(self.train, self.train_scan), whole_documents(self.val, self.val_scan)
        shared = np.isin(val[:, 0], train[:, 0])
        return float(val[shared, 1].sum() / max(1, val[:, 1].sum()))


def whole_documents(text: Text, text_scan: Scan) -> np.ndarray:
    """The rows of `text_scan.documents` that lie in this part of the text as a whole."""
    ends = np.cumsum(text_scan.documents[:, 1])
    starts = ends - text_scan.documents[:, 1]
    return text_scan.documents[(starts >= text.start) & (ends <= (ends[-1] if text.end is None else text.end))]


def read_texts(config: DataConfig) -> Texts:
    """Opens and scans the texts, and logs what it skips. Raises DataError.

    Without a validation text, the first 90 % of the characters are for training. The split is by characters, not by tokens,
    so that all tokenizers are validated on the same text.
    """
    data_dir = local_path(config.data_dir or cache_dir())

    def read(dataset: str) -> tuple[Text, Scan]:
        text = corpora.open_text(dataset, data_dir, config.encoding)
        text_scan = scan(text)
        empty = [f"documents without text: {text_scan.num_empty}"] if text_scan.num_empty else []
        if skipped := [*text.skipped, *empty]:
            log.info("%s: reading %d files, skipping %s.", dataset, len(text.paths), ", ".join(skipped))
        return text, text_scan

    text, text_scan = read(config.dataset)
    if config.val_dataset is not None:
        val_text, val_scan = read(config.val_dataset)
        return Texts(text, val_text, text_scan, val_scan, data_dir)
    end = int(text_scan.num_characters * TRAIN_FRACTION)
    train, val = dataclasses.replace(text, end=end), dataclasses.replace(text, start=end)
    return Texts(train, val, text_scan, text_scan, data_dir)


def train_tokenizer(config: DataConfig, vocab_size: int | None, texts: Texts) -> Tokenizer:
    """Learns words and merges from the training text only. Characters come from both texts, so that each has an id."""
    parts = [texts.train, texts.val] if config.tokenizer == "char" else [texts.train]
    is_one_document = texts.train_scan.num_documents == texts.val_scan.num_documents == 1
    separators = [] if is_one_document else ["\n"]  # needs an id, too
    pieces = itertools.chain(separators, (piece for part in parts for _, piece in part.pieces()))
    return make_tokenizer(config.tokenizer, pieces, vocab_size)


def tokenize_splits(texts: Texts, tokenizer: Tokenizer, context_length: int) -> dict[str, Tokens]:
    """The splits `train` and `val`. Raises DataError if one is shorter than a window of context_length + 1 tokens."""
    splits = {
        "train": tokenize(texts.train, texts.train_scan, tokenizer, texts.data_dir),
        "val": tokenize(texts.val, texts.val_scan, tokenizer, texts.data_dir),
    }
    shortest = min(len(part.ids) for part in splits.values())
    for name, part in splits.items():
        if len(part.ids) <= context_length:
            raise DataError(
                f"the {name} split has {len(part.ids)} tokens, but context_length={context_length} needs at least "
                f"{context_length + 1}: use a longer text"
                + (f", or a context_length of at most {shortest - 1}" if shortest > 1 else "")
            )
    return splits
