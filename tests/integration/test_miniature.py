"""scripts/quality.py on a real local cluster, with random weights at the miniature's sizes."""

from __future__ import annotations

import json

import pytest

from scripts import quality
from tests.support.miniature_parts import random_parts

pytestmark = pytest.mark.slow

SMALL = ("--height", "128", "--width", "192", "--num-frames", "9")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return random_parts(tmp_path_factory.mktemp("weights") / "parts")


def scores(tmp_path, weights, *options):
    file = tmp_path / "scores.json"
    words = ["--clips", "2", *SMALL, "--weights", str(weights), "--output", str(tmp_path / "out"), "--json", str(file)]
    before, after = options[: options.index("--")], options[options.index("--") + 1 :]
    assert quality.main([*words, *before, "--", "--stage2-replicas", "0", *after]) == 0
    found = json.loads(file.read_text())
    assert all(0 <= found[name] <= 1 for name in ("ground", "colour", "shape", "motion", "sound"))
    return found


def test_clips_of_the_hq_pipeline_are_rendered_and_scored(tmp_path, weights, capsys):
    found = scores(tmp_path, weights, "--pipeline", "hq", "--images", "--", "--num-inference-steps", "2")
    assert found["sharpness"] > 0 and 0 <= found["first_frame"] <= 1
    assert "not rendered" not in capsys.readouterr().out


def test_clips_of_the_distilled_pipeline_are_rendered_and_scored(tmp_path, weights, capsys):
    found = scores(tmp_path, weights, "--pipeline", "distilled", "--")
    assert found["sharpness"] > 0 and found["pipeline"] == "distilled"
    assert "not rendered" not in capsys.readouterr().out


def test_previews_are_rendered_and_scored(tmp_path, weights, capsys):
    found = scores(
        tmp_path, weights, "--pipeline", "base", "--", "--num-inference-steps", "2", "--stop-after", "stage1"
    )
    assert found["sharpness"] is None
    assert "not rendered" not in capsys.readouterr().out
