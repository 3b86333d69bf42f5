"""Where digests and other caches are kept."""

from __future__ import annotations

import pytest

from ltx_ray.checkpoints.digests import cache_root


@pytest.mark.parametrize(
    "own, shared, place",
    [
        ("~/c", "", "home/c"), ("c/", "/x", "work/c"), ("", "{}/caches", "caches/ltx-ray"),
        ("", "~/caches", "home/caches/ltx-ray"), ("", "caches", "home/.cache/ltx-ray"), ("", "", "home/.cache/ltx-ray"),
    ],
)  # fmt: skip
def test_the_place_of_caches(tmp_path, monkeypatch, own, shared, place):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LTX_RAY_CACHE", own)
    monkeypatch.setenv("XDG_CACHE_HOME", shared.format(tmp_path))
    assert cache_root() == tmp_path / place
