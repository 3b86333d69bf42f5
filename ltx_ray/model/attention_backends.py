"""Implementations of attention without masks, one of which the driver chooses for a run.

All take queries (B, T, H, D), keys and values (B, S, H, D) of any strides whose last axis is contiguous, and return
(B, T, H, D), whose tokens may share memory. Each rounds in its own way, so the run's numerics name the one in use.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Collection

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ltx_ray.config import FA3_MODULES, takes_heads
from ltx_ray.records import UnfitNode

#: (queries, keys, values) -> what each query attends to.
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

BACKENDS = ("fa3", "cudnn", "flash", "sdpa")
_SDPA = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
#: Compute capability of Hopper GPUs, which FlashAttention-3 is written for.
_HOPPER = 9
#: Queries in a tile of FlashAttention-3.
_QUERY_TILE = 128
#: Keys from which splitting them is faster, and the largest number of parts.
_SPLIT_FROM_KEYS = 4096
_MAX_SPLITS = 8


def attention_backend(name: str, device: torch.device | None = None, head_dims: Collection[int] = ()) -> Attend:
    """The implementation called `name`.

    Raises UnfitNode saying what is missing where `device` cannot run it, RuntimeError when it does not take heads of
    the widths `head_dims`.
    """
    assert name in BACKENDS, name
    if name == "sdpa":
        return _passing_a_single_value(_sdpa)
    if device is not None and device.type != "cuda":
        raise UnfitNode(f"attention {name!r} needs CUDA, and this replica runs on {device.type}")
    if not takes_heads(name, head_dims, device is not None and _is_hopper(device)):
        widths = " and ".join(map(str, sorted(set(head_dims))))
        raise RuntimeError(f"attention {name!r} does not take heads of {widths} channels; legal: --attention sdpa")
    return _passing_a_single_value(_fa3(device) if name == "fa3" else _pinned(_SDPA[name]))


def _passing_a_single_value(attend: Attend) -> Attend:
    """`attend`, except that queries with a single key get its value, as softmax gives it: cudnn refuses one key."""

    def passing(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return v.expand(-1, q.shape[1], -1, -1) if k.shape[1] == 1 else attend(q, k, v)

    return passing


def _pinned(backend: SDPBackend) -> Attend:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(backend):
            return _sdpa(q, k, v)

    return attend


def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] == _HOPPER


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def _fa3(device: torch.device | None) -> Attend:
    if device is not None and not _is_hopper(device):
        raise UnfitNode(
            f"attention 'fa3' needs a Hopper GPU, and this replica has {torch.cuda.get_device_name(device)}; "
            "legal: --attention cudnn"
        )
    for name in FA3_MODULES:
        if importlib.util.find_spec(name):
            function = importlib.import_module(name).flash_attn_func
            break
    else:
        raise UnfitNode("attention 'fa3' needs the package fa3-fwd on every GPU node; legal: --attention cudnn")

    processors = torch.cuda.get_device_properties(device).multi_processor_count

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = function(q, k, v, num_splits=_num_splits(q, k, processors))
        # Older versions return the log-sum-exp as well.
        return out[0] if isinstance(out, tuple) else out

    return attend


def _num_splits(q: torch.Tensor, k: torch.Tensor, processors: int) -> int:
    """Parts into which keys are split, so that few queries on many keys, as of audio on video, occupy the GPU."""
    batch, tokens, heads, _ = q.shape
    tiles = batch * heads * -(-tokens // _QUERY_TILE)
    return 1 if k.shape[1] < _SPLIT_FROM_KEYS else max(1, min(_MAX_SPLITS, processors // tiles))
