"""Which figures of a benchmark count as worse than the recorded ones."""

from __future__ import annotations

import json

import pytest

from scripts.bench.baselines import FILE, Baselines, check

H100, H200 = "NVIDIA H100 80GB HBM3", "NVIDIA H200"


@pytest.fixture
def recorded(tmp_path):
    baselines = Baselines(H100, tmp_path / "baselines.json")
    baselines.record({"dit.ms": 100.0, "clip.ms": 2000.0})
    return baselines


def test_within_five_percent_is_no_change(recorded):
    assert recorded.compare({"dit.ms": 104.9, "clip.ms": 2000.0}) == []


def test_worse(recorded):
    (line,) = recorded.compare({"dit.ms": 106.0, "clip.ms": 2000.0})
    assert "dit.ms" in line and "106" in line and "100" in line and "+6.0%" in line


def test_not_a_number_is_worse(recorded):
    assert len(recorded.compare({"dit.ms": float("nan")})) == 1


def test_better(recorded):
    assert recorded.compare({"dit.ms": 50.0, "clip.ms": 1.0}) == []


def test_higher_is_better(recorded):
    assert recorded.compare({"dit.ms": 110.0}, lower_is_better=False) == []
    (line,) = recorded.compare({"dit.ms": 90.0}, lower_is_better=False)
    assert "-10.0%" in line


def test_missing_case(recorded):
    assert recorded.compare({"other.ms": 1e9}) == []
    assert recorded.missing({"other.ms": 1e9, "dit.ms": 1.0}) == ["other.ms"]


def test_other_gpu(recorded):
    other = Baselines(H200, recorded.path)
    assert other.compare({"dit.ms": 1e9}) == []
    assert other.missing({"dit.ms": 1e9}) == ["dit.ms"]
    other.record({"dit.ms": 70.0})
    assert recorded.figures["dit.ms"] == 100.0 and other.figures == {"dit.ms": 70.0}


def test_recording_keeps_other_cases(recorded):
    recorded.record({"dit.ms": 90.0})
    assert json.loads(recorded.path.read_text()) == {H100: {"dit.ms": 90.0, "clip.ms": 2000.0}}
    assert [p.name for p in recorded.path.parent.iterdir()] == ["baselines.json"]


def test_no_file_is_no_baseline(tmp_path):
    baselines = Baselines(H100, tmp_path / "none.json")
    assert baselines.compare({"dit.ms": 1.0}) == [] and baselines.missing({"dit.ms": 1.0}) == ["dit.ms"]


def test_check_exit_codes(recorded, capsys):
    assert check(recorded, {"dit.ms": 100.0, "new.ms": 3.0}) == 0
    said = capsys.readouterr().out
    assert "no baseline" in said and "new.ms" in said and "better: 1 of 2 figures" in said
    assert check(recorded, {"dit.ms": 120.0}) == 1
    assert "WORSE  dit.ms" in capsys.readouterr().out


def test_the_file_in_the_repository_is_legal():
    for figures in json.loads(FILE.read_text()).values():
        assert all(isinstance(value, float | int) and value > 0 for value in figures.values())
