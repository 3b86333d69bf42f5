"""A directory in diffusers' layout renders what the single file renders, to the last bit."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ltx_ray.checkpoints.checkpoint import held_by, open_checkpoint
from ltx_ray.checkpoints.diffusers_layout import official_config, read_model
from ltx_ray.checkpoints.safetensors import read_header
from ltx_ray.config import EngineSpec, ModelFiles, Numerics
from ltx_ray.engine import codec
from ltx_ray.engine.base import Rank
from ltx_ray.engine.decode import DecodeEngine
from ltx_ray.engine.text import TextEngine
from tests.support.diffusers_directory import write_directory
from tests.support.pipeline import ToyPipeline, one_thread, toy_pipeline

#: Its image goes through the video encoder.
ROW = {
    "prompt": "a cat", "height": 64, "width": 128, "num_frames": 9, "num_inference_steps": 2,
    "images": [{"path": "a.png", "strength": 0.8}],
}  # fmt: skip


@pytest.fixture(scope="module")
def directory(toy, tmp_path_factory) -> str:
    return str(write_directory(toy, tmp_path_factory.mktemp("diffusers")))


def test_both_layouts_describe_the_same_transformer(toy, directory):
    ours, theirs = open_checkpoint(toy["checkpoint_path"]), open_checkpoint(directory)
    assert theirs.model_version == "2.3"
    assert theirs.transformer == ours.transformer
    parts, config = read_model(directory), read_header(toy["checkpoint_path"]).config["transformer"]
    official = official_config(parts["transformer"], parts["connectors"])
    assert {k: v for k, v in official.items() if k in config and v != config[k]} == {}
    shapes = [{name: info.shape for name, info in c.tensors.items()} for c in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert len({info.path for info in theirs.tensors.values()}) > 1, "several shards"


@pytest.mark.parametrize("dtype", ["bfloat16"])
def test_latents_frames_and_sound_are_the_single_files(toy, directory, dtype):
    files = ModelFiles(**toy)
    whole = replace(files, checkpoint_path=directory, **held_by(directory))
    assert whole.gemma_root == directory and whole.spatial_upsampler_path.startswith(directory)
    expected = _rendered(toy_pipeline() if dtype == "float32" else ToyPipeline(files, dtype))
    found = _rendered(ToyPipeline(whole, dtype))
    assert len(expected) == 7
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_a_text_encoder_that_lacks_a_tensor_is_refused(directory, tmp_path):
    shutil.copytree(Path(directory, "text_encoder"), tmp_path / "text_encoder")
    (tmp_path / "tokenizer").symlink_to(Path(directory, "tokenizer"))
    weights = tmp_path / "text_encoder" / "model.safetensors"
    tensors = load_file(weights)
    lost = next(name for name in tensors if name.endswith("layers.3.mlp.up_proj.weight"))
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, weights, metadata={"format": "pt"})
    model = ModelFiles(directory, str(tmp_path), "")
    with pytest.raises(ValueError, match=r"text_encoder: Gemma: 1 missing keys: .*layers\.3\.mlp\.up_proj\.weight"):
        TextEngine(EngineSpec("", model, Numerics(), ""), Rank()).load()


def _rendered(pipeline: ToyPipeline) -> dict[str, torch.Tensor]:
    """The four latents of ROW, its frames and its sound, and one so loud that the vocoder clamps it.

    diffusers' conversion leaves the clamp out.
    """
    latents = pipeline.latents(ROW)
    decode = DecodeEngine(EngineSpec("", pipeline.model, pipeline.numerics, "out"), Rank())
    decode.load()
    loud = torch.randn(1, 2, 9, 64, generator=torch.Generator().manual_seed(0)) * 8
    with one_thread(), torch.inference_mode():
        frames = codec.decode_video_tile(decode.video_vae, latents["stage_2.video"])
        sound, _ = codec.decode_audio(decode.audio_vae, decode.vocoder, latents["stage_1.audio"])
        return {**latents, "frames": frames, "sound": sound, "loud": decode.vocoder(loud)}
