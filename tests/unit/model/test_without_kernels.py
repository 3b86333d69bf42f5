"""A replica without Triton says so, and one that lacks memory for a moment is not taken for one without Triton."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

from ltx_ray.engine import components
from ltx_ray.model import fused
from ltx_ray.parallel import merging

ERRORS = {"no Triton": ImportError("No module named 'triton'"), "no memory": torch.OutOfMemoryError("CUDA out of memory")}


@pytest.fixture(params=ERRORS)
def error(request, monkeypatch) -> Exception:
    """What the first use of every kernel raises."""
    error = ERRORS[request.param]

    def fail(*args, **kwargs):
        raise error

    for package, name in (("ltx_ray.model", "kernels"), ("ltx_ray.parallel", "merge_kernel")):
        kernels = ModuleType(f"{package}.{name}")
        kernels.gelu = kernels.merge = fail  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, f"{package}.{name}", kernels)
        monkeypatch.setattr(sys.modules[package], name, kernels, raising=False)
    monkeypatch.setattr(components, "fuse_decoder", fail)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, device=None, **options: zeros(*size, **options))
    return error


def test_the_fused_path_needs_its_kernels(error):
    lacks_memory = isinstance(error, torch.OutOfMemoryError)
    expected, words = (torch.OutOfMemoryError, "^CUDA out of memory$") if lacks_memory else (RuntimeError, "needs Triton")
    with pytest.raises(expected, match=words):
        fused._steps_for(torch.device("cuda"))


def test_merging_goes_without_its_kernel_only_where_there_is_no_triton(error):
    """Without it, the bits of merged weights are others, so a moment's lack of memory must not decide."""
    merging._kernel.cache_clear()
    try:
        if isinstance(error, torch.OutOfMemoryError):
            with pytest.raises(torch.OutOfMemoryError):
                merging._kernel()
            assert merging._kernel.cache_info().currsize == 0, "the next merge tries again"
        else:
            assert merging._kernel() is None
    finally:
        merging._kernel.cache_clear()


@pytest.mark.slow  # It builds modules of diffusers.
def test_the_fused_decoder_needs_its_kernel(error, toy):
    lacks_memory = isinstance(error, torch.OutOfMemoryError)
    expected, words = (torch.OutOfMemoryError, "^CUDA out of memory$") if lacks_memory else (RuntimeError, "needs Triton")
    with pytest.raises(expected, match=words):
        components.load_video_vae(toy["checkpoint_path"], torch.float32, "cpu", fused=True)
