"""`--model miniature` and `miniature-distilled`: which rows they serve, and what is said without their weights."""

import json

import pytest
from click.testing import CliRunner

from ltx_ray.cli.app import app
from ltx_ray.miniature import files
from tests.support.miniature_parts import random_parts

ROW = {"prompt": "a red circle grows over a blue ground, silence", "height": 64, "width": 64, "num_frames": 9}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return random_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture
def plan(tmp_path, parts, monkeypatch):
    """What `plan` says of rows with the model `name`."""
    monkeypatch.setenv("LTX_RAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "WEIGHTS", parts)

    def run(name, *rows, code=0):
        manifest = tmp_path / "rows.jsonl"
        manifest.write_text("".join(json.dumps({**ROW, **row}) + "\n" for row in rows))
        found = CliRunner().invoke(app, ["plan", str(manifest), "--model", name, "--resolved"])
        assert found.exit_code == code, found.output
        return found.output

    return run


def test_the_miniature_serves_hq_and_base(plan):
    shown = plan("miniature", {"seed": 1}, {"seed": 2, "pipeline": "base"})
    assert '"pipeline":"hq"' in shown and '"pipeline":"base"' in shown and "2 to render" in shown
    assert "distilled" in plan("miniature", {"pipeline": "distilled"}, code=3)


def test_the_distilled_miniature_serves_distilled(plan):
    shown = plan("miniature-distilled", {"seed": 1})
    assert '"pipeline":"distilled"' in shown and "1 to render" in shown
    assert "legal: distilled" in plan("miniature-distilled", {"pipeline": "hq"}, code=3)


def test_weights_that_are_missing_are_named(plan, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "WEIGHTS", tmp_path)
    assert "vae.safetensors is not there" in plan("miniature", {}, code=2)
