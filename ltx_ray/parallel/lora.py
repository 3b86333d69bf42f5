"""LoRAs merged into a rank's shard, without communication, at any strengths, any number of times.

A column-parallel layer needs its rows of B and all of A, a row-parallel layer all of B and its columns of A. Every
merge starts from the clean weights, which are cached where memory allows and never recovered by subtraction. Weights
thus have the bits of a fresh load, whatever was merged before. LoRA: arXiv:2106.09685; arithmetic:
docs/ltx-2.3.md#lora.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ltx_ray.checkpoints.lora import Factor, LoraPair, not_finite
from ltx_ray.checkpoints.safetensors import TensorInfo
from ltx_ray.parallel.collectives import SINGLE_RANK, RankGroup
from ltx_ray.parallel.factors import FactorProduct
from ltx_ray.parallel.fp8 import row_scale_of, write_exactly, write_values
from ltx_ray.parallel.host_copy import HostCopyFailed
from ltx_ray.parallel.layers import ShardParameter
from ltx_ray.parallel.loading import as_stored, is_prequantized, scale_of, with_context
from ltx_ray.parallel.merging import merge_
from ltx_ray.parallel.weight_cache import FreeMemory, Location, ShardSource, WeightCache, choose_location
from ltx_ray.records import ModelError

_log = logging.getLogger(__name__)
#: Float32 values of a quantized factor that exist at once.
_DEQUANTIZE_BYTES = 8 * 2**20

#: (index of a LoRA, its strength) of those that take part, by index.
Strengths = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class LoraSetting:
    """What is merged: the index in LoraMerger's list and the strength of each LoRA that takes part.

    A LoRA of strength 0 beside others takes part, because it changes how the reference rounds those after it.
    """

    strengths: Strengths = ()

    def __post_init__(self) -> None:
        assert list(self.strengths) == sorted(self.strengths, key=lambda entry: entry[0]), self.strengths


class LoraMerger:
    """Brings the weights of `module` from one LoraSetting to another.

    `tensors` are the clean weights, and `loras` the factor pairs of each LoRA by module, in the reference's order (user
    LoRAs, then the distilled one). The module's parameters must hold the clean weights at first. `peers` are the ranks
    that hold the same shard.
    """

    def __init__(
        self,
        module: nn.Module,
        tensors: Mapping[str, TensorInfo],
        loras: Sequence[Mapping[str, LoraPair]],
        tp: RankGroup,
        peers: RankGroup = SINGLE_RANK,
    ):
        self._tp, self._loras, self._tensors, self._peers = tp, loras, tensors, peers
        self._parameters = dict(module.named_parameters())
        touched = {name for lora in loras for name in lora}
        # In file order, in which weights and factors come from disk fastest.
        self._modules = sorted(touched, key=lambda name: _file_position(tensors[f"{name}.weight"]))
        first = next((self._weight(name) for name in self._modules), None)
        self._device = first.device if first is not None else torch.device("cpu")
        self._dtype = next((p.dtype for p in module.parameters() if row_scale_of(p) is None), torch.float32)
        #: Modules in fp8. Their weights are too coarse to merge into, so every merge fetches the clean ones.
        self._quantized = {name for name in self._modules if row_scale_of(self._weight(name)) is not None}
        self._clean = WeightCache(dict(self._clean_sources()), tp, self._device, self._dtype, peers)
        self._factors = WeightCache(dict(self._factor_sources()), tp, self._device)
        #: (LoRA, module) of the factors that have been merged before, and answers about those that are new.
        self._checked: set[tuple[int, str]] = set()
        self._unanswered: list[tuple[TensorInfo, torch.Tensor]] = []
        #: What is merged now, by module; None after a merge that failed half-way.
        self._current: dict[str, Strengths] | None = self._by_module(LoraSetting())

    @property
    def clean_weights(self) -> Location:
        """Where the weights without LoRAs are cached."""
        return self._clean.location

    @property
    def lora_factors(self) -> Location:
        """Where the LoRA factors are cached."""
        return self._factors.location

    def cache_sources(
        self,
        reserve: int,
        memory: FreeMemory | None = None,
        clean: Location | None = None,
        factors: Location | None = None,
    ) -> None:
        """Cache factors and clean weights as close to the device as memory allows.

        `reserve` bytes of the device stay free. `clean` and `factors` give a location instead of choosing it. What goes
        to host memory is copied in the background; switches read the files until that is done. What is merged is taken
        out first where clean weights are copied from the module. All peers call this together and make the same choice,
        because a share of the clean weights is of use only when every peer caches its own.
        """
        memory = self._minimum_over_peers(memory or FreeMemory.measure(self._device))
        if self._device.type != "cuda" and clean is None and factors is None:
            return  # The file is in host memory already.
        if factors is None:
            factors = choose_location(self._factors.total_bytes, memory, reserve)
        if clean is None:
            clean = self._choose_clean_location(memory, reserve, factors)
        if factors == "host":
            self._factors.copy_to_host()
        else:
            self._factors.move_to(factors)
        if clean == "host":
            self._clean.copy_to_host(after=self._factors)
            return
        values = None
        if not self._quantized:
            self.switch_to(LoraSetting())
            values = {name: self._weight(name).data for name in self._modules}
        self._clean.move_to(clean, values)

    def take_over(self, wait: bool = False) -> float | None:
        """Read from host memory from now on what has been copied there; `wait`: until everything has.

        Returns the seconds of the copy of the clean weights when this call took it over. A copy that failed is logged.
        """
        seconds: dict[str, float | None] = {}
        for what, cache in (("LoRA factors", self._factors), ("clean weights", self._clean)):
            try:
                seconds[what] = cache.take_over(wait)
            except HostCopyFailed as error:
                # Switches read the file instead. Where that fails as well, the call that needs it reports it.
                _log.warning("%s stay in the file: %s", what, error)
        return seconds.get("clean weights")

    def _choose_clean_location(self, memory: FreeMemory, reserve: int, factors: Location) -> Location:
        """The location for the clean weights in what the factors leave."""
        device = memory.device - (self._factors.total_bytes if factors == "device" else 0)
        host = memory.host - (self._factors.total_bytes if factors == "host" else 0)
        location = choose_location(self._clean.total_bytes, FreeMemory(device, host), reserve)
        share = self._clean.total_bytes // self._peers.size
        if location != "device" and self._peers.size > 1 and share + reserve <= device:
            return "gang"
        return location

    def _minimum_over_peers(self, memory: FreeMemory) -> FreeMemory:
        if self._peers.size == 1:
            return memory
        figures = torch.tensor([memory.device, memory.host], dtype=torch.int64, device=self._device)
        device, host = self._peers.min_(figures).tolist()
        return FreeMemory(device, host)

    def would_change(self, setting: LoraSetting) -> bool:
        """Whether `switch_to` would change any weight."""
        return self._current != self._by_module(setting)

    def switch_to(self, setting: LoraSetting) -> bool:
        """Bring the weights to `setting`. Returns False when they are there already.

        Only layers that the change concerns are written. Raises what reading or merging raised, with the layer in the
        message; the weights are then unusable until a switch succeeds.
        """
        before, after = self._current, self._by_module(setting)
        changed = [m for m in self._modules if before is None or before[m] != after[m]]
        if not changed:
            return False
        # After a failure half-way, the next switch must not take the mixture for the old setting.
        self._current = None
        self._merge(changed, {m for m in changed if before is None or before[m]}, after)
        self._current = after
        return True

    def _merge(self, modules: list[str], stale: set[str], strengths: Mapping[str, Strengths]) -> None:
        """Merge `strengths` into `modules`. Those in `stale` hold something else than clean weights now."""
        targets = {m: self._weight(m).data for m in modules}
        clean = self._clean.fetch_into([m for m in modules if m in stale and m not in self._quantized], targets)
        originals = self._clean.fetch([[m] for m in modules if m in self._quantized])
        groups = [self._factor_names(m, strengths[m]) for m in modules]
        factors = self._factors.fetch(groups)
        module = "the LoRA"
        try:
            for module, names, tensors in zip(modules, groups, factors, strict=True):
                weight = self._weight(module)
                values = dict(zip(names, tensors, strict=True))
                products = [self._product(index, module, strength, values) for index, strength in strengths[module]]
                for (index, _), product in zip(strengths[module], products, strict=True):
                    if (index, module) not in self._checked:
                        self._check_later(index, module, product)
                info = self._tensors[f"{module}.weight"]
                if module in self._quantized:
                    (source,) = next(originals)
                    self._merge_quantized(weight, source, products, info)
                    continue
                source = next(clean)[1] if module in stale else weight.data
                self._merge_one(weight.data, weight.shard_dim, source, products, info)
        except RuntimeError as error:
            raise with_context(error, f"merging into {module}.weight") from error

    def _merge_quantized(
        self, weight: ShardParameter, source: torch.Tensor, products: list[FactorProduct], info: TensorInfo
    ) -> None:
        """Merge into a weight in fp8. Without products, a prequantized `source` is held exactly, as by a fresh load."""
        if is_prequantized(info):
            if not products:
                write_exactly(weight, source, scale_of(info))
                return
            source = self._multiplied(source, torch.tensor([[scale_of(info)]], device=source.device))
        merged = torch.empty_like(source)
        self._merge_one(merged, weight.shard_dim, source, products, info)
        write_values(weight, merged)

    def _check_later(self, index: int, module: str, product: FactorProduct) -> None:
        """Ask the device whether factors are finite, when they are merged for the first time."""
        pair = self._loras[index][module]
        self._checked.add((index, module))
        for factor, values in ((pair.a, product.a), (pair.b, product.b)):
            self._unanswered.append((factor.tensor, torch.isfinite(values).all()))

    def check_finite(self) -> None:
        """Raise ModelError, on every rank of the gang, when factors that have been merged are not finite on one.

        The only communication here, and only after a LoRA was merged for the first time. All ranks must have made the
        same switches.
        """
        asked, self._unanswered = self._unanswered, []
        if not asked:
            return
        finite = self._tp.min_(torch.stack([answer for _, answer in asked]).to(torch.int32)).tolist()
        for (info, _), fine in zip(asked, finite, strict=True):
            if not fine:
                raise ModelError(str(not_finite(info)))

    def _merge_one(
        self,
        target: torch.Tensor,
        shard_dim: int | None,
        source: torch.Tensor,
        products: list[FactorProduct],
        info: TensorInfo,
    ) -> None:
        first_row = self._tp.slice(info.shape[0]).start if shard_dim == 0 else 0
        merge_(target, source, products, first_row=first_row, full_columns=info.shape[1])

    def _product(self, index: int, module: str, strength: float, values: Mapping[str, torch.Tensor]) -> FactorProduct:
        pair = self._loras[index][module]
        a = self._dequantized(pair.a, _factor_name(index, module, "a"), values)
        b = self._dequantized(pair.b, _factor_name(index, module, "b"), values)
        return FactorProduct(a, b, strength * pair.scale)

    def _dequantized(self, factor: Factor, name: str, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The factor in the weights' dtype. A quantized one is multiplied by its scale, some rows at a time."""
        value = values[name]
        if factor.scale is None:
            return value.to(self._dtype)
        return self._multiplied(value, values[_scale_name(name)].float().reshape(-1, 1))

    def _multiplied(self, values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """values (R, C) times the scale (R, 1) or (1, 1) in float32, rounded to the weights' dtype."""
        product = torch.empty(values.shape, dtype=self._dtype, device=values.device)
        step = max(1, _DEQUANTIZE_BYTES // (4 * values.shape[1]))
        for start in range(0, values.shape[0], step):
            rows = slice(start, start + step)
            product[rows] = values[rows].float().mul_(scale[rows] if len(scale) > 1 else scale)
        return product

    def _by_module(self, setting: LoraSetting) -> dict[str, Strengths]:
        # The reference merges nothing when all strengths are 0.
        strengths = setting.strengths if any(strength for _, strength in setting.strengths) else ()
        return {m: tuple(entry for entry in strengths if m in self._loras[entry[0]]) for m in self._modules}

    def _weight(self, module: str) -> ShardParameter:
        parameter = self._parameters[f"{module}.weight"]
        assert isinstance(parameter, ShardParameter), module
        return parameter

    def _factor_names(self, module: str, strengths: Strengths) -> list[str]:
        """Names in the factor cache of all that merging `strengths` into `module` reads."""
        names = []
        for index, _ in strengths:
            pair = self._loras[index][module]
            for factor, side in ((pair.a, "a"), (pair.b, "b")):
                name = _factor_name(index, module, side)
                names += [name] if factor.scale is None else [name, _scale_name(name)]
        return names

    def _clean_sources(self) -> Iterator[tuple[str, ShardSource]]:
        """(name, source) of every weight. Those that a file in fp8 gives to a module in fp8 keep the file's values."""
        for module in self._modules:
            info, dim = self._tensors[f"{module}.weight"], self._weight(module).shard_dim
            stored = module in self._quantized and is_prequantized(info)
            yield module, ShardSource(as_stored(info), dim, True) if stored else ShardSource(info, dim)

    def _factor_sources(self) -> Iterator[tuple[str, ShardSource]]:
        """(name, source) of every factor and of the scales of quantized ones.

        A is divided along its columns as the weight is, B along its rows.
        """
        for index, lora in enumerate(self._loras):
            for module, pair in lora.items():
                dim = self._weight(module).shard_dim
                for factor, side, axis in ((pair.a, "a", 1), (pair.b, "b", 0)):
                    name = _factor_name(index, module, side)
                    shard_dim = axis if dim == axis else None
                    yield name, ShardSource(factor.tensor, shard_dim)
                    if factor.scale is not None:
                        by_row = factor.scale.shape and factor.scale.shape[0] == factor.shape[0] > 1
                        yield _scale_name(name), ShardSource(factor.scale, 0 if shard_dim == 0 and by_row else None)


def _factor_name(index: int, module: str, side: str) -> str:
    return f"{index}.{module}.{side}"


def _scale_name(factor_name: str) -> str:
    return f"{factor_name}.scale"


def _file_position(info: TensorInfo) -> tuple[str, int]:
    return info.path, info.start
