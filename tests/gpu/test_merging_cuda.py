"""Loading and merging on a CUDA device: the file's bits, the reference's rounding, and the same in every layout."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from ltx_ray.checkpoints.safetensors import read_header
from ltx_ray.parallel.collectives import RankGroup
from ltx_ray.parallel.loading import ShardRead, read_shards, shard_shape
from ltx_ray.parallel.lora import LoraSetting
from ltx_ray.parallel.merging import merge_
from ltx_ray.parallel.weight_cache import FreeMemory
from tests.support.lora_files import STRENGTHS, expected, merger
from tests.support.lora_files import files as files

DEVICE = torch.device("cuda")


def random(*shape, dtype=torch.bfloat16):
    return (torch.randn(*shape, device=DEVICE) * 0.05).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_shard_streams_to_the_device(tmp_path, dtype):
    """Tensors of several chunks, and rows and columns of them, converted on the way."""
    torch.manual_seed(0)
    tensors = {"wide": torch.randn(4096, 8192).bfloat16(), "tall": torch.randn(8192, 1024), "bias": torch.randn(64)}
    save_file(tensors, tmp_path / "a.safetensors")
    infos = read_header(tmp_path / "a.safetensors").tensors
    for size in (1, 4):
        tp = RankGroup(size - 1, size)
        for dim in (None, 0, 1):
            names = [name for name, tensor in tensors.items() if dim is None or dim < tensor.dim()]
            targets = {
                n: torch.full(shard_shape(infos[n], dim, tp), torch.nan, dtype=dtype, device=DEVICE) for n in names
            }
            reads = [ShardRead(infos[n], dim, targets[n]) for n in names]
            assert sorted(read_shards(reads, tp)) == list(range(len(names)))
            for name, target in targets.items():
                whole = tensors[name]
                part = whole if dim is None else whole.tensor_split(size, dim)[-1]
                assert torch.equal(target.cpu(), part.to(dtype)), (name, size, dim)


@pytest.mark.parametrize("shape", [(4096, 4096), (16384, 4096), (4096, 16384), (32, 4096), (2048, 4096)])
@pytest.mark.parametrize("rank", [384, 32, 7])
def test_the_kernel_rounds_like_the_reference(shape, rank):
    """Compared with the reference's operations. The order of a sum over the rank may change a last bit."""
    torch.manual_seed(1)
    (n_out, n_in), strength = shape, 0.37
    clean, a, b = random(n_out, n_in), random(rank, n_in), random(n_out, rank)
    theirs = torch.matmul(b * strength, a).add_(clean)
    ours = torch.full_like(clean, torch.nan)
    merge_(ours, clean, [(a, b, strength)])
    exact = ((b * strength).double() @ a.double()).bfloat16().double() + clean.double()
    assert (ours == theirs).float().mean() > 0.999
    assert (ours.double() - exact).norm() <= 1.01 * (theirs.double() - exact).norm()
    in_place = clean.clone()
    merge_(in_place, in_place, [(a, b, strength)])
    assert torch.equal(in_place, ours)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(4096, 4096), (4096, 16384), (2048, 4096)])
def test_a_shard_gets_the_bits_of_the_whole(shape, dtype):
    torch.manual_seed(2)
    n_out, n_in = shape
    clean = random(n_out, n_in, dtype=dtype)
    loras = [(random(r, n_in, dtype=dtype), random(n_out, r, dtype=dtype), s) for r, s in ((384, 0.25), (16, -0.9))]
    for products in (loras[:1], loras):
        whole = torch.empty_like(clean)
        merge_(whole, clean, products)
        for size in (2, 4, 8):
            for rank in (0, size - 1):
                rows, columns = RankGroup(rank, size).slice(n_out), RankGroup(rank, size).slice(n_in)
                part = torch.empty_like(clean[rows])
                merge_(part, clean[rows], [(a, b[rows], s) for a, b, s in products], first_row=rows.start)
                assert torch.equal(part, whole[rows])
                part = torch.empty_like(clean[:, columns])
                sliced = [(a[:, columns].contiguous(), b, s) for a, b, s in products]
                merge_(part, clean[:, columns].contiguous(), sliced, full_columns=n_in)
                assert torch.equal(part, whole[:, columns])


@pytest.mark.parametrize("clean", ["file", "host", "device"])
@pytest.mark.parametrize("factors", ["file", "host", "device"])
@pytest.mark.parametrize("waits", [True, False])
def test_every_cache_location_ends_in_the_bits_of_a_fresh_load(files, clean, factors, waits):
    """Also when switches come before the copies in host memory are there, and while they are taken over."""
    fresh = {}
    for strengths in STRENGTHS:
        model, merging = merger(files, device=DEVICE)
        merging.switch_to(LoraSetting(strengths))
        fresh[strengths] = {name: p.cpu() for name, p in model.named_parameters()}
        for name, value in expected(files, strengths).items():
            # Another device sums in another order, which changes at most a last bit of the product.
            assert torch.allclose(fresh[strengths][name].float(), value.float(), rtol=2e-2, atol=2e-2), name
    model, merging = merger(files, device=DEVICE)
    merging.cache_sources(0, FreeMemory(0, 0), clean, factors)
    if waits:
        merging.take_over(wait=True)
        assert (merging.clean_weights, merging.lora_factors) == (clean, factors)
    for strengths in [*STRENGTHS, *reversed(STRENGTHS), *STRENGTHS[::2]]:
        merging.switch_to(LoraSetting(strengths))
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter.cpu(), fresh[strengths][name]), name


def test_memory_above_the_weights_stays_small():
    """Merging one LoRA into a large layer allocates nothing, and merging several 32 MiB for their sum."""
    torch.manual_seed(3)
    weight, a, b = random(16384, 8192), random(384, 8192), random(16384, 384)
    for products, limit in (([(a, b, 0.5)], 0), ([(a, b, 0.5), (a, b, 0.25)], 33 * 2**20)):
        merge_(weight, weight, products)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        merge_(weight, weight, products)
        assert torch.cuda.max_memory_allocated() - before <= limit
