"""The decode engine on the toy model: smaller tiles when memory runs out, previews, and stored latents."""

from __future__ import annotations

import dataclasses
import gc
import json
import weakref
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import ltx_ray
from ltx_ray.config import EngineSpec, ModelFiles, Numerics
from ltx_ray.dataset.layout import thumb_path
from ltx_ray.engine import codec
from ltx_ray.engine.base import Rank
from ltx_ray.engine.decode import DecodeEngine
from ltx_ray.engine.initial_state import stage1_draws
from ltx_ray.engine.latents import latents_sha256, named_latents
from ltx_ray.placement.numerics import numerics_json, numerics_of_row
from ltx_ray.records import AV, ImageCondition, RowError, StageLatents, StoredLatentsGone, WorkItem
from ltx_ray.storage.store import Store
from tests.support.decoding import Tiles, stages, work

CPU_MESSAGE = (
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "123 bytes. Error code 12 (Cannot allocate memory)"
)


@pytest.fixture(scope="module")
def loaded(toy, tmp_path_factory):
    """An engine with loaded parts, which no test changes."""
    spec = EngineSpec("", ModelFiles(**toy), Numerics(dtype="float32"), str(tmp_path_factory.mktemp("unused")))
    engine = DecodeEngine(spec, Rank())
    engine.load()
    return engine


@pytest.fixture
def made(loaded, tmp_path, monkeypatch):
    """A function that makes engines with an output of the test's own and the loaded parts."""
    monkeypatch.setenv("LTX_RAY_CACHE", str(tmp_path / "cache"))
    for loader, part in (
        ("video_vae", loaded.video_vae), ("audio_decoder", loaded.audio_vae), ("vocoder", loaded.vocoder),
    ):  # fmt: skip
        monkeypatch.setattr(f"ltx_ray.engine.components.load_{loader}", lambda *_, found=part, **__: found)

    def make(**changes) -> DecodeEngine:
        engine = DecodeEngine(dataclasses.replace(loaded.spec, output=str(tmp_path / "out"), **changes), Rank())
        engine.load()
        return engine

    return make


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def tiles(monkeypatch):
    return Tiles(monkeypatch)


def pictures(path: Path) -> np.ndarray:
    """Luma codes (frames, height, width)."""
    with av.open(str(path)) as clip:
        return np.stack([f.to_ndarray(format="gray") for f in clip.decode(video=0)]).astype(float)


def probe(path: Path) -> tuple[int, tuple[int, int], float]:
    """Frames, (height, width) and seconds of sound of a clip, decoded to its end."""
    frames = pictures(path)
    with av.open(str(path)) as clip:
        samples = sum(f.samples for f in clip.decode(audio=0))
    return len(frames), frames.shape[1:], samples / 48000


def files(folder: Path) -> list[str]:
    return sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file())


# --- the ladder ----------------------------------------------------------------------------------

#: Latent frames of the tiles of 89 frames at the first three rungs. The first chunk is complete after two of them.
CUTS = [10, 6], [5, 6, 6, 4], [3, 4, 4, 4, 4, 3]


@pytest.mark.slow
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("out of memory"), RuntimeError(CPU_MESSAGE), MemoryError()])
def test_smaller_tiles_when_memory_runs_out(made, out, tiles, error):
    """At the first tile of rung 0, and at rung 1 after some frames have been encoded."""
    engine, item = made(), work(frame_rate=100.0)
    tiles.failing = {0: error, 3: error}
    clip = engine.run("decode", item, *stages(item))
    assert tiles.frames() == [10, 5, 6, 6, *CUTS[2]]
    assert clip.flags == ("tiled_smaller",)
    assert engine.facts.decode_rung == 2
    count, size, seconds = probe(out / clip.path)
    assert (count, size) == (89, (64, 64)) and seconds == pytest.approx(0.89, abs=0.03)
    assert files(out) == [clip.path, thumb_path(item.item_id)]
    # What the first attempts encoded left no trace in the clip.
    shown = pictures(out / clip.path)
    tiles.failing = {}
    again = engine.run("decode", item, *stages(item))
    assert tiles.frames() == CUTS[2], "the rung that sufficed comes first"
    assert again.flags == clip.flags
    assert np.abs(pictures(out / again.path) - shown).mean() < 0.5  # libx264's bytes differ from run to run.


