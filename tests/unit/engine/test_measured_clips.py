"""A clip that the decode engine makes carries its measures and the flags that follow. On the toy model."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from ltx_ray.config import EngineSpec, ModelFiles, Numerics
from ltx_ray.engine.base import Rank
from ltx_ray.engine.decode import DecodeEngine
from ltx_ray.engine.frames import PictureCheck
from ltx_ray.engine.fused_decoder import fuse_decoder
from ltx_ray.engine.loudness import measure_sound
from ltx_ray.engine.patchify import latent_sizes
from ltx_ray.records import NoiseLedger, StageLatents, WorkItem
from tests.support.samples import recipe, request


@pytest.fixture(scope="module")
def engine(toy, tmp_path_factory) -> DecodeEngine:
    output = str(tmp_path_factory.mktemp("out"))
    engine = DecodeEngine(EngineSpec("", ModelFiles(**toy), Numerics(dtype="float32"), output), Rank())
    engine.load()
    return engine


def work(**values) -> WorkItem:
    row = {"height": 128, "width": 192, "num_frames": 33, "frame_rate": 24.0, "seed": 1, **values}
    return WorkItem(f"{row['seed']:032x}", request(**row), recipe(dtype="float32"), "r" * 16)


def stages(item: WorkItem) -> list[StageLatents]:
    generator = torch.Generator().manual_seed(item.request.seed)
    sizes = (latent_sizes(shape) for shape in (item.request.shape.half(), item.request.shape))
    latents = (size.map(lambda size: torch.randn(size, generator=generator)) for size in sizes)
    return [StageLatents(pair, NoiseLedger(item.request.seed, "cpu", "cpu")) for pair in latents]


def replaced(engine: DecodeEngine, monkeypatch, sound: np.ndarray | None = None, still: bool = False) -> None:
    """Let the engine decode this sound, or the first picture in place of all."""
    if sound is not None:
        monkeypatch.setattr(engine, "_sound", lambda latent, samples: sound[:, :samples])
    if still:
        decode = engine.video_vae.decoder.forward

        def first(*args, **kwargs):
            pixels = decode(*args, **kwargs)
            return pixels[:, :, :1].expand_as(pixels).contiguous()

        monkeypatch.setattr(engine.video_vae.decoder, "forward", first)


def test_a_clip_carries_its_measures(engine, monkeypatch):
    rng = np.random.default_rng(0)
    sound = np.clip(rng.standard_normal((2, 66000)) * 0.3, -1, 1).astype(np.float32)
    replaced(engine, monkeypatch, sound)
    item = work()
    clip = engine.run("decode", item, *stages(item))
    assert clip.flags == ()
    assert clip.sound == measure_sound(sound) and clip.sound.clipped_samples == (np.abs(sound) == 1).sum() > 0
    with av.open(str(Path(engine.spec.output) / clip.path)) as file:
        frames = np.stack([frame.to_ndarray(format="yuv420p") for frame in file.decode(video=0)])
    check = PictureCheck()
    check.update(torch.from_numpy(frames))
    encoded = check.measures()
    assert encoded.cuts == clip.picture.cuts and encoded.still_share == clip.picture.still_share
    assert encoded.mean_luma == pytest.approx(clip.picture.mean_luma, abs=0.5)
    assert encoded.motion == pytest.approx(clip.picture.motion, abs=0.05) and clip.picture.motion > 0.5
    assert clip.picture.sharpness > 0


def test_a_still_and_silent_clip_is_flagged(engine, monkeypatch):
    item = work(num_frames=9, seed=2)
    replaced(engine, monkeypatch, np.zeros((2, 18000), np.float32), still=True)
    clip = engine.run("decode", item, *stages(item))
    assert clip.flags == ("frozen", "silent")
    assert (clip.picture.motion, clip.picture.still_share, clip.sound.sound_seconds) == (0.0, 1.0, 0.0)
    assert clip.sound.loudness_lufs is None


def test_a_silent_clip_is_flagged(engine, monkeypatch):
    for seed, peak, flags in ((3, 1e-4, ("silent",)), (4, 1e-2, ())):
        item = work(num_frames=9, seed=seed)
        time = np.arange(18000) / 48000
        replaced(engine, monkeypatch, np.stack([peak * np.sin(440 * 6.283 * time)] * 2).astype(np.float32))
        assert engine.run("decode", item, *stages(item)).flags == flags


def test_a_preview_is_measured_at_its_own_size(engine, monkeypatch):
    item = work()
    monkeypatch.setattr(engine, "spec", dataclasses.replace(engine.spec, stop_after="stage1"))
    clip = engine.run("decode", item, *stages(item)[:1])
    assert clip.path.startswith("previews/") and clip.picture.motion > 0 and clip.sound.sound_seconds > 0


@pytest.mark.parametrize("channels_last", [True, False])
def test_fused_steps_give_the_same_measures(engine, channels_last):
    """On a CPU they differ from the modules of diffusers by less than a rounding to codes."""
    item = work(num_frames=17)
    plain = engine.run("decode", item, *stages(item))
    other = copy.copy(engine)
    other.video_vae = copy.deepcopy(engine.video_vae)
    assert fuse_decoder(other.video_vae.decoder, channels_last)
    fused = other.run("decode", item, *stages(item))
    assert fused.flags == plain.flags and fused.sound == plain.sound
    for field in dataclasses.fields(plain.picture):
        a, b = getattr(plain.picture, field.name), getattr(fused.picture, field.name)
        assert a == pytest.approx(b, rel=1e-3), field.name
