"""Documents on disk: files, folders and glob patterns, read piece by piece so that they need not fit into memory.

find_text("my.txt")  find_text("books.txt.gz")    a file is one document, kept character for character
find_text("answers.jsonl")                        each line is one document: a JSON object with a "text"
find_text("folder")  find_text("books/*.md")      the text files in a folder, or the files that match, sorted by path
"""

import codecs
import contextlib
import dataclasses
import glob
import gzip
import hashlib
import io
import itertools
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from tqdm import tqdm

from minigpt_jax.errors import DataError, UsageError

SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz")  # files that are read from a folder
READ_SIZE = 2**20  # bytes
MIN_PIECE = 2**16  # characters; only the last piece of a document may be shorter
MAX_PIECE = 2**17

# Pieces end between a letter or digit and white space. No token of a tokenizer that splits at words spans that point, so the
# tokens of the pieces are those of the text. A piece without such a point ends anywhere.
SPLIT_POINT = re.compile(r"(?<=[^\W_])(?=[ \t\r\n])")


@dataclasses.dataclass(frozen=True)
class Text:
    """Documents in files, or the characters from `start` to `end` of all of them. Each use reads the files again."""

    name: str  # as the user wrote it
    paths: tuple[Path, ...]
    encoding: str = "utf-8"
    start: int = 0
    end: int | None = None

    def pieces(self) -> Iterator[tuple[int, str]]:
        """Yields the text as (document number, next piece of it). Raises DataError if a file is not valid text."""
        position = 0
        for number, document in enumerate(itertools.chain.from_iterable(map(self._documents, self.paths))):
            for piece in _split(document):
                part = piece[max(self.start - position, 0) : None if self.end is None else max(self.end - position, 0)]
                position += len(piece)
                if part:
                    yield number, part
                if self.end is not None and position >= self.end:
                    return

    def stamp(self) -> tuple[tuple[int, int], ...]:
        """Size and modification time of each file, to detect changes."""
        try:
            return tuple((status.st_size, status.st_mtime_ns) for status in map(os.stat, self.paths))
        except OSError as error:
            raise DataError(f"cannot read {str(error.filename)!r}: {error.strerror}") from None

    def _documents(self, path: Path) -> Iterator[Iterable[str]]:
        if path.name.removesuffix(".gz").endswith(".jsonl"):
            yield from ([text] for text in _read_json_lines(path))
        else:
            yield read_text(path, self.encoding)


@dataclasses.dataclass(frozen=True)
class Scan:
    """Statistics from one pass over a text."""

    sha256: str  # of the documents in UTF-8, separated by the byte 0xff, which UTF-8 does not use
    num_documents: int
    num_characters: int
    num_bytes: int  # in UTF-8
    stamp: tuple[tuple[int, int], ...]  # of the files, taken before reading


def scan(text: Text) -> Scan:
    """Reads all of a text once. Raises DataError if it is not valid text."""
    digest, stamp = hashlib.sha256(), text.stamp()
    number = num_characters = num_bytes = 0
    with progress("reading") as bar:
        for document, piece in text.pieces():
            data = piece.encode()
            digest.update(b"\xff" * (document - number))
            digest.update(data)
            number, num_characters, num_bytes = document, num_characters + len(piece), num_bytes + len(data)
            bar.update(len(data))
    return Scan(digest.hexdigest(), number + 1, num_characters, num_bytes, stamp)


def progress(description: str, total: int | None = None) -> tqdm:
    """A progress bar in bytes, shown on a terminal only."""
    return tqdm(desc=description, total=total, unit="B", unit_scale=True, leave=False, disable=None)


def find_text(dataset: str, encoding: str = "utf-8") -> Text:
    """The text of a file, folder or glob pattern.

    Raises DataError if a folder or pattern has no text files, UsageError for an unknown encoding.
    """
    try:
        "".encode(encoding)
    except (LookupError, UnicodeError) as error:
        raise UsageError(
            f"encoding={encoding!r} is not a text encoding of Python ({error}); common ones: utf-8, utf-16, cp1252, latin-1"
        ) from None
    if os.path.isdir(dataset):
        paths = sorted(file for file in Path(dataset).rglob("*") if file.name.endswith(SUFFIXES) and file.is_file())
        missing = f"the folder {dataset!r} has no text files ({', '.join(SUFFIXES)}); for others use a pattern such as *.md"
    elif glob.has_magic(dataset) and not os.path.exists(dataset):
        paths = sorted(file for file in map(Path, glob.glob(dataset, recursive=True)) if file.is_file())
        missing = f"no file matches {dataset!r}"
    else:
        return Text(dataset, (Path(dataset),), encoding)
    if not paths:
        raise DataError(missing)
    return Text(dataset, tuple(paths), encoding)


