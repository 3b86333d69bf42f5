"""What the documents say of commands, options and folders exists."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

from ltx_ray.cli.app import app

ROOT = Path(__file__).resolve().parents[3]
PAGES = [
    "README.md", "docs/manifest.md", "docs/gpus.md", "docs/operations.md", "docs/cluster.md", "docs/schedules.md",
    "docs/storage.md", "docs/monitoring.md", "docs/failure-model.md", "docs/security.md", "docs/sizing.md",
    "docs/runbook.md", "docs/first-runs.md",
]  # fmt: skip
#: Programs of the project; their options are those that their source names.
PROGRAM = re.compile(r"(?<![\w/])(?:scripts|jobs|cluster)/[\w./]*\w")
PROGRAMS = [path for folder in ("scripts", "jobs", "cluster") for path in (ROOT / folder).iterdir() if path.is_file()]
#: Options of other programs.
FOREIGN = {
    "ray": {"--working-dir", "--address"}, "kubectl": {"--from-file", "--from"}, "scancel": {"--batch", "--signal"},
    "sbatch": {"--nodes", "--partition", "--time"}, "curl": {"--max-time"},
}  # fmt: skip
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


@cache
def commands() -> dict[str, set[str]]:
    """Each command of `ltx-ray` with its options."""
    return {
        name: {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
        for name, command in app.commands.items()
    }


@cache
def options_of(program: Path) -> set[str]:
    return options(program.read_text())


def options(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))


def spans(text: str) -> list[str]:
    """Quoted code, and the lines of shell blocks without their comments; a backslash joins lines."""
    blocks = [block.replace("\\\n", " ") for language, block in FENCE.findall(text) if language in ("bash", "")]
    lines = [line.partition("  #")[0] for block in blocks for line in block.splitlines()]
    return lines + re.findall(r"`([^`\n]+)`", FENCE.sub("", text))


def legal(span: str) -> set[str]:
    """The options that a span may have: of the commands that it calls, or of any when it calls none."""
    if names := re.findall(r"\bltx-ray ([a-z]+)", span):
        names += ["render"] if "submit" in names else []  # whose arguments follow those of submit
        return {"--help"}.union(*(commands()[name] for name in names))
    called = [ROOT / program for program in PROGRAM.findall(span) if (ROOT / program).is_file()]
    found = {"--help"}.union(*commands().values(), *map(options_of, called or PROGRAMS))
    return found.union(*(flags for word, flags in FOREIGN.items() if re.search(rf"\b{word}\b", span)))


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_options_exist(page):
    quoted = spans((ROOT / page).read_text())
    named = {match[1] for span in quoted for match in re.finditer(r"\bltx-ray ([a-z]+)\b", span)}
    assert named <= set(commands())
    unknown = {span: left for span in quoted if (left := options(span) - legal(span))}
    assert unknown == {}


@pytest.mark.parametrize("page", PAGES)
def test_the_programs_exist(page):
    named = {program for span in spans((ROOT / page).read_text()) for program in PROGRAM.findall(span)}
    assert {program for program in named if not (ROOT / program).exists()} == set()


def test_the_tree_of_the_readme_has_every_folder():
    section = (ROOT / "README.md").read_text().partition("## Where things are")[2].partition("\n## ")[0]
    heads = [line.split(" | ")[0] for line in section.splitlines() if line.startswith("| `")]
    named = [name for head in heads for name in re.findall(r"`([\w/]+)/`", head)]
    packages = [f"ltx_ray/{path.parent.name}" for path in (ROOT / "ltx_ray").glob("*/__init__.py")]
    assert sorted(named) == sorted([*packages, "cluster", "jobs", "scripts", "tests"])
