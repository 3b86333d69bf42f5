"""Gangs of two ranks on cards of their own, at the released widths and the size of a stage 1.

Their exchanges are copies between the cards (peer_copies.PeerCopies) and NCCL's, eager and within CUDA graphs.
"""

from __future__ import annotations

import socket
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from ltx_ray.model.graphs import GraphedTransformer
from ltx_ray.parallel.mesh import Mesh, make_mesh
from ltx_ray.parallel.peer_copies import PeerCopies
from ltx_ray.shapes import ClipShape
from tests.support.cuda_passes import CALLS, passes
from tests.support.transformers import relative

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
#: 8,160 video tokens: rows go in two pieces, heads in four groups.
SHAPE = ClipShape(num_frames=121, height=544, width=960, frame_rate=24.0)
PRECISIONS = ("bf16", "fp8")


def _by_nccl(mesh: Mesh) -> Mesh:
    """The mesh without copies between the cards."""
    groups = {
        name: replace(group, transport=group.transport.others)
        for name, group in vars(mesh).items()
        if isinstance(group.transport, PeerCopies)
    }
    assert groups, "the cards can read each other's memory"
    return replace(mesh, **groups)


def _rank(rank: int, port: int, results: Any) -> None:
    torch.cuda.set_device(rank)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    dist.init_process_group("nccl", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    found: dict[str, Any] = {}
    with torch.inference_mode():
        (found["exact"],) = passes(Mesh(), "bf16", torch.float32, SHAPE)
        for precision in PRECISIONS:
            (found[f"one rank {precision}"],) = passes(Mesh(), precision, shape=SHAPE)
        for layout, tp in (("tp", 2), ("sp", 1)):
            mesh = make_mesh(rank, 2, tp)
            for precision in PRECISIONS:
                key = f"{layout} {precision}"
                found[f"{key} eager"] = passes(mesh, precision, shape=SHAPE, repeat=3)
                found[f"{key} graphs"] = passes(mesh, precision, shape=SHAPE, wrap=GraphedTransformer, repeat=4)
                found[f"{key} NCCL"] = passes(_by_nccl(mesh), precision, shape=SHAPE, repeat=2)
    everyone: list[Any] = [None, None]
    dist.all_gather_object(everyone, found)
    if rank == 0:
        results.put(everyone)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    """What each rank has found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    queue = torch.multiprocessing.get_context("spawn").Queue()
    running = start_processes(_rank, (port, queue), 2, join=False, start_method="spawn")
    found = queue.get(timeout=300)
    while not running.join():
        pass
    return found


def _equal(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for name in CALLS for x, y in zip(a[name], b[name], strict=True))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("layout", ["tp", "sp"])
def test_two_cards_are_as_near_to_float32_as_one(ranks, layout, precision):
    exact, floor = ranks[0]["exact"], ranks[0][f"one rank {precision}"]
    for way in ("eager", "graphs", "NCCL"):
        for name, right in exact.items():
            for stream in range(2):
                error = relative(list(floor[name])[stream], list(right)[stream])
                found = ranks[0][f"{layout} {precision} {way}"][-1]
                assert relative(list(found[name])[stream], list(right)[stream]) <= 1.2 * error, (way, name, stream)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("layout", ["tp", "sp"])
def test_every_pass_and_both_ranks_have_the_same_bits(ranks, layout, precision):
    for way in ("eager", "graphs"):
        first = ranks[0][f"{layout} {precision} {way}"][0]
        for rank in ranks:
            for number, found in enumerate(rank[f"{layout} {precision} {way}"]):
                assert _equal(found, first), (way, number)
