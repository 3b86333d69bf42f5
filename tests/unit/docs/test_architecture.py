"""docs/architecture.md: its tree is the folders, its layers are the import contract, and what it names is there."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PACKAGE = ROOT / "ltx_ray"
TEXT = (ROOT / "docs" / "architecture.md").read_text()


def section(title: str) -> str:
    return TEXT.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def indented(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("    ")]


def test_the_tree_is_the_folders():
    lines = indented(section("The tree"))
    inside = {line.split()[0] for line in lines if line.startswith("      ")}
    modules = {path.name for path in PACKAGE.glob("*.py")} - {"__init__.py"}
    packages = {f"{path.parent.name}/" for path in PACKAGE.glob("*/__init__.py")}
    assert inside == modules | packages
    outside = {line.split()[0] for line in lines if not line.startswith("      ")} - {"ltx_ray/"}
    tracked = {f"{path.name}/" for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith((".", "_"))}
    assert outside <= tracked and {"jobs/", "cluster/", "scripts/", "tests/", "docs/"} <= outside


def test_the_layers_are_the_import_contract():
    with open(ROOT / "pyproject.toml", "rb") as file:
        contracts = tomllib.load(file)["tool"]["importlinter"]["contracts"]
    (layers,) = (contract["layers"] for contract in contracts if contract["type"] == "layers")
    written = [set(re.findall(r"\w+", line)) for line in indented(section("Who may import whom"))]
    assert written == [set(re.findall(r"\w+", layer)) for layer in layers]


def test_files_and_names_are_there():
    files = re.findall(r"`(?:ltx_ray/)?((?:\w+/)?\w+\.py)`", TEXT)
    assert len(files) > 30
    missing = [f for f in files if not list(PACKAGE.glob(f"**/{f}")) and not list((ROOT / "tests").glob(f"**/{f}"))]
    assert not missing
    for file, name in re.findall(r"`(\w+/\w+\.py)` `([\w.]+)`", TEXT):
        *owner, function = name.split(".")
        body = ast.parse((PACKAGE / file).read_text()).body
        if owner:
            (body,) = (node.body for node in body if isinstance(node, ast.ClassDef) and node.name == owner[0])
        names = {node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        assert function in names, f"{file} has no {name}"


def test_types_of_the_glossary_are_there():
    named = set(re.findall(r"\(`(\w+)`\)", section("Glossary")))
    assert len(named) >= 8
    defined = {
        node.name for path in PACKAGE.rglob("*.py") for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef)
    }  # fmt: skip
    assert named <= defined
