"""The workflow of releases, and what scripts/check_wheel wants before it builds."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]
TEXT = (ROOT / ".github/workflows/release.yml").read_text()
WORKFLOW = yaml.safe_load(TEXT)
JOBS = WORKFLOW["jobs"]


def steps(job: str) -> list[str]:
    """What a job does: the commands that it runs and the actions that it uses."""
    return [step.get("run") or step["uses"] for step in JOBS[job]["steps"]]


def test_it_runs_for_tags_alone():
    assert WORKFLOW[True] == {"push": {"tags": ["v*"]}}  # YAML takes `on` for a truth


def test_nothing_is_attached_or_published_before_the_checks_and_the_wheel_have_passed():
    assert JOBS["check"] == {"uses": "./.github/workflows/check.yml"}
    assert "workflow_call" in yaml.safe_load((ROOT / ".github/workflows/check.yml").read_text())[True]
    assert JOBS["attach"]["needs"] == ["check", "build"] and JOBS["publish"]["needs"] == "attach"
    (command,) = [step for step in steps("build") if step.startswith("scripts/")]
    assert command == 'scripts/check_wheel --tag "$GITHUB_REF_NAME" dist'
    assert not any("continue-on-error" in job or "if" in job for job in JOBS.values())


def test_what_was_tried_is_what_is_published():
    (upload,) = [step for step in JOBS["build"]["steps"] if "upload-artifact" in step.get("uses", "")]
    assert upload["with"] == {"name": "dist", "path": "dist/", "if-no-files-found": "error"}
    for job in ("attach", "publish"):
        download, _ = JOBS[job]["steps"]
        assert download["with"] == {"name": "dist", "path": "dist/"} and "download-artifact" in download["uses"]
    assert "gh release create" in steps("attach")[-1] and " dist/* " in steps("attach")[-1]
    assert steps("publish")[-1].startswith("pypa/gh-action-pypi-publish@")
    assert "with" not in JOBS["publish"]["steps"][-1], "it takes dist/ and PyPI"


def test_each_job_has_the_rights_that_it_needs_and_no_secret():
    assert WORKFLOW["permissions"] == {"contents": "read"}
    rights = {name: job["permissions"] for name, job in JOBS.items() if "permissions" in job}
    assert rights == {"attach": {"contents": "write"}, "publish": {"id-token": "write"}}
    assert JOBS["publish"]["environment"] == "pypi" and "secrets." not in TEXT
    # A tag's name is anybody's text: shells get it as a variable.
    assert not any("${{" in step.get("run", "") for job in JOBS.values() for step in job.get("steps", ()))


def test_jobs_end_and_actions_have_versions():
    own = [job for job in JOBS.values() if "steps" in job]
    assert all(job["timeout-minutes"] <= 30 for job in own)
    used = [step["uses"] for job in own for step in job["steps"] if "uses" in step]
    assert used and all(re.fullmatch(r"[\w-]+/[\w-]+@(v\d+|release/v\d+)", action) for action in used)


@pytest.fixture
def clone(tmp_path) -> Path:
    """A repository with what the script reads before it builds."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts/check_wheel", tmp_path / "scripts")
    (tmp_path / "ltx_ray").mkdir()
    (tmp_path / "ltx_ray/__init__.py").write_text('"""A package."""\n\n__version__ = "1.2.0"\n')
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## [Unreleased]\n\n## [1.2.0] - 2026-12-01\n\n## [1x1.0]\n")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *command], check=True)
    # Only what is committed counts.
    (tmp_path / "ltx_ray/__init__.py").write_text('__version__ = "9.9.9"\n')
    return tmp_path


def check_wheel(clone: Path, *words: str) -> tuple[int, str]:
    """The script without a Python, so that it ends before it builds."""
    environment = {**os.environ, "PYTHON": str(clone / "no-python")}
    done = subprocess.run(
        [clone / "scripts/check_wheel", *words], capture_output=True, text=True, env=environment, cwd=clone
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("words", [(), ("--tag", "v1.2.0"), ("dist",), ("--tag", "v1.2.0", "dist")])
def test_a_tag_of_the_version_is_built(clone, words):
    code, said = check_wheel(clone, *words)
    assert code == 2 and "no-python; name a Python of 3.11 or later in PYTHON" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--tag", "v1.2.1"), "the tag is v1.2.1, and the package has the version 1.2.0; wanted: v1.2.0"),
        (("--tag", "1.2.0"), "the tag is 1.2.0, and the package has the version 1.2.0; wanted: v1.2.0"),
        (("--tag",), "--tag needs a tag"),
        (("--fast",), "unknown option '--fast'"),
        (("a", "b"), "at most one argument"),
    ],
)
def test_wrong_tags_and_words_are_refused_before_anything_is_built(clone, words, message):
    code, said = check_wheel(clone, *words)
    assert code == 2 and message in said


def test_a_version_without_its_section_of_the_changelog_is_refused(clone):
    (clone / "CHANGELOG.md").write_text("## [Unreleased]\n\n## [1x2.0] - 2026-12-01\n\n## [1.2.0]\n")
    git = ["git", "-C", str(clone), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "commit", "-qm", "no section", "CHANGELOG.md"], check=True)
    code, said = check_wheel(clone, "--tag", "v1.2.0")
    assert code == 2 and "CHANGELOG.md has no section '## [1.2.0] - DATE'" in said


def test_the_changelog_has_the_section_of_the_version():
    version = re.search(r'^__version__ = "(.*)"$', (ROOT / "ltx_ray/__init__.py").read_text(), re.MULTILINE)
    assert version is not None and f"\n## [{version[1]}] - " in (ROOT / "CHANGELOG.md").read_text()
