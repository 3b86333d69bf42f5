"""The fused path on several ranks against one rank, for every kind of pass. The ranks are threads of this process."""

from __future__ import annotations

import pytest
import torch

from ltx_ray.checkpoints.checkpoint import open_checkpoint
from ltx_ray.model import divided_attention, fused
from ltx_ray.model.fused import FusedTransformer
from ltx_ray.model.packing import pack_linears
from ltx_ray.model.rope import audio_positions, video_positions
from ltx_ray.model.transformer import NO_PERTURBATION, Modality, Perturbation, Transformer
from ltx_ray.parallel.collectives import RankGroup, Threads
from ltx_ray.parallel.loading import load_shard
from ltx_ray.parallel.mesh import Mesh
from ltx_ray.records import AV
from ltx_ray.shapes import ClipShape
from ltx_ray.toy import ToyShape, make_toy_model
from tests.support.thread_ranks import CopyingThreads, run_ranks
from tests.support.transformers import TEXT, relative

#: 3 * 4 * 6 = 72 video tokens and 18 audio latents; 2 x 5 x 3 = 30 and 9, which 4 ranks do not divide.
SHAPES = (
    ClipShape(num_frames=17, height=128, width=192, frame_rate=24.0),
    ClipShape(num_frames=9, height=160, width=96, frame_rate=25.0),
)
BOTH = AV(True, True)
STG = Perturbation(values_only=AV(frozenset({0}), frozenset({1})))
#: Perturbation, enabled streams, noise levels of the video's tokens, batch.
CALLS = {
    "plain": (NO_PERTURBATION, BOTH, 1, 1),
    "pair": (NO_PERTURBATION, BOTH, 1, 2),
    "isolated": (Perturbation(isolated=True), BOTH, 1, 1),
    "stg": (STG, BOTH, 1, 1),
    "levels": (STG, BOTH, 3, 2),
    "video alone": (NO_PERTURBATION, AV(True, False), 2, 1),
    "audio alone": (STG, AV(False, True), 1, 2),
}
#: tp and sequence parallel.
LAYOUTS = [(2, 1), (3, 1), (6, 1), (1, 2), (1, 3), (2, 3), (3, 2)]


@pytest.fixture(scope="module")
def six_heads(tmp_path_factory) -> str:
    shape = ToyShape(layers=2, heads=6, head_dim=32, audio_head_dim=16)
    return make_toy_model(tmp_path_factory.mktemp("six"), seed=1, shape=shape)["checkpoint_path"]


def _packed(path: str, tp: RankGroup, precision: str) -> Transformer:
    checkpoint, cpu = open_checkpoint(path), torch.device("cpu")
    with torch.inference_mode(False), torch.no_grad():
        with torch.device("meta"):
            model = Transformer(checkpoint.transformer, tp)
        pack_linears(model, cpu, torch.float32, precision)
        load_shard(model, checkpoint.tensors, tp, dtype=torch.float32, device=cpu)
    return model


def _pass(dit: FusedTransformer, shape: ClipShape, call: str, peers: RankGroup) -> AV[torch.Tensor]:
    perturbation, enabled, levels, batch = CALLS[call]
    config, rng = dit.model.config, torch.Generator().manual_seed(7)
    index = torch.arange(shape.video_tokens, dtype=torch.int32) % levels
    times = AV(torch.tensor([[0.7, 0.35, 0.0]])[:, :levels], torch.tensor([[0.7]]))
    positions = AV(video_positions(shape), audio_positions(shape.audio_latents))
    tokens = AV(shape.video_tokens, shape.audio_latents)

    def modality(stream, length, ropes, on, timesteps, level_index) -> Modality:
        latent = torch.randn((batch, length, stream.in_channels), generator=rng)
        context = torch.randn((batch, TEXT, stream.context_dim), generator=rng)
        sigma = torch.tensor([0.7]).expand(batch)
        return Modality(latent, sigma, timesteps.expand(batch, -1), context, *ropes, on, level_index)

    ropes = dit.ropes(positions, torch.float32, peers)
    indices = AV(index if levels > 1 else None, None)
    inputs = AV(config.video, config.audio).map(modality, tokens, ropes, enabled, times, indices)
    return dit(inputs, perturbation, peers)


