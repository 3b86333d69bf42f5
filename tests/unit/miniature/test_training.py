"""scripts/train_miniature.py in its smoke mode: a few steps, a checkpoint, a file that loads, a score, and on."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


def train(part, out, *more):
    command = [sys.executable, str(ROOT / "scripts" / "train_miniature.py"), "--part", part, "--smoke", *more]
    shown = subprocess.run(
        [*command, "--device", "cpu", "--out", str(out)], check=True, capture_output=True, text=True
    ).stdout
    return shown, json.loads(shown.strip().splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("part, score", [("vae", "64x96 psnr"), ("audio", "low pitch error")])
def test_smoke(part, score, tmp_path):
    shown, result = train(part, tmp_path)
    assert result["part"] == part and score in result["score"]
    assert "step 3 " in shown
    files = {file.name: file.stat().st_size for file in (tmp_path / part).iterdir()}
    assert f"{part}.safetensors" in files
    checkpoint = [files[f"{name}.safetensors"] for name in ("model", "average", "optimizer")]
    assert max(checkpoint) < 16e6
    shown, _ = train(part, tmp_path)
    assert "from step 3 of" in shown and "step 6 " in shown


@pytest.mark.slow
def test_it_can_start_from_the_shipped_weights(tmp_path):
    weights = ROOT / "ltx_ray" / "miniature" / "weights" / "vae.safetensors"
    _, fresh = train("vae", tmp_path / "fresh")
    _, better = train("vae", tmp_path / "better", "--start", str(weights))
    assert better["score"]["64x96 psnr"] > fresh["score"]["64x96 psnr"] + 5


def test_a_part_that_is_not_known_is_refused(tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "train_miniature.py"), "--part", "lora"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and "invalid choice: 'lora'" in done.stderr
