"""The parts around the DiT as a directory in diffusers' layout holds them.

singlefile.py is the same for the official files. A directory holds the same numbers, as far as whoever wrote it kept
their dtype: the convert script rounds parts that it saves one by one to bfloat16 unless told otherwise.
"""

from __future__ import annotations

import os
from dataclasses import replace

from ltx_ray.checkpoints.diffusers_layout import COMPONENTS, Component, read_component, read_upsampler


def _part(path: str, name: str) -> Component:
    return read_component(os.path.join(path, name), COMPONENTS[name])


def connectors(path: str) -> Component:
    """Text projections and connectors, as LTX2TextConnectors."""
    return _part(path, "connectors")


def video_vae(path: str) -> Component:
    """The video VAE with its latent statistics, as AutoencoderKLLTX2Video."""
    return _part(path, "vae")


def audio_vae(path: str) -> Component:
    """The audio VAE with its latent statistics, as AutoencoderKLLTX2Audio."""
    return _part(path, "audio_vae")


def vocoder(path: str) -> Component:
    """The vocoder with bandwidth extension, as LTX2VocoderWithBWE."""
    part = _part(path, "vocoder")
    # The reference's first generator ends in tanh or else in a clamp, never in neither; what diffusers' conversion
    # of 2.3 writes as null (the class's default too) is the clamp, which it forgets.
    return replace(part, config={**part.config, "final_act_fn": part.config.get("final_act_fn") or "clamp"})


def upsampler(path: str) -> Component:
    """The latent upsampler, as LTX2LatentUpsamplerModel; `path` is its folder, or one with a latent_upsampler/."""
    return read_upsampler(path)
