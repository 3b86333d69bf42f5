"""Shards against the whole model: the forward pass, and LoRA merged before or after slicing."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ltx_ray.checkpoints.checkpoint import open_checkpoint
from ltx_ray.checkpoints.lora import open_lora
from ltx_ray.model.transformer import NO_PERTURBATION, Perturbation
from ltx_ray.parallel.collectives import RankGroup
from ltx_ray.parallel.lora import LoraMerger, LoraSetting
from ltx_ray.records import AV
from tests.support.transformers import Inputs, load_ours, relative

PASSES = (NO_PERTURBATION, Perturbation(isolated=True), Perturbation(values_only=AV(frozenset({0}), frozenset({1}))))


def _rank(rank: int, world: int, store: Path, path: str, queue) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=120)
    )
    model = load_ours(path, tp=RankGroup.of_processes(rank, world))
    inputs = Inputs.random(model, seed=1)
    results = [inputs.ours(model, p) for p in (*PASSES, NO_PERTURBATION)]
    queue.put((rank, [(r.video.clone().numpy(), r.audio.clone().numpy()) for r in results]))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [4])
def test_forward_agrees_with_one_rank(toy, tmp_path, world):
    context = mp.get_context("spawn")
    queue = context.Queue()
    shared = (world, tmp_path / "store", toy["checkpoint_path"], queue)
    ranks = [context.Process(target=_rank, args=(rank, *shared)) for rank in range(world)]
    for process in ranks:
        process.start()
    found = dict(queue.get(timeout=1200) for _ in ranks)
    for process in ranks:
        process.join()
    model = load_ours(toy["checkpoint_path"])
    inputs = Inputs.random(model, seed=1)
    for number, perturbation in enumerate(PASSES):
        whole = inputs.ours(model, perturbation)
        for rank in range(world):
            for ours, expected in zip(found[rank][number], whole, strict=True):
                assert relative(torch.from_numpy(ours), expected) <= 1e-5
    for rank in range(world):
        for first, again, other in zip(found[rank][0], found[rank][-1], found[0][0], strict=True):
            assert (first == again).all(), "two equal calls differ"
            assert (first == other).all(), "the ranks differ"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_merging_a_shard_is_sharding_the_merged(toy, world, dtype):
    """Bit for bit, and at any strength after any other."""
    whole = load_ours(toy["checkpoint_path"], dtype)
    checkpoint = open_checkpoint(toy["checkpoint_path"])
    loras = [open_lora(toy["distilled_lora"]).fit(checkpoint.linear_layers, checkpoint.path)]
    clean = {name: p.detach().clone() for name, p in whole.named_parameters()}
    LoraMerger(whole, checkpoint.tensors, loras, RankGroup()).switch_to(LoraSetting(((0, 0.5),)))
    merged = dict(whole.named_parameters())
    changed = [name for name in merged if not torch.equal(merged[name], clean[name])]
    assert len(changed) > 100
    for rank in range(world):
        tp = RankGroup(rank, world)
        shard = load_ours(toy["checkpoint_path"], dtype, tp)
        merger = LoraMerger(shard, checkpoint.tensors, loras, tp)
        for strength in (0.25, 0.5, 0.0, 0.3, 0.5):
            assert merger.switch_to(LoraSetting(((0, strength),)))
        assert not merger.switch_to(LoraSetting(((0, 0.5),)))
        for name, parameter in shard.named_parameters():
            expected = merged[name]
            if parameter.shard_dim is not None and world > 1:
                expected = expected.narrow(
                    parameter.shard_dim,
                    rank * parameter.shape[parameter.shard_dim],
                    parameter.shape[parameter.shard_dim],
                )
            assert torch.equal(parameter, expected), name
        merger.switch_to(LoraSetting(((0, 0.0),)))
        if world == 1:
            for name, parameter in shard.named_parameters():
                assert torch.equal(parameter, clean[name]), name
