"""A replica of decode takes two clips at once: one is encoded and uploaded while the next is decoded."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from ltx_ray.config import EngineSpec, ModelFiles, Numerics
from ltx_ray.engine import codec
from ltx_ray.engine import decode as decoding
from ltx_ray.engine.base import Rank
from ltx_ray.engine.decode import DecodeEngine
from ltx_ray.engine.patchify import latent_sizes
from ltx_ray.records import NoiseLedger, StageLatents, WorkItem
from tests.support.samples import recipe, request


def work(number: int) -> WorkItem:
    row = request(height=64, width=64, num_frames=17, frame_rate=50.0, seed=number)
    return WorkItem(f"{number:032x}", row, recipe(dtype="float32"), "r" * 16)


def stages(item: WorkItem) -> list[StageLatents]:
    generator = torch.Generator().manual_seed(item.request.seed)
    ledger = NoiseLedger(item.request.seed, "cpu", "cpu", ())
    return [
        StageLatents(latent_sizes(shape).map(lambda size: torch.randn(size, generator=generator)), ledger)
        for shape in (item.request.shape.half(), item.request.shape)
    ]


@pytest.fixture(scope="module")
def engine(toy, tmp_path_factory):
    output = str(tmp_path_factory.mktemp("out"))
    engine = DecodeEngine(EngineSpec("", ModelFiles(**toy), Numerics(dtype="float32"), output), Rank())
    engine.load()
    return engine


def test_clips_that_are_made_at_once_are_those_that_are_made_one_by_one(engine):
    items = [work(number) for number in range(4)]
    alone = [engine.run("decode", item, *stages(item)) for item in items]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda item: engine.run("decode", item, *stages(item)), items))
    assert [clip.sha256 for clip in together] == [clip.sha256 for clip in alone]


def test_a_clip_is_decoded_while_the_one_before_it_is_encoded(engine, monkeypatch):
    """The first clip is not encoded before the second has been decoded, and no two are decoded at once."""
    write, decode = decoding.write_mp4, codec.decode_video_tile
    second_decoded, at_once, most = threading.Event(), [], []

    def write_late(target, frames, **options):
        if options["metadata"]["item_id"] == work(0).item_id:
            next(frames)  # The first frames are there, so that this clip has the GPU before the other.
            first_has_begun.set()
            assert second_decoded.wait(60), "the GPU is not free while a clip is encoded"
            return 0
        count = write(target, frames, **options)
        second_decoded.set()
        return count

    def decode_tile(vae, tile):
        at_once.append(tile)
        most.append(len(at_once))
        try:
            return decode(vae, tile)
        finally:
            at_once.pop()

    first_has_begun = threading.Event()
    monkeypatch.setattr(decoding, "write_mp4", write_late)
    monkeypatch.setattr(codec, "decode_video_tile", decode_tile)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(
            engine._write,
            "",
            stages(work(0))[1].latents.video,
            work(0).request.shape,
            None,
            {"item_id": work(0).item_id},
        )
        assert first_has_begun.wait(60)
        second = pool.submit(engine.run, "decode", work(1), *stages(work(1)))
        assert second.result().path and first.result()
    assert max(most) == 1


def test_the_facts_of_a_call_are_those_of_its_thread(engine):
    item = work(5)
    engine.run("decode", item, *stages(item))
    assert engine.facts.decode_rung == 0
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: engine.facts).result().decode_rung is None
