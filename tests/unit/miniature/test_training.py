"""scripts/train_miniature.py --smoke: three steps, a checkpoint, a file that loads, a score, and three more steps.

Also the vocoder's initial weights, and the optimizer."""

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ltx_ray.engine import codec, components
from ltx_ray.miniature import export, sound, spectrum
from ltx_ray.miniature.config import ACTIVE_AUDIO, ACTIVE_VIDEO, LATENT_CHANNELS
from scripts.miniature_training import audio, loop, upsampler
from scripts.miniature_training.least_squares import start_vocoder
from scripts.miniature_training.muon import Muon, orthogonal
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


def test_nothing_is_trained_without_what_it_is_trained_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(loop, "WEIGHTS", tmp_path)
    assert main(["--part", "lora", "--device", "cpu", "--out", str(tmp_path)]) == 2
    said = f"{tmp_path}/dit/transformer.safetensors: not there, nor does the package have it; legal: --part dit first"
    assert said in capsys.readouterr().err


def test_with_no_minutes_the_checkpoint_is_as_it_was(tmp_path):
    def trainer(minutes: float) -> loop.Trainer:
        torch.manual_seed(0)
        return loop.Trainer(torch.nn.Linear(2, 2), tmp_path, loop.Budget(minutes, 2), rate=0.1)

    def losses(step: int) -> dict[str, torch.Tensor]:
        loss = trained.module(torch.ones(1, 2)).square().sum()
        trained.module.zero_grad()
        loss.backward()
        return {"loss": loss}

    trained = trainer(1.0)
    trained.run(losses)
    before = {name: weight.detach().clone() for name, weight in trained.weights.items()}
    trained = trainer(0.0)
    trained.run(losses)
    assert trained.step == 2
    assert all(torch.equal(weight, before[name]) for name, weight in trained.weights.items())


@pytest.mark.slow
def test_the_video_vae_trains_resumes_and_starts_from_the_shipped_weights(train, tmp_path):
    shown, fresh = train("vae")
    assert "step 3 " in shown
    files = {file.name: file.stat().st_size for file in (tmp_path / "smoke" / "vae").iterdir()}
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
    assert (tmp_path / "smoke" / "audio" / "audio.safetensors").stat().st_size < 7e6


@pytest.mark.slow
def test_the_dit_trains_and_its_lora_is_distilled(train, tmp_path):
    """With the engines' samplers in the scores. Unused channels stay unused, whichever optimizer moves the rest."""
    shown, score = train("dit")
    assert "step 3 " in shown and score["video loss at 1.0"] > 0 and "image kept" in score
    folder = tmp_path / "smoke" / "dit"
    assert max(file.stat().st_size for file in folder.glob("*.safetensors") if file.stem != "whole") < 16e6
    assert (folder / "gemma" / "tokenizer.json").exists() and (folder / "clips.png").exists()
    shown, _ = train("dit")
    assert "from step 3 of" in shown and "step 6 " in shown
    tensors = load_file(folder / "transformer.safetensors")
    assert sum(tensor.nbytes for tensor in tensors.values()) == 2 * (1_514_344 + 177_416)
    for prefix, active in (("", ACTIVE_VIDEO), ("audio_", ACTIVE_AUDIO)):
        into = tensors[f"model.diffusion_model.{prefix}patchify_proj.weight"]
        out = [tensors[f"model.diffusion_model.{prefix}proj_out.{kind}"] for kind in ("weight", "bias")]
        assert into[:, :active].any() and not into[:, active:].any()
        assert all(tensor[:active].any() and not tensor[active:].any() for tensor in out)

    shown, score = train("lora")
    assert "step 3 " in shown and {"distilled ground", "without ground", "hq ground"} <= score.keys()
    factors = load_file(tmp_path / "smoke" / "lora" / "distilled_lora.safetensors")
    assert sum(tensor.nbytes for tensor in factors.values()) < 0.6e6
    assert not factors["diffusion_model.patchify_proj.lora_A.weight"][:, ACTIVE_VIDEO:].any()
    assert not factors["diffusion_model.proj_out.lora_B.weight"][ACTIVE_VIDEO:].any()
    assert factors["diffusion_model.proj_out.lora_B.weight"].any()


