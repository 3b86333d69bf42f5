"""The fused path on a GPU: its kernels against plain PyTorch, and its passes against float32 on a CPU."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from ltx_ray.checkpoints.checkpoint import open_checkpoint
from ltx_ray.config import takes_heads
from ltx_ray.model import graphs, steps
from ltx_ray.model.attention_backends import attention_backend
from ltx_ray.model.fused import FusedTransformer
from ltx_ray.model.graphs import GraphedTransformer
from ltx_ray.model.packed_linear import PackedLinear
from ltx_ray.model.packing import pack_linears
from ltx_ray.model.rope import RopeTable, audio_positions, video_positions
from ltx_ray.model.steps import Modulation, QuantizedRows, Residual, TokenLevels
from ltx_ray.model.transformer import NO_PERTURBATION, Modality, Perturbation, Transformer
from ltx_ray.parallel.collectives import RankGroup
from ltx_ray.parallel.fp8 import FP8, read_values, write_exactly
from ltx_ray.parallel.layers import shard_parameter
from ltx_ray.parallel.loading import load_shard
from ltx_ray.placement.numerics import has_fa3
from ltx_ray.records import AV
from ltx_ray.toy import ToyShape, make_toy_model
from tests.support.transformers import SHAPE, Inputs, load_ours, relative

DEVICE = torch.device("cuda")
BACKENDS = ["cudnn", "flash", "sdpa", *(["fa3"] if has_fa3() else [])]
PASSES = {
    "plain": NO_PERTURBATION,
    "isolated": Perturbation(isolated=True),
    "stg": Perturbation(values_only=AV(frozenset({0}), frozenset({1}))),
}
#: Relative error of a kernel against the same arithmetic in float32, rounded once at the end.
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 1e-3}
#: The same where both sides round to e4m3, of which some values are rounded to different neighbours.
FP8_ROUNDING = 1e-2


def values(rows) -> torch.Tensor:
    return rows if isinstance(rows, torch.Tensor) else rows.values.float() * rows.scale


@pytest.fixture
def normal():
    rng = torch.Generator(DEVICE).manual_seed(0)
    return lambda *size: torch.randn(size, generator=rng, device=DEVICE)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(("rows", "tokens", "width"), [(6, 3, 96), (1024, 512, 4096)])
def test_modulation_kernel(normal, rows, tokens, width, dtype):
    from ltx_ray.model import kernels

    indexed = TokenLevels(torch.arange(tokens, dtype=torch.int32, device=DEVICE) % 2)
    for norm, added, levels, quantize in itertools.product(
        (None, "rms", "layer"), (False, True), (None, indexed), (False, True)
    ):
        x, y = normal(rows, width).to(dtype), normal(rows, width).to(dtype)
        table = normal(2 if levels else 1, 9, width).to(dtype)
        modulations = [Modulation(table[:, 0], table[:, 1], quantize), Modulation(table[:, 3], table[:, 4])]
        residual = Residual(y, table[:, 2]) if added else None
        ours, expected = x.clone(), x.clone()
        found = kernels.add_norm_modulate(ours, residual, modulations, levels, norm, 1e-6)
        right = steps.add_norm_modulate(expected, residual, modulations, levels, norm, 1e-6)
        assert relative(ours, expected) <= ROUNDING[dtype]
        assert relative(values(found[0]), values(right[0])) <= (FP8_ROUNDING if quantize else ROUNDING[dtype])
        assert relative(values(found[1]).float(), values(right[1]).float()) <= ROUNDING[dtype]


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(("rows", "tokens", "heads", "head"), [(6, 3, 4, 24), (1024, 512, 32, 128)])
def test_head_kernels(normal, rows, tokens, heads, head, dtype):
    from ltx_ray.model import kernels

    width = heads * head
    packed = normal(rows, 3 * width + heads).to(dtype)
    weights = [normal(width).to(dtype) for _ in range(2)]
    table = RopeTable(*(normal(tokens, width // 2).to(dtype) for _ in range(2)))
    for rope, parts in itertools.product((None, table), (1, 2)):
        both = packed.clone(), packed.clone()
        for module, copy in zip((kernels, steps), both, strict=True):
            columns = copy.split((width, width, width, heads), dim=1)
            module.norm_heads_(list(zip(columns[:parts], weights[:parts], strict=True)), heads, 1e-6, rope)
        assert relative(both[0].float(), both[1].float()) <= ROUNDING[dtype]
        assert torch.equal(both[0][:, parts * width :], packed[:, parts * width :])
    heads_out, logits = packed[:, 2 * width : 3 * width].unflatten(1, (heads, -1)), packed[:, 3 * width :]
    for quantize in (False, True):
        limit = FP8_ROUNDING if quantize else ROUNDING[dtype]
        found, right = kernels.apply_gates(heads_out, logits, quantize), steps.apply_gates(heads_out, logits, quantize)
        assert relative(values(found).float(), values(right).float()) <= limit
        found, right = kernels.gelu(packed, quantize), steps.gelu(packed, quantize)
        assert relative(values(found).float(), values(right).float()) <= limit


@pytest.mark.parametrize("features", [(16384, 4096), (4096, 16384), (4160, 4096), (4096, 2048)])
def test_fp8_products_of_any_number_of_rows(normal, features):
    """At the released widths, where cuBLAS has kernels for some numbers of rows only."""
    n_out, n_in = features
    weight, scale = normal(n_out, n_in), normal(n_out).abs() / 100
    bias = (normal(n_out) / 100).bfloat16()
    layer = PackedLinear(weight.to(FP8), bias, (n_out,), scale)
    for rows in (1, 8, 31, 32, 63, 64, 65, 100, 129, 4590):
        x = QuantizedRows(normal(rows, n_in).to(FP8), normal(rows, 1).abs() / 100)
        right = values(x) @ (layer.weight.float() * scale[:, None]).T + bias.float()
        found = steps.linear(x, layer)
        assert found.shape == (rows, n_out) and found.dtype == torch.bfloat16
        errors = (found.float() - right).norm(dim=1) / right.norm(dim=1)
        assert errors.max() <= FP8_ROUNDING, rows


def packed_model(path: str, precision: str = "bf16") -> Transformer:
    checkpoint = open_checkpoint(path)
    with torch.device("meta"):
        model = Transformer(checkpoint.transformer)
    pack_linears(model, DEVICE, torch.bfloat16, precision)
    load_shard(model, checkpoint.tensors, RankGroup(), dtype=torch.bfloat16, device=DEVICE)
    return model


def call(run, ropes, inputs: Inputs, perturbation: Perturbation, sigma: float = 0.7, levels: int = 1):
    """One pass in bfloat16 on the GPU, with `levels` noise levels among the video's tokens."""
    at = torch.full((1,), sigma, device=DEVICE)
    parts = at[:, None] * torch.tensor([[1.0, 0.4, 0.0]], device=DEVICE)[:, :levels]
    of = torch.arange(SHAPE.video_tokens, dtype=torch.int32, device=DEVICE) % levels
    fused = not isinstance(run, Transformer)
    if levels > 1 and not fused:
        parts = parts[:, of.long()]
    index = AV(of if fused and levels > 1 else None, None)

    def modality(x, c, tables, times, of_token) -> Modality:
        return Modality(x.to(DEVICE, torch.bfloat16), at, times, c.to(DEVICE, torch.bfloat16), *tables,
                        level_index=of_token)  # fmt: skip

    with torch.inference_mode():
        return run(
            inputs.latents.map(modality, inputs.contexts, ropes, AV(parts, at[:, None]), index), perturbation
        ).map(lambda t: t.float().cpu())


