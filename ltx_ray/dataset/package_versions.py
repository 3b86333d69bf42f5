"""Versions of this package and of those that may change the bits of a clip, as `versions` of the index has them."""

from __future__ import annotations

import importlib.metadata

import ltx_ray

_PACKAGES = ("torch", "ray", "diffusers", "transformers", "safetensors", "av", "pyarrow")


def package_versions() -> dict[str, str | None]:
    """By name, the versions in this process's environment; None for a package that is missing."""
    return {"ltx_ray": ltx_ray.__version__, **{name: _version(name) for name in _PACKAGES}}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
