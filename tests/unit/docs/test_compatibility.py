"""docs/compatibility.md: its tests exist, its messages are those of the code, and no cell is empty."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
TEXT = (ROOT / "docs" / "compatibility.md").read_text()
QUOTED = re.compile(r"(?<!`)`([^`]+)`")
#: file::function, optionally followed by a case
REFERENCE = re.compile(r"([\w/]+\.py)::(\w+)(?:\[([^\]]+)\])?")
#: A message with less fixed text than this would match anything; it must be in the test that its cell names.
LEAST_FIXED = 16
#: In the document, a filled-in part is a <placeholder> or one word.
FILLED = r"(?:<[^<>]+>|\S+)"


def cells() -> list[str]:
    """The cells of all tables, without the first of each row."""
    found = []
    for line in TEXT.splitlines():
        if line.startswith("|") and not line.startswith(("| ---", "|---")):
            found += [cell.strip() for cell in line.strip().strip("|").split("|")[1:]]
    return found


def references(text: str) -> list[tuple[str, str, str | None]]:
    """(file, function, case) in the order of the text; a bare case belongs to the function before it."""
    found: list[tuple[str, str, str | None]] = []
    for quoted in QUOTED.findall(text):
        if match := REFERENCE.fullmatch(quoted):
            found.append((match[1], match[2], match[3]))
        elif found and (case := re.fullmatch(r"\[([^\]]+)\]", quoted)):
            found.append((*found[-1][:2], case[1]))
    return found


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def templates() -> list[re.Pattern]:
    """The patterns of all strings in the package that could be messages."""
    found = []
    for path in sorted((ROOT / "ltx_ray").rglob("*.py")):
        tree = parsed(path)
        constants = {
            node.targets[0].id: node.value.value
            for node in tree.body
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and _is_text(node.value)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                parts = [_part(value, constants) for value in node.values]
            elif _is_text(node):
                parts = [node.value]
            else:
                continue
            if sum(len(part) for part in parts if part) >= LEAST_FIXED:
                found.append(re.compile("".join(FILLED if part is None else re.escape(part) for part in parts)))
    return found


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _part(node: ast.expr, constants: dict[str, str]) -> str | None:
    if isinstance(node, ast.Constant):
        return node.value
    assert isinstance(node, ast.FormattedValue)
    return constants.get(node.value.id) if isinstance(node.value, ast.Name) else None


HEADS = {
    cell.strip() for before, after in zip(TEXT.splitlines(), TEXT.splitlines()[1:]) if after.startswith("| ---")
    for cell in before.strip("|").split("|")
}  # fmt: skip


def test_every_cell_names_a_test():
    bodies = [cell for cell in cells() if cell not in HEADS]
    assert len(bodies) > 80
    assert [cell for cell in bodies if not references(cell)] == []


@pytest.mark.parametrize("file", sorted({file for file, *_ in references(TEXT)}))
def test_the_tests_are_there(file):
    """A case must be named in its test file or be that of a golden."""
    tree = parsed(ROOT / "tests" / file)
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    words = {node.value for node in ast.walk(tree) if _is_text(node)}
    goldens = {path.stem for path in (ROOT / "tests" / "parity" / "goldens").glob("*.safetensors")}
    named = [(function, case) for path, function, case in references(TEXT) if path == file]
    assert {function for function, _ in named if function.startswith("test_")} <= functions
    assert all(function.startswith("test_") for function, _ in named)
    assert [case for _, case in named if case is not None and case not in words | goldens] == []


def refusals() -> list[tuple[str, str]]:
    """(message, cell) of every refusal."""
    return [(match[1], cell) for cell in cells() for match in re.finditer(r"refused: `([^`]+)`", cell)]


@pytest.mark.parametrize("message", sorted({message for message, _ in refusals()}))
def test_refusals_are_the_codes(message):
    if any(template.fullmatch(message) for template in templates()):
        return
    tests = {file for said, cell in refusals() if said == message for file, *_ in references(cell)}
    assert any(message in (ROOT / "tests" / file).read_text() for file in tests), "neither in the code nor in its test"
    assert "<" not in message


def test_every_refusal_quotes_its_message_and_nothing_else_is_quoted():
    said = [message for message, _ in refusals()]
    assert TEXT.count("refused:") == len(said) > 30
    quoted = [text for cell in cells() for text in QUOTED.findall(cell) if " " in text and not text.startswith("[")]
    assert sorted(quoted) == sorted(said)