def positions() -> AV[torch.Tensor]:
    return AV(video_positions(SHAPE, DEVICE), audio_positions(SHAPE.audio_latents, DEVICE))


def exact(plain: Transformer, inputs: Inputs, perturbation: Perturbation, levels: int) -> AV[torch.Tensor]:
    """The pass in float32 on a CPU, on inputs rounded to bfloat16."""
    rounded = replace(
        inputs,
        latents=inputs.latents.map(lambda t: t.bfloat16().float()),
        contexts=inputs.contexts.map(lambda t: t.bfloat16().float()),
    )
    if levels > 1:
        of = torch.arange(SHAPE.video_tokens) % levels
        rounded = replace(rounded, video_mask=torch.tensor([[1.0, 0.4, 0.0]])[:, of])
    return rounded.ours(plain, perturbation)


@pytest.mark.parametrize("levels", [1, 3])
@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("attention", BACKENDS)
def test_a_pass_is_as_exact_as_the_references_own_bf16(toy, attention, name, levels):
    """The plain path rounds where the reference does, and the fused one rounds less often."""
    inputs = Inputs.random(load_ours(toy["checkpoint_path"]), seed=3)
    right = exact(load_ours(toy["checkpoint_path"]), inputs, PASSES[name], levels)
    model = packed_model(toy["checkpoint_path"])
    fused = FusedTransformer(model, attention)
    found = call(fused, fused.ropes(positions(), torch.bfloat16), inputs, PASSES[name], levels=levels)
    plain = call(model, model.ropes(positions(), torch.bfloat16), inputs, PASSES[name], levels=levels)
    for ours, rounded, expected in zip(found, plain, right, strict=True):
        assert relative(ours, expected) <= 1.05 * relative(rounded, expected)


