"""What an installed package holds beside its modules, and that the checks of a commit are those of scripts/check."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml
from setuptools import Distribution

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def build(monkeypatch):
    """setuptools' `build_py` command as pyproject.toml configures it; it builds nothing here."""
    monkeypatch.chdir(ROOT)
    distribution = Distribution()
    distribution.parse_config_files()
    command = distribution.get_command_obj("build_py")
    command.ensure_finalized()
    return command


def test_a_wheel_has_every_package(build):
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "ltx_ray").rglob("__init__.py")}
    assert {name.replace(".", "/") for name in build.packages} == {folder.as_posix() for folder in folders}


def test_a_wheel_has_every_file_that_is_no_module(build):
    found = {f"{source}/{name}" for _, source, _, names in build.get_data_files_without_manifest() for name in names}
    files = [path for path in (ROOT / "ltx_ray").rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    data = {path.relative_to(ROOT).as_posix() for path in files}
    assert {"ltx_ray/py.typed", "ltx_ray/dataset/report_template.html"} <= data
    assert {Path(path).as_posix() for path in found} == data


def checks() -> list[str]:
    (line,) = re.findall(r"^steps=\((.*)\)$", (ROOT / "scripts/check").read_text(), re.MULTILINE)
    return line.split()


def test_pre_commit_runs_the_checks_and_fetches_nothing():
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local"
    assert [hook["entry"] for hook in repository["hooks"]] == [f"scripts/check {step}" for step in checks()]
    assert {hook["language"] for hook in repository["hooks"]} == {"script"}


def test_the_workflow_runs_the_same_scripts():
    jobs = yaml.safe_load((ROOT / ".github/workflows/check.yml").read_text())["jobs"]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert commands == ["scripts/check", "scripts/test"]


def test_an_unknown_check_is_refused():
    result = subprocess.run([ROOT / "scripts/check", "colours"], capture_output=True, text=True)
    assert result.returncode == 2 and "unknown check 'colours'" in result.stderr