def test_a_rung_begins_after_the_tensors_of_the_one_before_are_freed(made, monkeypatch):
    engine, item = made(), work()
    decode, held = codec.decode_video_tile, []

    def tight(vae, tile):
        alive = sum(ref() is not None for ref in held)
        if tile.shape[2] < 10:
            assert not alive
            return decode(vae, tile)
        frames = decode(vae, tile)
        held.extend((weakref.ref(tile), weakref.ref(frames)))
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr("ltx_ray.engine.codec.decode_video_tile", tight)
    gc.disable()  # A reference cycle would take the next rung's memory until the collector runs.
    try:
        engine.run("decode", item, *stages(item))
    finally:
        gc.enable()
    assert len(held) == 2 and engine.facts.decode_rung == 1


def test_the_references_tiles_when_memory_suffices(made, out, tiles):
    engine, item = made(), work()
    clip = engine.run("decode", item, *stages(item))
    assert tiles.frames() == CUTS[0]
    assert clip.flags == () and engine.facts.decode_rung == 0
    assert probe(out / clip.path)[0] == 89


@pytest.mark.slow
def test_the_pictures_of_all_rungs_are_close(made, out, tiles):
    """They differ, because tiles cut off what the decoder would see beyond them, by little of the contrast."""
    engine, item = made(), work()
    shown = []
    for failing in ((), (0,), (0,)):
        tiles.frames()
        tiles.failing = dict.fromkeys(failing, torch.OutOfMemoryError("out of memory"))
        clip = out / engine.run("decode", item, *stages(item)).path
        shown.append(pictures(clip))
        clip.unlink()  # it would be taken as it is
        assert engine.facts.decode_rung == len(shown) - 1
    for other in shown[1:]:
        assert 0.1 < np.abs(other - shown[0]).mean() < 0.35 * shown[0].std()


@pytest.mark.slow
def test_only_clips_of_at_least_that_size_start_lower(made, tiles):
    engine, item = made(), work()
    tiles.failing = {0: torch.OutOfMemoryError("out of memory")}
    assert engine.run("decode", item, *stages(item)).flags == ("tiled_smaller",)
    assert tiles.frames() == [10, *CUTS[1]]
    tiles.failing = {}
    for number, frames, cut in ((1, 81, [10, 5]), (2, 97, [5, 6, 6, 5]), (3, 89, CUTS[1])):
        other = work(number, num_frames=frames)
        clip = engine.run("decode", other, *stages(other))
        assert tiles.frames() == cut, f"{frames} frames"
        assert clip.flags == (("tiled_smaller",) if frames > 81 else ())


def test_a_large_clip_that_the_known_rung_does_not_cut_is_not_flagged(made, tiles):
    """Rungs 0 to 2 do not cut few frames of more pixels. Rung 3 is the first that does."""
    engine, item = made(), work(num_frames=41)
    tiles.failing = {0: torch.OutOfMemoryError("out of memory")}
    engine.run("decode", item, *stages(item))
    tiles.frames(), tiles.failing.clear()
    other = work(1, num_frames=9, width=640)
    assert engine.run("decode", other, *stages(other)).flags == ()
    assert engine.facts.decode_rung == 0


@pytest.mark.parametrize("frames, tries", [(89, 3), (9, 1)])
def test_after_the_last_rung_the_error_goes_up(made, out, tiles, frames, tries):
    """As torch's OutOfMemoryError, whatever was raised. A rung that would cut in the same way is not tried."""
    engine, item = made(), work(num_frames=frames)
    tiles.failing = dict.fromkeys(range(9), RuntimeError(CPU_MESSAGE))
    with pytest.raises(torch.OutOfMemoryError, match=rf"{frames} frames of 64x64 in the smallest tiles: .*123 bytes"):
        engine.run("decode", item, *stages(item))
    assert len(tiles.frames()) == tries
    assert files(out) == []
    tiles.failing = {}
    engine.run("decode", item, *stages(item))
    assert engine.facts.decode_rung == 0, "a rung that failed is not remembered as one that sufficed"


@pytest.mark.parametrize("error", [RuntimeError("shapes do not match"), RowError("not finite"), OSError(28, "full")])
def test_other_errors_go_up_at_once(made, out, tiles, error):
    engine, item = made(), work()
    tiles.failing = {0: error}
    with pytest.raises(type(error), match=str(error).replace("[", r"\[")):
        engine.run("decode", item, *stages(item))
    assert len(tiles.seen) == 1 and files(out) == []


