"""Texts: every character of every document is read in order, however it is split. Errors name the file and the position."""

import codecs
import errno
import functools
import gzip
import hashlib
import itertools
import json
import os
import socket

import pytest
from helpers import assert_raises, assert_says
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
    """The documents of a text, each as one string."""
    joined = {}
    for number, piece in find_text(dataset, encoding).pieces():
        assert piece
        joined[number] = joined.get(number, "") + piece
    assert list(joined) == list(range(len(joined)))
    return list(joined.values())


# ---- A file ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["a", "a\r\nb\r\n", "  two blanks, then \n\n\n", "é — 漢字 🙂\u2028\x0c", "a\ufeffb"])
@pytest.mark.parametrize("read_size", [1, 2, 3, 2**20])
def test_a_file_is_read_character_for_character(tmp_path, monkeypatch, text, read_size):
    monkeypatch.setattr(text_files, "READ_SIZE", read_size)  # splits multi-byte characters across reads
    assert documents(write(tmp_path / "own.txt", text)) == [text]
    assert documents(write(tmp_path / "own.txt.gz", gzip.compress(text.encode()))) == [text]
    for encoding in ("utf-16", "utf-16-le", "utf-8-sig"):
        assert documents(write(tmp_path / "own.txt", text.encode(encoding)), encoding) == [text]


def test_a_byte_order_mark_is_dropped_once(tmp_path):
    assert documents(write(tmp_path / "own.txt", b"\xef\xbb\xbf\xef\xbb\xbfa\n")) == ["\ufeffa\n"]


def test_another_encoding_is_read_if_it_is_set(tmp_path):
    path = write(tmp_path / "own.txt", "Prov\u00e9rbe \u20ac".encode("cp1252"))
    assert documents(path, "cp1252") == ["Prov\u00e9rbe \u20ac"]
    assert_raises(DataError, documents, path, "utf-16", says=(path, "UTF-16", "--encoding"))
    assert_raises(DataError, documents, path, "ascii", says=(path, "ASCII", "0xe9", "4", "--encoding"))


@pytest.mark.parametrize("encoding", ["utf9", "hex", "undefined", ""])
def test_an_unknown_encoding_is_an_error(encoding):
    assert_raises(UsageError, find_text, "own.txt", encoding, says=(f"encoding={encoding!r}", "utf-8"))


@pytest.mark.parametrize(
    "data, words",
    [
        (b"", ["empty"]),
        (b"\xef\xbb\xbf", ["empty"]),
        (b" \r\n\t\n", ["empty"]),
        (b"abc\0def", ["NUL", "3"]),
        ("Prov\u00e9rbe".encode("latin-1"), ["UTF-8", "0xe9", "4", "--encoding"]),
        (b"\xef\xbb\xbfab\xff", ["UTF-8", "0xff", "5"]),
        (b"cut \xe2\x82", ["UTF-8", "0xe2", "4"]),
        (b"\xed\xa0\x80", ["UTF-8", "0xed", "0"]),  # an unpaired surrogate
    ],
)
@pytest.mark.parametrize("read_size", [1, 2**20])
def test_invalid_text_is_reported_with_its_offset(tmp_path, monkeypatch, data, words, read_size):
    monkeypatch.setattr(text_files, "READ_SIZE", read_size)
    path = write(tmp_path / "own.txt", data)
    assert_raises(DataError, documents, path, says=(path, *words))


def test_utf_16_is_recognised(tmp_path):
    path = write(tmp_path / "own.txt", "text".encode("utf-16"))
    assert_raises(DataError, documents, path, says=(path, "UTF-16", "UTF-8", "NUL", "3"))


