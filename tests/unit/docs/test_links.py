"""Every link of the documents leads somewhere, and so does every section that a docstring cites."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = [path for folder in ("ltx_ray", "jobs", "scripts", "tests") for path in sorted((ROOT / folder).rglob("*.py"))]
LINK = re.compile(r"\]\(([^()\s]+)\)")
CITED = re.compile(r"\bdocs/([\w.-]+?\.md)(?:#([\w-]+))?")


@cache
def anchors(path: Path) -> set[str]:
    """Of the headings of a document, as GitHub makes them."""
    found: set[str] = set()
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    for heading in re.findall(r"^#+ +(.*?) *$", text, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower()
        anchor = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        number = sum(re.fullmatch(rf"{re.escape(anchor)}(-\d+)?", other) is not None for other in found)
        found.add(f"{anchor}-{number}" if number else anchor)
    return found


def leads_nowhere(document: Path, target: str) -> bool:
    file, _, anchor = target.partition("#")
    path = (document.parent / file).resolve() if file else document
    return not path.exists() or (bool(anchor) and anchor not in anchors(path))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_resolves(document):
    text = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    targets = [target for target in LINK.findall(text) if not re.match(r"[a-z]+:", target)]
    assert [target for target in targets if leads_nowhere(document, target)] == []


def test_every_citation_of_a_document_resolves():
    cited = [(path, match) for path in [*SOURCES, *DOCUMENTS] for match in CITED.finditer(path.read_text())]
    missing = [
        f"{path.relative_to(ROOT)}: {match[0]}" for path, match in cited
        if leads_nowhere(ROOT / "docs" / "any.md", match[1] + (f"#{match[2]}" if match[2] else ""))
    ]  # fmt: skip
    assert missing == [], "\n".join(missing)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= 1200
