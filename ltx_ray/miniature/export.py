"""The miniature's modules and files: diffusers' modules at its sizes, and their weights under the released names.

Key names and metadata are those of the release, so the code that loads the 22B file loads these files too.
Modules are typed `Any` because torch types every child of a module as `Tensor | Module`.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ltx_ray.checkpoints import single_file
from ltx_ray.checkpoints.transformer_config import TransformerConfig
from ltx_ray.checkpoints.transformer_keys import (
    AUDIO_CONNECTOR_PREFIX,
    K_NORM,
    Q_NORM,
    TRANSFORMER_PREFIX,
    VIDEO_CONNECTOR_PREFIX,
)
from ltx_ray.miniature.config import GEMMA_LAYERS, MODEL_VERSION, checkpoint_config, upsampler_config
from ltx_ray.miniature.config import WEIGHTS as WEIGHTS
from ltx_ray.miniature.spectrum import mel_filters, stft_basis
from ltx_ray.toy import save_tensors

_STATISTICS = {"latents_mean": "mean-of-means", "latents_std": "std-of-means"}


# --- modules -----------------------------------------------------------------------------------------------------


def _constructor_arguments(part: str) -> dict[str, Any]:
    """Constructor arguments of the diffusers class for `part` ("video_vae", "audio_vae", "vocoder" or "upsampler").

    `checkpoints.single_file` reads them from a file that has the miniature's config and no tensors.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "empty.safetensors")
        save_part(path, {}, upsampler_config() if part == "upsampler" else None)
        return getattr(single_file, part)(path).config


def new_video_vae() -> Any:
    """AutoencoderKLLTX2Video at the miniature's size, with random weights from torch's global generator."""
    from diffusers import AutoencoderKLLTX2Video

    return AutoencoderKLLTX2Video(**_constructor_arguments("video_vae"))


def new_audio_vae() -> Any:
    """AutoencoderKLLTX2Audio at the miniature's size, with random weights from torch's global generator."""
    from diffusers import AutoencoderKLLTX2Audio

    return AutoencoderKLLTX2Audio(**_constructor_arguments("audio_vae"))


def new_vocoder() -> Any:
    """LTX2VocoderWithBWE at the miniature's size, with random weights.

    Its spectrogram's DFT and mel bases are not trained; they are computed here.
    """
    from diffusers.pipelines.ltx2 import LTX2VocoderWithBWE

    module = LTX2VocoderWithBWE(**_constructor_arguments("vocoder"))
    config = module.config
    forward, inverse = stft_basis(config.filter_length)
    module.mel_stft.stft_fn.forward_basis.copy_(forward)
    module.mel_stft.stft_fn.inverse_basis.copy_(inverse)
    module.mel_stft.mel_basis.copy_(
        mel_filters(config.num_mel_channels, config.filter_length, config.input_sampling_rate)
    )
    return module


def new_connectors(dtype: torch.dtype) -> Any:
    """LTX2TextConnectors at the miniature's size, with random weights in float32; it rotates in `dtype`."""
    from diffusers.pipelines.ltx2 import LTX2TextConnectors

    from ltx_ray.engine.components import rounding_connectors

    # Without tensors, the file does not say how many hidden states Gemma has.
    arguments = {**_constructor_arguments("connectors"), "text_proj_in_factor": GEMMA_LAYERS + 1}
    return rounding_connectors(LTX2TextConnectors(**arguments), dtype)


def transformer_config() -> TransformerConfig:
    """Sizes of the miniature's transformer."""
    return TransformerConfig.from_metadata(checkpoint_config()["transformer"], "the miniature")


def new_upsampler() -> Any:
    """LTX2LatentUpsamplerModel at the miniature's size, with random weights from torch's global generator.

    Its keys are the released names.
    """
    from diffusers.pipelines.ltx2 import LTX2LatentUpsamplerModel

    return LTX2LatentUpsamplerModel(**_constructor_arguments("upsampler"))


# --- released names ----------------------------------------------------------------------------------------------


def released_video_vae(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """State dict of new_video_vae() under the released names.

    The release numbers residual and resampling blocks in one sequence. diffusers' mid_block is the last residual
    block of the release's encoder and the first of its decoder.
    """
    downs = 1 + max(int(key.split(".")[2]) for key in state if key.startswith("encoder.down_blocks."))
    named = {}
    for key, value in state.items():
        if key in _STATISTICS:
            named[f"vae.per_channel_statistics.{_STATISTICS[key]}"] = value
            continue
        half, kind, *rest = key.replace("resnets.", "res_blocks.").split(".")
        direction, last = ("down", 2 * downs) if half == "encoder" else ("up", 0)
        if kind == "mid_block":
            kind = f"{direction}_blocks.{last}"
        elif kind == f"{direction}_blocks":
            index = 2 * int(rest.pop(0)) + (0 if half == "encoder" else 1)
            if rest[0] == f"{direction}samplers":
                del rest[:2]
                index += half == "encoder"
            else:
                index += half == "decoder"
            kind = f"{direction}_blocks.{index}"
        named[".".join(("vae", half, kind, *rest))] = value
    return named


def released_audio_vae(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """State dict of new_audio_vae() under the released names."""
    statistics = {f"per_channel_statistics.{new}": state[old] for old, new in _STATISTICS.items()}
    weights = {key: value for key, value in state.items() if key not in _STATISTICS}
    return {f"audio_vae.{key}": value for key, value in {**weights, **statistics}.items()}


_VOCODER_NAMES = {
    "conv_in": "conv_pre",
    "conv_out": "conv_post",
    "act_out": "act_post",
    "upsamplers": "ups",
    "resnets": "resblocks",
}


def released_vocoder(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """State dict of new_vocoder() under the released names."""
    named = {}
    for key, value in state.items():
        part, name, *rest = key.split(".")
        if part != "mel_stft":
            name = _VOCODER_NAMES[name]
            if rest[-2:] == ["downsample", "filter"]:
                rest[-1:] = ["lowpass", "filter"]
        named[".".join(("vocoder", part, name, *rest))] = value
    return named


_CONNECTOR_PREFIXES = {"video_connector": VIDEO_CONNECTOR_PREFIX, "audio_connector": AUDIO_CONNECTOR_PREFIX}


def released_connectors(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """State dict of new_connectors() under the released names."""
    named = {}
    for key, value in state.items():
        part, _, rest = key.partition(".")
        if part in _CONNECTOR_PREFIXES:
            rest = rest.replace("transformer_blocks.", "transformer_1d_blocks.")
            named[_CONNECTOR_PREFIXES[part] + rest.replace("norm_q", Q_NORM).replace("norm_k", K_NORM)] = value
        else:
            stream = part.removesuffix("_text_proj_in")
            named[f"text_embedding_projection.{stream}_aggregate_embed.{rest}"] = value
    return named


def released_transformer(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """State dict of `ltx_ray.model`'s Transformer under the released names."""
    return {TRANSFORMER_PREFIX + key: value for key, value in state.items()}


# --- files -------------------------------------------------------------------------------------------------------


def save_part(
    path: str | os.PathLike, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any] | None = None
) -> int:
    """Write `tensors` (released names) as bfloat16 with the metadata of a released file. Returns its size in bytes.

    `config` is the JSON object under `config` in the metadata, by default the single file's.
    """
    metadata = {"config": json.dumps(checkpoint_config() if config is None else config), "model_version": MODEL_VERSION}
    rounded = {key: value.detach().to("cpu", torch.bfloat16).contiguous() for key, value in tensors.items()}
    save_tensors(Path(path), rounded, metadata)
    return os.path.getsize(path)
