"""Attention without masks by several implementations, chosen once a run by the driver.

All take queries (B, T, H, D), keys and values (B, S, H, D), any strides whose last axis is contiguous, and give
(B, T, H, D). They round differently, each within its documented error; the run's numerics name the one in use.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ltx_ray.config import FA3_MODULES

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

_SDPA = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
#: Queries that FlashAttention-3 works on at once; keys from which splitting them pays, and into how many at most.
_QUERY_TILE = 128
_MANY_KEYS = 4096
_MOST_SPLITS = 8
BACKENDS = ("fa3", "cudnn", "flash", "sdpa")


def backend(name: str, device: torch.device | None = None) -> Attend:
    """The implementation called `name`. Raises RuntimeError saying what is missing when `device` cannot run it."""
    assert name in BACKENDS, name
    if name == "sdpa":
        return _sdpa
    if device is not None and device.type != "cuda":
        raise RuntimeError(f"attention {name!r} needs CUDA, and this replica runs on {device.type}")
    if name == "fa3":
        return _fa3(device)
    chosen = _SDPA[name]

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(chosen):
            return _sdpa(q, k, v)

    return attend


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def _fa3(device: torch.device | None) -> Attend:
    if device is not None and torch.cuda.get_device_capability(device)[0] != 9:
        raise RuntimeError(
            f"attention 'fa3' needs a Hopper GPU, and this replica has {torch.cuda.get_device_name(device)}; "
            "legal: --attention cudnn"
        )
    for name in FA3_MODULES:
        if importlib.util.find_spec(name):
            function = importlib.import_module(name).flash_attn_func
            break
    else:
        raise RuntimeError("attention 'fa3' needs the package fa3-fwd on every GPU node; legal: --attention cudnn")

    processors = torch.cuda.get_device_properties(device).multi_processor_count

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = function(q, k, v, num_splits=_splits(q, k, processors))
        # older versions give the log-sum-exp beside it
        return out[0] if isinstance(out, tuple) else out

    return attend


def _splits(q: torch.Tensor, k: torch.Tensor, processors: int) -> int:
    """Parts into which the keys are split: more than one where few queries meet many keys, as sound meets picture."""
    batch, tokens, heads, _ = q.shape
    tiles = batch * heads * -(-tokens // _QUERY_TILE)
    return 1 if k.shape[1] < _MANY_KEYS else max(1, min(_MOST_SPLITS, processors // tiles))
