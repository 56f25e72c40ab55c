"""Texts: every character of every document comes, in order, however it is cut; what is no text is named with its place."""

import codecs
import errno
import gzip
import hashlib
import itertools
import json
import os

import pytest
from helpers import error_message
from hypothesis import given
from hypothesis import strategies as st

from minigpt_jax.data import text_files
from minigpt_jax.data.text_files import Text, find_text, scan
from minigpt_jax.data.tokenizers import KINDS, make_tokenizer
from minigpt_jax.errors import DataError, UsageError

PROSE = "To be, or not to be — that is the question:\r\nWhether 'tis nobler in the mind\n\n  to suffer naïve café 漢字 🙂\n"


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return str(path)


def documents(dataset, encoding="utf-8"):
    """The documents of a text, each as a whole."""
    found = {}
    for number, piece in find_text(dataset, encoding).pieces():
        assert piece
        found[number] = found.get(number, "") + piece
    assert list(found) == list(range(len(found)))
    return list(found.values())


# ---- A file ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["a", "a\r\nb\r\n", "  two blanks, then \n\n\n", "é — 漢字 🙂\u2028\x0c", "a\ufeffb"])
@pytest.mark.parametrize("read", [1, 2, 3, 2**20])
def test_a_file_comes_character_for_character(tmp_path, monkeypatch, text, read):
    monkeypatch.setattr(text_files, "READ", read)  # so that reading cuts every character in two
    assert documents(write(tmp_path / "own.txt", text)) == [text]
    assert documents(write(tmp_path / "own.txt.gz", gzip.compress(text.encode()))) == [text]
    for encoding in ("utf-16", "utf-16-le", "utf-8-sig"):
        assert documents(write(tmp_path / "own.txt", text.encode(encoding)), encoding) == [text]


def test_a_byte_order_mark_is_dropped_once(tmp_path):
    assert documents(write(tmp_path / "own.txt", b"\xef\xbb\xbf\xef\xbb\xbfa\n")) == ["\ufeffa\n"]


def test_another_encoding_is_taken_when_it_is_named(tmp_path):
    path = write(tmp_path / "own.txt", "Prov\u00e9rbe \u20ac".encode("cp1252"))
    assert documents(path, "cp1252") == ["Prov\u00e9rbe \u20ac"]
    error_message(DataError, documents, path, "utf-16", says=(path, "UTF-16", "--encoding"))
    error_message(DataError, documents, path, "ascii", says=(path, "ASCII", "0xe9", "4", "--encoding"))


@pytest.mark.parametrize("encoding", ["utf9", "hex", "undefined", ""])
def test_an_encoding_that_is_none_is_named(encoding):
    error_message(UsageError, find_text, "own.txt", encoding, says=(f"encoding={encoding!r}", "utf-8"))


@pytest.mark.parametrize(
    "data, wanted",
    [
        (b"", ["empty"]),
        (b"\xef\xbb\xbf", ["empty"]),
        (b" \r\n\t\n", ["empty"]),
        (b"abc\0def", ["NUL", "3"]),
        ("Prov\u00e9rbe".encode("latin-1"), ["UTF-8", "0xe9", "4", "--encoding"]),
        (b"\xef\xbb\xbfab\xff", ["UTF-8", "0xff", "5"]),
        (b"cut \xe2\x82", ["UTF-8", "0xe2", "4"]),
        (b"\xed\xa0\x80", ["UTF-8", "0xed", "0"]),  # a lone surrogate
    ],
)
@pytest.mark.parametrize("read", [1, 2**20])
def test_a_file_that_is_not_text(tmp_path, monkeypatch, data, wanted, read):
    monkeypatch.setattr(text_files, "READ", read)
    path = write(tmp_path / "own.txt", data)
    error_message(DataError, documents, path, says=(path, *wanted))


def test_utf_16_is_taken_for_what_it_is(tmp_path):
    path = write(tmp_path / "own.txt", "text".encode("utf-16"))
    error_message(DataError, documents, path, says=(path, "UTF-16", "UTF-8", "NUL", "3"))


