"""A rank's shard straight from a safetensors file: each parameter reads only its own slice."""

from __future__ import annotations

import torch
from safetensors import safe_open
from torch import nn

from ltx_ray.parallel.layers import TPGroup


class ShardReader:
    """Slices of the tensors under `prefix` of the file at `path`, for one rank.

    The file stays open (it is mapped, not read), so a slice can be had again at any time.
    """

    def __init__(self, path: str, prefix: str, tp: TPGroup):
        self.path, self.prefix, self.tp = path, prefix, tp
        self._file = safe_open(path, framework="pt")
        self.names = {name[len(prefix) :] for name in self._file.keys() if name.startswith(prefix)}  # noqa: SIM118

    def read(self, name: str, shard_dim: int | None) -> torch.Tensor:
        """This rank's slice of tensor `name` along `shard_dim` (None: all of it), on the host.

        It may share memory with the mapped file: never write to it.
        """
        entry = self._file.get_slice(self.prefix + name)
        if shard_dim is None or self.tp.size == 1:
            return entry[:]
        index = [slice(None)] * len(entry.get_shape())
        index[shard_dim] = self.tp.slice(entry.get_shape()[shard_dim])
        return entry[tuple(index)]

    def full_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file.get_slice(self.prefix + name).get_shape())


def load_shard(
    module: nn.Module,
    reader: ShardReader,
    *,
    dtype: torch.dtype,
    device: torch.device,
    ignore: tuple[str, ...] = (),
) -> None:
    """Fill `module` (built on the meta device) with this rank's slices, as `dtype` on `device`.

    Names starting with one of `ignore` belong to other parts that share the prefix. Raises
    ValueError naming the file and the first ten keys when names or shapes do not match.
    """
    expected = dict(module.named_parameters())
    found = {name for name in reader.names if not name.startswith(ignore)} if ignore else reader.names
    problems = _listed("missing", expected.keys() - found) + _listed("unexpected", found - expected.keys())
    if problems:
        raise ValueError(f"{reader.path}: keys under {reader.prefix!r} do not fit the model: {'; '.join(problems)}")
    for name, parameter in expected.items():
        tensor = reader.read(name, parameter.shard_dim)
        if tensor.shape != parameter.shape:
            raise ValueError(
                f"{reader.path}: {reader.prefix}{name} has shape {reader.full_shape(name)}, of which rank "
                f"{reader.tp.rank} of {reader.tp.size} takes {tuple(tensor.shape)}; legal: {tuple(parameter.shape)}"
            )
        # `tensor` may be the mapped file itself, which stays the clean copy that LoRAs are merged from
        loaded = nn.Parameter(tensor.to(device=device, dtype=dtype, copy=True), requires_grad=False)
        loaded.shard_dim = parameter.shard_dim
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, loaded)


def _listed(what: str, names: set[str]) -> list[str]:
    if not names:
        return []
    first = ", ".join(sorted(names)[:10])
    return [f"{len(names)} {what} ({first}{', ...' if len(names) > 10 else ''})"]
