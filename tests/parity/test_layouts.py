"""Every way of dividing a clip over ranks gives the latents of one rank."""

from __future__ import annotations

import traceback
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ltx_ray.config import EngineSpec
from ltx_ray.engine.base import Rank
from ltx_ray.engine.decode import named_latents
from ltx_ray.engine.diffusion import DiffusionEngine
from ltx_ray.parallel.collectives import RankGroup
from ltx_ray.parallel.mesh import SequenceSharding
from ltx_ray.parallel.weight_cache import FreeMemory
from tests.support.pipeline import one_thread, toy_pipeline
from tests.support.transformers import relative

#: name -> ranks of the gang; tp, guidance_parallel, stage1_sequence_parallel, sequence_parallel; path of the DiT
LAYOUTS = {
    "guidance": (2, (1, 2, 1, 1), "off"),
    "tp, guidance, sequence": (4, (2, 2, 1, 2), "off"),
    "fused tp, sequence": (4, (2, 1, 2, 2), "fused"),
    "fused guidance, sequence": (4, (1, 2, 2, 4), "fused"),
}
#: All four guidance passes, timesteps that differ by token, and keyframe tokens.
ROW = {
    "num_frames": 9, "num_inference_steps": 2, "height": 64, "width": 128, "prompt": "a lighthouse",
    "video_stg_scale": 1.0, "video_stg_blocks": [1], "audio_skip_step": 1,
    "images": [{"path": "a.png", "frame_idx": 0, "strength": 0.8}, {"path": "a.png", "frame_idx": 8}],
}  # fmt: skip


def _rank(rank: int, world: int, store: Path, spec: EngineSpec, item, conditions, queue) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=120)
    )
    try:
        found: dict[str, dict[str, np.ndarray]] = {}
        for name, (ranks, (tp, guidance, sequence1, sequence2), path) in LAYOUTS.items():
            if ranks != world:
                continue
            divided = replace(
                spec.layout, tp=tp, guidance_parallel=guidance, stage1_sequence_parallel=sequence1,
                sequence_parallel=sequence2,
            )  # fmt: skip
            batching = 2 if path == "fused" and guidance == 1 else 1
            numerics = replace(spec.numerics, compile=path, guidance_batching=batching)
            engine = DiffusionEngine(replace(spec, layout=divided, numerics=numerics), Rank(rank, world))
            engine.load()
            if engine.mesh.peers.size > 1:
                # Each rank caches a share of the clean weights, from which stage 2 is merged. Only rank 0 has memory
                # for more, and must choose as the others do.
                share = engine.merger._clean.total_bytes // engine.mesh.peers.size
                engine.merger.cache_sources(0, FreeMemory(share * (100 if rank == 0 else 1), 0), factors="file")
                assert engine.merger.clean_weights == "gang"
            first = _broadcast(engine.run("stage1", item, conditions))
            second = engine.run("stage2", item, conditions, first)
            if rank == 0:
                found[name] = {key: value.numpy() for key, value in named_latents(first, second).items()}
        _check_sequence_sharding(RankGroup.of_processes(rank, world))
        queue.put((rank, found))
        dist.barrier()
    except BaseException:
        queue.put((rank, traceback.format_exc()))
        raise
    finally:
        dist.destroy_process_group()


def _broadcast(latents):
    """Rank 0's latents on all ranks, as the object write_values gives them."""
    box = [latents]
    dist.broadcast_object_list(box)
    return box[0]


def _check_sequence_sharding(group: RankGroup) -> None:
    """Every exchange and its inverse, with a length that the ranks do not divide."""
    torch.manual_seed(0)
    whole, length = torch.randn(1, 8, 11, 6), 11
    sharding = SequenceSharding(group, length)
    mine = sharding.own_shard(whole, 2)
    heads = sharding.tokens_to_heads(mine)
    assert mine.shape == (1, 8, -(-length // group.size), 6) and torch.equal(heads, sharding.own_heads(whole))
    assert torch.equal(sharding.heads_to_tokens(heads), mine)
    assert torch.equal(sharding.gather_heads(heads), whole)
    flat = whole.transpose(1, 2).flatten(2)
    assert torch.equal(sharding.gather_tokens(sharding.own_shard(flat, 1)), flat)


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    """(latents of one rank, latents by layout)."""
    pipeline = toy_pipeline()
    item = pipeline.item(ROW)
    with one_thread():
        conditions = pipeline.text.run("text", item)
    found = {}
    for world in sorted({ranks for ranks, *_ in LAYOUTS.values()}):
        found |= _gang(world, tmp_path_factory.mktemp("gang") / "store", pipeline.diffusion.spec, item, conditions)
    return pipeline.latents(ROW), found


def _gang(world: int, store: Path, spec: EngineSpec, item, conditions) -> dict[str, dict[str, np.ndarray]]:
    context = mp.get_context("spawn")
    queue = context.Queue()
    ranks = [context.Process(target=_rank, args=(r, world, store, spec, item, conditions, queue)) for r in range(world)]
    for process in ranks:
        process.start()
    found = {}
    while len(found) < world:
        rank, result = queue.get(timeout=1200)
        if isinstance(result, str):
            for process in ranks:
                process.kill()
            pytest.fail(f"rank {rank}: {result}")
        found[rank] = result
    for process in ranks:
        process.join()
    return found[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_gives_the_latents_of_one_rank(rendered, layout):
    one_rank, found = rendered
    for name, expected in one_rank.items():
        assert relative(torch.from_numpy(found[layout][name]), expected) <= 1e-5, name


def test_dividing_the_guidance_passes_changes_no_bit(rendered):
    one_rank, found = rendered
    for name, expected in one_rank.items():
        assert np.array_equal(found["guidance"][name], expected.numpy()), name
