"""What the parts of the miniature's training share: a time budget, a schedule, averaged weights and checkpoints."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

#: A checkpoint's files: what is trained in float32; its average, and both moments of Adam, in bfloat16.
_FILES = ("model", "average", "optimizer")
_SAVE_EVERY = 60.0


@dataclass(frozen=True)
class Budget:
    """How long a part trains: until `minutes` have passed or `steps` were made, whichever comes first."""

    minutes: float
    steps: int | None = None


class Trainer:
    """Trains `module` with AdamW, from the newest checkpoint in `folder` if there is one.

    `rate` is the rate of learning of a layer of 432 inputs or fewer. It rises over the first `warmup` steps of all,
    stays, and falls evenly to a twentieth over the last `decay` part of this call's budget. `average` is the module
    with weights averaged over some hundred steps: it is what is scored and exported.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        folder: Path,
        budget: Budget,
        *,
        rate: float,
        warmup: int = 200,
        decay: float = 0.4,
        average_over: int = 500,
    ):
        self.module, self.folder, self.budget = module, folder, budget
        self.rate, self.warmup, self.decay, self.average_over = rate, warmup, decay, average_over
        self.step = 0
        self.weights = {name: p for name, p in module.named_parameters() if p.requires_grad}
        groups = [{"params": [weight], "share": _share(weight)} for weight in self.weights.values()]
        self.optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.99), weight_decay=0.0)
        self.average = copy.deepcopy(module).requires_grad_(False).eval()
        folder.mkdir(parents=True, exist_ok=True)
        self._load()

    # --- training ------------------------------------------------------------------------------------------------

    def run(self, loss_of: Callable[[int], dict[str, torch.Tensor]], show_every: int = 200) -> None:
        """Train until the budget is spent. `loss_of(step)` returns named losses; "loss" is the one to minimise.

        Raises FloatingPointError when a loss is not finite; the checkpoint on disk is then the last good one.
        """
        started = saved = time.monotonic()
        first, sums, count = self.step, {}, 0
        while (used := self._used(started, first)) < 1:
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate * group["share"] * self._factor(used)
            losses = loss_of(self.step)
            self.optimizer.zero_grad(set_to_none=True)
            losses["loss"].backward()
            norm = torch.nn.utils.clip_grad_norm_(self.weights.values(), 1.0)
            self.optimizer.step()
            self._follow()
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
                if time.monotonic() - saved > _SAVE_EVERY:
                    self.save()
                    saved = time.monotonic()
        self.save()

    def _used(self, started: float, first: int) -> float:
        """The part of the budget that is spent."""
        used = (time.monotonic() - started) / (60 * self.budget.minutes)
        return used if self.budget.steps is None else max(used, (self.step - first) / self.budget.steps)

    def _factor(self, used: float) -> float:
        rising = min(1.0, (self.step + 1) / self.warmup)
        return rising * min(1.0, 0.05 + 0.95 * (1 - used) / self.decay)

    @torch.no_grad()
    def _follow(self) -> None:
        keep = 1 - max(1 / self.average_over, 1 / (self.step + 1))
        theirs = dict(self.average.named_parameters())
        averages = [theirs[name] for name in self.weights]
        torch._foreach_lerp_(averages, list(self.weights.values()), 1 - keep)

    # --- checkpoints ---------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Replace the checkpoint. Each file appears by rename, so that one that was cut short is never read."""
        averages = dict(self.average.named_parameters())
        moments = {}
        for name, weight in self.weights.items():
            state = self.optimizer.state.get(weight, {})
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
        _copy(self.weights, loaded["model"])
        _copy(dict(self.average.named_parameters()), loaded["average"])
        for name, weight in self.weights.items():
            moments = {m: loaded["optimizer"].get(f"{m}.{name}") for m in ("exp_avg", "exp_avg_sq")}
            if moments["exp_avg"] is not None:
                state = {m: value.to(weight.device, torch.float32) for m, value in moments.items()}
                self.optimizer.state[weight] = {"step": torch.tensor(float(self.step)), **state}
        print(f"from step {self.step} of {self.folder}", flush=True)


def _share(weight: torch.Tensor) -> float:
    """The share of the rate of learning that a weight takes.

    Adam moves every number of a layer by about the rate. What comes out moves by that times its inputs, so that a
    layer of many inputs must move more slowly.
    """
    if weight.dim() < 2:
        return 0.5
    return min(1.0, 432 / (weight.numel() / weight.shape[0]))


@torch.no_grad()
def _copy(into: dict[str, torch.Tensor], values: dict[str, torch.Tensor]) -> None:
    for name, value in values.items():
        into[name].copy_(value)


def _is_finite(value: float) -> bool:
    return value - value == 0


def chunks(count: int, size: int) -> Iterator[range]:
    """0 … count - 1 in runs of at most `size`."""
    for first in range(0, count, size):
        yield range(first, min(first + size, count))
