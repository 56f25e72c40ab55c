"""Every snippet of the guide and of the page on NNX runs, each column of the guide as one program."""

import contextlib
import io
import re
import warnings
from pathlib import Path

import pytest

from minigpt_jax import compare

pytestmark = pytest.mark.e2e

PAGES = Path(compare.__file__).parent
GUIDE, NNX = ((PAGES / name).read_text(encoding="utf-8") for name in ("guide.md", "linen_and_nnx.md"))
ROWS = re.findall(r"<tr><td>\n(.*?)\n</td><td>\n(.*?)\n</td></tr>", GUIDE, re.DOTALL)
TOPICS = re.findall(r'<tr><td colspan="2">\n\n\*\*(.*?)\.\*\*', GUIDE)


def snippets(text):
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def before_and_after_the_table(text):
    before, _, after = re.split(r"(?s)(<table>.*</table>)", text)
    return snippets(before), snippets(after)


def execute(snippets):
    namespace = {}
    with contextlib.redirect_stdout(io.StringIO()):
        for number, snippet in enumerate(snippets):
            exec(compile(snippet, f"snippet {number}", "exec"), namespace)


def test_each_topic_has_a_snippet_in_both_columns():
    assert TOPICS == [
        "Parameters", "The model", "Initialisation", "Randomness", "Training and evaluation", "Gradients", "The optimizer",
        "A training step", "Compilation", "Devices", "Saving", "Sampling", "Debugging",
    ]  # fmt: skip
    assert len(ROWS) == len(TOPICS)
    for ours, theirs in ROWS:
        assert len(snippets(ours)) == len(snippets(theirs)) == 1
        assert "assert" in ours
        assert "assert" in theirs
        assert ours.count("\n") == theirs.count("\n")  # so that both columns align


@pytest.mark.slow
def test_the_jax_column_runs():
    [setup], _ = before_and_after_the_table(GUIDE)
    execute([setup, *(snippet for ours, _ in ROWS for snippet in snippets(ours))])


def test_the_pytorch_column_runs():
    pytest.importorskip("torch")
    [setup], _ = before_and_after_the_table(GUIDE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's own warnings
        execute([setup, *(snippet for _, theirs in ROWS for snippet in snippets(theirs))])


def test_defaults_match_the_table():
    pytest.importorskip("torch")
    _, [checks] = before_and_after_the_table(GUIDE)
    execute([checks])


def test_linen_and_nnx_compute_the_same():
    [snippet] = snippets(NNX)
    execute([snippet])
