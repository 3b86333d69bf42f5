"""The fused path on several ranks of one GPU, at the released widths: as near to float32 as on one rank.

The ranks are threads of this process, so the passes are eager. Their exchanges are exact.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch

from ltx_ray.model.fused import FusedTransformer
from ltx_ray.model.packing import pack_linears
from ltx_ray.model.rope import audio_positions, video_positions
from ltx_ray.model.transformer import NO_PERTURBATION, Modality, Perturbation, Transformer
from ltx_ray.parallel.collectives import SINGLE_RANK, RankGroup
from ltx_ray.parallel.fp8 import write_values
from ltx_ray.parallel.mesh import Mesh
from ltx_ray.records import AV
from ltx_ray.shapes import ClipShape
from scripts.bench import random_transformer
from tests.support.thread_ranks import run_ranks
from tests.support.transformers import TEXT, relative

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


def passes(mesh: Mesh, precision: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, AV[torch.Tensor]]:
    dit = FusedTransformer(model(mesh.tp, precision, dtype))
    positions = AV(video_positions(SHAPE, DEVICE), audio_positions(SHAPE.audio_latents, DEVICE))
    ropes, config = dit.ropes(positions, dtype, mesh.peers), dit.model.config
    found = {}
    for name, (perturbation, levels, batch) in CALLS.items():
        rng = torch.Generator(DEVICE).manual_seed(7)
        index = torch.arange(SHAPE.video_tokens, dtype=torch.int32, device=DEVICE) % levels
        times = torch.tensor([[0.7, 0.35, 0.0]], device=DEVICE)[:, :levels]

        def modality(stream, tokens, tables, timesteps, level_index, rng=rng, batch=batch) -> Modality:
            latent, context = (
                torch.randn(size, generator=rng, device=DEVICE).bfloat16().to(dtype)
                for size in ((batch, tokens, stream.in_channels), (batch, TEXT, stream.context_dim))
            )
            sigma = torch.full((batch,), 0.7, device=DEVICE)
            at = timesteps.expand(batch, -1)
            return Modality(latent, sigma, at, context, *tables, level_index=level_index)

        inputs = AV(config.video, config.audio).map(
            modality, AV(SHAPE.video_tokens, SHAPE.audio_latents), ropes, AV(times, times[:, :1]),
            AV(index if levels > 1 else None, None),
        )  # fmt: skip
        found[name] = dit(inputs, perturbation, mesh.peers).map(lambda x: x.float().cpu())
    return found


@cache
def one_rank(precision: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, AV[torch.Tensor]]:
    with torch.inference_mode():
        return passes(Mesh(SINGLE_RANK, SINGLE_RANK), precision, dtype)


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize(("tp", "sequence"), [(2, 1), (4, 1), (1, 2), (1, 4), (2, 2)])
def test_a_layout_is_as_near_to_float32_as_one_rank(tp, sequence, precision):
    exact, floor = one_rank("bf16", torch.float32), one_rank(precision)
    ranks = run_ranks(tp, sequence, lambda mesh: passes(mesh, precision))
    for name, right in exact.items():
        for stream in range(2):
            error = relative(list(floor[name])[stream], list(right)[stream])
            for found in ranks:
                assert relative(list(found[name])[stream], list(right)[stream]) <= 1.2 * error, (name, stream, error)
        assert all(torch.equal(a, b) for found in ranks for a, b in zip(found[name], ranks[0][name], strict=True))
