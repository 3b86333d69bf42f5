"""The house rules of CONTRIBUTING.md that can be read off the source."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LONGEST_FUNCTION, LONGEST_FILE = 70, 500
#: A display of at least this many entries is a table of constants, which does not count towards a function's length.
TABLE = 10
CODE = [path for folder in ("ltx_ray", "jobs", "scripts") for path in sorted((ROOT / folder).rglob("*.py"))]
TESTS = sorted((ROOT / "tests").rglob("*.py"))
FOLDERS = (".ci", ".github", "cluster", "docs", "jobs", "ltx_ray", "scripts", "tests")

#: Class names of earlier versions that must not come back: each meant several things, or nothing to a stranger.
OLD_CLASSES = (
    "Books Work Line Joined Verdict Crew RayCrew SimulatedCrew News Started Answered Lost Wanted Replicas Room Problem "
    "RecipeBook Done Patience Records Start PlacedImage Residence"
).split()
#: Module names of earlier versions, as the last part of an import. Elsewhere `done` or `apply` are English words.
OLD_MODULES = (
    "actors ahead apply books chosen cliprun crew diffusersfiles diffusersnames directory dit_peers done fakedrive "
    "fakework headers imagefiles line lorafiles metrics modelfiles mux news patience realfiles realsize residence "
    "singlefile start tables transformerkeys"
).split()
#: Words that may not even be a part of a name.
OLD_WORDS = "books crew crews news patience residence mobile".split()
#: English adverbs that were names; they may be a part of one (`read_ahead`, `test_they_are_told_apart`).
OLD_NAMES = (*OLD_CLASSES, "ahead", "aside", "apart", "alike")


def place(path: Path, line: int | None = None) -> str:
    return path.relative_to(ROOT).as_posix() + (f":{line}" if line else "")


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without those of the tables in it."""
    lines = set(range(function.lineno, function.end_lineno + 1))
    for node in ast.walk(function):
        if len(getattr(node, "keys", getattr(node, "elts", ()))) >= TABLE:
            lines -= set(range(node.lineno + 1, node.end_lineno + 1))
    return len(lines)


def identifiers(path: Path) -> Iterator[tuple[str, int]]:
    """(name, line) of every name that a file defines or uses, without those that it imports."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Name):
            yield node.id, node.lineno
        elif isinstance(node, ast.Attribute):
            yield node.attr, node.lineno
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, node.lineno
        elif isinstance(node, ast.arg | ast.keyword) and node.arg:
            yield node.arg, node.lineno


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """(dotted name, line) of every module that a file imports, and of every name that it imports from one."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, node.lineno
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


@cache
def words(name: str) -> set[str]:
    """The words of a snake_case or CamelCase name, in lower case."""
    return {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)}


def texts() -> Iterator[tuple[Path, str]]:
    """Every text file of the project."""
    below = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*"))]
    for path in [*ROOT.glob("*.md"), ROOT / "pyproject.toml", ROOT / ".pre-commit-config.yaml", *below]:
        if path.is_file() and "__pycache__" not in path.parts:
            try:
                yield path, path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue


def test_at_most_six_modules_stand_at_the_root():
    assert len([path for path in (ROOT / "ltx_ray").glob("*.py") if path.name != "__init__.py"]) <= 6


def test_no_function_is_too_long():
    long = [(place(path, f.lineno), f.name, length(f)) for path in CODE for f in functions(path)]
    assert [found for found in long if found[-1] > LONGEST_FUNCTION] == []


def test_no_file_is_too_long():
    lengths = {place(path): path.read_text(encoding="utf-8").count("\n") for path in CODE}
    assert {name: lines for name, lines in lengths.items() if lines > LONGEST_FILE} == {}


def test_no_name_is_one_of_the_old():
    found = [
        f"{place(path, line)} {name}"
        for path in [*CODE, *TESTS]
        for name, line in identifiers(path)
        if path != Path(__file__).resolve() and (name.strip("_") in OLD_NAMES or words(name) & {*OLD_WORDS})
    ]
    assert found == [], "\n".join(found)


def test_no_old_module_is_imported_or_named():
    imported = [
        f"{place(path, line)} {name}" for path in [*CODE, *TESTS] for name, line in imports(path)
        if name.startswith(("ltx_ray.", "scripts.")) and name.rpartition(".")[2] in OLD_MODULES
    ]  # fmt: skip
    assert imported == [], "\n".join(imported)
    file = re.compile(rf"(?<![\w/])(?:{'|'.join(OLD_MODULES)})\.py\b")
    named = [f"{place(path)} {match[0]}" for path, text in texts() for match in file.finditer(text)]
    assert named == [], "\n".join(named)


def test_no_file_cites_a_document_from_elsewhere():
    # put together, so that this file cites none
    outside = re.compile(
        "|".join((r"ltx-" + "facts", r"\bshared" + "/", r"\bshared " + "facts", r"\bdesign" + r"\.md"))
    )
    found = [f"{place(path)}: {match[0]}" for path, text in texts() for match in outside.finditer(text)]
    assert found == [], "\n".join(found)


@pytest.mark.parametrize("folder", ["unit", "parity", "integration", "chaos", "gpu", "support"])
def test_tests_do_not_import_from_tests(folder):
    for path in sorted((ROOT / "tests" / folder).rglob("*.py")):
        for name, line in imports(path):
            if name.startswith("tests."):
                parts = name.split(".")
                assert not any(part.startswith("test_") for part in parts), place(path, line)
                assert folder != "unit" or parts[1] in ("support", "unit"), f"{place(path, line)} imports {name}"


def test_no_files_import_each_other_in_a_circle():
    """Imports for type checkers count: what two files share belongs in a third."""
    package = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for path in CODE
        if path.is_relative_to(ROOT / "ltx_ray")
    }
    imports = {module: set() for module in package}
    for module, path in package.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
                imports[module].update(name for name in names if name in package)
    ended: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in ended:
            for imported in imports[module]:
                visit(imported, (*path, module))
            ended.add(module)

    for module in package:
        visit(module, ())
