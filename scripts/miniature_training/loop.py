"""The training loop of the miniature's parts: time budget, learning-rate schedule, averaged weights, checkpoints."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ltx_ray.miniature.config import WEIGHTS
from scripts.miniature_training.muon import Muon

M = TypeVar("M", bound=torch.nn.Module)

#: A checkpoint's files: the weights in float32, their average in bfloat16, and both moments of Adam in bfloat16.
_FILES = ("model", "average", "optimizer")
#: Folder of a training by the name of its file, where the two differ.
_FOLDERS = {"transformer": "dit"}
#: Seconds between checkpoints.
_SAVE_INTERVAL = 60.0
#: Inputs of an output up to which a layer takes the full learning rate.
_FULL_RATE_INPUTS = 432


@dataclass(frozen=True)
class Budget:
    """Training of one call ends after `minutes` or `steps`, whichever comes first."""

    minutes: float
    steps: int | None = None


class Trainer(Generic[M]):
    """Trains `module`, from the checkpoint in `folder` if there is one.

    `rate` is AdamW's learning rate of layers with few inputs (see `_rate_factor`). With `muon_rate`, Muon trains the
    weights but biases whose names `takes_muon` accepts, and AdamW the rest. Rates rise linearly over the first `warmup`
    steps of the part's training, stay constant, and fall linearly to a twentieth over the last fraction `decay` of this
    call's budget. `average` is a copy of the module whose weights are an exponential average over about `average_over`
    steps. It is scored and exported.
    """

    def __init__(
        self,
        module: M,
        folder: Path,
        budget: Budget,
        *,
        rate: float,
        warmup: int = 200,
        decay: float = 0.4,
        average_over: int = 500,
        muon_rate: float | None = None,
        takes_muon: Callable[[str], bool] = lambda name: True,
    ) -> None:
        self.module, self.folder, self.budget = module, folder, budget
        self.warmup, self.decay, self.average_over = warmup, decay, average_over
        self.step = 0
        self.weights = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.optimizers = _optimizers(self.weights, rate, muon_rate, takes_muon)
        self.average = copy.deepcopy(module).requires_grad_(False).eval()
        folder.mkdir(parents=True, exist_ok=True)
        self._load()

    # --- training ------------------------------------------------------------------------------------------------

    def run(self, loss_of: Callable[[int], dict[str, torch.Tensor]], show_every: int = 200) -> None:
        """Train until the budget is spent. `loss_of(step)` returns named losses and sets the weights' gradients.

        Raises FloatingPointError when a printed mean is not finite. The checkpoint on disk stays as it was.
        """
        started = saved = time.monotonic()
        first, count = self.step, 0
        sums: dict[str, Any] = {}
        while (used := self._used(started, first)) < 1:
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["full_rate"] * self._schedule(used)
            losses = loss_of(self.step)
            norm = torch.nn.utils.clip_grad_norm_(self.weights.values(), 1.0)
            for optimizer in self.optimizers:
                optimizer.step()
            self._update_average()
            self.step += 1
            count += 1
            for name, value in {**losses, "gradient": norm}.items():
                sums[name] = sums.get(name, 0) + value.detach()
            if self.step % show_every == 0 or self._used(started, first) >= 1:
                shown = {name: float(total) / count for name, total in sums.items()}
                if not all(map(_is_finite, shown.values())):
                    raise FloatingPointError(f"step {self.step}: {shown}")
                text = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
                print(f"step {self.step}  {time.monotonic() - started:.0f} s  {text}", flush=True)
                sums, count = {}, 0
                if time.monotonic() - saved > _SAVE_INTERVAL:
                    self.save()
                    saved = time.monotonic()
        self.save()

    def _used(self, started: float, first: int) -> float:
        """The fraction of the budget that is spent."""
        if not self.budget.minutes:
            return 1.0
        used = (time.monotonic() - started) / (60 * self.budget.minutes)
        return used if self.budget.steps is None else max(used, (self.step - first) / self.budget.steps)

    def _schedule(self, used: float) -> float:
        """The factor of the learning rate when the fraction `used` of the budget is spent."""
        rising = min(1.0, (self.step + 1) / self.warmup)
        return rising * min(1.0, 0.05 + 0.95 * (1 - used) / self.decay)

    @torch.no_grad()
    def _update_average(self) -> None:
        of_average = dict(self.average.named_parameters())
        averages: list[torch.Tensor] = [of_average[name] for name in self.weights]
        weights: list[torch.Tensor] = list(self.weights.values())
        torch._foreach_lerp_(averages, weights, max(1 / self.average_over, 1 / (self.step + 1)))

    def _optimizer_of(self, weight: torch.Tensor) -> torch.optim.Optimizer:
        return next(o for o in self.optimizers for g in o.param_groups for w in g["params"] if w is weight)

    # --- checkpoints ---------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Replace the checkpoint. Each file is renamed into place, so a partly written one is never read."""
        averages = dict(self.average.named_parameters())
        moments = {}
        for name, weight in self.weights.items():
            state: dict[str, torch.Tensor] = self._optimizer_of(weight).state.get(weight, {})
            for moment in ("exp_avg", "exp_avg_sq"):
                if moment in state:
                    moments[f"{moment}.{name}"] = state[moment].to(torch.bfloat16)
        tensors = {
            "model": {name: weight.detach() for name, weight in self.weights.items()},
            "average": {name: averages[name].to(torch.bfloat16) for name in self.weights},
            "optimizer": moments,
        }
        for file in _FILES:
            target, partial = self.folder / f"{file}.safetensors", self.folder / f".{file}.partial"
            contents = {name: value.contiguous() for name, value in tensors[file].items()}
            save_file(contents, str(partial), metadata={"step": json.dumps(self.step)})
            partial.rename(target)

    def _load(self) -> None:
        paths = {file: self.folder / f"{file}.safetensors" for file in _FILES}
        if not all(path.exists() for path in paths.values()):
            return
        loaded = {}
        for file, path in paths.items():
            with safe_open(str(path), "pt") as opened:
                self.step = json.loads(opened.metadata()["step"])
                loaded[file] = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        sizes = {name: value.shape for name, value in loaded["model"].items()}
        if sizes != {name: weight.shape for name, weight in self.weights.items()}:
            raise ValueError(f"{paths['model']}: weights of other sizes or names; legal: another --out")
        _copy(self.weights, loaded["model"])
        _copy(dict(self.average.named_parameters()), loaded["average"])
        for name, weight in self.weights.items():
            moments = {m: loaded["optimizer"].get(f"{m}.{name}") for m in ("exp_avg", "exp_avg_sq")}
            state = {m: value.to(weight.device, torch.float32) for m, value in moments.items() if value is not None}
            if state:
                state["step"] = torch.tensor(float(self.step), device=weight.device)
                self._optimizer_of(weight).state[weight] = state
        print(f"from step {self.step} of {self.folder}", flush=True)


