"""How a run computes: what goes together, and what "auto" means on the GPUs that are there."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ltx_ray.config import RequestedNumerics
from ltx_ray.placement.numerics import check, resolve
from ltx_ray.placement.sizing import ParallelConfig


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
        ("cuda", {}, {"tp": 2}, ("H100",), True, "sdpa", "off"),
        ("cuda", {}, {"stage2_tp": 2}, ("H100",), True, "sdpa", "off"),
        ("cuda", {}, {"sequence_parallel": 2}, ("H100",), True, "sdpa", "off"),
        ("cuda", {}, {"guidance_parallel": 3}, ("H100",), True, "fa3", "fused"),
        ("cuda", {"attention": "flash"}, {}, ("H100",), True, "flash", "fused"),
        ("cuda", {"compile": "off"}, {}, ("H100",), True, "sdpa", "off"),
        ("cpu", {"precision": "fp8"}, {}, (), False, "sdpa", "fused"),
        ("cpu", {"compile": "fused"}, {}, (), False, "sdpa", "fused"),
        ("cuda", {"precision": "fp8"}, {}, ("H200",), True, "fa3", "fused"),
    ],
)
def test_auto(device, requested, parallel, gpus, fa3, attention, compiled):
    asked, layout = RequestedNumerics(**requested), ParallelConfig(**parallel)
    check(asked, layout)
    found = resolve(asked, layout, device, gpus, fa3)
    assert (found.device, found.attention, found.compile) == (device, attention, compiled)
    assert found.guidance_batching == (2 if compiled == "fused" and layout.guidance_parallel == 1 else 1)
    assert (found.tp, found.stage2_tp) == (layout.tp, layout.tp_of_stage2)
    assert (found.guidance_parallel, found.sequence_parallel) == (layout.guidance_parallel, layout.sequence_parallel)
    # What auto chose gives the same when it is asked for by name.
    by_name = replace(asked, attention=found.attention, compile=found.compile)
    assert resolve(by_name, layout, device, gpus, fa3) == found


@pytest.mark.parametrize(
    ("requested", "parallel", "message"),
    [
        ({"precision": "fp8", "dtype": "float32"}, {}, "--precision: 'fp8' with --dtype float32, legal: --dtype bfl"),
        ({"precision": "fp8", "compile": "off"}, {}, "--compile: 'off' with --precision fp8, legal: auto or fused"),
        ({"precision": "fp8"}, {"tp": 2}, "--precision: 'fp8' with --tp 2, legal: replicas of one rank"),
        ({"compile": "fused"}, {"stage2_tp": 4}, "--compile: 'fused' with --stage2-tp 4, legal: auto or off"),
        ({"attention": "fa3", "compile": "off"}, {}, "--attention: 'fa3' with --compile off, legal: auto or sdpa"),
        ({"attention": "cudnn"}, {"tp": 2}, "--attention: 'cudnn' with --tp 2, legal: auto or sdpa"),
        ({"attention": "fa3", "dtype": "float32"}, {}, "--attention: 'fa3' with --dtype float32, legal: auto or sdpa"),
    ],
)
def test_what_cannot_go_together_is_refused(requested, parallel, message):
    with pytest.raises(ValueError) as caught:
        check(RequestedNumerics(**requested), ParallelConfig(**parallel))
    assert str(caught.value).startswith(message)


def test_attention_of_gpus_needs_one():
    with pytest.raises(ValueError, match="--attention: 'fa3' without a GPU, legal: auto or sdpa"):
        resolve(RequestedNumerics(attention="fa3"), ParallelConfig(), "cpu", (), True)
