"""A rank's shard straight from a safetensors file: each parameter reads only its own slice."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from ltx_ray.headers import TensorInfo
from ltx_ray.parallel.layers import TPGroup


class ShardReader:
    """This rank's slices of `tensors` (name -> where it is).

    Files stay open (they are mapped, not read), so a slice can be had again at any time.
    """

    def __init__(self, tensors: Mapping[str, TensorInfo], tp: TPGroup):
        self.tensors, self.tp = tensors, tp
        self._files: dict[str, Any] = {}

    def read(self, name: str, shard_dim: int | None) -> torch.Tensor:
        """This rank's slice of tensor `name` along `shard_dim` (None: all of it), on the host.

        It may share memory with the mapped file: never write to it.
        """
        info = self.tensors[name]
        if info.path not in self._files:
            self._files[info.path] = safe_open(info.path, framework="pt")
        entry = self._files[info.path].get_slice(info.key)
        if shard_dim is None or self.tp.size == 1:
            return entry[:] if info.shape else self._files[info.path].get_tensor(info.key)
        index = [slice(None)] * len(info.shape)
        index[shard_dim] = self.tp.slice(info.shape[shard_dim])
        return entry[tuple(index)]


def load_shard(
    module: nn.Module,
    reader: ShardReader,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Fill `module` (built on the meta device) with this rank's slices, as `dtype` on `device`.

    Raises ValueError naming the file and the first ten keys when names or shapes do not match.
    """
    expected, found = dict(module.named_parameters()), reader.tensors
    problems = _listed("missing", expected.keys() - found.keys()) + _listed(
        "unexpected", found.keys() - expected.keys()
    )
    if problems:
        where = next(iter(found.values())).path if found else "the checkpoint"
        raise ValueError(f"{where}: the transformer's keys do not fit the model: {'; '.join(problems)}")
    for name, parameter in expected.items():
        tensor = reader.read(name, parameter.shard_dim)
        if tensor.shape != parameter.shape:
            raise ValueError(
                f"{found[name].path}: {found[name].key} has shape {found[name].shape}, of which rank "
                f"{reader.tp.rank} of {reader.tp.size} takes {tuple(tensor.shape)}; legal: {tuple(parameter.shape)}"
            )
        # `tensor` may be the mapped file itself, which stays the clean copy that LoRAs are merged from
        loaded = nn.Parameter(tensor.to(device=device, dtype=dtype, copy=True), requires_grad=False)
        loaded.shard_dim = parameter.shard_dim
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, loaded)


def _listed(what: str, names: Set[str]) -> list[str]:
    if not names:
        return []
    first = ", ".join(sorted(names)[:10])
    return [f"{len(names)} {what} ({first}{', ...' if len(names) > 10 else ''})"]