def test_graphs_give_the_bits_of_the_passes_that_they_were_made_from(toy):
    """For every pass of a call, at several noise levels, and after weights have changed in place."""
    model = packed_model(toy["checkpoint_path"])
    inputs = Inputs.random(load_ours(toy["checkpoint_path"]), seed=4)
    eager, graphed = FusedTransformer(model, "cudnn"), GraphedTransformer(FusedTransformer(model, "cudnn"))
    ropes = eager.ropes(positions(), torch.bfloat16)
    for number, sigma in enumerate((0.9, 0.5, 0.5, 0.2)):
        for perturbation in PASSES.values():
            expected = call(eager, ropes, inputs, perturbation, sigma)
            for _ in range(2):
                found = call(graphed, ropes, inputs, perturbation, sigma)
                assert all(torch.equal(ours, right) for ours, right in zip(found, expected, strict=True))
        if number == 1:
            before = call(eager, ropes, inputs, NO_PERTURBATION, 0.5)
            model.transformer_blocks[0].attn1.to_q.weight.data.mul_(1.5)
            assert not torch.equal(call(eager, ropes, inputs, NO_PERTURBATION, 0.5).video, before.video)


@pytest.mark.parametrize("attention", ["cudnn", *(["fa3"] if has_fa3() else [])])
def test_graphs_of_many_kinds_of_passes_do_not_mix(toy, monkeypatch, attention):
    """Two prompts in turn, both in one batch, the noise levels of images, a disabled stream, and more shapes than are
    kept."""
    monkeypatch.setattr(graphs, "_MAX_SHAPES", 2)
    model = packed_model(toy["checkpoint_path"])
    eager = FusedTransformer(model, attention)
    graphed = GraphedTransformer(FusedTransformer(model, attention))
    ropes = eager.ropes(positions(), torch.bfloat16)
    prompts = [
        Inputs.random(load_ours(toy["checkpoint_path"]), seed).contexts.map(lambda t: t.to(DEVICE, torch.bfloat16))
        for seed in (6, 7)
    ]
    pair = AV(*(torch.cat(both) for both in zip(*prompts, strict=True)))
    of = torch.arange(SHAPE.video_tokens, dtype=torch.int32, device=DEVICE) % 3
    kinds = [(prompts[0], 1, True), (prompts[1], 1, True), (pair, 1, True), (prompts[0], 3, True), (pair, 1, False)]
    with torch.inference_mode():
        for number, (contexts, levels, sound) in enumerate(kinds * 4):
            latents = Inputs.random(model, seed=number).latents.map(lambda t: t.to(DEVICE, torch.bfloat16))
            at = torch.full((1,), 0.1 + 0.04 * number, device=DEVICE)
            times = at[:, None] * torch.tensor([[1.0, 0.4, 0.0]], device=DEVICE)[:, :levels]

            def modality(x, c, tables, times, of, on, at=at) -> Modality:
                return Modality(x.expand(len(c), -1, -1), at, times, c, *tables, enabled=on, level_index=of)

            index = AV(of if levels > 1 else None, None)
            inputs = latents.map(modality, contexts, ropes, AV(times, at[:, None]), index, AV(True, sound))
            for ours, right in zip(graphed(inputs), eager(inputs), strict=True):
                assert torch.equal(ours, right), number


