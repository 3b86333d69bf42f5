"""The miniature's files: their size, that the engine loads them, and that the trained parts work."""

import itertools
import math
import random

import numpy as np
import pytest
import torch
from safetensors import safe_open

from ltx_ray.engine import codec, components
from ltx_ray.miniature import config, export, measure, picture, spectrum, world
from scripts.miniature_training import audio as audio_training


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Fresh modules, and the files written from them."""
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    vae, audio, vocoder = export.new_video_vae(), export.new_audio_vae(), export.new_vocoder()
    export.save_part(folder / "vae.safetensors", export.released_video_vae(vae.state_dict()))
    tensors = {**export.released_audio_vae(audio.state_dict()), **export.released_vocoder(vocoder.state_dict())}
    export.save_part(folder / "audio.safetensors", tensors)
    return folder, vae, audio, vocoder


def same(loaded: torch.nn.Module, made: torch.nn.Module):
    theirs = loaded.state_dict()
    assert theirs
    for key, value in theirs.items():
        assert torch.equal(value, made.state_dict()[key].bfloat16().float()), key


def test_every_part_comes_back_through_the_products_loader(parts):
    folder, vae, audio, vocoder = parts
    cpu = (torch.float32, "cpu")
    same(components.load_video_vae(folder / "vae.safetensors", *cpu, part="both"), vae)
    same(components.load_audio_decoder(folder / "audio.safetensors", *cpu), audio)
    same(components.load_vocoder(folder / "audio.safetensors", *cpu), vocoder)


def test_a_file_has_the_released_names_and_depends_on_its_tensors_alone(parts, tmp_path):
    folder, vae, *_ = parts
    with safe_open(str(folder / "vae.safetensors"), "pt") as file:
        keys = set(file.keys())
    for key in (
        "vae.encoder.down_blocks.7.conv.conv.weight",
        "vae.decoder.up_blocks.0.res_blocks.0.conv1.conv.weight",
        "vae.decoder.up_blocks.8.res_blocks.1.conv2.conv.bias",
        "vae.per_channel_statistics.mean-of-means",
    ):
        assert key in keys
    export.save_part(tmp_path / "again.safetensors", export.released_video_vae(vae.state_dict()))
    assert (tmp_path / "again.safetensors").read_bytes() == (folder / "vae.safetensors").read_bytes()


def test_the_bases_of_the_second_spectrogram_are_a_dft(parts):
    *_, vocoder = parts
    forward = vocoder.mel_stft.stft_fn.forward_basis[:, 0].double()
    size = forward.shape[1]
    wave = torch.randn(size, dtype=torch.float64)
    want = torch.fft.rfft(wave * torch.hann_window(size, dtype=torch.float64))
    got = forward @ wave
    assert torch.allclose(got[: size // 2 + 1], want.real, atol=1e-4)
    assert torch.allclose(got[size // 2 + 1 :], want.imag, atol=1e-4)


def test_mel_filters():
    filters = spectrum.mel_filters(64, 1024, 16000)
    assert filters.shape == (64, 513) and (filters >= 0).all() and (filters.sum(1) > 0).all()
    peaks = filters.argmax(1) * 15.625
    assert (peaks.diff() > 0).all()
    assert torch.allclose(filters.sum(1) * 15.625, torch.ones(64) * 2 / 2, atol=0.2)  # each of area 1 in Hz


def test_a_spectrogram_shows_phase():
    time = torch.arange(4000) / 16000
    tone = lambda phase: 0.1 * torch.sin(2 * math.pi * (220 * time + phase))[None]  # noqa: E731
    shown = [spectrum.analyse(tone(p))[0, :, 0] for p in (0.0, 0.25, 0.5, 0.75)]
    assert spectrum.analyse(tone(0.0)).shape == (1, 2, 19, 64)
    for one, other in itertools.combinations(shown, 2):
        assert (one - other).abs().max() > 0.1
    silent = spectrum.analyse(torch.zeros(1, 4000))
    assert torch.allclose(silent[:, :, 0], silent[:, :, -1], atol=1e-5)


def test_the_config_is_of_the_release():
    release = config.checkpoint_config()
    t = release["transformer"]
    assert t["num_attention_heads"] == t["audio_num_attention_heads"] == 4
    assert t["apply_gated_attention"] and t["cross_attention_adaln"] and t["caption_proj_before_connector"]
    assert [name for name, _ in release["vae"]["encoder_blocks"]][1::2] == [
        "compress_space_res",
        "compress_time_res",
        "compress_all_res",
        "compress_all_res",
    ]
    assert t["num_attention_heads"] * t["attention_head_dim"] > config.ACTIVE_VIDEO
    assert t["audio_num_attention_heads"] * t["audio_attention_head_dim"] > config.ACTIVE_AUDIO
    assert math.prod((3, *release["vocoder"]["vocoder"]["upsample_rates"])) == 3 * 160


# --- the trained parts -------------------------------------------------------------------------------------------


def test_the_shipped_weights_are_whole_and_small():
    files = {path.relative_to(export.WEIGHTS).as_posix(): path for path in export.WEIGHTS.rglob("*.safetensors")}
    parts = ("vae", "audio", "transformer", "upsampler", "distilled_lora", "gemma/model")
    assert set(files) == {f"{part}.safetensors" for part in parts}
    assert sum(path.stat().st_size for path in files.values()) < 16e6


def test_the_shipped_video_vae_keeps_colours_place_and_motion():
    vae = components.load_video_vae(export.WEIGHTS / "vae.safetensors", torch.float32, "cpu", part="both")
    clips = list(itertools.islice(world.clips(7, "held_out", 1.5), 3))
    pixels = picture.draw_frames(clips, 9, 256, 384)
    latents = codec.encode_video(vae, pixels)
    assert latents.shape == (3, 128, 2, 8, 12)
    assert (latents[:, config.ACTIVE_VIDEO :] == 0).all()
    assert 0.5 < latents[:, : config.ACTIVE_VIDEO].std() < 2
    # The decoder ignores unused channels, so the noise that a narrow DiT leaves in them does no harm.
    noisy = latents.clone()
    noisy[:, config.ACTIVE_VIDEO :] = torch.randn(noisy[:, config.ACTIVE_VIDEO :].shape)
    decoded = codec.decode_video_tile(vae, noisy)
    assert torch.allclose(decoded, codec.decode_video_tile(vae, latents), atol=1e-4)
    frames = ((decoded + 1) * 127.5).clamp(0, 255).byte().permute(0, 2, 3, 4, 1).numpy()
    for clip, row in zip(clips, frames):
        first, last = measure.read_frame(row[0]), measure.read_frame(row[-1])
        assert measure.nearest_colour(last.ground) == clip.scene.ground
        assert measure.nearest_colour(last.colour) == clip.scene.colour
        assert np.hypot(*np.subtract(first.centre, np.multiply(clip.start, (384, 256)))) < 12
        assert measure.classify_motion(first, last, 256, 384) == clip.scene.motion


@pytest.mark.slow
@pytest.mark.parametrize("name", world.SOUNDS)
def test_the_shipped_audio_parts_keep_every_sound(name):
    """Also with noise on the latents, as a diffusion model leaves it."""
    path, cpu = export.WEIGHTS / "audio.safetensors", (torch.float32, "cpu")
    encoder = audio_training.load_audio_vae(path)
    parts = components.load_audio_decoder(path, *cpu), components.load_vocoder(path, *cpu)
    latents = audio_training.normalised(encoder, audio_training.spectrogram_source(name, 1.1, 0.3))
    for sigma in (0.0, 0.3):
        noise = sigma * torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
        wave, rate = codec.decode_audio(*parts, latents + noise)
        assert measure.classify_sound(wave.numpy(), rate) == name


def test_random_clips_can_be_drawn_for_any_split():
    rng = random.Random(0)
    assert world.draw_clip(rng, "train", 1.0).scene in set(world.scenes("train"))
