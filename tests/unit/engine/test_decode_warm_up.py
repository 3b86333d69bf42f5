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
    assert engine._warm_up.seconds is not None


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
        engine.warm_up(item.request.shape)
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
    engine.warm_up(item.request.shape)
    assert began.wait(60)
    threading.Timer(0.2, goes_on.set).start()
    engine.run("decode", item, *stages(item))
    # A chunk of the clip is complete after two of its tiles. The sound of nothing is not decoded any more.
    assert seen.count("warm-up") == 2 and len(seen) == 4
    assert len(heard) == 1 and "warm-up" not in heard


def test_an_error_fails_no_clip(make, tmp_path, monkeypatch, caplog):
    engine, item = make(tmp_path / "out"), work(2)
    monkeypatch.setenv("LTX_RAY_CACHE", str(tmp_path / "cache"))
    tiles = Tiles(monkeypatch)
    tiles.failing = {0: torch.OutOfMemoryError("no memory")}
    engine.warm_up(item.request.shape)
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
    assert ended == ["closed", "finished"] and warm_up.seconds > 0


def test_nothing_is_warmed_up_on_a_cpu_or_without_a_clip(make, tmp_path):
    assert make(tmp_path / "a", first_shape=work().request.shape)._warm_up is None
    assert make(tmp_path / "b")._warm_up is None
