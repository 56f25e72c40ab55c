"""Text on the disk, in documents: files, folders and patterns of them, read piece by piece, however large they are.

find_text("my.txt")  find_text("books.txt.gz")    a file is a document, character for character
find_text("answers.jsonl")                        each line is one: a JSON object with a "text"
find_text("folder")  find_text("books/*.md")      the files below a folder, or those that match, in order of their paths
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

SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz")  # what is taken from a folder
READ = 2**20  # bytes that are read at a time
PIECE = 2**16  # characters of a piece, or a few more
LONGEST_PIECE = 2**17

# Tokenizers that cut at words make no token of a letter or digit and white space after it, so that the tokens of the pieces
# are those of the whole. Where there is no such place for long, a piece ends anywhere.
CUT = re.compile(r"(?<=[^\W_])(?=[ \t\r\n])")


@dataclasses.dataclass(frozen=True)
class Text:
    """Documents in files, or the characters from `start` to `end` of them all. They are read anew for each use."""

    name: str  # as the user wrote it
    paths: tuple[Path, ...]
    encoding: str = "utf-8"
    start: int = 0
    end: int | None = None

    def pieces(self) -> Iterator[tuple[int, str]]:
        """All of the text as (number of the document, the next piece of it). Raises DataError where a file is not text."""
        position = 0
        for number, document in enumerate(itertools.chain.from_iterable(map(self._documents, self.paths))):
            for piece in _cut(document):
                part = piece[max(self.start - position, 0) : None if self.end is None else max(self.end - position, 0)]
                position += len(piece)
                if part:
                    yield number, part
                if self.end is not None and position >= self.end:
                    return

    def stamp(self) -> tuple[tuple[int, int], ...]:
        """Size and time of each file: as long as they are the same, nobody has written to it."""
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
    """What reading a text once tells of it."""

    sha256: str  # of the documents in UTF-8, with a byte 0xff, which UTF-8 does not have, between two of them
    num_documents: int
    num_characters: int
    num_bytes: int  # in UTF-8
    stamp: tuple[tuple[int, int], ...]  # of the files, before they were read


def scan(text: Text) -> Scan:
    """Reads a text from beginning to end. Raises DataError where it is not one."""
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


def progress(what: str, total: int | None = None) -> tqdm:
    """A bar that counts bytes, on a terminal only."""
    return tqdm(desc=what, total=total, unit="B", unit_scale=True, leave=False, disable=None)


def find_text(dataset: str, encoding: str = "utf-8") -> Text:
    """The text of a file, a folder or a pattern. Raises DataError where there is none, UsageError for the encoding."""
    try:
        "".encode(encoding)
    except (LookupError, UnicodeError) as error:
        raise UsageError(
            f"encoding={encoding!r} is none that Python knows ({error}); usual ones: utf-8, utf-16, cp1252, latin-1"
        ) from None
    if os.path.isdir(dataset):
        paths = sorted(file for file in Path(dataset).rglob("*") if file.name.endswith(SUFFIXES) and file.is_file())
        missing = f"the folder {dataset!r} has no text: taken are {', '.join(SUFFIXES)}, and others by a pattern"
    elif glob.has_magic(dataset) and not os.path.exists(dataset):
        paths = sorted(file for file in map(Path, glob.glob(dataset, recursive=True)) if file.is_file())
        missing = f"no file matches {dataset!r}"
    else:
        return Text(dataset, (Path(dataset),), encoding)
    if not paths:
        raise DataError(missing)
    return Text(dataset, tuple(paths), encoding)


def read_text(path: Path | str, encoding: str = "utf-8") -> Iterator[str]:
    """The text of a file in portions, as it is but for a byte order mark. Raises DataError where it is not text."""
    with _opened(path) as file:
        yield from decode(file, str(path), encoding)


def decode(file: io.BufferedIOBase, name: str, encoding: str = "utf-8") -> Iterator[str]:
    """The text that a file holds, in portions. Raises DataError, with the name and the place, where it does not."""
    decoder = codecs.getincrementaldecoder(encoding)()
    nul = b"\0" if "\0".encode(encoding) == b"\0" else None  # in UTF-16 it is half of many characters
    offset, is_empty, is_blank = 0, True, True
    while True:
        data = file.read(READ)
        if nul and nul in data:
            place = f"a NUL byte at offset {offset + data.index(nul)}"
            raise DataError(f"{name!r} is binary or UTF-16, not {encoding.upper()} text: it has {place}")
        held = len(decoder.getstate()[0])  # bytes of a character that the last portion has cut
        try:
            text = decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            place = f"byte 0x{error.object[error.start]:02x} at offset {offset - held + error.start}"
            raise DataError(
                f"{name!r} is not {encoding.upper()} ({place}); name its encoding with --encoding, or convert it"
            ) from None
        except UnicodeError as error:  # UTF-16 has one of its own
            raise DataError(f"{name!r} is not {encoding.upper()}: {error}; name its encoding with --encoding") from None
        if is_empty and text:
            text, is_empty = text.removeprefix("\ufeff"), False
        is_blank = is_blank and not text.strip()
        offset += len(data)
        if text:
            yield text
        if not data:
            break
    if is_blank:
        raise DataError(f"{name!r} is empty" + (": it holds nothing but white space" if offset > 3 else ""))


def read_text_file(path: str) -> str:
    """The whole text of a UTF-8 file. Raises DataError where it is not one."""
    return "".join(read_text(path))


def decode_text(data: bytes, name: str) -> str:
    """The text of these bytes in UTF-8, which came from `name`. Raises DataError where they are not text."""
    return "".join(decode(io.BytesIO(data), name))


def _read_json_lines(path: Path) -> Iterator[str]:
    """The text of each line that is not blank. JSON is always UTF-8 (RFC 8259)."""
    is_empty = True
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"line {number} of {str(path)!r}"
            try:
                text = json.loads(line.removeprefix(codecs.BOM_UTF8) if number == 1 else line)["text"]
                text.encode()  # a JSON string may hold half of a surrogate pair, which is no character
            except UnicodeEncodeError as error:
                half = f"U+{ord(error.object[error.start]):04X}"
                raise DataError(f"{where} has no character {half}: it is half of a pair") from None
            except (KeyError, TypeError, AttributeError):
                raise DataError(f'{where} has no text: it must be like {{"text": "..."}}') from None
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where} is not JSON in UTF-8: {getattr(error, 'msg', error)}") from None
            if not text.strip():
                raise DataError(f'{where} has no text: its "text" is empty')
            is_empty = False
            yield text
    if is_empty:
        raise DataError(f"{str(path)!r} is empty")


@contextlib.contextmanager
def _opened(path: Path | str) -> Iterator[io.BufferedIOBase]:
    name = str(path)
    try:
        # Bytes: text mode would turn \r\n into \n.
        with gzip.open(name, "rb") if name.endswith(".gz") else open(name, "rb") as file:
            yield file
    except FileNotFoundError:
        raise DataError(f"there is no file {name!r}") from None
    except IsADirectoryError:
        raise DataError(f"{name!r} is a folder; give the path of one UTF-8 text file") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{name!r} is not a whole gzip file: {error}") from None
    except OSError as error:
        raise DataError(f"cannot read {name!r}: {error.strerror}") from None


def _cut(portions: Iterable[str]) -> Iterator[str]:
    """The same text in pieces of PIECE to LONGEST_PIECE characters, whatever portions it came in."""
    rest = ""
    for portion in portions:
        rest, start = rest + portion, 0
        while len(rest) - start >= LONGEST_PIECE:
            end = _end_of_piece(rest, start)
            yield rest[start:end]
            start = end
        rest = rest[start:]
    while rest:
        end = _end_of_piece(rest, 0)
        yield rest[:end]
        rest = rest[end:]


def _end_of_piece(text: str, start: int) -> int:
    if found := CUT.search(text, start + PIECE, start + LONGEST_PIECE):
        return found.start()
    return start + PIECE if len(text) - start >= LONGEST_PIECE else len(text)
