"""Gangs of two ranks on cards of their own, at the released widths and the size of a stage 1.

Their exchanges are copies between the cards (peer_copies.PeerCopies) and NCCL's, eager and within CUDA graphs.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from ltx_ray.model.graphs import GraphedTransformer
from ltx_ray.parallel.mesh import Mesh, make_mesh
from ltx_ray.parallel.peer_copies import PeerCopies
from ltx_ray.records import AV
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


def _rank(rank: int, store: Path, results: Any) -> None:
    """Put what is found of each layout, precision and way to exchange into `results`: see `_found`."""
    torch.cuda.set_device(rank)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    dist.init_process_group("nccl", init_method=f"file://{store}", rank=rank, world_size=2)
    found = {}
    with torch.inference_mode():
        (exact,) = passes(Mesh(), "bf16", torch.float32, SHAPE)
        for precision in PRECISIONS:
            (alone,) = passes(Mesh(), precision, shape=SHAPE)
            found["one card", precision, ""] = _found([alone], exact)
        for layout, tp in (("tp", 2), ("sp", 1)):
            mesh = make_mesh(rank, 2, tp)
            for precision in PRECISIONS:
                eager = passes(mesh, precision, shape=SHAPE, repeat=3)
                graphs = passes(mesh, precision, shape=SHAPE, wrap=GraphedTransformer, repeat=4)
                by_nccl = passes(_by_nccl(mesh), precision, shape=SHAPE)
                for way, repeated in (("eager", eager), ("graphs", graphs), ("NCCL", by_nccl)):
                    found[layout, precision, way] = _found(repeated, exact)
    results.put((rank, found))
    dist.destroy_process_group()


Velocities = dict[str, AV[torch.Tensor]]


def _found(repeated: list[Velocities], exact: Velocities) -> tuple[list[str], dict[str, list[float]]]:
    """The digest of each repetition, and for each call the distances of the last one from float32."""
    digests = [
        hashlib.sha256(b"".join(x.numpy().tobytes() for name in CALLS for x in one[name])).hexdigest()
        for one in repeated
    ]
    last = repeated[-1]
    return digests, {n: [relative(a, b) for a, b in zip(last[n], exact[n], strict=True)] for n in CALLS}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> dict[int, dict]:
    """What each rank has found."""
    queue = torch.multiprocessing.get_context("spawn").SimpleQueue()
    start_processes(_rank, (tmp_path_factory.mktemp("ranks") / "store", queue), 2, start_method="spawn")
    return dict(queue.get() for _ in range(2))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("layout", ["tp", "sp"])
def test_two_cards_are_as_near_to_float32_as_one(ranks, layout, precision):
    _, floor = ranks[0]["one card", precision, ""]
    for way in ("eager", "graphs", "NCCL"):
        _, errors = ranks[0][layout, precision, way]
        for name in CALLS:
            for found, error in zip(errors[name], floor[name], strict=True):
                assert found <= 1.2 * error, (way, name)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("layout", ["tp", "sp"])
def test_every_pass_and_both_ranks_have_the_same_bits(ranks, layout, precision):
    for way, times in (("eager", 3), ("graphs", 4)):
        digests = [digest for rank in ranks.values() for digest in rank[layout, precision, way][0]]
        assert len(digests) == 2 * times and len(set(digests)) == 1, way