def _optimizers(
    weights: Mapping[str, torch.nn.Parameter],
    rate: float,
    muon_rate: float | None,
    takes_muon: Callable[[str], bool],
) -> list[torch.optim.Optimizer]:
    """AdamW at `rate`, after Muon at `muon_rate` for the weights that it takes if that is given."""
    by_rate: dict[float, list[torch.nn.Parameter]] = {}
    wide = []
    for name, weight in weights.items():
        if muon_rate is not None and weight.dim() >= 2 and takes_muon(name):
            wide.append(weight)
        else:
            by_rate.setdefault(rate * _rate_factor(weight), []).append(weight)
    groups = [{"params": members, "full_rate": full} for full, members in by_rate.items()]
    on_gpu = next(iter(weights.values())).is_cuda
    adam = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.99), weight_decay=0.0, fused=on_gpu)
    if muon_rate is None:
        return [adam]
    return [Muon([{"params": wide, "full_rate": muon_rate}], lr=muon_rate), adam]


def _rate_factor(weight: torch.Tensor) -> float:
    """The factor of the learning rate for one weight.

    Adam moves every number of a layer by about the learning rate, so an output can move by the rate times the number
    of its inputs. Layers with many inputs therefore take a smaller rate.
    """
    if weight.dim() < 2:
        return 0.5
    return min(1.0, _FULL_RATE_INPUTS / (weight.numel() / weight.shape[0]))


@torch.no_grad()
def _copy(into: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor]) -> None:
    for name, value in values.items():
        into[name].copy_(value)


def _is_finite(value: float) -> bool:
    return value - value == 0


def weights_of(part: str, folder: Path) -> Path:
    """The file of a trained part: that of a training beside `folder`, or else the shipped one.

    Raises ValueError when there is neither.
    """
    trained_by = _FOLDERS.get(part, part)
    own, shipped = folder.parent / trained_by / f"{part}.safetensors", WEIGHTS / f"{part}.safetensors"
    found = next((path for path in (own, shipped) if path.exists()), None)
    if found is None:
        raise ValueError(f"{own}: not there, nor does the package have it; legal: --part {trained_by} first")
    print(f"{part}: {found}", flush=True)
    return found


def chunks(count: int, size: int) -> Iterator[range]:
    """The numbers 0 to count - 1 in ranges of at most `size`."""
    for first in range(0, count, size):
        yield range(first, min(first + size, count))
