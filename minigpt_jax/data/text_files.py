"""Documents on disk: files, folders and glob patterns, read piece by piece so that they need not fit into memory.

find_text("my.txt")  find_text("books.txt.gz")    a file is one document, kept character for character
find_text("answers.jsonl")                        each line is one document: a JSON object with a "text"
find_text("folder")  find_text("books/*.md")      the text files in a folder, or the files that match, sorted by path

Folders hold more than text. What is not read is counted in `Text.skipped`, and documents without text in `Scan.num_empty`.
"""

import codecs
import contextlib
import dataclasses
import fnmatch
import glob
import gzip
import hashlib
import io
import itertools
import json
import os
import re
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from tqdm import tqdm

from minigpt_jax.errors import DataError, UsageError
from minigpt_jax.files import local_path

JSON_LINES = (".jsonl", ".ndjson", ".jsonlines", ".jl")  # names of the same format
SUFFIXES = tuple(suffix + gz for suffix in (".txt", *JSON_LINES) for gz in ("", ".gz"))  # read from a folder, in any case
# Names that are not the user's texts: hidden files, and what systems, editors, tools and synchronisation leave behind.
CLUTTER = (
    ".*", "~*", "*~", "#*#", "thumbs.db", "desktop.ini", "__macosx", "$recycle.bin", "#recycle", "@eadir", "lost+found",
    "#snapshot", "system volume information", "__pycache__", "site-packages", "*.egg-info", "*.dist-info", "node_modules",
)  # fmt: skip
HIDDEN, MODEL, LINK = "hidden or temporary", "of a run or model", "links to what is read anyway"
MAX_REASONS = 8  # in a log line; every suffix is one
MODEL_TEXTS = ("metrics.jsonl", "merges.txt", "vocab.txt")  # not the user's either, in the folder of a run or a model
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
    skipped: tuple[str, ...] = ()  # what a folder or pattern has besides: "hidden or temporary: 2"

    def pieces(self, empty: Counter[str] | None = None) -> Iterator[tuple[int, str]]:
        """Yields the text as (document number, next piece of it). Raises DataError if a file is not valid text.

        Skips documents that have nothing but white space, and counts them in `empty`, by file.
        """
        position, number = 0, -1
        for path in self.paths:
            for document in self._documents(path):
                is_empty = True
                for piece in _split(document):
                    number, is_empty = number + is_empty, False
                    part = piece[max(self.start - position, 0) : None if self.end is None else max(self.end - position, 0)]
                    position += len(piece)
                    if part:
                        yield number, part
                    if self.end is not None and position >= self.end:
                        return
                if is_empty and empty is not None:
                    empty[str(path)] += 1
        if number < 0:
            raise DataError(f"{self.name!r} is empty or has nothing but white space")

    def stamp(self) -> tuple[tuple[int, int], ...]:
        """Size and modification time of each file, to detect changes."""
        try:
            return tuple((status.st_size, status.st_mtime_ns) for status in map(os.stat, self.paths))
        except OSError as error:
            raise DataError(f"cannot read {str(error.filename)!r}: {error.strerror}") from None

    def _documents(self, path: Path) -> Iterator[Iterable[str]]:
        if path.name.lower().removesuffix(".gz").endswith(JSON_LINES):
            yield from ([text] if text.strip() else [] for text in _read_json_lines(path))
        else:
            yield read_text(path, self.encoding)


@dataclasses.dataclass(frozen=True)
class Scan:
    """Statistics from one pass over a text."""

    sha256: str  # of the documents in UTF-8, separated by the byte 0xff, which UTF-8 does not use
    num_documents: int
    num_empty: int  # documents that were skipped, as they have nothing but white space
    num_characters: int
    num_bytes: int  # in UTF-8
    stamp: tuple[tuple[int, int], ...]  # of the files, taken before reading
    documents: np.ndarray = dataclasses.field(compare=False, repr=False)  # for each, a hash and the number of characters


def scan(text: Text) -> Scan:
    """Reads all of a text once. Raises DataError if it is not valid text."""
    digest, stamp, empty, documents = hashlib.sha256(), text.stamp(), Counter(), []
    num_bytes = 0
    with progress("reading") as bar:
        for number, pieces in itertools.groupby(text.pieces(empty), key=lambda numbered: numbered[0]):
            digest.update(b"\xff" * (number > 0))
            of_document, num_characters = hashlib.blake2b(digest_size=8), 0
            for _, piece in pieces:
                data = _utf8(piece, text.name)
                digest.update(data)
                of_document.update(data)
                num_bytes, num_characters = num_bytes + len(data), num_characters + len(piece)
                bar.update(len(data))
            documents.append((int.from_bytes(of_document.digest(), "little"), num_characters))
    table = np.array(documents, np.uint64)
    return Scan(digest.hexdigest(), len(table), empty.total(), int(table[:, 1].sum()), num_bytes, stamp, table)