def _passes(path: str, precision: str, mesh: Mesh) -> dict[tuple[ClipShape, str], AV[torch.Tensor]]:
    dit = FusedTransformer(_packed(path, mesh.tp, precision))
    return {(shape, call): _pass(dit, shape, call, mesh.peers) for shape in SHAPES for call in CALLS}


@pytest.fixture(scope="module")
def one_rank(six_heads):
    with torch.inference_mode():
        return {precision: _passes(six_heads, precision, Mesh()) for precision in ("bf16", "fp8")}


@pytest.mark.parametrize(("tp", "sequence"), LAYOUTS)
def test_a_layout_gives_the_velocities_of_one_rank(six_heads, one_rank, tp, sequence):
    ranks = run_ranks(tp, sequence, lambda mesh: _passes(six_heads, "bf16", mesh))
    for key, expected in one_rank["bf16"].items():
        for found in ranks:
            assert max(relative(a, b) for a, b in zip(found[key], expected, strict=True)) <= 1e-5, key
            assert all(torch.equal(a, b) for a, b in zip(found[key], ranks[0][key], strict=True)), "the ranks differ"


@pytest.mark.parametrize(("tp", "sequence"), [(2, 1), (3, 2)])
def test_rows_in_pieces_give_the_velocities_of_one_rank(six_heads, one_rank, monkeypatch, tp, sequence):
    """Between 3 and 4 of them, of which the last is the shortest."""
    monkeypatch.setattr(fused, "_PIECE_ROWS", 9)
    for precision in ("bf16", "fp8"):
        ranks = run_ranks(tp, sequence, lambda mesh, p=precision: _passes(six_heads, p, mesh), CopyingThreads)
        for key, exact in one_rank["bf16"].items():
            floor = max(relative(a, b) for a, b in zip(one_rank[precision][key], exact, strict=True))
            for found in ranks:
                error = max(relative(a, b) for a, b in zip(found[key], exact, strict=True))
                assert error <= max(1e-5, 1.25 * floor), key
                assert all(torch.equal(a, b) for a, b in zip(found[key], ranks[0][key], strict=True)), (
                    "the ranks differ"
                )


@pytest.mark.parametrize(("sequence", "groups"), [(3, (2,)), (2, (3,)), (2, (2,))])
def test_heads_in_groups_give_the_velocities_of_one_rank(six_heads, one_rank, monkeypatch, sequence, groups):
    """The last asks for more groups than the heads of a rank can make."""
    monkeypatch.setattr(divided_attention, "_GROUPS", groups)
    monkeypatch.setattr(divided_attention, "_FILLING_QUERIES", 1)
    for found in run_ranks(1, sequence, lambda mesh: _passes(six_heads, "bf16", mesh), CopyingThreads):
        for key, expected in one_rank["bf16"].items():
            assert max(relative(a, b) for a, b in zip(found[key], expected, strict=True)) <= 1e-5, key


@pytest.mark.parametrize(("tp", "sequence"), [(2, 1), (3, 2)])
def test_exchanges_by_copies_give_the_same_bits(six_heads, tp, sequence):
    found, expected = (
        run_ranks(tp, sequence, lambda mesh: _passes(six_heads, "fp8", mesh), threads)
        for threads in (CopyingThreads, Threads)
    )
    for a, b in zip(found, expected, strict=True):
        for key in a:
            assert all(torch.equal(x, y) for x, y in zip(a[key], b[key], strict=True)), key


@pytest.mark.parametrize(("tp", "sequence"), [(1, 3), (2, 1), (3, 2)])
def test_fp8_is_as_near_as_on_one_rank(six_heads, one_rank, tp, sequence):
    """Rows are quantized where they live, so that ranks that divide the tokens have the values of one rank."""
    ranks = run_ranks(tp, sequence, lambda mesh: _passes(six_heads, "fp8", mesh))
    for key, exact in one_rank["bf16"].items():
        floor = max(relative(a, b) for a, b in zip(one_rank["fp8"][key], exact, strict=True))
        assert floor >= 1e-3
        for found in ranks:
            assert max(relative(a, b) for a, b in zip(found[key], exact, strict=True)) <= 1.25 * floor, key
            if tp == 1:
                same = max(relative(a, b) for a, b in zip(found[key], one_rank["fp8"][key], strict=True))
                assert same <= 0.05 * floor, key
