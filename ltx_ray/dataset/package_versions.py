"""Versions of this package and of those that may change the bits of a clip, as `versions` of the index has them."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence

import ltx_ray

#: Packages of which the fused path's kernels are: Triton, and both packages that provide FlashAttention-3.
TRITON, FA3 = ("triton",), ("fa3-fwd", "flash-attn-3")
_PACKAGES = ("torch", "ray", "diffusers", "transformers", "safetensors", "av", "pyarrow")


def package_versions() -> dict[str, str | None]:
    """By name, the versions in this process's environment; None for a package that is missing."""
    return {"ltx_ray": ltx_ray.__version__, **{name: _version(name) for name in _PACKAGES}}


def installed_versions(packages: Sequence[str]) -> dict[str, str]:
    """By name, the versions of those of `packages` that this process's environment has."""
    return {name: version for name in packages if (version := _version(name)) is not None}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
