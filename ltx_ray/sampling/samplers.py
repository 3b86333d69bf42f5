"""The samplers by the names that presets.py gives them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from ltx_ray.sampling.euler import sample_euler
from ltx_ray.sampling.res2s import sample_res2s
from ltx_ray.sampling.sampler import Sampler

SAMPLERS: Mapping[str, Sampler] = MappingProxyType({"res_2s": sample_res2s, "euler": sample_euler})
