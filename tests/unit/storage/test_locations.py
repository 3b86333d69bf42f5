"""One path has one meaning, wherever it is given."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ltx_ray.storage.locations import is_in_job_copy, join, parent, recorded, resolve
from ltx_ray.storage.store import Store


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


@pytest.mark.parametrize(
    "path, place",
    [
        ("~/ds", "home/ds"), ("~", "home"), ("~/ds//", "home/ds"), ("ds", "work/ds"), ("./ds/", "work/ds"),
        (".", "work"), ("../ds", "ds"), ("a//b/./c", "work/a/b/c"), ("a:b", "work/a:b"),
        ("a b?c#d%20", "work/a b?c#d%20"),
        ("x~/y", "work/x~/y"), ("./~", "work/~"), ("./$x", "work/$x"), ("-", "work/-"),
    ],
)  # fmt: skip
def test_a_local_path(home, path, place):
    assert resolve(path) == str(home / place) == resolve(resolve(path))
    assert Store(path).root == str(home / place)


@pytest.mark.parametrize("form", ["file://{}", "file://localhost{}", "FILE://{}/", "file:{}", "file:///{}"])
def test_a_file_url(home, form):
    assert resolve(form.format(home / "a")) == str(home / "a")


def test_a_file_url_is_percent_encoded_as_other_programs_write_it(home):
    assert resolve((home / "a b%c").as_uri()) == str(home / "a b%c")


@pytest.mark.parametrize(
    "uri, same",
    [
        ("s3://b", "s3://b"), ("s3://b/", "s3://b"), ("S3://b/x//", "s3://b/x"), ("gcs://b/x", "gs://b/x"),
        ("s3://b/x/?region=r", "s3://b/x?region=r"), ("s3://b/x?", "s3://b/x"), ("s3://K:S@b/x/", "s3://K:S@b/x"),
        ("s3://b/~/a", "s3://b/~/a"), ("s3://b/a%20b c", "s3://b/a%20b c"),
    ],
)  # fmt: skip
def test_a_uri(uri, same):
    assert resolve(uri) == same == resolve(same)


@pytest.mark.parametrize(
    "path, words",
    [
        ("", "names no place"), ("a\0b", "names no place"), ("hdfs://n/x", "unsupported scheme"),
        ("https://h/x", "unsupported scheme"), ("s3:/b/x", "names no bucket; legal: s3://bucket"),
        ("s3://", "names no bucket"), ("s3://b//x", "has nothing between two slashes; legal: s3://bucket/folder"),
        ("s3:///x", "names no bucket"), ("s3://K:S@", "names no bucket"), ("file://host/x", "names a host"),
        ("file://x", "names a host"), (r"C:\data", "is a Windows path"), ("c:/data", "is a Windows path"),
        (r"\\nas\data", "is a Windows path"), ("$HOME/ds", "no shell has replaced"),
        ("${OUT}", "no shell has replaced"),
        ("~nobody-of-this-name/ds", "names no home directory"),
    ],
)  # fmt: skip
def test_what_is_no_place_is_refused(path, words):
    with pytest.raises(ValueError, match=words.replace("$", r"\$")) as caught:
        resolve(path)
    assert "S@" not in str(caught.value)


def test_a_name_that_is_not_utf8_is_refused_wherever_it_stands(home, monkeypatch):
    legal = "is a name that is not UTF-8; legal: a name in UTF-8"
    for path in ("caf\udce9/ds", "~/caf\udce9", "s3://b/caf\udce9"):
        with pytest.raises(ValueError, match=rf"caf\\udce9.*, {legal}"):
            resolve(path)
    (home / "caf\udce9").mkdir()
    monkeypatch.chdir(home / "caf\udce9")
    with pytest.raises(ValueError, match=rf"{home}/caf\\udce9/ds, {legal}"):
        resolve("ds")


def test_a_user_without_a_home(monkeypatch):
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 7)
    with pytest.raises(ValueError, match="~/ds, names no home directory"):
        resolve("~/ds")


def test_relative_to_a_folder(home):
    assert resolve("a/b.png", "/m") == "/m/a/b.png" and resolve("../b.png", "/m/x") == "/m/b.png"
    assert resolve("/b.png", "/m") == resolve("/b.png", "s3://b") == "/b.png"
    assert resolve("~/b.png", "s3://b") == str(home / "home/b.png")
    assert resolve("a/b.png", "s3://b/m?region=r") == "s3://b/m/a/b.png?region=r"


def test_links_stay_and_dots_follow_them(home):
    (home / "far/deep").mkdir(parents=True)
    (home / "work/link").symlink_to(home / "far/deep")
    assert resolve("link/ds") == str(home / "work/link/ds")
    assert resolve("link/../ds") == str(home / "far/ds")


def test_join_and_parent_keep_options():
    assert join("s3://b/m?region=r", "x") == "s3://b/m/x?region=r" and join("/m", "x") == "/m/x"
    assert parent("s3://b/m/x?region=r") == "s3://b/m?region=r" and parent("/m/x") == "/m"


COPY = "/tmp/ray/session_1/runtime_resources/working_dir_files/_ray_pkg_12ab"


def test_a_file_of_a_job_has_the_same_name_in_each_copy(tmp_path):
    assert recorded(f"{COPY}/set/m.jsonl") == "set/m.jsonl" and recorded(COPY) == "."
    assert recorded("/data/m.jsonl") == "/data/m.jsonl"
    assert is_in_job_copy(f"{COPY}/out") and is_in_job_copy(COPY)
    assert is_in_job_copy("/tmp/ray/session_2026-11-29_16-47-34_136238_5768/runtime_resources/out")
    assert not is_in_job_copy("/tmp/ray/session_1/out") and not is_in_job_copy("s3://b/x")
    folder = tmp_path / "runtime_resources/working_dir_files/_ray_pkg_1"
    folder.mkdir(parents=True)
    (tmp_path / "link").symlink_to(folder)
    assert is_in_job_copy(f"{tmp_path}/link/out")
