"""The version of this package, with the commit of which it was built."""

from __future__ import annotations

import subprocess
import sys

import pytest

import ltx_ray
from ltx_ray.dataset import package_versions
from ltx_ray.dataset.package_versions import is_same_version, own_version


@pytest.fixture
def commit_file(tmp_path, monkeypatch):
    monkeypatch.setattr(package_versions, "COMMIT_FILE", tmp_path / "commit.txt")
    own_version.cache_clear()
    yield tmp_path / "commit.txt"
    own_version.cache_clear()


@pytest.mark.parametrize(
    ("text", "version"),
    [
        (None, "0.1.0"),
        ("1a2b3c4d5e6f7a8b9c0d1a2b3c4d5e6f7a8b9c0d\n", "0.1.0+1a2b3c4d5e6f"),
        ("", "0.1.0"),
        ("$(git rev-parse HEAD)", "0.1.0"),
    ],
)
def test_a_build_records_its_commit(commit_file, monkeypatch, text, version):
    monkeypatch.setattr(ltx_ray, "__version__", "0.1.0")
    if text is not None:
        commit_file.write_text(text)
    assert own_version() == version == package_versions.package_versions()["ltx_ray"]


def test_the_command_says_it():
    program = "import sys; from ltx_ray.cli import main; main(['--version'])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"ltx-ray, version {own_version()}\n")


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("0.1.0", "0.1.0", True), ("0.1.0", "0.1.1", False), ("0.1.0+a", "0.1.0", True), ("0.1.0+a", "0.1.0+b", False),
        ("0.1.0+a", "0.1.1+a", False),
    ],
)  # fmt: skip
def test_versions_are_one_as_far_as_both_tell_their_commits(one, other, same):
    assert is_same_version(one, other) == is_same_version(other, one) == same
