"""scripts/train_miniature.py --smoke: three steps, a checkpoint, a file that loads, a score, and three more steps."""

import json
from pathlib import Path

import pytest

from scripts.train_miniature import main

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def train(tmp_path, capsys):
    """Trains a part; returns what was printed and the scores."""

    def run(part, *more, out=tmp_path):
        assert main(["--part", part, "--smoke", "--device", "cpu", "--out", str(out), *more]) == 0
        shown = capsys.readouterr().out
        result = json.loads(shown.strip().splitlines()[-1])
        assert result["part"] == part
        return shown, result["score"]

    return run


@pytest.mark.slow
def test_the_video_vae_trains_resumes_and_starts_from_the_shipped_weights(train, tmp_path):
    shown, fresh = train("vae")
    assert "step 3 " in shown
    files = {file.name: file.stat().st_size for file in (tmp_path / "vae").iterdir()}
    assert "vae.safetensors" in files
    assert max(files[f"{name}.safetensors"] for name in ("model", "average", "optimizer")) < 16e6
    shown, _ = train("vae")
    assert "from step 3 of" in shown and "step 6 " in shown
    weights = ROOT / "ltx_ray" / "miniature" / "weights" / "vae.safetensors"
    _, better = train("vae", "--start", str(weights), out=tmp_path / "started")
    assert better["64x96 psnr"] > fresh["64x96 psnr"] + 5


@pytest.mark.slow
def test_the_audio_parts_train(train, tmp_path):
    shown, score = train("audio")
    assert "step 3 " in shown and "low pitch error" in score
    assert (tmp_path / "audio" / "audio.safetensors").stat().st_size < 7e6


def test_an_unknown_part_is_refused(capsys):
    with pytest.raises(SystemExit) as refused:
        main(["--part", "lora"])
    assert refused.value.code == 2
    assert "invalid choice: 'lora'" in capsys.readouterr().err
