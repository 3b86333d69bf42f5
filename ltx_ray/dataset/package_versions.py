"""Versions of this package and of those that may change the bits of a clip, as `versions` of the index has them."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import ltx_ray

#: Packages of which the fused path's kernels are: Triton, and both packages that provide FlashAttention-3.
TRITON, FA3 = ("triton",), ("fa3-fwd", "flash-attn-3")
_PACKAGES = ("torch", "ray", "diffusers", "transformers", "safetensors", "av", "pyarrow")


#: The commit of which a release or an image was built, beside the package's modules.
COMMIT_FILE = Path(ltx_ray.__file__).with_name("commit.txt")
_COMMIT = re.compile("[0-9a-f]{12}")


@cache
def own_version() -> str:
    """The version of this package, with its commit where the build has recorded that: `0.1.0+1a2b3c4d5e6f`."""
    commit = _COMMIT.match(COMMIT_FILE.read_text(encoding="utf-8", errors="replace")) if COMMIT_FILE.exists() else None
    return ltx_ray.__version__ if commit is None else f"{ltx_ray.__version__}+{commit.group()}"


def is_same_version(one: str, other: str) -> bool:
    """Whether two versions of this package are one, as far as both tell their commits."""
    (version, _, commit), (other_version, _, other_commit) = one.partition("+"), other.partition("+")
    return version == other_version and (not commit or not other_commit or commit == other_commit)


def package_versions() -> dict[str, str | None]:
    """By name, the versions in this process's environment; None for a package that is missing."""
    return {"ltx_ray": own_version(), **{name: _version(name) for name in _PACKAGES}}


def installed_versions(packages: Sequence[str]) -> dict[str, str]:
    """By name, the versions of those of `packages` that this process's environment has."""
    return {name: version for name in packages if (version := _version(name)) is not None}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