def test_a_file_that_cannot_be_read(tmp_path):
    below, long = write(tmp_path / "own.txt", b"a") + "/below", "long" * 99 + ".txt"
    for path in (str(tmp_path / "missing.txt"), str(tmp_path / "missing.jsonl")):
        error_message(DataError, documents, path, says=(path,))
    error_message(DataError, documents, below, says=(below, os.strerror(errno.ENOTDIR)))
    error_message(DataError, documents, str(tmp_path / long), says=(str(tmp_path / long), os.strerror(errno.ENAMETOOLONG)))
    error_message(DataError, lambda: scan(find_text(long)), says=(long, os.strerror(errno.ENAMETOOLONG)))
    whole = gzip.compress(b"text" * 99)
    for data in (b"no gzip", whole[:-9], whole[:-6] + b"sixsix", whole[:10] + b"\xff" * 20):
        path = write(tmp_path / "own.txt.gz", data)
        error_message(DataError, documents, path, says=(path, "gzip"))


def test_a_file_without_permission(tmp_path, monkeypatch):
    """The system's answer is played, since some users, root among them, may read every file."""

    def denied(*arguments, **keywords):
        raise PermissionError(errno.EACCES, "Permission denied")

    path = write(tmp_path / "own.txt", b"secret")
    monkeypatch.setattr(text_files, "open", denied, raising=False)  # in place of the builtin
    error_message(DataError, documents, path, says=(path, "Permission denied"))


# ---- Several documents ----------------------------------------------------------------------------------------------------


def test_each_line_of_json_is_a_document(tmp_path):
    lines = [json.dumps({"text": text, "id": 7}) for text in ("one\n", PROSE, " 漢字")]
    data = "\n".join(lines).encode()
    for name, content in (("a.jsonl", data), ("a.jsonl.gz", gzip.compress(data)), ("b.jsonl", codecs.BOM_UTF8 + data)):
        assert documents(write(tmp_path / name, content)) == ["one\n", PROSE, " 漢字"]
    assert documents(write(tmp_path / "a.jsonl", b"\n" + data + b"\n \r\n")) == ["one\n", PROSE, " 漢字"]


@pytest.mark.parametrize(
    "line, wanted",
    [
        ("{}", '"text"'),
        ('"text"', '"text"'),
        ('{"text": 7}', '"text"'),
        ('{"text": null}', '"text"'),
        ('{"text": " \\n"}', '"text"'),
        ('{"text": "cut', "JSON"),
        ('{"text": "a\\ud83d"}', "U+D83D"),
        ("[" * 100_000, "JSON"),
    ],
)
def test_a_line_of_json_without_text_is_named(tmp_path, line, wanted):
    good = '{"text": "good"}\n'
    path = write(tmp_path / "own.jsonl", good + good + line + "\n" + good)
    error_message(DataError, documents, path, says=(path, "line 3", wanted))


def test_a_line_of_json_that_is_not_utf_8_and_a_file_without_lines(tmp_path):
    path = write(tmp_path / "own.jsonl", b'{"text": "caf\xe9"}')
    error_message(DataError, documents, path, says=(path, "line 1", "UTF-8"))
    for data in (b"", b"\n\n"):
        error_message(DataError, documents, write(tmp_path / "own.jsonl", data), says=(path, "empty"))


def test_a_folder_is_its_texts_in_the_order_of_their_paths(tmp_path):
    for name in ("b.txt", "a/z.txt", "c.txt.gz", "d.jsonl", "e.md", "a/y.bin"):
        text = json.dumps({"text": name}) if name.endswith("jsonl") else name
        write(tmp_path / name, gzip.compress(text.encode()) if name.endswith("gz") else text)
    assert documents(str(tmp_path)) == ["a/z.txt", "b.txt", "c.txt.gz", "d.jsonl"]
    assert documents(str(tmp_path / "*.m?")) == ["e.md"]
    assert documents(str(tmp_path / "**" / "*.txt")) == ["a/z.txt", "b.txt"]
    error_message(DataError, find_text, str(tmp_path / "*.rst"), says=(str(tmp_path / "*.rst"),))
    (tmp_path / "nothing").mkdir()
    error_message(DataError, find_text, str(tmp_path / "nothing"), says=(str(tmp_path / "nothing"), *text_files.SUFFIXES))
    blank = write(tmp_path / "nothing" / "blank.txt", " \n")
    error_message(DataError, documents, str(tmp_path), says=(blank, "empty"))


