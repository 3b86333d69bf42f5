"""How a run computes: what goes together, and what "auto" means on the GPUs that are there."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from ltx_ray.checkpoints.transformer_config import TransformerConfig
from ltx_ray.config import RequestedNumerics
from ltx_ray.placement.numerics import check, check_widths, numerics_of_row, resolve
from ltx_ray.placement.sizing import ParallelConfig
from tests.support.checkpoint_files import REQUIRED
from tests.support.samples import request as request_of


@pytest.mark.parametrize(
    ("device", "requested", "parallel", "gpus", "fa3", "attention", "compiled"),
    [
        ("cpu", {}, {}, (), True, "sdpa", "off"),
        ("cuda", {}, {}, ("H100",), True, "fa3", "fused"),
        ("cuda", {}, {}, ("H100", "H200"), True, "fa3", "fused"),
        ("cuda", {}, {}, ("H100",), False, "cudnn", "fused"),
        ("cuda", {}, {}, ("H100", "A100"), True, "cudnn", "fused"),
        ("cuda", {}, {}, (), True, "cudnn", "fused"),
        ("cuda", {}, {}, ("T4",), True, "sdpa", "off"),
        ("cuda", {"dtype": "float32"}, {}, ("H100",), True, "sdpa", "off"),
        ("cuda", {}, {"tp": 2}, ("H100",), True, "fa3", "fused"),
        ("cuda", {}, {"stage2_tp": 2}, ("A100",), True, "cudnn", "fused"),
        ("cuda", {}, {"sequence_parallel": 2}, ("H100",), True, "fa3", "fused"),
        ("cuda", {}, {"stage1_sequence_parallel": 2}, ("H100",), True, "fa3", "fused"),
        ("cuda", {}, {"guidance_parallel": 3}, ("H100",), True, "fa3", "fused"),
        ("cuda", {"attention": "flash"}, {}, ("H100",), True, "flash", "fused"),
        ("cuda", {"compile": "off"}, {}, ("H100",), True, "sdpa", "off"),
        ("cpu", {"precision": "fp8"}, {}, (), False, "sdpa", "fused"),
        ("cpu", {"compile": "fused"}, {}, (), False, "sdpa", "fused"),
        ("cuda", {"precision": "fp8"}, {}, ("H200",), True, "fa3", "fused"),
        ("cuda", {"precision": "fp8"}, {"tp": 2}, ("H200",), True, "fa3", "fused"),
        ("cuda", {"compile": "fused"}, {"stage2_tp": 4}, ("H200",), True, "fa3", "fused"),
        ("cuda", {"attention": "cudnn"}, {"sequence_parallel": 2}, ("H200",), True, "cudnn", "fused"),
        ("cpu", {"compile": "fused"}, {"tp": 2, "sequence_parallel": 2}, (), False, "sdpa", "fused"),
    ],
)
def test_auto(device, requested, parallel, gpus, fa3, attention, compiled):
    asked, layout = RequestedNumerics(**requested), ParallelConfig(**parallel)
    check(asked)
    found = resolve(asked, layout, device, gpus, fa3)
    assert (found.device, found.attention, found.compile) == (device, attention, compiled)
    assert found.guidance_batching == (2 if compiled == "fused" and layout.guidance_parallel == 1 else 1)
    assert (found.tp, found.stage2_tp) == (layout.tp, layout.tp_of_stage2)
    assert (found.guidance_parallel, found.sequence_parallel) == (layout.guidance_parallel, layout.sequence_parallel)
    # What auto chose gives the same when it is asked for by name.
    by_name = replace(asked, attention=found.attention, compile=found.compile)
    assert resolve(by_name, layout, device, gpus, fa3) == found


@pytest.mark.parametrize("attention", ["fa3", "cudnn", "flash"])
def test_attention_of_the_fused_path_is_refused_where_there_is_none(attention):
    """Those GPUs have no bfloat16, so what was recorded would not have been computed with."""
    with pytest.raises(ValueError, match=f"--attention: '{attention}' on V100, legal: auto or sdpa, or GPUs with bf"):
        resolve(RequestedNumerics(attention=attention), ParallelConfig(), "cuda", ("H100", "V100"), True)


@pytest.mark.parametrize(
    ("requested", "message"),
    [
        ({"precision": "fp8", "dtype": "float32"}, "--precision: 'fp8' with --dtype float32, legal: --dtype bfl"),
        ({"precision": "fp8", "compile": "off"}, "--compile: 'off' with --precision fp8, legal: auto or fused"),
        ({"attention": "fa3", "compile": "off"}, "--attention: 'fa3' with --compile off, legal: auto or sdpa"),
        ({"attention": "fa3", "dtype": "float32"}, "--attention: 'fa3' with --dtype float32, legal: auto or sdpa"),
    ],
)
def test_what_cannot_go_together_is_refused(requested, message):
    with pytest.raises(ValueError) as caught:
        check(RequestedNumerics(**requested))
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("pipeline", "guidance", "shared"),
    [
        ("hq", {}, False),
        ("base", {"stg_scale": 1.0, "stg_blocks": (28,)}, True),
        ("hq", {"stg_scale": 1.0, "stg_blocks": (3,)}, True),
        ("hq", {"stg_scale": 1.0, "stg_blocks": ()}, False),
        ("distilled", {"stg_scale": 1.0, "stg_blocks": (3,)}, False),
    ],
)
def test_rows_with_a_perturbed_pass_say_that_it_shares_blocks(pipeline, guidance, shared):
    """Rows without one have the numerics of versions that did not share any, and are comparable with theirs."""
    changes = {f"video_{name}": value for name, value in guidance.items()}
    request = replace(request_of(), pipeline=pipeline, **changes)
    found = json.loads(numerics_of_row('{"tp":1}', request))
    assert found == ({"tp": 1, "stg_prefix": True} if shared else {"tp": 1})


def test_attention_of_gpus_needs_one():
    with pytest.raises(ValueError, match="--attention: 'fa3' without a GPU, legal: auto or sdpa"):
        resolve(RequestedNumerics(attention="fa3"), ParallelConfig(), "cpu", (), True)


def model(heads: int, head_dim: int, audio_head_dim: int) -> TransformerConfig:
    widths = {
        "num_attention_heads": heads, "attention_head_dim": head_dim, "audio_attention_head_dim": audio_head_dim,
        "cross_attention_dim": heads * head_dim, "audio_cross_attention_dim": heads * audio_head_dim,
    }  # fmt: skip
    return TransformerConfig.from_metadata({**REQUIRED, **widths})


@pytest.mark.parametrize(
    ("widths", "requested", "gpus", "attention", "compiled"),
    [
        ((32, 128, 64), {}, ("H100",), "fa3", "fused"),
        ((32, 128, 64), {}, ("A100",), "cudnn", "fused"),
        # Head widths of 8 that make odd stream widths: 3 x 24 = 72 and 3 x 8 = 24.
        ((3, 24, 8), {}, ("H100",), "sdpa", "off"),
        ((3, 24, 8), {"attention": "cudnn"}, ("A100",), "cudnn", "fused"),
        ((3, 24, 8), {"attention": "flash"}, ("A100",), "flash", "fused"),
        ((3, 24, 8), {"compile": "fused"}, ("H100",), "fa3", "fused"),
        # One stream of two is odd.
        ((3, 32, 8), {}, ("H100",), "sdpa", "off"),
        # Stream widths of 16 with other heads: 8 x 62 = 496 and 8 x 10 = 80.
        ((8, 62, 10), {}, ("H100",), "sdpa", "fused"),
        ((8, 62, 10), {"precision": "fp8"}, ("H100",), "sdpa", "fused"),
        ((8, 62, 10), {"attention": "flash"}, ("H100",), "flash", "fused"),
        ((1, 62, 10), {}, ("H100",), "sdpa", "off"),
        ((1, 62, 10), {"compile": "fused"}, ("H100",), "sdpa", "fused"),
        ((16, 192, 64), {}, ("H100",), "fa3", "fused"),
        ((16, 192, 64), {}, ("A100",), "sdpa", "fused"),
        ((16, 192, 64), {}, (), "sdpa", "fused"),
        ((16, 512, 64), {}, ("H100",), "sdpa", "fused"),
    ],
)
def test_auto_at_other_widths(widths, requested, gpus, attention, compiled):
    asked, transformer = RequestedNumerics(**requested), model(*widths)
    check_widths(asked, ParallelConfig(), transformer)
    found = resolve(asked, ParallelConfig(), "cuda", gpus, True, transformer)
    assert (found.attention, found.compile) == (attention, compiled)
    by_name = replace(asked, attention=found.attention, compile=found.compile)
    assert resolve(by_name, ParallelConfig(), "cuda", gpus, True, transformer) == found


def test_hopper_without_flash_attention_3_takes_wide_heads_in_cudnn():
    assert (
        resolve(RequestedNumerics(), ParallelConfig(), "cuda", ("H100",), False, model(16, 192, 64)).attention
        == "cudnn"
    )


@pytest.mark.parametrize(
    ("widths", "requested", "message"),
    [
        ((1, 62, 10), {"attention": "cudnn"},
         "--attention: 'cudnn' with heads of 62 and 10 channels, legal: auto or sdpa, or a model whose heads have up "
         "to 256 channels, in multiples of 8"),
        ((1, 62, 10), {"attention": "fa3"}, "--attention: 'fa3' with heads of 62 and 10 channels, legal: auto or sdpa"),
        ((1, 258, 10), {"attention": "flash"}, "--attention: 'flash' with heads of 258 and 10 channels, legal: auto "),
        ((3, 24, 8), {"precision": "fp8", "device": "cuda"},
         "--precision: 'fp8' with video 72 wide and audio 24 wide, legal: bf16, or a model whose widths are multiples"),
    ],
)  # fmt: skip
def test_what_no_gpu_does_at_a_width_is_refused_before_there_is_a_cluster(widths, requested, message):
    for refuse in (
        lambda asked, transformer: check_widths(asked, ParallelConfig(), transformer),
        lambda asked, transformer: resolve(asked, ParallelConfig(), "cuda", (), True, transformer),
    ):
        with pytest.raises(ValueError) as caught:
            refuse(RequestedNumerics(**requested), model(*widths))
        assert str(caught.value).startswith(message)


def test_fp8_needs_the_widths_of_a_rank():
    """Each of 2 ranks has 40 of 80 channels of the audio, which no fp8 product takes."""
    asked = RequestedNumerics(precision="fp8", device="cuda")
    check_widths(asked, ParallelConfig(), model(8, 64, 10))
    with pytest.raises(ValueError, match="--precision: 'fp8' with audio 80 wide on 2 ranks, legal: bf16, or a model"):
        check_widths(asked, ParallelConfig(stage2_tp=2), model(8, 64, 10))


def test_heads_that_only_hopper_takes_are_refused_on_other_gpus():
    asked = RequestedNumerics(attention="cudnn")
    check_widths(asked, ParallelConfig(), model(16, 192, 64))
    assert resolve(asked, ParallelConfig(), "cuda", ("H100",), False, model(16, 192, 64)).attention == "cudnn"
    with pytest.raises(ValueError, match=r"'cudnn' on A100 or H100 with heads of 192 and 64 channels, .* up to 128"):
        resolve(asked, ParallelConfig(), "cuda", ("A100", "H100"), False, model(16, 192, 64))


def test_a_cpu_takes_any_width():
    for requested in ({}, {"precision": "fp8"}, {"compile": "fused"}):
        asked = RequestedNumerics(**requested)
        check_widths(asked, ParallelConfig(), model(1, 62, 10))
        assert resolve(asked, ParallelConfig(), "cpu", (), False, model(1, 62, 10)).attention == "sdpa"