def test_a_sweep_over_stg_blocks_keeps_a_bounded_number_of_graphs(toy, monkeypatch):
    """More kinds of passes than are kept, in turns, have the bits of passes without graphs."""
    monkeypatch.setattr(graphs, "_MAX_GRAPHS", 2)
    model, inputs = packed_model(toy["checkpoint_path"]), Inputs.random(load_ours(toy["checkpoint_path"]), seed=4)
    eager, graphed = FusedTransformer(model, "cudnn"), GraphedTransformer(FusedTransformer(model, "cudnn"))
    ropes = eager.ropes(positions(), torch.bfloat16)
    kinds = [Perturbation(values_only=AV(frozenset(blocks), frozenset())) for blocks in ((0,), (1,), (0, 1), ())]
    for number in range(12):
        perturbation = kinds[number % 4 if number < 8 else 0]
        for _ in range(2):
            found = call(graphed, ropes, inputs, perturbation, 0.1 + 0.05 * number)
            right = call(eager, ropes, inputs, perturbation, 0.1 + 0.05 * number)
            assert all(torch.equal(ours, expected) for ours, expected in zip(found, right, strict=True))
    assert all(len(shape.graphs) <= 2 for shape in graphed._shapes.values())


@pytest.mark.parametrize("queries", [1, 40])
@pytest.mark.parametrize("attention", BACKENDS)
def test_one_key_gives_its_value(normal, attention, queries):
    q, k, v = (normal(2, tokens, 4, 64).bfloat16() for tokens in (queries, 1, 1))
    found = attention_backend(attention, DEVICE, (64,))(q, k, v)
    assert torch.equal(found, v.expand(2, queries, 4, 64))


@pytest.mark.parametrize("attention", BACKENDS)
def test_one_query_on_many_keys(normal, attention):
    """The sound of a clip of one frame, which looks at its picture."""
    q, k, v = (normal(2, tokens, 4, 64).bfloat16() for tokens in (1, 2000, 2000))
    exact = F.scaled_dot_product_attention(*(t.float().transpose(1, 2) for t in (q, k, v))).transpose(1, 2)
    assert relative(attention_backend(attention, DEVICE, (64,))(q, k, v).float(), exact) <= 1e-2


