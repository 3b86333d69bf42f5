"""A small model with every kind of layer, LoRAs for it, and the reference's merge in a few lines."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ltx_ray.checkpoints.lora import open_lora
from ltx_ray.checkpoints.safetensors import read_header
from ltx_ray.parallel.collectives import SINGLE_RANK, RankGroup
from ltx_ray.parallel.layers import ColumnParallelLinear, ReplicatedLinear, RowParallelLinear
from ltx_ray.parallel.loading import load_shard
from ltx_ray.parallel.lora import LoraMerger

SHAPES = {"up": (32, 16), "down": (16, 32), "gate": (4, 16), "whole": (24, 16)}


class Model(nn.Module):
    def __init__(self, tp: RankGroup):
        super().__init__()
        self.up, self.gate = ColumnParallelLinear(16, 32, tp), ColumnParallelLinear(16, 4, tp)
        self.down = RowParallelLinear(32, 16, tp)
        self.whole = ReplicatedLinear(16, 24)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A checkpoint in bfloat16 and three LoRAs: of all layers, of some, and with an alpha in float32."""
    folder = tmp_path_factory.mktemp("merging")
    torch.manual_seed(0)
    weights = {}
    for name, (n_out, n_in) in SHAPES.items():
        weights |= {
            f"{name}.weight": torch.randn(n_out, n_in).bfloat16(),
            f"{name}.bias": torch.randn(n_out).bfloat16(),
        }
    save_file(weights, folder / "model.safetensors")
    for number, (modules, rank, dtype) in enumerate(
        [(SHAPES, 8, torch.bfloat16), (("up", "whole"), 3, torch.float16), (("down", "gate"), 4, torch.float32)]
    ):
        factors = {}
        for name in modules:
            n_out, n_in = SHAPES[name]
            factors[f"{name}.lora_A.weight"] = torch.randn(rank, n_in).to(dtype)
            factors[f"{name}.lora_B.weight"] = torch.randn(n_out, rank).to(dtype)
            if number == 2:
                factors[f"{name}.alpha"] = torch.tensor(6.0)
        save_file(factors, folder / f"lora{number}.safetensors")
    return folder


def merger(files, tp=SINGLE_RANK, dtype=torch.bfloat16, device="cpu"):
    tensors = read_header(files / "model.safetensors").tensors
    with torch.device("meta"):
        model = Model(tp)
    load_shard(model, tensors, tp, dtype=dtype, device=torch.device(device))
    loras = [open_lora(str(files / f"lora{i}.safetensors")).fit(SHAPES, "model") for i in range(3)]
    return model, LoraMerger(model, tensors, loras, tp)


def expected(files, strengths, dtype=torch.bfloat16):
    """Whole weights as the reference merges them."""
    weights = {k: v.to(dtype) for k, v in load_file(files / "model.safetensors").items()}
    if not any(strength for _, strength in strengths):
        return weights
    for name in SHAPES:
        delta = None
        for index, strength in strengths:
            factors = load_file(files / f"lora{index}.safetensors")
            if f"{name}.lora_A.weight" not in factors:
                continue
            a, b = (factors[f"{name}.lora_{side}.weight"].to(dtype) for side in "AB")
            scaled = strength * (6.0 / 4 if index == 2 else 1.0)
            delta = torch.matmul(b * scaled, a) if delta is None else delta.addmm_(b, a, alpha=scaled)
        if delta is not None:
            weights[f"{name}.weight"] = delta + weights[f"{name}.weight"]
    return weights


def assert_same(model, weights):
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name]), name


#: Strengths by LoRA index, to be merged one after the other.
STRENGTHS = [
    (),
    ((0, 0.25),),
    ((0, 0.5), (1, -1.5)),
    ((1, 0.3), (2, 0.7)),
    ((0, 0.0), (1, 0.9)),
    ((0, 0.25), (1, 0.5), (2, 2.0)),
    ((0, 0.0), (2, 0.0)),
]