def test_a_file_that_is_called_like_a_pattern_is_that_file(tmp_path):
    write(tmp_path / "a.txt", "other")
    assert documents(write(tmp_path / "[a].txt", "own")) == ["own"]


# ---- Pieces ---------------------------------------------------------------------------------------------------------------


@given(
    portions=st.lists(st.text(st.sampled_from("ab. \n漢"), max_size=40)), piece=st.integers(1, 9), extra=st.integers(1, 9)
)
def test_pieces_are_the_text_and_end_before_white_space_after_a_letter(portions, piece, extra):
    text, longest = "".join(portions), piece + extra
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(text_files, "PIECE", piece)
        patched.setattr(text_files, "LONGEST_PIECE", longest)
        pieces = list(text_files._cut(portions))
        assert list(text_files._cut([text])) == pieces  # whatever it came in
    assert "".join(pieces) == text
    for left, right in itertools.pairwise(pieces):
        assert piece <= len(left) < longest
        assert (left[-1].isalnum() and right[0].isspace()) or len(left) == piece


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.text(st.one_of(st.sampled_from(" \n\r\tab.,'é漢_1\u00a0\x1c"), st.characters(exclude_categories=["Cs"]))))
def test_tokens_of_the_pieces_are_those_of_the_whole(kind, text):
    """Which is why they may be cut at all, and why they are cut there."""
    if kind == "bpe":
        pytest.importorskip("tokenizers")
    tokenizer = tokenizer_for(kind) if kind != "char" else make_tokenizer("char", [text + "a"])
    places = [match.start() for match in text_files.CUT.finditer(text)]
    pieces = [text[start:end] for start, end in zip([0, *places], [*places, None], strict=True)]
    ids = [i for one in tokenizer.encode_batch(pieces) for i in one.tolist()]
    assert ids == tokenizer.encode(text).tolist()


made = {}


def tokenizer_for(kind):
    if kind not in made:
        made[kind] = make_tokenizer(kind, [PROSE * 3], 300 if kind == "bpe" else None)
    return made[kind]


@pytest.mark.parametrize("piece", [3, 2**16])
def test_parts_are_cut_at_characters_and_keep_the_documents_apart(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(text_files, "PIECE", piece)
    write(tmp_path / "a.txt", "one two three four")
    write(tmp_path / "b.txt", "five six")
    whole, length = find_text(str(tmp_path)), 26
    for cut in range(length + 1):
        parts = [Text("", whole.paths, end=cut), Text("", whole.paths, start=cut)]
        joined = ["".join(text for _, text in part.pieces()) for part in parts]
        assert joined == ["one two three fourfive six"[:cut], "one two three fourfive six"[cut:]]
        assert len({number for part in parts for number, _ in part.pieces()}) == 2


def test_a_part_is_not_read_beyond_its_end(tmp_path):
    path = write(tmp_path / "own.txt", b"good text " * 200_000 + b"\xff")
    assert "".join(piece for _, piece in Text("", find_text(path).paths, end=11).pieces()) == "good text g"
    error_message(DataError, documents, path, says=(path, "0xff", "2000000"))


def test_a_scan_counts_and_sums(tmp_path, monkeypatch):
    path = write(tmp_path / "own.txt", PROSE)
    sums = set()
    for piece in (1, 7, 2**16):
        monkeypatch.setattr(text_files, "PIECE", piece)
        seen = scan(find_text(path))
        assert (seen.num_documents, seen.num_characters, seen.num_bytes) == (1, len(PROSE), len(PROSE.encode()))
        sums.add(seen.sha256)
    assert sums == {hashlib.sha256(PROSE.encode()).hexdigest()}


def test_the_sum_tells_where_documents_end(tmp_path):
    for name, parts in {"a": ["ab", "c"], "b": ["a", "bc"], "c": ["abc"]}.items():
        for number, part in enumerate(parts):
            write(tmp_path / name / f"{number}.txt", part)
    seen = [scan(find_text(str(tmp_path / name))) for name in "abc"]
    assert len({one.sha256 for one in seen}) == 3
    assert [one.num_documents for one in seen] == [2, 2, 1]
