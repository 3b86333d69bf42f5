"""Checks of GPUs and of the encoder, made by engine.device_check in a process of its own: a broken card may end it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ltx_ray.doctor.checks import Check, Status, at_least

#: Seconds for a node's cards. Triton compiles kernels and CUDA loads its libraries, from a cold disk.
_SECONDS = 300.0
_DRIVER_VERSION = Path("/sys/module/nvidia/version")
#: Free GiB of a card: the DiT in bf16 and the clips of stage 2 take 80 of them on one card, and gangs divide them.
_GPU_GIB, _LEAST_GPU_GIB = 79, 12


def device_checks(device: str) -> Iterator[Check]:
    """`device`: "cuda" or "cpu"."""
    found = _look(device)
    if isinstance(found, str):
        yield Check("FAIL", "device", found, "a device that computes")
        return
    if device == "cuda":
        driver = _DRIVER_VERSION.read_text().strip() if _DRIVER_VERSION.exists() else "none"
        runs = bool(found["gpus"])
        yield Check(
            "ok" if runs else "FAIL", "driver", driver, f"one that runs CUDA {found['cuda']} of torch {found['torch']}"
        )
        if not runs:
            why = found["error"] or "none"
            yield Check("FAIL", "gpus", why, "an NVIDIA GPU; --device cpu checks a node without one")
    else:
        yield Check("ok", "torch", found["torch"], "any, on a CPU")
    for number, gpu in enumerate(found["gpus"]):
        yield from _gpu_checks(number, gpu)
    encoder = found["encoder"]
    yield Check(
        "FAIL" if encoder else "ok", "encoder", encoder or "libx264 and AAC", "H.264 and AAC in an mp4, by PyAV"
    )


def _gpu_checks(number: int, gpu: Mapping[str, Any]) -> Iterator[Check]:
    name = f"gpu {number}"
    yield Check("ok", name, f"{gpu['name']}, {gpu['total'] / 2**30:.1f} GiB", "the same model on every node of a run")
    yield at_least(f"{name} memory", gpu["free"] / 2**30, "GiB free", _GPU_GIB, _LEAST_GPU_GIB, "or a gang (--tp)")
    yield _answered(f"{name} products", gpu["products"], "bfloat16 products that are right", "FAIL")
    wanted = "FlashAttention-3 (pip install 'ltx-ray[hopper]')" if gpu["hopper"] else "cuDNN attention"
    missing = gpu["hopper"] and gpu["attention"] != "fa3"
    status: Status = "FAIL" if gpu["attention_error"] else "warn" if missing else "ok"
    yield Check(status, f"{name} attention", gpu["attention_error"] or gpu["attention"], wanted)
    yield _answered(
        f"{name} kernels", gpu["kernels"], "Triton and a C compiler; without: --compile off, slower", "warn"
    )


def _answered(name: str, error: str, wanted: str, otherwise: Status) -> Check:
    return Check(otherwise if error else "ok", name, error or "right", wanted)


def _look(device: str) -> dict[str, Any] | str:
    """What engine.device_check reports, or why it does not."""
    command = [sys.executable, "-m", "ltx_ray.engine.device_check", device]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, env=environment)
    except subprocess.TimeoutExpired:
        return f"no answer in {_SECONDS:g} s"
    if done.returncode:
        last = next(iter(reversed(done.stderr.strip().splitlines())), "")
        return f"the process that looked ended with {done.returncode}: {last}"
    report = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(report, dict)
    return report
