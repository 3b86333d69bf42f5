"""docs/messages.md lists exactly the messages of the code.

A message is found where it is raised, logged or printed. What it fills in is a <placeholder> on both sides.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from ltx_ray.manifest.columns import COLUMNS

ROOT = Path(__file__).resolve().parents[3]
TEXT = (ROOT / "docs" / "messages.md").read_text()
#: The mark of a placeholder.
HOLE = "\x00"
RAISED = {
    "ValueError", "RowError", "WrongDevice", "ReplicaError", "StartFailed", "OSError", "ConnectionError",
    "FileNotFoundError", "RuntimeError", "OutOfMemoryError", "InvalidImage", "StoredLatentsGone", "GangLost",
    "FileReplaced", "InputsMissing", "UnreadablePart", "StoreUnavailable", "NotFinite", "UnfitNode",
}  # fmt: skip
#: Functions and classes that take messages, with the position of these among the arguments.
SAID = {name: slice(0, 1) for name in (*RAISED, "say", "echo", "print", "warning", "_drain")} | {
    "RowProblem": slice(2, 4), "Finding": slice(2, 4), "require": slice(3, 4), "with_context": slice(1, 2),
    "wrong": slice(0, 2), "wrong_row": slice(2, 4), "refused": slice(0, 1),
}  # fmt: skip
#: Keyword arguments that take messages, and functions that return some.
NAMED = {"message", "unreadable"}
RETURNED = {"messages", "overdue", "check_lora", "submit_once", "size_problems", "cost_line", "space_warning"} | {
    "clip_or_problem", "_wrong_clip", "summary_line", "_state", "_foreign", "taken_out", "_why_stop",
} | {"_unlike_claims", "_difference", "card_failed", "told", "rows_text", "retry_line"}  # fmt: skip
#: The fake engine is left out: only tests see its messages.
FILES = {*(ROOT / "ltx_ray").rglob("*.py"), *(ROOT / "jobs").glob("*.py")} - {ROOT / "ltx_ray" / "engine" / "fake.py"}


def normal(text: str) -> str:
    """The form in which templates are compared: marks for <placeholders>, single spaces."""
    return re.sub(rf"{HOLE}+", HOLE, " ".join(re.sub(r"<[^<>\n]*>", HOLE, text).split()))


def worded(template: str) -> bool:
    """Whether the template has words of its own besides what it fills in."""
    return len(re.sub(r"[^A-Za-z]", "", template.removeprefix("error: "))) >= 3


class Finder(ast.NodeVisitor):
    """Collects the templates of the messages in one file, with the lines where they begin."""

    def __init__(self, tree: ast.Module):
        self.found: dict[str, int] = {}
        self._constants: dict[str, str] = {}
        for node in tree.body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
                self._constants |= {t.id: str(node.value.value) for t in node.targets if isinstance(t, ast.Name)}
        self._functions: list[ast.AST] = []
        self.visit(tree)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._functions.append(node)
        for inner in ast.walk(node) if node.name in RETURNED else ():
            # A dictionary has messages as its keys; a pair or a problem, as its last element.
            if isinstance(inner, ast.Dict):
                self._take(inner.keys)
            elif isinstance(inner, ast.Return):
                self._take(inner.value.elts[-1:] if isinstance(inner.value, ast.Tuple) else [inner.value])
            elif isinstance(inner, ast.Tuple) and len(inner.elts) == 3:
                self._take(last for last in inner.elts[-1:] if not isinstance(last, ast.Constant))
        self.generic_visit(node)
        self._functions.pop()

    def visit_Call(self, node: ast.Call) -> None:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in SAID and not any(isinstance(arg, ast.Starred) for arg in node.args):
            # As in OSError(errno, text).
            self._take(node.args[1:2] if name in RAISED and len(node.args) > 1 else node.args[SAID[name]])
        self._take(keyword.value for keyword in node.keywords if keyword.arg in NAMED)
        self.generic_visit(node)

    def _take(self, expressions: Iterable[ast.expr | None]) -> None:
        for expression in expressions:
            for template in map(normal, self.texts(expression, follow=True)):
                if worded(template):
                    self.found.setdefault(template, expression.lineno)

    def texts(self, node: ast.expr | None, follow: bool = False) -> Iterator[str]:
        """The texts that an expression may give; with `follow`, also those assigned to a local name."""
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield re.sub(r"%[sd]", HOLE, node.value)
        elif isinstance(node, ast.JoinedStr):
            yield "".join(self._part(value) for value in node.values)
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            # An optional end counts as filled in.
            right = () if isinstance(node.right, ast.IfExp) else self.texts(node.right)
            yield next(self.texts(node.left), HOLE) + next(iter(right), HOLE)
        elif isinstance(node, ast.IfExp):
            yield from self.texts(node.body, follow)
            yield from self.texts(node.orelse, follow)
        elif isinstance(node, ast.Lambda):
            yield from self.texts(node.body)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "rstrip":
            yield from self.texts(node.func.value)
        elif isinstance(node, ast.Name) and node.id in self._constants:
            yield self._constants[node.id]
        elif isinstance(node, ast.Name) and follow and self._functions:
            for inner in ast.walk(self._functions[-1]):
                if isinstance(inner, ast.Assign) and any(getattr(t, "id", None) == node.id for t in inner.targets):
                    yield from self.texts(inner.value)

    def _part(self, value: ast.expr) -> str:
        if isinstance(value, ast.Constant):
            return value.value
        text = self._constants.get(value.value.id, "") if isinstance(value.value, ast.Name) else ""
        return text if worded(text) else HOLE


def said() -> dict[str, str]:
    """The templates of the code, with one place of each."""
    found = {normal(column.legal): f"the column {column.name}" for column in COLUMNS.values()}
    for path in sorted(FILES):
        lines = Finder(ast.parse(path.read_text())).found
        found |= {template: f"{path.relative_to(ROOT)}:{line}" for template, line in lines.items()}
    return found


def listed() -> list[str]:
    """The messages in the first cells of the document's tables."""
    return [normal(quoted) for _, quoted in re.findall(r"^\| (`+)(.*?)\1 \|", TEXT, re.MULTILINE)]


def test_every_message_has_a_line():
    there, found = set(listed()), said()
    missing = [f"{found[text]}: {text.replace(HOLE, '<…>')}" for text in found if text not in there]
    assert missing == [], "\n".join(missing)


def test_no_line_is_stale_or_twice():
    found, lines = said(), listed()
    stale = [line.replace(HOLE, "<…>") for line in lines if line not in found]
    assert stale == [], "\n".join(stale)
    assert sorted(lines) == sorted(set(lines)) and len(lines) > 200


def test_messages_that_other_pages_quote_are_listed():
    """A quoted message has a placeholder; its beginning or its end may be left out with an ellipsis."""
    there = "\n".join(listed())
    for page in ("runbook", "security"):
        text = " ".join((ROOT / "docs" / f"{page}.md").read_text().split())
        quoted = [span for span in re.findall(r"`([^`]*)`", text) if re.search(r"[a-z] .*<\w+>|<\w+>[^/]* [a-z]", span)]
        assert quoted and [span for span in quoted if normal(span).strip("… ") not in there] == []


def test_every_line_says_when_what_to_do_and_the_exit_code():
    for row in re.findall(r"^\| `.*", TEXT, re.MULTILINE):
        cells = [cell.strip() for cell in row.strip("|").split(" | ")]
        assert len(cells) == 4 and all(cells) and re.fullmatch(r"[0-4](, [0-4])*|–", cells[3]), row
