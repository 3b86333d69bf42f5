"""Passes of the fused path at the released widths on a card, alone or as a rank of a gang."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ltx_ray.model.fused import FusedTransformer
from ltx_ray.model.graphs import GraphedTransformer
from ltx_ray.model.packing import pack_linears
from ltx_ray.model.rope import audio_positions, video_positions
from ltx_ray.model.transformer import NO_PERTURBATION, Modality, Perturbation, Transformer
from ltx_ray.parallel.collectives import RankGroup
from ltx_ray.parallel.fp8 import write_values
from ltx_ray.parallel.mesh import Mesh
from ltx_ray.records import AV
from ltx_ray.shapes import ClipShape
from scripts.bench import random_transformer
from tests.support.transformers import TEXT

DEVICE, LAYERS = torch.device("cuda"), 4
#: 2 * 9 * 15 = 270 video tokens, which 4 ranks do not divide, and 26 audio latents.
SHAPE = ClipShape(num_frames=9, height=288, width=480, frame_rate=24.0)
STG = Perturbation(values_only=AV(frozenset({1}), frozenset({2})))
#: Perturbation, noise levels of the video's tokens, batch.
CALLS = {"pair": (NO_PERTURBATION, 1, 2), "stg": (STG, 3, 1), "isolated": (Perturbation(isolated=True), 1, 1)}


def model(tp: RankGroup, precision: str, dtype: torch.dtype = torch.bfloat16) -> Transformer:
    """Random weights of the released widths, of which each rank has its part."""
    config = random_transformer.config(LAYERS)
    with torch.device("meta"):
        made = Transformer(config, tp)
    pack_linears(made, DEVICE, dtype, precision)
    random_transformer.fill(made, DEVICE, dtype, write_values, tp=tp)
    return made


def passes(
    mesh: Mesh,
    precision: str,
    dtype: torch.dtype = torch.bfloat16,
    shape: ClipShape = SHAPE,
    wrap: Callable[[FusedTransformer], FusedTransformer | GraphedTransformer] = lambda dit: dit,
    repeat: int = 1,
) -> list[dict[str, AV[torch.Tensor]]]:
    """The velocities of every kind of call, on the host, as often as `repeat` says."""
    dit = FusedTransformer(model(mesh.tp, precision, dtype))
    positions = AV(video_positions(shape, DEVICE), audio_positions(shape.audio_latents, DEVICE))
    ropes, config, run = dit.ropes(positions, dtype, mesh.peers), dit.model.config, wrap(dit)

    def velocities(perturbation: Perturbation, levels: int, batch: int) -> AV[torch.Tensor]:
        rng = torch.Generator(DEVICE).manual_seed(7)
        index = torch.arange(shape.video_tokens, dtype=torch.int32, device=DEVICE) % levels
        times = torch.tensor([[0.7, 0.35, 0.0]], device=DEVICE)[:, :levels]

        def modality(stream, tokens, tables, timesteps, level_index) -> Modality:
            latent, context = (
                torch.randn(size, generator=rng, device=DEVICE).bfloat16().to(dtype)
                for size in ((batch, tokens, stream.in_channels), (batch, TEXT, stream.context_dim))
            )
            sigma = torch.full((batch,), 0.7, device=DEVICE)
            at = timesteps.expand(batch, -1)
            return Modality(latent, sigma, at, context, *tables, level_index=level_index)

        inputs = AV(config.video, config.audio).map(
            modality, AV(shape.video_tokens, shape.audio_latents), ropes, AV(times, times[:, :1]),
            AV(index if levels > 1 else None, None),
        )  # fmt: skip
        return run(inputs, perturbation, mesh.peers).map(lambda x: x.float().cpu())

    return [{name: velocities(*call) for name, call in CALLS.items()} for _ in range(repeat)]
