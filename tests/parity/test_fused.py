"""The fused path against `Transformer.forward` on a CPU: the same function for every kind of pass."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ltx_ray.checkpoints.checkpoint import open_checkpoint
from ltx_ray.model import steps
from ltx_ray.model.fused import FusedTransformer, check_fp8
from ltx_ray.model.packing import pack_linears
from ltx_ray.model.rope import audio_positions, video_positions
from ltx_ray.model.transformer import NO_PERTURBATION, Modality, Perturbation, Transformer
from ltx_ray.parallel.collectives import RankGroup
from ltx_ray.parallel.fp8 import read_values, row_scale_of, write_values
from ltx_ray.parallel.loading import load_shard
from ltx_ray.records import AV
from ltx_ray.toy import ToyShape, make_toy_model
from tests.support.transformers import SHAPE, Inputs, load_ours, relative

BOTH = AV(True, True)
STG = Perturbation(values_only=AV(frozenset({0}), frozenset({1})))
#: Perturbation, enabled streams, noise levels of the video's tokens.
CALLS = {
    "plain": (NO_PERTURBATION, BOTH, 1),
    "isolated": (Perturbation(isolated=True), BOTH, 1),
    "stg": (STG, BOTH, 1),
    "levels": (NO_PERTURBATION, BOTH, 3),
    "video alone": (NO_PERTURBATION, AV(True, False), 1),
    "audio alone": (STG, AV(False, True), 2),
}


def _packed(path: str, precision: str = "bf16") -> Transformer:
    checkpoint = open_checkpoint(path)
    with torch.device("meta"):
        model = Transformer(checkpoint.transformer)
    cpu = torch.device("cpu")
    pack_linears(model, cpu, torch.float32, precision)
    load_shard(model, checkpoint.tensors, RankGroup(), dtype=torch.float32, device=cpu)
    return model


def _call(run, ropes, inputs: Inputs, enabled: AV[bool], timesteps: torch.Tensor, level_index=None, batch: int = 1):
    sigma = torch.tensor([0.7]).expand(batch)

    def modality(latent, context, tables, on, times, index) -> Modality:
        x, c = (t.expand(batch, -1, -1).clone() for t in (latent, context))
        # The entries of a batch differ.
        x *= torch.linspace(1, 1.5, batch).view(-1, 1, 1)
        return Modality(x, sigma, times.expand(batch, -1), c, *tables, enabled=on, level_index=index)

    times = AV(timesteps, torch.tensor([[0.7]]))
    return run(inputs.latents.map(modality, inputs.contexts, ropes, enabled, times, AV(level_index, None)))


def _both(plain: Transformer, packed: Transformer, inputs: Inputs, call: str, batch: int):
    perturbation, enabled, levels = CALLS[call]
    values = torch.tensor([[0.7, 0.35, 0.0]])[:, :levels]
    index = torch.arange(SHAPE.video_tokens, dtype=torch.int32) % levels
    positions = AV(video_positions(SHAPE), audio_positions(SHAPE.audio_latents))
    fused = FusedTransformer(packed)
    with torch.inference_mode():
        expected = _call(
            lambda x: plain(x, perturbation), plain.ropes(positions, torch.float32), inputs, enabled,
            values[:, index.long()] if levels > 1 else values, batch=batch,
        )  # fmt: skip
        found = _call(
            lambda x: fused(x, perturbation), fused.ropes(positions, torch.float32), inputs, enabled, values,
            index if levels > 1 else None, batch,
        )  # fmt: skip
    return found, expected


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("call", CALLS)
def test_agrees_with_the_plain_forward(toy, call, batch):
    plain, packed = load_ours(toy["checkpoint_path"]), _packed(toy["checkpoint_path"])
    found, expected = _both(plain, packed, Inputs.random(plain, seed=3), call, batch)
    for ours, theirs in zip(found, expected, strict=True):
        assert relative(ours, theirs) <= 1e-5


def test_modulations_are_those_of_the_call(toy):
    """A call at another noise level gets modulations of its own, although passes of one call share them."""
    plain, packed = load_ours(toy["checkpoint_path"]), _packed(toy["checkpoint_path"])
    inputs, fused = Inputs.random(plain, seed=4), FusedTransformer(packed)
    positions = AV(video_positions(SHAPE), audio_positions(SHAPE.audio_latents))
    with torch.inference_mode():
        for sigma in (0.9, 0.3, 0.9):
            at_sigma = replace(inputs, sigma=AV(sigma, sigma))
            own = at_sigma.ours(plain, NO_PERTURBATION)
            at = torch.tensor([sigma])
            parts = zip(inputs.latents, inputs.contexts, fused.ropes(positions, torch.float32), strict=True)
            found = fused(AV(*(Modality(x, at, at.reshape(1, 1), c, *tables) for x, c, tables in parts)))
            assert max(relative(a, b) for a, b in zip(found, own, strict=True)) <= 1e-5


def test_fp8_weights_are_near_and_so_are_the_velocities(toy):
    """fp8 changes the rounding of weights and rows, by far less than the signal and far more than float32."""
    plain, packed = load_ours(toy["checkpoint_path"]), _packed(toy["checkpoint_path"], "fp8")
    fp8 = {name for name, p in packed.named_parameters() if row_scale_of(p) is not None}
    assert "transformer_blocks.0.attn1.to_q.weight" in fp8 and "transformer_blocks.0.ff.net.2.weight" in fp8
    assert not any(".audio_attn" in name or ".audio_ff" in name for name in fp8)
    for name in sorted(fp8):
        assert relative(read_values(packed.get_parameter(name)), plain.get_parameter(name)) <= 0.04, name
    found, expected = _both(plain, packed, Inputs.random(plain, seed=5), "plain", 1)
    for ours, theirs in zip(found, expected, strict=True):
        assert 1e-4 <= relative(ours, theirs) <= 0.1


def test_a_device_without_fp8_products_is_named(toy, monkeypatch):
    layer = _packed(toy["checkpoint_path"], "fp8").transformer_blocks[0].packed_linears["attn1", "qkv"]
    check_fp8(layer, "a card")

    reason: Exception

    def refuse(rows, layer):
        assert rows.values.shape[1] == layer.weight.shape[1]
        raise reason

    monkeypatch.setattr(steps, "linear", refuse)
    reason = torch.OutOfMemoryError("20 MiB")
    with pytest.raises(torch.OutOfMemoryError, match=r"^20 MiB$"):
        check_fp8(layer, "a card")
    reason = RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED\nand more")
    with pytest.raises(RuntimeError, match=r"for a card \(CUBLAS_STATUS_NOT_SUPPORTED\); legal: --precision bf16"):
        check_fp8(layer, "a card")


def test_packed_parameters_are_views_under_the_checkpoint_s_names(toy):
    plain, packed = load_ours(toy["checkpoint_path"]), _packed(toy["checkpoint_path"])
    assert [name for name, _ in plain.named_parameters()] == [name for name, _ in packed.named_parameters()]
    attention = packed.transformer_blocks[0].attn1
    whole = packed.transformer_blocks[0].packed_linears["attn1", "qkv"].weight
    write_values(attention.to_k.weight, torch.full_like(attention.to_k.weight, 2.0))
    assert int((whole == 2.0).all(dim=1).sum()) == len(attention.to_k.weight)


def test_warming_up_changes_no_weight(toy):
    packed = _packed(toy["checkpoint_path"])
    before = {name: parameter.clone() for name, parameter in packed.named_parameters()}
    FusedTransformer(packed).warm_up()
    assert all(torch.equal(parameter, before[name]) for name, parameter in packed.named_parameters())


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("heads", "head_dim", "audio_head_dim"), [(1, 62, 10), (3, 20, 8), (3, 24, 14), (5, 16, 2)])
def test_other_widths_agree_with_the_plain_forward(tmp_path, heads, head_dim, audio_head_dim, batch):
    """Stream widths that are no multiples of 16, hidden widths that are not either, and one head."""
    shape = ToyShape(layers=2, heads=heads, head_dim=head_dim, audio_head_dim=audio_head_dim)
    path = make_toy_model(tmp_path, seed=1, shape=shape)["checkpoint_path"]
    plain, packed = load_ours(path), _packed(path)
    for call in CALLS:
        found, expected = _both(plain, packed, Inputs.random(plain, seed=3), call, batch)
        assert max(relative(a, b) for a, b in zip(found, expected, strict=True)) <= 1e-5, call
    FusedTransformer(packed).warm_up()


def test_layers_whose_outputs_are_not_split_have_no_padding(tmp_path):
    """Their result is read as the stream, or as the input of the next layer, which is as wide as the model says."""
    path = make_toy_model(tmp_path, shape=ToyShape(layers=1, heads=1, head_dim=62, audio_head_dim=10))[
        "checkpoint_path"
    ]
    for (_, name), layer in _packed(path).transformer_blocks[0].packed_linears.items():
        split = name in ("qkv", "gates", "q_gates", "kv")
        assert len(layer.weight) == (-(-sum(layer.sizes) // 16) * 16 if split else sum(layer.sizes)), name