def test_kernels_refuse_tensors_of_other_shapes(normal):
    """Read with the pitch of the stream, a residual with padding would be silent garbage."""
    from ltx_ray.model import kernels

    x, table = normal(6, 60), normal(1, 60)
    modulation = Modulation(table, table)

    def refused(run, *args) -> None:
        with pytest.raises(AssertionError):
            run(*args)

    def modulated(residual=None, modulation=modulation, levels=None) -> None:
        kernels.add_norm_modulate(x.clone(), residual, [modulation], levels, "rms", 1e-6)

    modulated(Residual(normal(6, 60), table))
    refused(modulated, Residual(normal(6, 64), table))
    refused(modulated, Residual(normal(6, 64)[:, :60], table))
    refused(modulated, Residual(normal(6, 60), normal(1, 64)))
    refused(modulated, None, Modulation(normal(1, 64), normal(1, 64)))
    refused(modulated, None, Modulation(normal(2, 60), normal(2, 60)))
    refused(modulated, None, modulation, TokenLevels(torch.zeros(4, dtype=torch.int32, device=DEVICE)))
    rope = RopeTable(normal(3, 30), normal(3, 30))
    kernels.norm_heads_([(x.clone(), normal(60))], 3, 1e-6, rope)
    refused(kernels.norm_heads_, [(x, normal(64))], 3, 1e-6, rope)
    refused(kernels.norm_heads_, [(x, normal(60))], 4, 1e-6, rope)
    refused(kernels.norm_heads_, [(x, normal(60))], 3, 1e-6, RopeTable(normal(3, 32), normal(3, 32)))
    refused(kernels.norm_heads_, [(x, normal(60))], 3, 1e-6, RopeTable(normal(4, 30), normal(4, 30)))
    refused(kernels.apply_gates, normal(6, 3, 20), normal(6, 4), False)


#: (heads, head width, head width of the audio): stream widths that are no multiples of 16, hidden widths that are not
#: either, one head, and heads that are no multiples of 8.
OTHER_WIDTHS = [(3, 24, 8), (1, 62, 10), (4, 20, 14), (8, 62, 10)]


@pytest.mark.parametrize("levels", [1, 3])
@pytest.mark.parametrize("widths", OTHER_WIDTHS)
@pytest.mark.parametrize("attention", BACKENDS)
def test_other_widths_are_as_exact_or_refused(tmp_path, attention, widths, levels):
    heads, head_dim, audio_head_dim = widths
    shape = ToyShape(layers=2, heads=heads, head_dim=head_dim, audio_head_dim=audio_head_dim)
    path = make_toy_model(tmp_path, seed=1, shape=shape)["checkpoint_path"]
    model, plain = packed_model(path), load_ours(path)
    hopper = torch.cuda.get_device_capability()[0] == 9
    if not takes_heads(attention, (head_dim, audio_head_dim), hopper):
        with pytest.raises(RuntimeError, match="does not take heads of"):
            FusedTransformer(model, attention)
        return
    inputs, fused = Inputs.random(plain, seed=3), FusedTransformer(model, attention)
    fused.warm_up()
    for name, perturbation in PASSES.items():
        right = exact(plain, inputs, perturbation, levels)
        found = call(fused, fused.ropes(positions(), torch.bfloat16), inputs, perturbation, levels=levels)
        rounded = call(model, model.ropes(positions(), torch.bfloat16), inputs, perturbation, levels=levels)
        for ours, theirs, expected in zip(found, rounded, right, strict=True):
            assert relative(ours, expected) <= 1.2 * relative(theirs, expected), name


def test_prequantized_values_are_held_exactly(normal, tmp_path):
    """Written on the GPU, where powers of two need not be exact."""
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        values = (normal(64, 48) * torch.logspace(-4, 0, 64, device=DEVICE)[:, None]).to(dtype)
        parameter = shard_parameter(torch.empty(values.shape, dtype=FP8, device=DEVICE), None)
        parameter.row_scale = torch.empty(64, device=DEVICE)
        write_exactly(parameter, values, 0.0371)
        assert torch.equal(read_values(parameter), values.float() * 0.0371)


def test_fp8_is_near(toy):
    inputs = Inputs.random(load_ours(toy["checkpoint_path"]), seed=5)
    right = exact(load_ours(toy["checkpoint_path"]), inputs, NO_PERTURBATION, 1)
    fused = FusedTransformer(packed_model(toy["checkpoint_path"], "fp8"), "cudnn")
    found = call(fused, fused.ropes(positions(), torch.bfloat16), inputs, NO_PERTURBATION)
    for ours, expected in zip(found, right, strict=True):
        assert 1e-3 <= relative(ours, expected) <= 0.1
