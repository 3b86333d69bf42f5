"""Whether the GPUs of this node compute rightly, and whether clips can be encoded.

The doctor runs it as a process of its own: `python -m ltx_ray.engine.device_check cuda`. It prints one JSON object.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import torch

from ltx_ray.engine.mp4 import write_mp4
from ltx_ray.placement.numerics import has_fa3
from ltx_ray.records import first_line

#: Width of products, tokens and heads of the attention, and the most by which two ways to attend may differ.
_WIDTH, _TOKENS, _HEADS, _HEAD_DIM, _TOLERANCE = 1024, 256, 8, 128, 0.02
_HOPPER = 9


def device_report(device: str) -> dict[str, Any]:
    """`device`: "cuda" or "cpu". "" stands for what works; anything else says what is wrong."""
    gpus, error = [], ""
    if device == "cuda":
        try:
            torch.cuda.init()
            gpus = [_gpu(torch.device("cuda", number)) for number in range(torch.cuda.device_count())]
        except Exception as caught:
            error = _message(caught)
    return {
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda or "none",
        "error": error,
        "gpus": gpus,
        "encoder": _error_of(_encode),
    }


def _gpu(device: torch.device) -> dict[str, Any]:
    free, total = torch.cuda.mem_get_info(device)
    hopper = torch.cuda.get_device_capability(device)[0] == _HOPPER
    attention = "fa3" if hopper and has_fa3() else "cudnn"
    return {
        "name": torch.cuda.get_device_name(device),
        "free": free,
        "total": total,
        "hopper": hopper,
        "products": _error_of(lambda: _multiply(device)),
        "attention": attention,
        "attention_error": _error_of(lambda: _attend(attention, device)),
        "kernels": _error_of(lambda: _run_kernel(device)),
    }


def _multiply(device: torch.device) -> None:
    """Whole numbers, of which sums in float32 are exact in any order."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randint(-4, 5, (_WIDTH, _WIDTH), generator=generator).float() for _ in range(2))
    product = left.bfloat16().to(device) @ right.bfloat16().to(device)
    if not torch.equal(product.cpu(), (left @ right).bfloat16()):
        raise ArithmeticError("wrong results")


def _attend(name: str, device: torch.device) -> None:
    from ltx_ray.model.attention_backends import attention_backend

    generator = torch.Generator().manual_seed(0)
    shape = (1, _TOKENS, _HEADS, _HEAD_DIM)
    q, k, v = (torch.randn(shape, generator=generator).bfloat16() for _ in range(3))
    expected = attention_backend("sdpa")(q.float(), k.float(), v.float())
    found = attention_backend(name, device, {_HEAD_DIM})(q.to(device), k.to(device), v.to(device))
    difference = (found.cpu().float() - expected).abs().max().item()
    if not difference <= _TOLERANCE:
        raise ArithmeticError(f"results are {difference:.3g} off")


def _run_kernel(device: torch.device) -> None:
    from ltx_ray.model import kernels

    with torch.cuda.device(device):
        x = torch.linspace(-4, 4, 4096, dtype=torch.bfloat16, device=device).reshape(4, 1024)
        found = kernels.gelu(x, False)
    expected = torch.nn.functional.gelu(x.float(), approximate="tanh")
    if not torch.allclose(torch.as_tensor(found).float(), expected, atol=_TOLERANCE):
        raise ArithmeticError("wrong results")


def _encode() -> None:
    """A clip of two frames with a second of silence."""
    frames = np.zeros((2, 96, 64), dtype=np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        write_mp4(
            f"{folder}/clip.mp4", [frames], width=64, height=64, frame_rate=Fraction(24),
            audio=np.zeros((2, 48_000), np.float32), sample_rate=48_000, metadata={},
        )  # fmt: skip


def _error_of(check: Callable[[], None]) -> str:
    try:
        check()
        return ""
    except Exception as error:
        return _message(error)


def _message(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(str(error))}"


if __name__ == "__main__":
    print(json.dumps(device_report(sys.argv[1])))
