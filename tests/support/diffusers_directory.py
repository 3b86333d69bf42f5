"""The toy model in diffusers' layout: what LTX2Pipeline.save_pretrained writes of the same weights, in shards."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file

from ltx_ray.engine import components
from tests.support.transformers import load_diffusers

#: Cuts the toy's transformer into several files.
_SHARD = "2MB"


def write_directory(files: Mapping[str, str], out: Path) -> Path:
    """Save the model of `files` (as ensure_toy_model returns them) into `out`, weights in bfloat16 as they are."""
    from diffusers import FlowMatchEulerDiscreteScheduler, LTX2Pipeline
    from transformers import AutoTokenizer, Gemma3ForConditionalGeneration

    path, dtype = files["checkpoint_path"], torch.bfloat16
    vocoder = components.load_vocoder(path, dtype, "cpu").to(dtype)
    vocoder.register_to_config(final_act_fn=None)  # the convert script forgets the clamp
    pipeline = LTX2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.1),
        vae=components.load_video_vae(path, dtype, "cpu", "both"),
        audio_vae=_whole_audio_vae(path),
        text_encoder=Gemma3ForConditionalGeneration.from_pretrained(files["gemma_root"], dtype=dtype),
        tokenizer=AutoTokenizer.from_pretrained(files["gemma_root"]),
        connectors=components.load_connectors(path, dtype, "cpu"),
        transformer=load_diffusers(path).to(dtype),
        vocoder=vocoder,
    )
    pipeline.save_pretrained(out, max_shard_size=_SHARD)
    upsampler = components.load_upsampler(files["spatial_upsampler_path"], dtype, "cpu")
    upsampler.save_pretrained(out / "latent_upsampler")
    assert len(list((out / "transformer").glob("*.safetensors"))) > 1
    assert json.loads((out / "vocoder" / "config.json").read_text())["final_act_fn"] is None
    return out


def _whole_audio_vae(path: str) -> torch.nn.Module:
    """With its encoder, which we never load."""
    from diffusers import AutoencoderKLLTX2Audio

    vae = AutoencoderKLLTX2Audio.from_config(components.load_audio_decoder(path, torch.bfloat16, "cpu").config)
    names = {
        "per_channel_statistics.mean-of-means": "latents_mean",
        "per_channel_statistics.std-of-means": "latents_std",
    }
    state = {k.removeprefix("audio_vae."): v for k, v in load_file(path).items() if k.startswith("audio_vae.")}
    vae.load_state_dict({names.get(k, k): v for k, v in state.items()}, strict=True, assign=True)
    return vae