def test_a_file_that_cannot_be_read(tmp_path):
    nested, long = write(tmp_path / "own.txt", b"a") + "/below", "long" * 99 + ".txt"
    for path in (str(tmp_path / "missing.txt"), str(tmp_path / "missing.jsonl")):
        assert_raises(DataError, documents, path, says=(path,))
    assert_raises(DataError, documents, nested, says=(nested, os.strerror(errno.ENOTDIR)))
    assert_raises(DataError, documents, str(tmp_path / long), says=(str(tmp_path / long), os.strerror(errno.ENAMETOOLONG)))
    assert_raises(DataError, lambda: scan(find_text(long)), says=(long, os.strerror(errno.ENAMETOOLONG)))
    intact = gzip.compress(b"text" * 99)
    for data in (b"no gzip", intact[:-9], intact[:-6] + b"sixsix", intact[:10] + b"\xff" * 20):
        path = write(tmp_path / "own.txt.gz", data)
        assert_raises(DataError, documents, path, says=(path, "gzip"))


def test_a_file_without_permission(tmp_path, monkeypatch):
    """The error is simulated, because some users, such as root, may read every file."""

    def denied(*arguments, **keywords):
        raise PermissionError(errno.EACCES, "Permission denied")

    path = write(tmp_path / "own.txt", b"secret")
    monkeypatch.setattr(text_files, "open", denied, raising=False)  # shadows the builtin
    assert_raises(DataError, documents, path, says=(path, "Permission denied"))


# ---- Several documents ----------------------------------------------------------------------------------------------------


def test_each_json_line_is_a_document(tmp_path):
    lines = [json.dumps({"text": text, "id": 7}) for text in ("one\n", PROSE, " 漢字")]
    data = "\n".join(lines).encode()
    for name, content in (("a.jsonl", data), ("a.jsonl.gz", gzip.compress(data)), ("b.jsonl", codecs.BOM_UTF8 + data)):
        assert documents(write(tmp_path / name, content)) == ["one\n", PROSE, " 漢字"]
    assert documents(write(tmp_path / "a.jsonl", b"\n" + data + b"\n \r\n")) == ["one\n", PROSE, " 漢字"]


@pytest.mark.parametrize(
    "line, word",
    [
        ("{}", '"text"'),
        ('"text"', '"text"'),
        ('{"text": 7}', '"text"'),
        ('{"text": null}', '"text"'),
        ('{"text": "cut', "JSON"),
        ('{"text": "a\\ud83d"}', "U+D83D"),
        ("[" * 100_000, "JSON"),
    ],
)
def test_a_json_line_without_text_is_reported_by_number(tmp_path, line, word):
    good = '{"text": "good"}\n'  # of the three lines before it, one is blank and one is empty
    path = write(tmp_path / "own.jsonl", good + "\n" + '{"text": ""}\n' + line + "\n" + good)
    assert_raises(DataError, documents, path, says=(path, "line 4", word))


def test_empty_documents_are_skipped_and_counted(tmp_path):
    rows = [*[json.dumps({"text": f"row {number}"}) for number in range(200)], '{"text": ""}', '{"text": " \\n"}']
    path = write(tmp_path / "rows.jsonl", "\n".join(rows))
    assert documents(path) == [f"row {number}" for number in range(200)]
    assert (scan(find_text(path)).num_documents, scan(find_text(path)).num_empty) == (200, 2)
    full = scan(find_text(path)).sha256
    assert scan(find_text(write(tmp_path / "full.jsonl", "\n".join(rows[:200])))).sha256 == full
    for name, data in (("blank.txt", " \n" * 9), ("empty.txt", ""), ("empty.jsonl", "\n")):
        write(tmp_path / "folder" / name, data)
    assert_raises(DataError, documents, str(tmp_path / "folder"), says=(str(tmp_path / "folder"), "empty"))
    write(tmp_path / "folder" / "c.txt", "  text")
    assert documents(str(tmp_path / "folder")) == ["  text"]
    assert scan(find_text(str(tmp_path / "folder"))).num_empty == 3
    assert_raises(DataError, documents, write(tmp_path / "rows.jsonl", "\n".join(rows[200:])), says=(path, "empty"))


def test_joined_json_lines_have_byte_order_marks_in_the_middle(tmp_path):
    row = codecs.BOM_UTF8 + b'{"text": "one"}\r\n'
    assert documents(write(tmp_path / "own.jsonl", codecs.BOM_UTF8 + b"\n" + row + row)) == ["one", "one"]