def test_the_sound_has_no_ladder(made, tiles, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("out of memory for sound")

    engine, item = made(), work()
    monkeypatch.setattr("ltx_ray.engine.codec.decode_audio", fail)
    with pytest.raises(torch.OutOfMemoryError, match="out of memory for sound"):
        engine.run("decode", item, *stages(item))
    assert tiles.seen == []


# --- previews ------------------------------------------------------------------------------------


def test_a_preview_of_half_the_size_beside_the_latents(made, out):
    engine, item = made(stop_after="stage1"), work(height=128, width=192, frame_rate=100.0)
    first = stages(item)[0]
    clip = engine.run("decode", item, first)
    assert clip.path == f"previews/00/{item.item_id}.mp4" and clip.audio_stage == "stage_1"
    count, size, seconds = probe(out / clip.path)
    assert (count, size) == (89, (64, 96)) and seconds == pytest.approx(0.89, abs=0.03)
    assert clip.latents_sha256 == latents_sha256(named_latents(first))
    assert files(out) == [f"latents/00/{item.item_id}.safetensors", clip.path]
    stored = load_file(out / f"latents/00/{item.item_id}.safetensors")
    assert latents_sha256({name: stored[name] for name in ("stage_1.video", "stage_1.audio")}) == clip.latents_sha256


def test_latents_are_there_before_the_preview(made, out, tiles):
    engine, item = made(stop_after="stage1"), work()
    tiles.failing = {0: RowError("decoded frames are not finite")}
    with pytest.raises(RowError):
        engine.run("decode", item, stages(item)[0])
    assert files(out) == [f"latents/00/{item.item_id}.safetensors"]


@pytest.mark.slow
def test_a_clip_has_a_picture_of_its_frames(made, out, tiles):
    """Frames of an attempt for which memory did not suffice are not in it."""
    engine, item = made(), work(frame_rate=100.0)
    tiles.failing = {3: MemoryError()}
    clip = engine.run("decode", item, *stages(item))
    with Image.open(out / thumb_path(item.item_id)) as picture:
        assert picture.size == (3 * 64, 2 * 64)
        shown = np.asarray(picture.convert("L")).astype(float)
    frames = pictures(out / clip.path)
    for number in range(6):
        row, column = divmod(number, 3)
        tile = shown[64 * row : 64 * (row + 1), 64 * column : 64 * (column + 1)]
        distances = np.abs(np.clip((frames - 16) * 255 / 219, 0, 255) - tile).mean(axis=(1, 2))
        middle = int((number + 0.5) * 89 / 6)
        # The clip shows such noise a few frames late.
        assert distances[middle - 2 : middle + 3].min() < 0.7 * np.median(distances)


def test_a_picture_that_cannot_be_written_costs_no_row(made, out, monkeypatch):
    engine, item = made(), work(num_frames=9)

    def refuse(*args: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(Store, "write_bytes", refuse)
    clip = engine.run("decode", item, *stages(item))
    assert clip.sha256 and files(out) == [clip.path]


def test_a_preflight_publishes_nothing(made, out):
    engine, item = made(save_latents=True), dataclasses.replace(work(num_frames=9), preflight=True)
    clip = engine.run("decode", item, *stages(item))
    assert clip.path is None and clip.sha256
    assert files(out) == []


# --- latents that outlive a run ------------------------------------------------------------------


def test_saved_latents_are_loaded_again(made, out):
    engine, item = made(), work()
    both = stages(item)
    location = engine.run("save_latents", item, *both)
    assert location == str(out / f"latents/00/{item.item_id}.safetensors") == engine.facts.stored_at
    loaded_again = made().run("load_latents", item)
    assert latents_sha256(named_latents(loaded_again)) == latents_sha256(named_latents(both[0]))
    assert loaded_again.ledger == both[0].ledger, "as it was after stage 1"
    assert set(load_file(location)) == set(named_latents(*both))


def test_images_count_in_the_ledger():
    """Noise is drawn for the keyframe tokens of later images, and not for an image at frame 0."""
    plain = work().request
    for frames, extra in (((0,), 0), ((0, 9), 1), ((8, 9), 2)):
        images = tuple(ImageCondition("a.png", frame, 1.0, None) for frame in frames)
        (name, shape, _), _ = stage1_draws(dataclasses.replace(plain, images=images), "float32")
        assert (name, shape) == ("stage_1.video", (1, plain.shape.half().video_tokens + extra, 128))


def with_first(item: WorkItem, change) -> list[StageLatents]:
    """Both stages, with changed latents of the first."""
    first, second = stages(item)
    return [StageLatents(change(first.latents), first.ledger), second]


def with_ledger(item: WorkItem, **changes) -> list[StageLatents]:
    first, second = stages(item)
    return [StageLatents(first.latents, dataclasses.replace(first.ledger, **changes)), second]


def with_numerics(item: WorkItem, text: str) -> list[StageLatents]:
    first, second = stages(item)
    return [dataclasses.replace(first, numerics=text), second]


def set_nan(latents: AV) -> AV:
    latents.audio[0, 3, 2, 1] = float("nan")
    return latents


FAULTS = {
    "not of this size": (lambda i: with_first(i, lambda x: AV(x.video[:, :, 1:], x.audio)), r"stage_1\.video is .*not"),
    "another dtype": (lambda i: with_first(i, lambda x: x.map(torch.Tensor.half)), r"float16 .*, not torch\.float32"),
    "not finite": (lambda i: with_first(i, set_nan), r"stage_1\.audio is not finite"),
    "another seed": (lambda i: with_ledger(i, seed=5), "not that of the item"),
    "after stage 2": (lambda i: with_ledger(i, draws=stages(i)[1].ledger.draws), "not that of the item"),
    "before stage 1": (lambda i: with_ledger(i, draws=()), "not that of the item"),
    "numerics that are no JSON": (lambda i: with_numerics(i, '{"tp"'), "its numerics cannot be read"),
    "numerics that are no object": (lambda i: with_numerics(i, "[1]"), "its numerics cannot be read"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_stored_latents_that_do_not_fit(made, fault):
    engine, item = made(), work()
    change, words = FAULTS[fault]
    engine.run("save_latents", item, *change(item))
    with pytest.raises(StoredLatentsGone, match=words):
        engine.run("load_latents", item)
    engine.run("save_latents", item, *stages(item))
    engine.run("load_latents", item)


def spoil(path: Path, how: str) -> None:
    data = path.read_bytes()
    metadata_end = 8 + int.from_bytes(data[:8], "little")
    if how == "missing":
        path.unlink()
    elif how == "half":
        path.write_bytes(data[: len(data) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "no ledger":
        path.write_bytes(data[:metadata_end].replace(b'"noise_ledger"', b'"ledger_noise"') + data[metadata_end:])
    elif how == "broken ledger":
        path.write_bytes(data[:metadata_end].replace(b'\\"seed\\"', b'\\"sead\\"') + data[metadata_end:])
    elif how == "a flipped bit":
        path.write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
    elif how == "no video":
        path.write_bytes(data[:metadata_end].replace(b"stage_1.video", b"stage_3.video") + data[metadata_end:])


@pytest.mark.parametrize(
    "how, words",
    [
        ("missing", "no such file"), ("half", "not a whole safetensors file"), ("empty", "not a whole safetensors"),
        ("no ledger", "no noise ledger"), ("broken ledger", r"cannot be read \(KeyError"),
        ("no video", r"no stage_1\.video"),
        ("a flipped bit", "the latents of stage 1 are not those that were written"),
    ],
)  # fmt: skip
def test_stored_latents_that_cannot_be_read(made, how, words):
    engine, item = made(), work()
    location = Path(engine.run("save_latents", item, stages(item)[0]))
    spoil(location, how)
    with pytest.raises(StoredLatentsGone, match=words) as error:
        engine.run("load_latents", item)
    assert str(location) in str(error.value)


def test_latents_of_an_older_version_have_no_digest(made):
    engine, item = made(), work()
    location = Path(engine.run("save_latents", item, *stages(item)))
    engine.run("load_latents", item)
    assert not engine.facts.unchecked
    data = location.read_bytes()
    location.write_bytes(data.replace(b'"stage_1.sha256"', b'"stage_9.sha256"'))
    engine.run("load_latents", item)
    assert engine.facts.unchecked
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert header["__metadata__"]["ltx_ray"] == ltx_ray.__version__


def test_a_preview_is_of_the_latents_that_are_stored(made):
    """An earlier run with other kernels has stored both stages, and a promotion will continue those. What is recorded
    of the preview is how they were made."""
    item = work(num_frames=9)
    stored, other = stages(item), stages(dataclasses.replace(item, request=dataclasses.replace(item.request, seed=9)))
    ledger = dataclasses.replace(stored[0].ledger, device_model="another")
    made().run("save_latents", item, StageLatents(stored[0].latents, ledger, '{"tp":2}'), stored[1])
    engine = made(stop_after="stage1")
    clip = engine.run("decode", item, StageLatents(other[0].latents, stored[0].ledger, "{}"))
    assert clip.latents_sha256 == latents_sha256(named_latents(stored[0]))
    assert engine.facts.noise_ledger == ledger and engine.facts.stage1_numerics == '{"tp":2}'


@pytest.mark.parametrize("stored_on, recorded", [("H200", False), ("A100", True)])
def test_stored_latents_of_the_same_numerics_and_gpu_are_no_other_ones(made, stored_on, recorded):
    """The numerics of a row of base name its shared blocks, which those of a run do not. With noise of a CPU, stages
    may run on GPUs of several models, and the preview shows what the one of the stored latents has made."""
    item = work(num_frames=9, video_stg_scale=1.0, video_stg_blocks=(1,))
    engine = made(stop_after="stage1")
    numerics = numerics_of_row(numerics_json(engine.spec.numerics), item.request)
    assert json.loads(numerics)["stg_prefix"]
    first, second = stages(item)
    made().run("save_latents", item, StageLatents(first.latents, first.ledger, numerics, stored_on), second)
    engine.run("decode", item, StageLatents(first.latents, first.ledger, numerics, "H200"))
    found = engine.facts.stage1_numerics
    assert (found is not None) == recorded
    assert found is None or json.loads(found) == {**json.loads(numerics), "device_name": "A100"}


@pytest.mark.parametrize("fault", FAULTS)
def test_stored_latents_that_no_run_continues_are_replaced_by_those_of_a_preview(made, out, fault):
    """They are not kept for having both stages, and the preview does not wait for them."""
    item = work()
    Path(made().run("save_latents", item, *FAULTS[fault][0](item)))
    clip = made(stop_after="stage1").run("decode", item, stages(item)[0])
    assert clip.latents_sha256 == latents_sha256(named_latents(stages(item)[0]))
    loaded_again = made().run("load_latents", item)
    assert latents_sha256(named_latents(loaded_again)) == clip.latents_sha256


def test_latents_of_another_item(made, out):
    engine, item, other = made(), work(0), work(1)
    location = Path(engine.run("save_latents", item, stages(item)[0]))
    location.with_name(f"{other.item_id}.safetensors").write_bytes(location.read_bytes())
    with pytest.raises(StoredLatentsGone, match=f"holds item {item.item_id}"):
        engine.run("load_latents", other)


@pytest.mark.parametrize("count", [1, 2])
def test_latents_that_the_output_refuses_stay_on_the_node(made, out, tmp_path, count):
    engine, item = made(), work(num_frames=9)
    out.mkdir(exist_ok=True)
    (out / "latents").write_text("in the way")
    location = engine.run("save_latents", item, *stages(item)[:count])
    assert Path(location).is_file() and location.startswith(str(tmp_path / "cache" / "kept"))
    assert engine.facts.stored_at == location
    loaded_again = engine.run("load_latents", item)
    assert latents_sha256(named_latents(loaded_again)) == latents_sha256(named_latents(stages(item)[0]))
    assert engine.facts.stored_at == location
    # Another output has a folder of its own.
    engine.latents.__init__(Store(str(tmp_path / "other")))
    with pytest.raises(StoredLatentsGone):
        engine.run("load_latents", item)
    # The copy is removed when the output is writable again, unless it has more stages than what is published.
    (out / "latents").unlink()
    made().run("save_latents", item, stages(item)[0])
    assert Path(location).exists() == (count == 2)


def test_a_finished_clip_removes_the_copy(made, out):
    engine, item = made(), work(num_frames=9)
    out.mkdir(exist_ok=True)
    (out / "latents").write_text("in the way")
    location = Path(engine.run("save_latents", item, *stages(item)))
    assert location.exists()
    engine.run("decode", item, *stages(item))
    assert not location.exists()


@pytest.mark.parametrize("stop_after", [None, "stage1"])
def test_both_stages_are_never_replaced_by_one(made, out, stop_after):
    """Neither by saving nor by a run that stops after stage 1. A broken file is replaced."""
    item = work(num_frames=9)
    both = stages(item)
    engine = made(stop_after=stop_after)
    location = Path(engine.run("save_latents", item, *both))

    def publish_first():
        engine.run("decode" if stop_after else "save_latents", item, both[0])
        return set(load_file(location))

    assert publish_first() == set(named_latents(*both))
    location.write_bytes(location.read_bytes()[:-1])
    assert publish_first() == set(named_latents(both[0]))
    engine.run("save_latents", item, *both)
    assert set(load_file(location)) == set(named_latents(*both)), "and one is replaced by both"
