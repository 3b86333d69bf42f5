"""Checks of packages, CPUs, memory and the limits of processes."""

from __future__ import annotations

import glob
import importlib.metadata
import os
import platform
import re
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement

from ltx_ray.doctor.checks import Check, at_least

_GIB = 2**30
#: Open files: each rank of Ray holds hundreds of connections. Ray warns below this number.
_OPEN_FILES = 65_536
#: CPUs for each GPU: x264 and the upload take them. GiB for each GPU: the object store, and the clean weights that a
#: switch of LoRAs reads.
_CPUS, _MEMORY_GIB = 8, 64
_LEAST_CPUS, _LEAST_GIB = 2, 8
#: Ray's object store lies in shared memory; in less it falls back to a disk.
_SHM_GIB = 8


def package_checks() -> Iterator[Check]:
    """Python, and every package that this one requires, in a version that it allows."""
    yield Check("ok", "python", platform.python_version(), "3.11 or later")
    wrong = list(_wrong_packages())
    versions = ", ".join(f"{name} {_version(name)}" for name in ("ltx-ray", "torch", "ray", "diffusers", "av"))
    if wrong:
        yield Check("FAIL", "packages", ", ".join(wrong), "what ltx-ray requires; pip install ltx-ray brings it")
    else:
        yield Check("ok", "packages", versions, "the same on every node of a run")


def _wrong_packages() -> Iterator[str]:
    for text in importlib.metadata.requires("ltx-ray") or []:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = _version(requirement.name)
        if version is None:
            yield f"{requirement.name} is missing"
        elif not requirement.specifier.contains(version, prereleases=True):
            yield f"{requirement.name} {version}, where {requirement.specifier} is required"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def system_checks(device: str) -> Iterator[Check]:
    """CPUs, memory, shared memory, limits of processes, and a C compiler. `device`: "cuda" or "cpu"."""
    gpus = len(glob.glob("/proc/driver/nvidia/gpus/*")) if device == "cuda" else 0
    enough, enough_gib = (_CPUS * gpus, _MEMORY_GIB * gpus) if gpus else (_LEAST_CPUS, _LEAST_GIB)
    why = f"for {gpus} GPUs" if gpus else "on a CPU"
    yield at_least("cpus", cpus(), "CPUs", enough, _LEAST_CPUS, why)
    yield at_least("memory", memory_bytes() / _GIB, "GiB", enough_gib, _LEAST_GIB, why)
    shm = shutil.disk_usage("/dev/shm").total / _GIB if Path("/dev/shm").is_dir() else 0.0
    yield at_least("shm", shm, "GiB", _SHM_GIB, 0, "in /dev/shm: Ray's object store lies there (docker --shm-size)")
    yield from _limits()
    compiler = os.environ.get("CC") or next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    found = shutil.which(compiler) if compiler else None
    yield Check(
        "ok" if found else "warn",
        "compiler",
        found or compiler or "none",
        "a C compiler, with which Triton builds kernels",
    )


def cpus() -> float:
    """The CPUs that this process may use, the limit of its container included."""
    available = float(len(os.sched_getaffinity(0)))
    quota = re.fullmatch(r"(\d+) (\d+)\s*", _read("/sys/fs/cgroup/cpu.max"))
    return min(available, int(quota[1]) / int(quota[2])) if quota else available


def memory_bytes() -> int:
    """The memory of this machine, or the limit of its container."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    return min(total, int(limit)) if limit.isdigit() else total


def own_memory() -> int | None:
    """The bytes of this process that are in memory; None where the system does not say."""
    words = _read("/proc/self/statm").split()
    return int(words[1]) * os.sysconf("SC_PAGE_SIZE") if words else None


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _limits() -> Iterator[Check]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield Check(
        "ok" if _reaches(hard, _OPEN_FILES) else "warn", "open files", f"{_limit(soft)}, at most {_limit(hard)}",
        f"{_OPEN_FILES:,} or more (ulimit -n), since Ray raises it to the most",
    )  # fmt: skip
    processes, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    yield Check(
        "ok" if _reaches(processes, 4096) else "warn",
        "processes",
        _limit(processes),
        "4,096 or more threads (ulimit -u)",
    )
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    yield Check(
        "ok" if _reaches(locked, 2**26) else "warn", "locked memory",
        _limit(locked) if locked == resource.RLIM_INFINITY else f"{locked / 2**20:,.4g} MiB",
        "unlimited (ulimit -l), where NCCL exchanges over InfiniBand",
    )  # fmt: skip


def _reaches(limit: int, wanted: int) -> bool:
    return limit == resource.RLIM_INFINITY or limit >= wanted


def _limit(limit: int) -> str:
    return "unlimited" if limit == resource.RLIM_INFINITY else f"{limit:,}"
