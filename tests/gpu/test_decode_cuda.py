"""Decoding on a card without room for the reference's tiles."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import av
import pytest
import torch

from ltx_ray.config import EngineSpec, ModelFiles, Numerics
from ltx_ray.engine import base
from ltx_ray.engine.decode import DecodeEngine
from ltx_ray.engine.start import latent_sizes
from ltx_ray.records import NoiseLedger, StageLatents, WorkItem
from tests.unit.samples import recipe, request


@contextmanager
def memory(nbytes: float):
    """As if the card had `nbytes`."""
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(nbytes / torch.cuda.get_device_properties(0).total_memory)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.fixture
def engine(toy, tmp_path):
    spec = EngineSpec("", ModelFiles(**toy), Numerics(dtype="bfloat16", device="cuda"), str(tmp_path))
    made = DecodeEngine(spec, base.Rank(0, 1, base.join("cuda", 0, 1, None, 60)))
    made.load()
    return made


def clip_of(number: int, **size: int) -> tuple[WorkItem, list[StageLatents]]:
    item = WorkItem(f"{number:032x}", request(seed=number, frame_rate=200.0, **size), recipe(), "r" * 16)
    generator = torch.Generator().manual_seed(number)
    shapes = item.request.shape.half(), item.request.shape
    latents = (latent_sizes(s).map(lambda size: torch.randn(size, generator=generator).bfloat16()) for s in shapes)
    return item, [StageLatents(pair, NoiseLedger(number, "cpu", "cpu")) for pair in latents]


def frames(engine: DecodeEngine, path: str) -> int:
    with av.open(str(Path(engine.spec.output) / path)) as clip:
        return sum(1 for _ in clip.decode(video=0))


def test_smaller_tiles_where_the_references_do_not_fit(engine):
    item, stages = clip_of(1, height=704, width=1280, num_frames=121)
    small, small_stages = clip_of(2, height=128, width=192, num_frames=17)
    engine.run("decode", small, *small_stages)  # what libraries keep for themselves is there now
    torch.cuda.empty_cache()
    idle = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    clip = engine.run("decode", item, *stages)
    assert clip.flags == () and engine.info["decode_tiling"]["rung"] == 0
    needed = torch.cuda.max_memory_allocated() - idle
    rungs = []
    for share in (0.8, 0.5):
        with memory(idle + share * needed):
            clip = engine.run("decode", item, *stages)
            rungs.append(engine.info["decode_tiling"]["rung"])
            assert clip.flags == ("tiled_smaller",) and frames(engine, clip.path) == 121
            assert engine.run("decode", small, *small_stages).flags == ()
    assert 0 < rungs[0] < rungs[1], "less memory, smaller tiles"
    # with the whole card again, where the ladder was left
    engine.run("decode", item, *stages)
    assert engine.info["decode_tiling"]["rung"] == rungs[1]


def test_when_nothing_fits_the_error_goes_up_and_nothing_stays(engine):
    item, stages = clip_of(1, height=704, width=1280, num_frames=121)
    small, small_stages = clip_of(2, height=128, width=192, num_frames=17)
    engine.run("decode", small, *small_stages)  # what libraries keep for themselves is there now
    before = torch.cuda.memory_allocated()
    torch.cuda.empty_cache()
    with memory(torch.cuda.memory_reserved() + 2**27):
        with pytest.raises(torch.OutOfMemoryError, match="in the smallest tiles"):
            engine.run("decode", item, *stages)
        assert torch.cuda.memory_allocated() <= before
    assert engine.run("decode", item, *stages).flags == ()
