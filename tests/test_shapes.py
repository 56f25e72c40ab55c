"""Shape suffixes are correct: each einsum string matches the suffixes of its operands and of its result."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "minigpt_jax").rglob("*.py"))
SUFFIX = re.compile(r"_([A-Z]+)$")


def suffix(node: ast.AST) -> str | None:
    """BTHK for q_BTHK, self.q_BTHK or q_BTHK.astype(…); None without a name or a suffix."""
    if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "astype":
        return suffix(node.func.value)
    name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
    return match[1] if (match := SUFFIX.search(name)) else None


def einsums(source: str):
    """(line, string, suffixes of the operands, suffix of the result's name) of every einsum."""
    tree = ast.parse(source)
    targets = {
        id(node.value): node.targets[0] if isinstance(node, ast.Assign) else node.target
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign | ast.AugAssign)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "einsum":
            string, *operands = node.args
            target = targets.get(id(node))
            yield node.lineno, string.value, [suffix(operand) for operand in operands], target and suffix(target)


def mismatches(source: str) -> list[int]:
    """Lines with an einsum whose string does not match the suffixes."""
    lines = []
    for line, string, operands, target in einsums(source):
        inputs, output = string.replace(" ", "").split("->")
        pairs = [*zip(inputs.split(","), operands, strict=False), (output, target)]
        if any(name not in (None, letters) for letters, name in pairs):
            lines.append(line)
    return lines


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT / "minigpt_jax").as_posix())
def test_einsum_strings_match_the_suffixes(path):
    assert mismatches(path.read_text(encoding="utf-8")) == []


def test_mismatches_are_detected():
    assert sum(len(list(einsums(path.read_text(encoding="utf-8")))) for path in FILES) > 10
    assert mismatches("o_BTHK = jnp.einsum('BHTS,BSHK->BTHK', weights_BHTS, v_BSHK)") == []
    assert mismatches("o_BTHK = jnp.einsum('BHTS,BSHK->BTHK', weights_BHST, v_BSHK)") == [1]
    assert mismatches("o_BHTK = jnp.einsum('BHTS,BSHK->BTHK', weights_BHTS, v_BSHK)") == [1]
    assert mismatches("\nf(jnp.einsum('BHTS,BSHK->BTHK', self.weights_BHTS[0], v_BTHK.astype(float)))") == [2]
