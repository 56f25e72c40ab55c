"""Shape suffixes are correct: each einsum string matches the suffixes of its operands and of its result."""

import ast
import itertools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "minigpt_jax").rglob("*.py"))
SUFFIX = re.compile(r"_([A-Z0-9]+)$")


def suffix(node: ast.AST) -> str | None:
    """BTHK for q_BTHK, self.q_BTHK, q_BTHK.astype(…) or q_NBTHK[i]; None without a name or a suffix."""
    if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "astype":
        return suffix(node.func.value)
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Name | ast.Constant):
        return (suffix(node.value) or "")[1:] or None
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


def fits(letters: str, name: str | None) -> bool:
    """Whether a name's suffix has these letters; in place of a small letter a digit, as in matrices_B22."""
    return name is not None and re.fullmatch(re.sub("[a-z]", "[0-9]", letters), name) is not None


def mismatches(source: str) -> list[int]:
    """Lines with an einsum whose string does not match the suffixes. Each operand must have one."""
    lines = []
    for line, string, operands, target in einsums(source):
        inputs, output = string.replace(" ", "").split("->")
        pairs = itertools.zip_longest(inputs.split(","), operands, fillvalue="")
        if not all(itertools.starmap(fits, pairs)) or not (target is None or fits(output, target)):
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
    assert mismatches("o_BTK = jnp.einsum('BTS,BSK->BTK', weights_NBTS[i], v_NBSK[0])") == []
    assert mismatches("jnp.einsum('BTS,BSK->BTK', weights, v_BSK)") == [1]
    assert mismatches("jnp.einsum('BTS,BSK->BTK', *pair)") == [1]
    assert mismatches("x_BT2 = jnp.einsum('Bij,BTj->BTi', matrices_B22, x_BT2)") == []
    assert mismatches("x_BT2 = jnp.einsum('Bij,BTj->BTi', matrices_BDD, x_BT2)") == [1]
    assert mismatches("\nf(jnp.einsum('BHTS,BSHK->BTHK', self.weights_BHTS[0], v_BTHK.astype(float)))") == [2]
