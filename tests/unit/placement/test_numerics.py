"""How a run computes: what goes together, and what "auto" means on the GPUs that are there."""

from __future__ import annotations

import pytest

from ltx_ray.config import Numerics
from ltx_ray.placement.numerics import check, resolve


def asked(**changes) -> Numerics:
    return Numerics(**{"attention": "auto", "compile": "auto", **changes})


@pytest.mark.parametrize(
    ("numerics", "gpus", "fa3", "attention", "compiled"),
    [
        (asked(device="cpu"), (), True, "sdpa", "off"),
        (asked(device="cuda"), ("H100",), True, "fa3", "fused"),
        (asked(device="cuda"), ("H100", "H200"), True, "fa3", "fused"),
        (asked(device="cuda"), ("H100",), False, "cudnn", "fused"),
        (asked(device="cuda"), ("H100", "A100"), True, "cudnn", "fused"),
        (asked(device="cuda"), (), True, "cudnn", "fused"),
        (asked(device="cuda", dtype="float32"), ("H100",), True, "sdpa", "off"),
        (asked(device="cuda", tp=2), ("H100",), True, "sdpa", "off"),
        (asked(device="cuda", sequence_parallel=2), ("H100",), True, "sdpa", "off"),
        (asked(device="cuda", guidance_parallel=3), ("H100",), True, "fa3", "fused"),
        (asked(device="cuda", attention="flash"), ("H100",), True, "flash", "fused"),
        (asked(device="cuda", compile="off"), ("H100",), True, "sdpa", "off"),
        (asked(device="cpu", precision="fp8"), (), False, "sdpa", "fused"),
        (asked(device="cpu", compile="fused"), (), False, "sdpa", "fused"),
        (asked(device="cuda", precision="fp8"), ("H200",), True, "fa3", "fused"),
    ],
)
def test_auto(numerics, gpus, fa3, attention, compiled):
    check(numerics)
    found = resolve(numerics, gpus, fa3)
    assert (found.attention, found.compile) == (attention, compiled)
    assert found.guidance_batching == (2 if compiled == "fused" and numerics.guidance_parallel == 1 else 1)
    assert resolve(found, gpus, fa3) == found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": "fp8", "dtype": "float32"}, "--precision: 'fp8' with --dtype float32, legal: --dtype bfloat16"),
        ({"precision": "fp8", "compile": "off"}, "--compile: 'off' with --precision fp8, legal: auto or fused"),
        ({"precision": "fp8", "tp": 2}, "--precision: 'fp8' with --tp 2, legal: replicas of one rank"),
        ({"compile": "fused", "stage2_tp": 4}, "--compile: 'fused' with --stage2-tp 4, legal: auto or off"),
        ({"attention": "fa3", "compile": "off"}, "--attention: 'fa3' with --compile off, legal: auto or sdpa"),
        ({"attention": "cudnn", "tp": 2}, "--attention: 'cudnn' with --tp 2, legal: auto or sdpa"),
        ({"attention": "fa3", "dtype": "float32"}, "--attention: 'fa3' with --dtype float32, legal: auto or sdpa"),
    ],
)
def test_what_cannot_go_together_is_refused(changes, message):
    with pytest.raises(ValueError) as caught:
        check(asked(**changes))
    assert str(caught.value).startswith(message)


def test_attention_of_gpus_needs_one():
    with pytest.raises(ValueError, match="--attention: 'fa3' without a GPU, legal: auto or sdpa"):
        resolve(asked(attention="fa3"), (), True)
