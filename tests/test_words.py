"""Docstrings, comments, messages and Markdown avoid the first words of the glossary in CONTRIBUTING.md."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Patterns to avoid, and phrases in which they are good English.
AVOIDED = {
    r"anew": "",
    r"in turn": "",
    r"tells?|told": "",
    r"what there is|what lies|what comes|as it was": "",
    r"stands?|stood|lies|lay": r"stands? for|stand-in",
    r"goes on|go on|going on|went on|begins?|began|begun": "",
    r"(is|are|was|were|be) no": r"there (is|are|was|were|will be) no|(is|are|was|were|be) no (longer|more|one)",
    r"means|ways?": r"(means|ways?) (that|of)|(this|which|that|it|value|default|empty|zero|0) means|by way of"
    r"|means? (and|over|per|are|is)|by means of|either way|the same way",
    r"places?": r"in place|in-place|takes? place|in its place|in the first place|decimal places?",
}
SHAKESPEARE = r"This way will I|Here stand I|stand close, the queen is coming"  # lines of the plays, in rules and tests


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """Yields line number and text of each comment, string and test name of a Python file, or of Markdown outside code."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        text = re.sub(r"```.*?```", lambda code: "\n" * code[0].count("\n"), text, flags=re.DOTALL)
        yield from enumerate(text.splitlines(), 1)
        return
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            for number, line in enumerate(node.value.splitlines()):
                yield node.lineno + number, line
        elif isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            yield node.lineno, node.name.replace("_", " ")


def avoided_words(line: str) -> list[str]:
    """The words in a line that the glossary replaces."""
    line = re.sub(r"`[^`]*`|" + SHAKESPEARE, "", line)
    hits = []
    for avoided, allowed in AVOIDED.items():
        spans = [match.span() for match in re.finditer(rf"\b({allowed})\b", line, re.IGNORECASE)] if allowed else []
        for match in re.finditer(rf"\b({avoided})\b", line, re.IGNORECASE):
            if not any(start <= match.start() and match.end() <= end for start, end in spans):
                hits.append(match[0])
    return hits


FOLDERS = "minigpt_jax", "configs", "scripts", "tests"
SOURCES = [
    *ROOT.glob("*.md"),
    *(path for folder in FOLDERS for kind in ("py", "md") for path in (ROOT / folder).rglob(f"*.{kind}")),
]
SOURCES.remove(Path(__file__).resolve())


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_prose_uses_plain_words(path):
    found = [f"line {number}: {words} in {line.strip()!r}" for number, line in prose(path) if (words := avoided_words(line))]
    assert found == []


@pytest.mark.parametrize(
    "line, hits",
    [
        ("The model is built anew, and begins again.", ["anew", "begins"]),
        ("There is no GPU: this means that the CPU is used; it is no problem.", ["is no"]),
        ("One letter stands for a dimension; the rest lies in a folder.", ["lies"]),
        ("The wheel `begins` in place, always, halfway.", []),
    ],
)
def test_the_words_are_recognised(line, hits):
    assert avoided_words(line) == hits