def test_a_json_line_that_is_not_utf_8_and_a_file_without_lines(tmp_path):
    path = write(tmp_path / "own.jsonl", b'{"text": "caf\xe9"}')
    assert_raises(DataError, documents, path, says=(path, "line 1", "UTF-8"))
    for data in (b"", b"\n\n"):
        assert_raises(DataError, documents, write(tmp_path / "own.jsonl", data), says=(path, "empty"))


def test_a_folder_is_its_text_files_sorted_by_path(tmp_path):
    for name in ("b.txt", "a/z.txt", "c.txt.gz", "d.jsonl", "e.md", "a/y.bin"):
        text = json.dumps({"text": name}) if name.endswith("jsonl") else name
        write(tmp_path / name, gzip.compress(text.encode()) if name.endswith("gz") else text)
    assert documents(str(tmp_path)) == ["a/z.txt", "b.txt", "c.txt.gz", "d.jsonl"]
    assert documents(str(tmp_path / "*.m?")) == ["e.md"]
    assert documents(str(tmp_path / "**" / "*.txt")) == ["a/z.txt", "b.txt"]
    assert_raises(DataError, find_text, str(tmp_path / "*.rst"), says=(str(tmp_path / "*.rst"),))
    (tmp_path / "nothing").mkdir()
    assert_raises(DataError, find_text, str(tmp_path / "nothing"), says=(str(tmp_path / "nothing"), *text_files.SUFFIXES))


@pytest.mark.parametrize("name", ["c.JSONL", "c.Jsonl.GZ", "c.ndjson", "c.NDJSON.gz", "c.jl", "c.jsonlines"])
def test_suffixes_are_compared_without_case(tmp_path, name):
    row = b'{"text": "row"}\n'
    path = write(tmp_path / name, gzip.compress(row) if name.lower().endswith("gz") else row)
    assert documents(path) == ["row"]
    write(tmp_path / "TWO.TXT", "two")
    write(tmp_path / "a.Txt.Gz", gzip.compress(b"packed"))
    assert documents(str(tmp_path)) == ["two", "packed", "row"]
    assert find_text(str(tmp_path)).skipped == ()


# What is not the user's text in a folder, by the reason why it is skipped. Each of them would be found in the text.
CLUTTER = [
    ".hidden.txt", "._x.txt", ".DS_Store", ".ipynb_checkpoints/x-checkpoint.txt", ".git/info.txt", "~x.txt", "x.txt~",
    ".x.txt.swp", "#x.txt#", "Thumbs.db", "desktop.ini", "__MACOSX/x.txt", "$RECYCLE.BIN/x.txt", "__pycache__/x.txt",
    "a.egg-info/SOURCES.txt", "#snapshot/x.txt", "System Volume Information/x.txt", "venv/site-packages/x.txt",
]  # fmt: skip


def test_the_line_about_skipped_files_stays_short(tmp_path):
    for number in range(30):
        write(tmp_path / f"x.{number}", "x")
    write(tmp_path / "y.0", "y")
    message = assert_raises(
        DataError, find_text, str(tmp_path), says=(".0: 2", f"others: {31 - 1 - text_files.MAX_REASONS}")
    )
    assert len(message) < 300 + len(str(tmp_path))


@pytest.mark.parametrize("where", ["", "below/"])
def test_hidden_temporary_and_generated_files_are_skipped_and_counted(tmp_path, where):
    write(tmp_path / where / "x.txt", "x")
    for name in CLUTTER:
        write(tmp_path / where / name, b"\0binary")
    for name in ("b.md", "README", "c.pdf", "d.pdf"):
        write(tmp_path / where / name, b"\0binary")
    text = find_text(str(tmp_path))
    assert [path.name for path in text.paths] == ["x.txt"]
    assert find_text(str(tmp_path / where / "x.t?t")).skipped == ()
    assert_says(" ".join(text.skipped), str(len(CLUTTER)), ".md: 1", ".pdf: 2", "no suffix: 1")
    (tmp_path / where / "x.txt").unlink()
    assert_raises(DataError, find_text, str(tmp_path), says=(str(tmp_path), str(len(CLUTTER)), ".pdf: 2"))