def _utf8(piece: str, name: str) -> bytes:
    try:
        return piece.encode()
    except UnicodeEncodeError as error:  # encodings such as unicode_escape produce them
        surrogate = f"U+{ord(piece[error.start]):04X}"
        raise DataError(f"{name!r} has the unpaired surrogate {surrogate}, which is not a character") from None


def progress(description: str, total: int | None = None) -> tqdm:
    """A progress bar in bytes, shown on a terminal only. Standard error is None in a program without a console."""
    return tqdm(desc=description, total=total, unit="B", unit_scale=True, leave=False, disable=None if sys.stderr else True)


def find_text(dataset: str, encoding: str = "utf-8") -> Text:
    """The text of a file, folder or glob pattern.

    Raises DataError if a folder or pattern has no text files, UsageError for an unknown encoding or a remote address.
    """
    try:
        "".encode(encoding)
    except (LookupError, UnicodeError) as error:
        raise UsageError(
            f"encoding={encoding!r} is not a text encoding of Python ({error}); common ones: utf-8, utf-16, cp1252, latin-1"
        ) from None
    dataset = str(local_path(dataset))
    skipped: dict[str, str] = {}  # reasons by path
    if os.path.isdir(dataset):
        paths = _files_in(dataset, skipped)
        missing = f"the folder {dataset!r} has no text files ({', '.join(SUFFIXES)}); for others use a pattern such as *.md"
    elif glob.has_magic(dataset) and not os.path.lexists(dataset):
        anchor, *parts = Path(dataset).parts if os.path.isabs(dataset) else ("", *Path(dataset).parts)
        paths = _distinct_files([path for path in _matches(anchor, parts, skipped) if not path.is_dir()], skipped)
        missing = f"no file matches {dataset!r}"
    else:
        if os.path.exists(dataset) and not os.path.isfile(dataset):
            raise DataError(f"{dataset!r} is a pipe or a device: text is read more than once, so save it as a file first")
        return Text(dataset, (Path(dataset),), encoding)
    counts = Counter(skipped.values()).most_common()
    if rest := sum(count for _, count in counts[MAX_REASONS:]):
        counts[MAX_REASONS:] = [("others", rest)]
    reasons = tuple(f"{reason}: {count}" for reason, count in counts)
    if not paths:
        raise DataError(missing + (f" (skipped {', '.join(reasons)})" if reasons else ""))
    return Text(dataset, tuple(sorted(paths)), encoding, skipped=reasons)


def _files_in(root: str, skipped: dict[str, str]) -> list[Path]:
    """The text files in a folder and all folders in it. Notes in `skipped` why it leaves out everything else."""
    paths = []
    for folder, names, is_model in _walk(root, skipped):
        for name in names:
            path = os.path.join(folder, name)
            if is_clutter(name):
                skipped[path] = HIDDEN
            elif is_model and name in MODEL_TEXTS:
                skipped[path] = MODEL
            elif not name.lower().endswith(SUFFIXES):
                skipped[path] = os.path.splitext(name)[1] or "no suffix"
            else:
                paths.append(Path(path))
    return _distinct_files(paths, skipped)


def _walk(root: str, skipped: dict[str, str]) -> Iterator[tuple[str, list[str], bool]]:
    """Yields a folder and the folders in it: path, names of its files, and whether a run or a model is in it.

    Leaves out clutter, and folders of runs and models below the root. Follows links, but visits nothing twice, and no
    folder that holds the root.
    """
    seen = {real_root := os.path.realpath(root)}
    for folder, folders, names in os.walk(root, onerror=_raise_unreadable, followlinks=True):
        is_model = "config.json" in names and not {"tokenizer.json", "vocab.json", "checkpoints"}.isdisjoint(names + folders)
        inside, folders[:] = sorted(folders), []  # os.walk descends into what is left in this list
        if is_model and folder != root:
            skipped[folder] = MODEL
            continue
        for name in inside:
            path = os.path.join(folder, name)
            real = os.path.realpath(path)
            if is_clutter(name):
                skipped[path] = HIDDEN
            elif real in seen or Path(real_root).is_relative_to(real):
                skipped[path] = LINK
            else:
                seen.add(real)
                folders.append(name)
        yield folder, sorted(names), is_model


def _matches(folder: str, parts: Sequence[str], skipped: dict[str, str]) -> Iterator[Path]:
    """The paths in a folder that match the parts of a pattern, without clutter, unless a part looks like it: `*~`, `.*`.

    Unlike `glob.glob`, it ends even if links go round in circles.
    """
    if not parts:
        yield Path(folder)
        return
    part, *rest = parts
    if part == "**":
        for inside, _, _ in _walk(folder or os.curdir, skipped):
            yield from _matches(inside, rest or ["*"], skipped)
    elif not glob.has_magic(part) or os.path.lexists(os.path.join(folder, part)):  # a folder's name may have brackets
        if os.path.lexists(os.path.join(folder, part)):
            yield from _matches(os.path.join(folder, part), rest, skipped)
    elif os.path.isdir(folder or "."):
        for name in _names_in(folder or "."):
            path = os.path.join(folder, name)
            if not fnmatch.fnmatch(name, part):
                continue
            if is_clutter(name) and not is_clutter(part):
                skipped[path] = HIDDEN
            else:
                yield from _matches(path, rest, skipped)


