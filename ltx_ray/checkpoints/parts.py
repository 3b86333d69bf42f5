"""The parts around the transformer, checked by their configurations and headers before any actor starts. No torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from types import MappingProxyType, ModuleType
from typing import Any

from ltx_ray.checkpoints import diffusers_layout, single_file
from ltx_ray.checkpoints.checkpoint import check_gemma, check_upsampler, gemma_folders
from ltx_ray.checkpoints.model_paths import is_folder
from ltx_ray.config import ModelFiles
from ltx_ray.shapes import AUDIO_CHANNELS, AUDIO_SAMPLE_RATE, SPACE_FACTOR, TIME_FACTOR, VIDEO_CHANNELS

#: What a clip's sizes rely on (shapes.py), by diffusers' names of it.
VIDEO_SIZES: Mapping[str, int] = MappingProxyType(
    {
        "latent_channels": VIDEO_CHANNELS,
        "spatial_compression_ratio": SPACE_FACTOR,
        "temporal_compression_ratio": TIME_FACTOR,
    }
)
AUDIO_SIZES: Mapping[str, int] = MappingProxyType(
    {"latent_channels": AUDIO_CHANNELS, "sample_rate": 16000, "mel_hop_length": 160}
)
VOCODER_SIZES: Mapping[str, int] = MappingProxyType(
    {"input_sampling_rate": 16000, "output_sampling_rate": AUDIO_SAMPLE_RATE}
)
UPSAMPLER_SIZES: Mapping[str, int] = MappingProxyType({"in_channels": VIDEO_CHANNELS, "dims": 3})


def layout_of(path: str | os.PathLike[str]) -> ModuleType:
    """The module of this package that reads the layout at `path`."""
    return diffusers_layout if is_folder(path) else single_file


def check_sizes(path: str, what: str, sizes: Mapping[str, int], value: Callable[[str], Any]) -> None:
    """Raise ValueError for a setting in `sizes` whose `value` is not the one with which clips are as large and as long
    as planned."""
    for name, legal in sizes.items():
        if (found := value(name)) != legal:
            raise ValueError(f"{path}: {what}: {name} is {found!r}; legal: {legal} (LTX-2.3)")


def check_other_models(model: ModelFiles) -> None:
    """Raise ValueError unless the upsampler, Gemma and the parts around the transformer are of LTX-2.3, and fit."""
    check_upsampler(model.spatial_upsampler_path)
    check_parts(model.checkpoint_path, model.spatial_upsampler_path)
    check_gemma(model.gemma_root)
    check_text_width(model.checkpoint_path, model.gemma_root)


def check_parts(checkpoint_path: str, upsampler_path: str) -> None:
    """Raise ValueError naming the file and the field when the configuration of a part is not one of LTX-2.3.

    Whether its tensors fit the configuration shows when they are loaded.
    """
    layout = layout_of(checkpoint_path)
    layout.connectors(checkpoint_path)
    for part, what, sizes in (
        (layout.video_vae(checkpoint_path), "video VAE", VIDEO_SIZES),
        (layout.audio_vae(checkpoint_path), "audio VAE", AUDIO_SIZES),
        (layout.vocoder(checkpoint_path), "vocoder", VOCODER_SIZES),
        (layout_of(upsampler_path).upsampler(upsampler_path), "latent upsampler", UPSAMPLER_SIZES),
    ):
        # diffusers' default of a setting that is not stated is LTX-2.3's, or is computed when the part is loaded.
        stated = {name: legal for name, legal in sizes.items() if part.config.get(name) is not None}
        check_sizes(part.path, what, stated, part.config.__getitem__)


def check_text_width(checkpoint_path: str, gemma_root: str) -> None:
    """Raise ValueError for a Gemma of another size than the text projection takes. Every row would fail in it."""
    folder, _ = gemma_folders(gemma_root)
    config = diffusers_layout.read_config(folder)
    text = config.get("text_config", config)
    if not isinstance(text, Mapping):
        raise ValueError(f"--gemma-root: {folder}, has the text_config {text!r}; legal: a JSON object")
    channels, layers = text.get("hidden_size"), text.get("num_hidden_layers")
    connectors = layout_of(checkpoint_path).connectors(checkpoint_path)
    projection = connectors.tensors.get("video_text_proj_in.weight")
    wanted = connectors.config.get("caption_channels")
    if None in (channels, layers, projection, wanted):
        return
    # It takes the hidden states of all layers, and what enters the first one.
    wanted_layers = projection.shape[1] // wanted - 1
    if (channels, layers) != (wanted, wanted_layers):
        raise ValueError(
            f"--gemma-root: {folder}, has {layers} layers of {channels} channels; legal: {wanted_layers} layers of "
            f"{wanted} channels, which the text projection of {checkpoint_path} takes"
        )