def test_a_pattern_reads_clutter_only_if_it_names_it(tmp_path):
    for name in ("x.md", *CLUTTER):
        write(tmp_path / ".texts" / name, name)
    inside = tmp_path / ".texts"
    assert documents(f"{inside}/**/*") == ["x.md"]
    [skipped] = find_text(f"{inside}/**/*").skipped
    assert_says(skipped, str(len(CLUTTER)))
    assert documents(f"{inside}/*~") == ["x.txt~"]
    assert documents(f"{inside}/._*") == ["._x.txt"]
    assert documents(f"{inside}/.git/*") == [".git/info.txt"]


def test_the_folder_of_a_run_is_not_text(tmp_path):
    write(tmp_path / "x.txt", "x")
    for folder in (tmp_path / "runs" / "mine", tmp_path):  # or the texts lie in the folder of the run
        for name in ("config.json", "tokenizer.json", "metrics.jsonl", "merges.txt"):
            write(folder / name, '{"step": 1}\n')
        write(tmp_path / "runs" / "mine" / "sample.txt", "generated")
        assert documents(str(tmp_path)) == ["x"]
        assert_says(" ".join(find_text(str(tmp_path)).skipped), "1" if folder != tmp_path else "3")
    write(tmp_path / "other" / "config.json", "{}")
    write(tmp_path / "other" / "metrics.jsonl", '{"text": "not of a run"}')
    assert documents(str(tmp_path)) == ["not of a run", "x"]


def test_what_a_link_names_is_read_once(tmp_path):
    root, far = tmp_path / "root", tmp_path / "far"
    write(root / "a" / "x.txt", "x")
    write(far / "y.txt", "y")
    write(tmp_path / "outside.txt", "outside")
    (root / "far").symlink_to(far)  # read
    for name, target in {
        "copy.txt": root / "a" / "x.txt", "same": root / "a", "a/loop": root, "a/self": root / "a", "up": tmp_path,
        "far2": far, "gone.txt": "missing.txt", "circle.txt": "circle.txt",
    }.items():  # fmt: skip
        (root / name).symlink_to(target)
    os.mkfifo(root / "pipe.txt")
    text = find_text(str(root))
    assert sorted(documents(str(root))) == ["x", "y"]
    assert_says(" ".join(text.skipped), "3", "6")
    assert sorted(documents(str(root / "**" / "*.txt"))) == ["x", "y"]
    assert sorted(documents(str(root / "**"))) == ["x", "y"]
    assert documents(str(root / "*" / "x.txt")) == ["x"]


