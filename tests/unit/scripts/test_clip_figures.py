"""The file that keeps a benchmark's figures from run to run."""

from __future__ import annotations

import pytest

from scripts.bench.clip_figures import known_figures, save_figures


def test_figures_are_found_again(tmp_path):
    path = tmp_path / "figures.json"
    assert known_figures(path, "a case") == {} == known_figures(None, "a case")
    save_figures(path, "a case", {"split": {"clips": 12}})
    assert known_figures(path, "a case") == {"split": {"clips": 12}}
    assert [file.name for file in tmp_path.iterdir()] == ["figures.json"]


def test_figures_of_another_case_are_refused(tmp_path):
    save_figures(tmp_path / "figures.json", "a case", {})
    with pytest.raises(SystemExit, match="has figures of a case; this run is another"):
        known_figures(tmp_path / "figures.json", "another")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"of": "a case", "figures": 3}'])
def test_another_file_is_refused(tmp_path, text):
    (tmp_path / "figures.json").write_text(text)
    with pytest.raises(SystemExit, match=r"figures\.json, was not written by this script"):
        known_figures(tmp_path / "figures.json", "a case")
