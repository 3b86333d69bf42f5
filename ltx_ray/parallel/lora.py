"""LoRA merged into a rank's shard, with no communication, at any strengths, any number of times.

A column-parallel layer needs its rows of B and all of A, a row-parallel layer all of B and its columns
of A. Every merge starts from the clean weights, which are kept where memory allows and never
reconstructed by subtracting, so that the weights have the bits of a fresh load whatever was merged before.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ltx_ray.checkpoints.lora import Factor, LoraPair
from ltx_ray.checkpoints.safetensors import TensorInfo
from ltx_ray.parallel.fp8 import row_scale_of, store
from ltx_ray.parallel.layers import TPGroup
from ltx_ray.parallel.loading import named
from ltx_ray.parallel.merging import FactorProduct, merge_
from ltx_ray.parallel.weight_cache import Memory, Part, WeightCache, choose

_log = logging.getLogger(__name__)
#: Float32 values of a quantized factor that exist at once.
_DEQUANTIZE_BYTES = 8 * 2**20

#: (place of a LoRA, strength) of those that take part, in order.
Uses = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class LoraSetting:
    """What is merged: (place in the list given to LoraMerger, strength) of each LoRA that takes part, in order.

    A LoRA of strength 0 beside others still takes part: the reference rounds what comes after it otherwise.
    """

    uses: Uses = ()

    def __post_init__(self) -> None:
        assert list(self.uses) == sorted(self.uses, key=lambda use: use[0]), self.uses


class LoraMerger:
    """Keeps the weights of `module` at a LoraSetting.

    `tensors` are the clean weights and `loras` the factor pairs by module, in the reference's order
    (user LoRAs, then the distilled one). The module's parameters are clean when it is given.
    `group` is the ranks that hold the same shard, if any.
    """

    def __init__(
        self,
        module: nn.Module,
        tensors: Mapping[str, TensorInfo],
        loras: Sequence[Mapping[str, LoraPair]],
        tp: TPGroup,
        group: TPGroup = TPGroup(),  # noqa: B008 (frozen)
    ):
        self._tp, self._loras = tp, loras
        self._parameters = dict(module.named_parameters())
        touched = {stem for lora in loras for stem in lora}
        # in file order, which is the order in which weights and factors come from disk fastest
        self._modules = sorted(touched, key=lambda stem: _place(tensors[f"{stem}.weight"]))
        self._tensors = tensors
        first = next((self._weight(stem) for stem in self._modules), None)
        self._device = first.device if first is not None else torch.device("cpu")
        self._dtype = next((p.dtype for p in module.parameters() if row_scale_of(p) is None), torch.float32)
        weights = {stem: Part(tensors[f"{stem}.weight"], self._weight(stem).shard_dim) for stem in self._modules}
        self._clean = WeightCache(weights, tp, self._device, self._dtype, group)
        self._group = group
        #: Those in fp8: nothing can be merged into what is left of them, so every merge starts from the clean weight.
        self._quantized = {stem for stem in self._modules if row_scale_of(self._weight(stem)) is not None}
        self._factors = WeightCache(dict(self._factor_parts()), tp, self._device)
        #: What is merged now; None after a merge that failed half-way.
        self._current: dict[str, Uses] | None = self._by_module(LoraSetting())

    @property
    def clean_weights(self) -> str:
        """Where the weights without LoRAs are kept: "device", "host", "gang" or "file"."""
        return self._clean.where

    @property
    def lora_factors(self) -> str:
        """Where the LoRA factors are kept: "device", "host" or "file"."""
        return self._factors.where

    def keep(
        self, reserve: int, memory: Memory | None = None, clean: str | None = None, factors: str | None = None
    ) -> None:
        """Keep factors and clean weights as near as memory allows; what is merged is taken out for it.

        `reserve` bytes of the device stay free. `clean` and `factors` name a place instead. All ranks of the
        group call this together, and choose alike: a share of the weights is of use only when all keep theirs.
        """
        memory = self._least(memory or Memory.now(self._device))
        if self._device.type != "cuda" and clean is None and factors is None:
            return  # the file is host memory already
        if factors is None:
            factors = choose(self._factors.total, memory, reserve)
        device = memory.device - (self._factors.total if factors == "device" else 0)
        host = memory.host - (self._factors.total if factors == "host" else 0)
        chosen = clean is None
        if clean is None:
            clean = choose(self._clean.total, Memory(device, host), reserve)
            share = self._clean.total // self._group.size
            if clean != "device" and self._group.size > 1 and share + reserve <= device:
                clean = "gang"
        source = None
        if not self._quantized:
            self.switch(LoraSetting())
            source = {stem: self._weight(stem).data for stem in self._modules}
        self._factors.keep(factors)
        try:
            self._clean.keep(clean, source)
        except RuntimeError as error:
            if not chosen or clean != "host":
                raise
            # locked memory may be limited; the file is there in any case
            _log.warning("clean weights stay in the file: %s", error)

    def _least(self, memory: Memory) -> Memory:
        """What every rank of the group has at least."""
        if self._group.size == 1:
            return memory
        figures = torch.tensor([memory.device, memory.host], dtype=torch.int64, device=self._device)
        device, host = self._group.min_(figures).tolist()
        return Memory(device, host)

    def would_change(self, setting: LoraSetting) -> bool:
        """Whether `switch` would have to do anything."""
        return self._current != self._by_module(setting)

    def switch(self, setting: LoraSetting) -> bool:
        """Bring the weights to `setting`; False when they are there already.

        Only layers that the change concerns are touched. Raises what reading or merging raised, with the
        layer in the message; the weights are then unusable until a switch succeeds.
        """
        before, now = self._current, self._by_module(setting)
        changed = [m for m in self._modules if before is None or before[m] != now[m]]
        if not changed:
            return False
        # should this fail half-way, the next call must not take the mixture for what was there before
        self._current = None
        self._merge(changed, {m for m in changed if before is None or before[m]}, now)
        self._current = now
        return True

    def _merge(self, modules: list[str], stale: set[str], uses: Mapping[str, Uses]) -> None:
        """Merge `uses` into `modules`; those in `stale` are not clean now."""
        into = {m: self._weight(m).data for m in modules}
        clean = self._clean.fetch_into([m for m in modules if m in stale and m not in self._quantized], into)
        originals = self._clean.fetch([[m] for m in modules if m in self._quantized])
        groups = [self._names(m, uses[m]) for m in modules]
        factors = self._factors.fetch(groups)
        stem = "the LoRA"
        try:
            for stem, names, tensors in zip(modules, groups, factors, strict=True):
                weight = self._weight(stem)
                values = dict(zip(names, tensors, strict=True))
                products = [self._product(index, stem, strength, values) for index, strength in uses[stem]]
                if stem in self._quantized:
                    (source,) = next(originals)
                    merged = torch.empty_like(source)
                    self._merge_one(merged, weight.shard_dim, source, products, self._tensors[f"{stem}.weight"])
                    store(weight, merged)
                    continue
                source = next(clean)[1] if stem in stale else weight.data
                self._merge_one(weight.data, weight.shard_dim, source, products, self._tensors[f"{stem}.weight"])
        except RuntimeError as error:
            raise named(error, f"merging into {stem}.weight") from error

    def _merge_one(
        self,
        target: torch.Tensor,
        shard_dim: int | None,
        source: torch.Tensor,
        products: list[FactorProduct],
        info: TensorInfo,
    ) -> None:
        offset = self._tp.slice(info.shape[0]).start if shard_dim == 0 else 0
        merge_(target, source, products, first_row=offset, full_columns=info.shape[1])

    def _product(self, index: int, stem: str, strength: float, values: Mapping[str, torch.Tensor]) -> FactorProduct:
        pair = self._loras[index][stem]
        a, b = (
            self._plain(factor, _name(index, stem, side), values) for factor, side in ((pair.a, "a"), (pair.b, "b"))
        )
        return a, b, strength * pair.scale

    def _plain(self, factor: Factor, name: str, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The factor in the weights' dtype; a quantized one times its scale, some rows at a time."""
        value = values[name]
        if factor.scale is None:
            return value.to(self._dtype)
        scale = values[f"{name}.scale"].float().reshape(-1, 1)
        plain = torch.empty(value.shape, dtype=self._dtype, device=value.device)
        step = max(1, _DEQUANTIZE_BYTES // (4 * value.shape[1]))
        for start in range(0, value.shape[0], step):
            rows = slice(start, start + step)
            plain[rows] = value[rows].float().mul_(scale[rows] if len(scale) > 1 else scale)
        return plain

    def _by_module(self, setting: LoraSetting) -> dict[str, Uses]:
        # when all strengths are 0 the reference merges nothing
        uses = setting.uses if any(strength for _, strength in setting.uses) else ()
        return {m: tuple(use for use in uses if m in self._loras[use[0]]) for m in self._modules}

    def _weight(self, stem: str) -> nn.Parameter:
        return self._parameters[f"{stem}.weight"]

    def _names(self, stem: str, uses: Uses) -> list[str]:
        names = []
        for index, _ in uses:
            pair = self._loras[index][stem]
            for factor, side in ((pair.a, "a"), (pair.b, "b")):
                name = _name(index, stem, side)
                names += [name] if factor.scale is None else [name, f"{name}.scale"]
        return names

    def _factor_parts(self):
        for index, lora in enumerate(self._loras):
            for stem, pair in lora.items():
                dim = self._weight(stem).shard_dim
                for factor, side, axis in ((pair.a, "a", 1), (pair.b, "b", 0)):
                    sharded = axis if dim == axis else None
                    yield _name(index, stem, side), Part(factor.tensor, sharded)
                    if factor.scale is not None:
                        by_row = factor.scale.shape and factor.scale.shape[0] == factor.shape[0] > 1
                        yield (
                            f"{_name(index, stem, side)}.scale",
                            Part(factor.scale, 0 if sharded == 0 and by_row else None),
                        )


def _name(index: int, stem: str, side: str) -> str:
    return f"{index}.{stem}.{side}"


def _place(info: TensorInfo) -> tuple[str, int]:
    return info.path, info.start