def _distinct_files(paths: list[Path], skipped: dict[str, str]) -> list[Path]:
    """The paths without broken links, pipes and the like, and without links to files that are among them."""
    kept = {}
    for path in paths:
        if not path.is_file():
            skipped[str(path)] = "broken links, pipes or devices"
        elif kept.setdefault(os.path.realpath(path), path) is not path:
            skipped[str(path)] = LINK
    return list(kept.values())


def is_clutter(name: str) -> bool:
    """Whether a file or folder of this name is not the user's text: hidden, temporary or generated."""
    return any(fnmatch.fnmatchcase(name.lower(), pattern) for pattern in CLUTTER)


def _names_in(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        _raise_unreadable(error)


def _raise_unreadable(error: OSError) -> NoReturn:
    raise DataError(f"cannot read the folder {str(error.filename)!r}: {error.strerror}")


def read_text(path: Path | str, encoding: str = "utf-8") -> Iterator[str]:
    """Yields the text of a file as `decode` does. Raises DataError if it is not valid text."""
    with _open(path) as file:
        yield from decode(file, str(path), encoding)


def decode(file: io.BufferedIOBase, name: str, encoding: str = "utf-8") -> Iterator[str]:
    """Yields the text of an open file in chunks, without a byte order mark, or nothing if it is only white space.

    Raises DataError, with name and offset, if it is not valid text.
    """
    decoder = codecs.getincrementaldecoder(encoding)()
    nul = b"\0" if "\0".encode(encoding) == b"\0" else None  # UTF-16 text is full of NUL bytes
    offset, is_empty, blank = 0, True, ""
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
                f"{name!r} is not {encoding.upper()} ({where}): convert it, or for a dataset set --encoding, such as cp1252"
            ) from None
        except UnicodeError as error:  # UTF-16 without a byte order mark
            raise DataError(
                f"{name!r} is not {encoding.upper()} ({error}): convert it, or for a dataset set --encoding"
            ) from None
        if is_empty and text:
            text, is_empty = text.removeprefix("\ufeff"), False
        offset += len(data)
        if blank is not None:  # nothing but white space so far
            text = blank + text
            blank, text = (None, text) if text.strip() else (text, "")
        if text:
            yield text
        if not data:
            break


def read_text_file(path: str | Path) -> str:
    """All of the text of a UTF-8 file. Raises DataError if it is not valid text, or empty."""
    return _all_of(read_text(path), str(path))


def decode_text(data: bytes, name: str) -> str:
    """Decodes UTF-8 bytes read from `name`. Raises DataError if they are not valid text, or empty."""
    return _all_of(decode(io.BytesIO(data), name), name)


def _all_of(chunks: Iterable[str], name: str) -> str:
    text = "".join(chunks)
    if not text:
        raise DataError(f"{name!r} is empty or has nothing but white space")
    return text


def _read_json_lines(path: Path) -> Iterator[str]:
    """Yields the text of each line that is not blank, which may be empty, or one empty text if there is none.

    JSON is always UTF-8 (RFC 8259).
    """
    is_empty = True
    for where, value in json_lines(path):
        try:
            text = value["text"]
            text.encode()  # JSON allows unpaired surrogates, which are not characters
        except UnicodeEncodeError as error:
            surrogate = f"U+{ord(error.object[error.start]):04X}"
            raise DataError(f"{where} has an unpaired surrogate, {surrogate}") from None
        except (KeyError, TypeError, AttributeError):
            raise DataError(f'{where} must be a JSON object with a string "text": {{"text": "..."}}') from None
        is_empty = False
        yield text
    if is_empty:
        yield ""


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields each line that is not blank, as ("line 3 of 'a.jsonl'", its JSON). Raises DataError for what is not JSON."""
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            line = line.removeprefix(codecs.BOM_UTF8)  # joined files have it in the middle, too
            if not line.strip():
                continue
            where = f"line {number} of {str(path)!r}"
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where} is not valid UTF-8 JSON: {getattr(error, 'msg', error)}") from None
            yield where, value


@contextlib.contextmanager
def _open(path: Path | str) -> Iterator[io.BufferedIOBase]:
    name = str(path)
    try:
        # Binary mode, because text mode would turn \r\n into \n.
        with gzip.open(name, "rb") if name.lower().endswith(".gz") else open(name, "rb") as file:
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