def test_a_pipe_or_device_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "s.txt"))
        for path in (str(tmp_path / "pipe.txt"), str(tmp_path / "s.txt"), "/dev/null"):
            assert_raises(DataError, find_text, path, says=(path,))
    read_end, write_end = os.pipe()
    os.write(write_end, b"text")
    assert_raises(DataError, find_text, f"/dev/fd/{read_end}", says=(f"/dev/fd/{read_end}",))
    os.close(read_end)
    os.close(write_end)


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch):
    """Simulated, because some users, such as root, may list every folder."""
    write(tmp_path / "x.txt", "x")
    write(tmp_path / "secret" / "y.txt", "y")
    scandir = os.scandir

    def denied(path):
        if str(path).endswith("secret"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    monkeypatch.setattr(os, "listdir", lambda path: [entry.name for entry in os.scandir(path)])
    for dataset in (tmp_path, tmp_path / "*" / "*.txt"):
        assert_raises(DataError, find_text, str(dataset), says=(str(tmp_path / "secret"), "Permission denied"))


def test_a_pattern_may_be_below_a_folder_whose_name_has_brackets(tmp_path):
    write(tmp_path / "b [old]" / "x.txt", "x")
    write(tmp_path / "b o" / "y.txt", "y")
    assert documents(str(tmp_path / "b [old]" / "*.txt")) == ["x"]


def test_an_encoding_that_gives_unpaired_surrogates_is_an_error(tmp_path):
    path = write(tmp_path / "x.txt", "to be \\ud800")
    assert_raises(DataError, scan, find_text(path, "unicode_escape"), says=(path, "U+D800"))


def test_a_file_whose_name_looks_like_a_pattern_is_read(tmp_path):
    write(tmp_path / "a.txt", "other")
    assert documents(write(tmp_path / "[a].txt", "own")) == ["own"]


# ---- Pieces ---------------------------------------------------------------------------------------------------------------


@given(
    chunks=st.lists(st.text(st.sampled_from("ab. \n漢"), max_size=40)), shortest=st.integers(1, 9), extra=st.integers(1, 9)
)
def test_pieces_join_to_the_text_and_end_between_a_letter_and_white_space(chunks, shortest, extra):
    text, limit = "".join(chunks), shortest + extra
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(text_files, "MIN_PIECE", shortest)
        patched.setattr(text_files, "MAX_PIECE", limit)
        pieces = list(text_files._split(chunks))
        assert list(text_files._split([text])) == pieces  # the chunks do not matter
    assert "".join(pieces) == text
    for left, right in itertools.pairwise(pieces):
        assert shortest <= len(left) < limit
        assert (left[-1].isalnum() and right[0].isspace()) or len(left) == shortest


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.text(st.one_of(st.sampled_from(" \n\r\tab.,'é漢_1\u00a0\x1c"), st.characters(exclude_categories=["Cs"]))))
def test_tokens_of_the_pieces_are_those_of_the_text(kind, text):
    """This is why a text can be tokenized in pieces, and why they end where they do."""
    if kind == "bpe":
        pytest.importorskip("tokenizers")
    tokenizer = tokenizer_for(kind) if kind != "char" else make_tokenizer("char", [text + "a"])
    split_points = [match.start() for match in text_files.SPLIT_POINT.finditer(text)]
    pieces = [text[start:end] for start, end in zip([0, *split_points], [*split_points, None], strict=True)]
    ids = [i for piece_ids in tokenizer.encode_batch(pieces) for i in piece_ids.tolist()]
    assert ids == tokenizer.encode(text).tolist()


@functools.cache
def tokenizer_for(kind):
    return make_tokenizer(kind, [PROSE * 3], 300 if kind == "bpe" else None)


@pytest.mark.parametrize("min_piece", [3, 2**16])
def test_parts_are_ranges_of_characters_and_keep_documents_separate(tmp_path, monkeypatch, min_piece):
    monkeypatch.setattr(text_files, "MIN_PIECE", min_piece)
    write(tmp_path / "a.txt", "one two three four")
    write(tmp_path / "b.txt", "five six")
    paths, length = find_text(str(tmp_path)).paths, 26
    for cut in range(length + 1):
        parts = [Text("", paths, end=cut), Text("", paths, start=cut)]
        joined = ["".join(text for _, text in part.pieces()) for part in parts]
        assert joined == ["one two three fourfive six"[:cut], "one two three fourfive six"[cut:]]
        assert len({number for part in parts for number, _ in part.pieces()}) == 2


def test_a_part_is_not_read_beyond_its_end(tmp_path):
    path = write(tmp_path / "own.txt", b"good text " * 200_000 + b"\xff")
    assert "".join(piece for _, piece in Text("", find_text(path).paths, end=11).pieces()) == "good text g"
    assert_raises(DataError, documents, path, says=(path, "0xff", "2000000"))


def test_a_scan_counts_and_hashes(tmp_path, monkeypatch):
    path = write(tmp_path / "own.txt", PROSE)
    for min_piece in (1, 7, 2**16):
        monkeypatch.setattr(text_files, "MIN_PIECE", min_piece)
        result = scan(find_text(path))
        assert (result.num_documents, result.num_characters, result.num_bytes) == (1, len(PROSE), len(PROSE.encode()))
        assert result.sha256 == hashlib.sha256(PROSE.encode()).hexdigest()


def test_the_hash_of_a_scan_depends_on_document_boundaries(tmp_path):
    for name, parts in {"a": ["ab", "c"], "b": ["a", "bc"], "c": ["abc"]}.items():
        for number, part in enumerate(parts):
            write(tmp_path / name / f"{number}.txt", part)
    scans = [scan(find_text(str(tmp_path / name))) for name in "abc"]
    assert len({result.sha256 for result in scans}) == 3
    assert [result.num_documents for result in scans] == [2, 2, 1]
