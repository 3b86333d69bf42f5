"""docs/messages.md lists the messages of the code: each is there, and nothing that the code no longer says.

A message is found where it is raised, said or printed; what it fills in is a <placeholder> on both sides.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "messages.md").read_text()
#: Stands for what a message fills in.
HOLE = "\x00"
#: Exceptions and functions with the positions of their arguments that people read.
RAISED = {
    "ValueError", "RowError", "ReplicaError", "StartFailed", "OSError", "ConnectionError", "FileNotFoundError",
    "RuntimeError", "OutOfMemoryError", "NoPicture", "StoredLatentsGone", "GangLost", "InputsMissing",
}  # fmt: skip
SAID = {name: slice(0, 1) for name in (*RAISED, "say", "echo", "print", "warning", "_drain")} | {
    "Problem": slice(2, 4), "need": slice(3, 4), "named": slice(1, 2),
}  # fmt: skip
#: Arguments by name, and functions all of whose returned texts are read.
NAMED = {"message", "unreadable", "should_stop"}
RETURNED = {"_wrong_clip", "overdue", "check_lora", "submit_once", "messages", "duplicate_id", "size_problems"}
#: An engine for tests; what it says never reaches a user.
LEFT_OUT = {"ltx_ray/engine/fake.py"}


def sources() -> list[Path]:
    files = [*(ROOT / "ltx_ray").rglob("*.py"), *(ROOT / "jobs").glob("*.py")]
    return sorted(path for path in files if str(path.relative_to(ROOT)) not in LEFT_OUT)


def normal(text: str) -> str:
    """What a template is compared by: holes for <placeholders>, single spaces, no case marks of its own."""
    text = re.sub(r"<[^<>\n]*>", HOLE, text)
    return re.sub(rf"{HOLE}+", HOLE, " ".join(text.split()))


def worded(template: str) -> bool:
    """Whether it says something besides what it fills in and passes on."""
    return len(re.sub(r"[^A-Za-z]", "", template.removeprefix("error: "))) >= 3


class Finder(ast.NodeVisitor):
    """Templates of the messages in one file, with the lines where they begin."""

    def __init__(self, tree: ast.Module):
        self.found: dict[str, int] = {}
        self._constants = {
            node.targets[0].id: node.value.value
            for node in tree.body
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
            and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        }  # fmt: skip
        self._functions: list[ast.AST] = []
        self.visit(tree)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._functions.append(node)
        if node.name in RETURNED:
            for inner in ast.walk(node):
                # a dictionary has its messages as keys, a pair as the last, a triple of a problem too
                if isinstance(inner, ast.Dict):
                    self._take(inner.keys)
                elif isinstance(inner, ast.Tuple) and len(inner.elts) in (2, 3):
                    self._take(inner.elts[-1:])
                elif isinstance(inner, ast.Return) and not isinstance(inner.value, ast.Tuple):
                    self._take([inner.value])
        self.generic_visit(node)
        self._functions.pop()

    def visit_Call(self, node: ast.Call) -> None:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in SAID and not any(isinstance(arg, ast.Starred) for arg in node.args):
            # OSError(errno, text)
            self._take(node.args[1:2] if name in RAISED and len(node.args) > 1 else node.args[SAID[name]])
        self._take([keyword.value for keyword in node.keywords if keyword.arg in NAMED])
        self.generic_visit(node)

    def _take(self, expressions: list[ast.expr | None]) -> None:
        for expression in expressions:
            for text in self.texts(expression, follow=True) if expression is not None else ():
                template = normal(text)
                if worded(template):
                    self.found.setdefault(template, expression.lineno)

    def texts(self, node: ast.expr, follow: bool = False) -> Iterator[str]:
        """What an expression may read as. follow: names of local texts too."""
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield re.sub(r"%[sd]", HOLE, node.value)
        elif isinstance(node, ast.JoinedStr):
            yield "".join(self._part(value) for value in node.values)
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            # what may follow is filled in
            yield next(self.texts(node.left), HOLE) + (HOLE if isinstance(node.right, ast.IfExp) else "".join(
                list(self.texts(node.right))[:1] or [HOLE]
            ))  # fmt: skip
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
                targets = inner.targets if isinstance(inner, ast.Assign) else ()
                if any(isinstance(target, ast.Name) and target.id == node.id for target in targets):
                    yield from self.texts(inner.value)

    def _part(self, value: ast.expr) -> str:
        if isinstance(value, ast.Constant):
            return value.value
        name = value.value.id if isinstance(value.value, ast.Name) else ""
        return self._constants.get(name, HOLE)


def said() -> dict[str, str]:
    """Templates of the code, with a place of each."""
    found = {}
    for path in sources():
        finder = Finder(ast.parse(path.read_text()))
        found |= {template: f"{path.relative_to(ROOT)}:{line}" for template, line in finder.found.items()}
    from ltx_ray.columns import COLUMNS

    return {normal(column.legal): f"the column {column.name}" for column in COLUMNS.values()} | found


def listed() -> list[str]:
    """First cells of the tables of the document, which quote a message each."""
    rows = [line for line in TEXT.splitlines() if re.match(r"\| `", line)]
    return [normal(re.match(r"\| (`+)(.*?)\1 \|", row)[2].strip()) for row in rows]


def test_every_message_has_a_line():
    there = set(listed())
    missing = [f"{place}: {template.replace(HOLE, '<…>')}" for template, place in said().items() if template not in there]
    assert missing == [], "\n".join(missing)


def test_no_line_is_stale_or_twice():
    found, lines = said(), listed()
    stale = [line.replace(HOLE, "<…>") for line in lines if line not in found]
    assert stale == [], "\n".join(stale)
    assert sorted(lines) == sorted(set(lines))


def test_every_line_says_when_what_to_do_and_the_exit_code():
    for row in re.findall(r"^\| `.*", TEXT, re.MULTILINE):
        cells = [cell.strip() for cell in row.strip("|").split(" | ")]
        assert len(cells) == 4 and all(cells), row
        assert re.fullmatch(r"[0-4](, [0-4])*|–", cells[3].rstrip("| ")), row
    assert len(listed()) > 200