def test_the_upsampler_trains_resumes_and_ignores_unused_channels(train, tmp_path):
    shown, score = train("upsampler")
    assert "step 3 " in shown and {"64x128 upsampled psnr", "64x128 bilinear psnr"} <= score.keys()
    path = tmp_path / "smoke" / "upsampler" / "upsampler.safetensors"
    assert path.stat().st_size < 0.8e6
    vae = export.WEIGHTS / "vae.safetensors"
    upsampler, stats = components.load_upsampler(path, torch.float32, "cpu"), components.latent_stats(vae)
    latents = torch.randn(1, LATENT_CHANNELS, 2, 1, 2, generator=torch.Generator().manual_seed(0))
    out = codec.upsample_latents(upsampler, *stats, latents)
    assert out.shape == (1, LATENT_CHANNELS, 2, 2, 4)
    assert (out[:, ACTIVE_VIDEO:] == 0).all() and out[:, :ACTIVE_VIDEO].std() > 0
    other = latents.clone()
    other[:, ACTIVE_VIDEO:] += 100
    assert torch.equal(codec.upsample_latents(upsampler, *stats, other), out)
    shown, _ = train("upsampler")
    assert "from step 3 of" in shown and "step 6 " in shown
    _, started = train("upsampler", "--start", str(path), out=tmp_path / "started")
    assert started.keys() == score.keys()


def test_the_upsampler_is_trained_as_the_engine_runs_it():
    torch.manual_seed(0)
    weights = export.WEIGHTS / "vae.safetensors"
    vae = components.load_video_vae(weights, torch.float32, "cpu", part="both")
    training = upsampler.UpsamplerTraining(vae)
    pixels = torch.rand(2, 3, 9, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    latents = training.encode(pixels)
    assert torch.allclose(latents, codec.encode_video(vae, pixels), atol=1e-5)
    assert torch.allclose(training.decode(latents), codec.decode_video_tile(vae, latents), atol=1e-4)
    with torch.no_grad():
        mine = training(latents)
    theirs = codec.upsample_latents(training.upsampler, *components.latent_stats(weights), latents)
    assert torch.allclose(mine, theirs, atol=1e-5) and mine.shape[-2:] == (4, 4)


@torch.no_grad()
def test_a_vocoder_makes_sound_before_it_is_trained():
    """Of sounds that were not fitted, to the ends of a clip."""
    torch.manual_seed(0)
    rng = random.Random(0)
    vocoder = export.new_vocoder().vocoder
    fitted, other = (audio.synthesise(audio.draw_rows(rng, count, 6), 6) for count in (300, 50))
    start_vocoder(vocoder, spectrum.analyse(fitted.source), fitted.low)
    made = vocoder(spectrum.analyse(other.source))
    assert (made - other.low).square().mean() < 0.2 * other.low.square().mean()
    assert made.abs().max() < 3 * sound.AMPLITUDE


@pytest.mark.parametrize("size", [(3, 16, 432), (2, 129, 64), (1, 48, 48)])
def test_an_orthogonal_matrix_keeps_the_directions(size):
    matrices = torch.randn(size, generator=torch.Generator().manual_seed(1))
    found = orthogonal(matrices)
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    assert torch.linalg.svdvals(found).max() < 1.3
    assert ((found - u @ v).norm(dim=(1, 2)) < 0.4 * (u @ v).norm(dim=(1, 2))).all()


def test_muon_minimises():
    generator = torch.Generator().manual_seed(2)
    weight, x = torch.nn.Parameter(torch.zeros(8, 4, 3)), torch.randn(64, 4, 9, generator=generator)
    wanted = torch.nn.functional.conv1d(x, torch.randn(8, 4, 3, generator=generator) / 4)
    optimizer = Muon([{"params": [weight]}], lr=0.1)
    losses = []
    for step in range(120):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 120)
        loss = (torch.nn.functional.conv1d(x, weight) - wanted).square().mean()
        weight.grad = None
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.01 * losses[0]


def test_an_unknown_part_is_refused(capsys):
    with pytest.raises(SystemExit) as refused:
        main(["--part", "gemma"])
    assert refused.value.code == 2
    assert "invalid choice: 'gemma'" in capsys.readouterr().err
