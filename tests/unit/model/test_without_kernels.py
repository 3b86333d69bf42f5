"""A replica without Triton says so, and one that lacks memory for a moment is not taken for one without Triton."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

from ltx_ray.engine import components
from ltx_ray.model import fused
from ltx_ray.parallel import merging

NO_MEMORY = "CUDA out of memory"
ERRORS = {"no Triton": ImportError("No module named 'triton'"), "no memory": torch.OutOfMemoryError(NO_MEMORY)}


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


def refusing(error: Exception):
    """Expects a lack of memory to go up as it is, and anything else to be said of Triton."""
    if isinstance(error, torch.OutOfMemoryError):
        return pytest.raises(torch.OutOfMemoryError, match=f"^{NO_MEMORY}$")
    return pytest.raises(RuntimeError, match="needs Triton")


def test_the_fused_path_needs_its_kernels(error):
    with refusing(error):
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
    with refusing(error):
        components.load_video_vae(toy["checkpoint_path"], torch.float32, "cpu", fused=True)