def read_text(path: Path | str, encoding: str = "utf-8") -> Iterator[str]:
    """Yields the text of a file in chunks, without a byte order mark. Raises DataError if it is not valid text."""
    with _open(path) as file:
        yield from decode(file, str(path), encoding)


def decode(file: io.BufferedIOBase, name: str, encoding: str = "utf-8") -> Iterator[str]:
    """Yields the text of an open file in chunks. Raises DataError, with name and offset, if it is not valid text."""
    decoder = codecs.getincrementaldecoder(encoding)()
    nul = b"\0" if "\0".encode(encoding) == b"\0" else None  # UTF-16 text is full of NUL bytes
    offset, is_empty, is_blank = 0, True, True
    while True:
        data = file.read(READ_SIZE)
        if nul and nul in data:
            where = f"NUL byte at offset {offset + data.index(nul)}"
            raise DataError(f"{name!r} is binary or UTF-16, not {encoding.upper()} text ({where})")
        num_pending = len(decoder.getstate()[0])  # bytes of a character that is split across two reads
        try:
            text = decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            where = f"byte 0x{error.object[error.start]:02x} at offset {offset - num_pending + error.start}"
            raise DataError(
                f"{name!r} is not {encoding.upper()} ({where}); set its encoding with --encoding, or convert it"
            ) from None
        except UnicodeError as error:  # UTF-16 without a byte order mark
            raise DataError(f"{name!r} is not {encoding.upper()} ({error}); set its encoding with --encoding") from None
        if is_empty and text:
            text, is_empty = text.removeprefix("\ufeff"), False
        is_blank = is_blank and not text.strip()
        offset += len(data)
        if text:
            yield text
        if not data:
            break
    if is_blank:
        raise DataError(f"{name!r} is empty" + (" except for white space" if offset > 3 else ""))


def read_text_file(path: str) -> str:
    """All of the text of a UTF-8 file. Raises DataError if it is not valid text."""
    return "".join(read_text(path))


def decode_text(data: bytes, name: str) -> str:
    """Decodes UTF-8 bytes read from `name`. Raises DataError if they are not valid text."""
    return "".join(decode(io.BytesIO(data), name))


def _read_json_lines(path: Path) -> Iterator[str]:
    """Yields the text of each line that is not blank. JSON is always UTF-8 (RFC 8259)."""
    is_empty = True
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"line {number} of {str(path)!r}"
            try:
                text = json.loads(line.removeprefix(codecs.BOM_UTF8) if number == 1 else line)["text"]
                text.encode()  # JSON allows unpaired surrogates, which are not characters
            except UnicodeEncodeError as error:
                surrogate = f"U+{ord(error.object[error.start]):04X}"
                raise DataError(f"{where} has an unpaired surrogate, {surrogate}") from None
            except (KeyError, TypeError, AttributeError):
                raise DataError(f'{where} must be a JSON object with a string "text": {{"text": "..."}}') from None
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where} is not valid UTF-8 JSON: {getattr(error, 'msg', error)}") from None
            if not text.strip():
                raise DataError(f'{where} has an empty "text"')
            is_empty = False
            yield text
    if is_empty:
        raise DataError(f"{str(path)!r} is empty")


@contextlib.contextmanager
def _open(path: Path | str) -> Iterator[io.BufferedIOBase]:
    name = str(path)
    try:
        # Binary mode, because text mode would turn \r\n into \n.
        with gzip.open(name, "rb") if name.endswith(".gz") else open(name, "rb") as file:
            yield file
    except FileNotFoundError:
        raise DataError(f"no such file: {name!r}") from None
    except IsADirectoryError:
        raise DataError(f"{name!r} is a folder; pass the path of one UTF-8 text file") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{name!r} is not an intact gzip file: {error}") from None
    except OSError as error:
        raise DataError(f"cannot read {name!r}: {error.strerror}") from None


def _split(chunks: Iterable[str]) -> Iterator[str]:
    """Yields the text in pieces of MIN_PIECE to MAX_PIECE characters, which do not depend on how it was chunked."""
    rest = ""
    for chunk in chunks:
        rest, start = rest + chunk, 0
        while len(rest) - start >= MAX_PIECE:
            end = _end_of_piece(rest, start)
            yield rest[start:end]
            start = end
        rest = rest[start:]
    while rest:
        end = _end_of_piece(rest, 0)
        yield rest[:end]
        rest = rest[end:]


def _end_of_piece(text: str, start: int) -> int:
    if match := SPLIT_POINT.search(text, start + MIN_PIECE, start + MAX_PIECE):
        return match.start()
    return start + MIN_PIECE if len(text) - start >= MAX_PIECE else len(text)
