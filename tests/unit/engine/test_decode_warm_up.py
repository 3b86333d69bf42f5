"""The decoder's warm-up: what it decodes, that it gives way to a clip, and that no clip shows it."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path

import pytest
import torch

from ltx_ray.config import EngineSpec, ModelFiles, Numerics
from ltx_ray.engine import codec
from ltx_ray.engine.base import Rank
from ltx_ray.engine.decode import DecodeEngine
from ltx_ray.engine.decode_warm_up import WarmUp
from tests.support.decoding import Tiles, stages, work


@pytest.fixture(scope="module")
def make(toy):
    """A function that makes engines whose clips go to a folder."""

    def made(folder: Path, **changes) -> DecodeEngine:
        spec = EngineSpec("", ModelFiles(**toy), Numerics(dtype="float32"), str(folder))
        engine = DecodeEngine(dataclasses.replace(spec, **changes), Rank())
        engine.load()
        return engine

    return made


def wait_for(engine: DecodeEngine) -> None:
    engine._warm_up._thread.join(60)
    assert engine._warm_up.seconds > 0


def tile_sizes(monkeypatch, decode) -> list[tuple[int, ...]]:
    with monkeypatch.context() as patched:
        tiles = Tiles(patched)
        decode()
        return tiles.seen


@pytest.mark.parametrize("stop_after", [None, "stage1"])
def test_it_decodes_the_tiles_of_the_clip_and_leaves_no_trace(make, tmp_path, monkeypatch, stop_after):
    """One engine makes the clip before and after. The encoder gets the same frames and the same sound."""
    item = dataclasses.replace(work(3), preflight=True)
    monkeypatch.setenv("LTX_RAY_CACHE", str(tmp_path / "cache"))
    inputs, encoded = stages(item)[: 1 if stop_after else 2], []

    def write_mp4(path, frames, *, audio, **settings):
        encoded.append(b"".join(chunk.tobytes() for chunk in frames) + audio.tobytes())

    monkeypatch.setattr("ltx_ray.engine.decode.write_mp4", write_mp4)
    engine = make(tmp_path / "out", stop_after=stop_after)
    of_clip = tile_sizes(monkeypatch, lambda: engine.run("decode", item, *inputs))
    random = torch.get_rng_state()

    def warm_up():
        engine._is_warm = False  # A clip has been decoded already.
        engine._begin_warm_up(item.request.shape)
        wait_for(engine)

    assert tile_sizes(monkeypatch, warm_up) == of_clip
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(path.is_file() for path in (tmp_path / "out").rglob("*"))
    engine.run("decode", item, *inputs)
    assert encoded[1] == encoded[0]
    assert engine.facts.start_seconds.keys() == {"waited for warm", "warm"}
    engine.run("decode", item, *inputs)
    assert engine.facts.start_seconds is None


def test_a_clip_waits_for_the_tile_under_way_only(make, tmp_path, monkeypatch):
    engine, item = make(tmp_path / "out"), work(1)
    monkeypatch.setenv("LTX_RAY_CACHE", str(tmp_path / "cache"))
    began, goes_on, seen = threading.Event(), threading.Event(), []
    decode, heard = codec.decode_video_tile, []

    def gated(vae, tile):
        seen.append(threading.current_thread().name)
        began.set()
        assert goes_on.wait(60)
        return decode(vae, tile)

    decode_audio = codec.decode_audio
    monkeypatch.setattr(codec, "decode_video_tile", gated)
    monkeypatch.setattr(
        codec, "decode_audio", lambda *a: heard.append(threading.current_thread().name) or decode_audio(*a)
    )
    engine._begin_warm_up(item.request.shape)
    assert began.wait(60)
    stopped = engine._warm_up._stop
    threading.Thread(target=lambda: (stopped.wait(60), goes_on.set())).start()
    engine.run("decode", item, *stages(item))
    # A chunk of the clip is complete after two of its tiles. The sound of nothing is not decoded any more.
    assert seen.count("warm-up") == 2 and len(seen) == 4
    assert len(heard) == 1 and "warm-up" not in heard


def test_an_error_fails_no_clip(make, tmp_path, monkeypatch, caplog):
    engine, item = make(tmp_path / "out"), work(2)
    monkeypatch.setenv("LTX_RAY_CACHE", str(tmp_path / "cache"))
    tiles = Tiles(monkeypatch)
    tiles.failing = {0: torch.OutOfMemoryError("no memory")}
    engine._begin_warm_up(item.request.shape)
    wait_for(engine)
    assert "the decoder is not warmed up: OutOfMemoryError: no memory" in caplog.text
    assert engine.run("decode", item, *stages(item)).path
    assert engine.facts.decode_rung == 0


def test_a_stopped_warm_up_is_closed_and_finished():
    ended, going = [], threading.Event()

    def steps():
        try:
            while True:
                going.set()
                yield
        finally:
            ended.append("closed")

    warm_up = WarmUp(steps(), lambda: ended.append("finished"))
    assert going.wait(30)
    warm_up.stop()
    assert ended == ["closed", "finished"] and warm_up.seconds > 0 and warm_up.cut_short


def test_a_device_that_fails_at_the_end_of_a_warm_up_fails_no_clip(caplog):
    def finish():
        raise torch.AcceleratorError("the card fell off the bus")

    warm_up = WarmUp(iter_once(), finish)
    warm_up.stop()
    assert "the decoder is not warmed up: AcceleratorError: the card fell off the bus" in caplog.text


def iter_once():
    yield


class Decoding:
    """A decoder that says it is on a GPU, whose clips and warm-ups are held until `goes_on` is set."""

    def __init__(self, make, folder, monkeypatch):
        self.engine = make(folder, first_shape=work().request.shape)
        monkeypatch.setattr(self.engine, "device", torch.device("cuda"))
        monkeypatch.setattr(self.engine, "_release_cached_memory", lambda: None)
        self.goes_on, self.decoding, self.begun = threading.Event(), threading.Event(), 0
        monkeypatch.setattr(self.engine, "_decode_nothing", self._nothing)
        monkeypatch.setattr(self.engine, "_decode", self._clip)

    def _nothing(self, shape):
        self.begun += 1
        while not self.goes_on.is_set():
            yield

    def _clip(self, item, stages):
        if not item.preflight:
            self.decoding.set()
            assert self.goes_on.wait(60)

    def run(self, preflight=False):
        self.engine.run("decode", dataclasses.replace(work(), preflight=preflight))


@pytest.fixture
def decoding(make, tmp_path, monkeypatch):
    found = Decoding(make, tmp_path / "out", monkeypatch)
    yield found
    found.goes_on.set()


def test_a_preflight_that_cut_a_warm_up_short_is_followed_by_another(decoding):
    decoding.engine.begin_warm_up()
    decoding.run(preflight=True)
    assert decoding.begun == 2 and decoding.engine._warm_up is not None


def test_a_preflight_after_a_whole_warm_up_is_followed_by_none(decoding):
    decoding.goes_on.set()
    decoding.engine.begin_warm_up()
    wait_for(decoding.engine)
    decoding.run(preflight=True)
    assert decoding.begun == 1 and decoding.engine._warm_up is None


def test_no_warm_up_begins_beside_a_clip_or_after_it(decoding):
    """The warm-up would hold the GPU until it is over, because nobody would stop it."""
    clip = threading.Thread(target=decoding.run)
    clip.start()
    assert decoding.decoding.wait(60)
    decoding.run(preflight=True)
    assert decoding.begun == 0
    decoding.goes_on.set()
    clip.join(60)
    decoding.run(preflight=True)
    assert decoding.begun == 0 and decoding.engine._warm_up is None


def test_nothing_is_warmed_up_on_a_cpu_or_without_a_clip(make, tmp_path, monkeypatch):
    on_a_cpu, without = make(tmp_path / "a", first_shape=work().request.shape), make(tmp_path / "b")
    monkeypatch.setattr(without, "device", torch.device("cuda"))
    for engine in (on_a_cpu, without):
        engine.begin_warm_up()
        assert engine._warm_up is None
