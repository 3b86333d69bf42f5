"""The diffusion engine on the toy model: stage 2 from stored latents, ledgers of other devices, caches for switches,
and failed calls."""

from __future__ import annotations

import dataclasses
import gc
import json
import weakref
from types import SimpleNamespace

import pytest
import torch

from ltx_ray.config import GangLayout
from ltx_ray.engine.base import Rank, error_kind
from ltx_ray.engine.diffusion import DiffusionEngine
from ltx_ray.engine.latents import LatentStore, latents_sha256, named_latents
from ltx_ray.parallel.lora import LoraMerger
from ltx_ray.parallel.mesh import Mesh
from ltx_ray.placement.numerics import numerics_json
from ltx_ray.pools.worker import RankActor
from ltx_ray.records import (
    AV,
    LoraUse,
    NoiseLedger,
    ReplicaError,
    RowError,
    StageLatents,
    WrongDevice,
)  # fmt: skip
from ltx_ray.stages import DIFFUSION_STAGES, Stage
from ltx_ray.storage.store import Store
from tests.support.pipeline import ToyPipeline, one_thread, toy_pipeline
from tests.support.thread_ranks import run_ranks

ROW = {
    "prompt": "a red boat", "height": 128, "width": 128, "num_frames": 17, "num_inference_steps": 2, "seed": 3,
    "images": [{"path": "a.png", "strength": 0.9}, {"path": "b.jpg", "frame_idx": 9, "strength": 0.7}],
}  # fmt: skip


@pytest.fixture(scope="module")
def pipeline() -> ToyPipeline:
    return toy_pipeline()


@pytest.fixture(scope="module")
def rendered(pipeline):
    """(item, conditions, stage 1, stage 2)."""
    item = pipeline.item(ROW)
    with one_thread():
        conditions = pipeline.text.run("text", item)
        first = pipeline.diffusion.run("stage1", item, conditions)
        return item, conditions, first, pipeline.diffusion.run("stage2", item, conditions, first)


def test_stored_latents_lead_to_the_bits_of_an_uninterrupted_run(pipeline, rendered, tmp_path, monkeypatch):
    """With images at frame 0 and later, whose tokens are in the ledger."""
    monkeypatch.setenv("LTX_RAY_CACHE", str(tmp_path / "cache"))
    item, conditions, first, second = rendered
    store = LatentStore(Store(str(tmp_path / "out")))
    store.publish(item, [first])
    stored, _ = store.load_stage1(item, torch.float32)
    assert stored.ledger == first.ledger
    with one_thread():
        again = pipeline.diffusion.run("stage2", item, conditions, stored)
    assert latents_sha256(named_latents(stored, again)) == latents_sha256(named_latents(first, second))


@pytest.mark.parametrize("compiled", ["off", "fused"])
@pytest.mark.parametrize("size", [(64, 64), (64, 128)])
def test_a_clip_of_one_frame(size, compiled, tmp_path):
    """Its sound is one latent, and at 64x64 its picture is one token in stage 1."""
    pipeline = toy_pipeline(compiled=compiled)
    item = pipeline.item(
        {"prompt": "a", "num_frames": 1, "height": size[0], "width": size[1], "num_inference_steps": 2}
    )
    with one_thread():
        conditions = pipeline.text.run("text", item)
        first = pipeline.diffusion.run("stage1", item, conditions)
        second = pipeline.diffusion.run("stage2", item, conditions, first)
    assert first.latents.audio.shape == (1, 8, 1, 16) and second.latents.video.shape[2:] == (
        1,
        size[0] // 32,
        size[1] // 32,
    )
    store = LatentStore(Store(str(tmp_path)))
    store.publish(item, [first])
    assert latents_sha256(named_latents(store.load_stage1(item, torch.float32)[0])) == latents_sha256(
        named_latents(first)
    )


def test_a_digest_does_not_depend_on_strides_that_mean_nothing():
    token = torch.randn(1, 128, 1, 1, 1)
    strided = token.as_strided(token.shape, (128, 1, 128, 128, 128))
    assert torch.equal(token, strided) and strided.is_contiguous()
    assert latents_sha256({"a": token}) == latents_sha256({"a": strided})


def test_a_distilled_lora_of_strength_0_is_not_merged(pipeline):
    engine = DiffusionEngine.__new__(DiffusionEngine)
    engine._lora_names, engine._has_distilled = ["style"], True
    request = dataclasses.replace(pipeline.item(ROW).request, loras=(LoraUse("style", 0.7),))
    item = dataclasses.replace(pipeline.item(ROW), request=request)
    assert engine._lora_setting(item, 0.5).strengths == ((0, 0.7), (1, 0.5))
    assert engine._lora_setting(item, 0.0).strengths == ((0, 0.7),)


def test_stored_latents_say_how_they_were_computed(pipeline, rendered, tmp_path, monkeypatch):
    """Stage 2 reports their numerics when those are not the run's."""
    monkeypatch.setenv("LTX_RAY_CACHE", str(tmp_path / "cache"))
    item, conditions, first, _ = rendered
    now = numerics_json(pipeline.diffusion.spec.numerics)
    assert first.numerics == now
    for numerics in (now, '{"attention":"another"}'):
        store = LatentStore(Store(str(tmp_path / f"out{len(numerics)}")))
        store.publish(item, [dataclasses.replace(first, numerics=numerics)])
        stored, _ = store.load_stage1(item, torch.float32)
        assert stored.numerics == numerics
        with one_thread():
            pipeline.diffusion.run("stage2", item, conditions, stored)
        assert pipeline.diffusion.facts.stage1_numerics == (None if numerics == now else numerics)


@pytest.mark.parametrize("made_on, recorded", [("NVIDIA H100", True), ("cpu", False), ("", False)])
def test_stage_2_reports_another_gpu_of_stage_1(pipeline, rendered, tmp_path, monkeypatch, made_on, recorded):
    """With noise of a CPU, a preview of one model of GPU may be finished on another, with other bits in stage 1."""
    monkeypatch.setenv("LTX_RAY_CACHE", str(tmp_path / "cache"))
    item, conditions, first, _ = rendered
    assert first.device_name == "cpu"
    store = LatentStore(Store(str(tmp_path / "out")))
    store.publish(item, [dataclasses.replace(first, device_name=made_on)])
    stored, _ = store.load_stage1(item, torch.float32)
    with one_thread():
        pipeline.diffusion.run("stage2", item, conditions, stored)
    reported = pipeline.diffusion.facts.stage1_numerics
    if recorded:
        assert json.loads(reported) == {**json.loads(first.numerics), "device_name": made_on}
    else:
        assert reported is None


def test_noise_of_a_gpu_is_not_drawn_on_a_cpu(pipeline, rendered):
    """The call fails before it merges anything."""
    item, conditions, first, _ = rendered
    pipeline.diffusion._merge_loras(item, item.request.distilled_lora_strength_stage_1)
    switches = pipeline.diffusion.switches
    other_device = dataclasses.replace(first.ledger, device="cuda", device_model="NVIDIA H100 80GB HBM3")
    with pytest.raises(WrongDevice, match=r"NVIDIA H100 80GB HBM3.* cpu; legal: .*--noise-device cpu"):
        pipeline.diffusion.run("stage2", item, conditions, StageLatents(first.latents, other_device))
    assert pipeline.diffusion.switches == switches


@pytest.mark.parametrize(
    "layout, at_load",
    [
        (GangLayout(DIFFUSION_STAGES, alternates=True), True),
        (GangLayout(DIFFUSION_STAGES), False),
        (GangLayout((Stage.STAGE1,)), False),
        (GangLayout((Stage.STAGE1,), alternates=True), True),
    ],
)
def test_what_a_switch_reads_is_cached_once_a_switch_is_certain(pipeline, rendered, monkeypatch, layout, at_load):
    """When it is loaded where a replica alternates between the stages, otherwise at its first switch."""
    cached = []
    cache_sources = LoraMerger.cache_sources

    def counted(self, reserve):
        cached.append(reserve)
        cache_sources(self, reserve)

    monkeypatch.setattr(LoraMerger, "cache_sources", counted)
    engine = DiffusionEngine(dataclasses.replace(pipeline.diffusion.spec, layout=layout), Rank())
    engine.load()
    assert len(cached) == at_load
    item = rendered[0]
    engine._merge_loras(item, 0.25)
    engine._merge_loras(item, 0.25)
    assert len(cached) == at_load, "the first merge belongs to loading"
    engine._merge_loras(item, 0.5)
    engine._merge_loras(item, 0.25)
    assert len(cached) == 1 and engine.switches == 2


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("tried to allocate 3 GiB"), RowError("at fault")])
def test_a_failed_call_is_reported_by_name_and_keeps_no_tensor(pipeline, rendered, monkeypatch, stage, error):
    item, conditions, first, _ = rendered
    actor, tensors = RankActor(), []
    actor.engine = pipeline.diffusion

    def fail(inputs, *_):
        tensors.extend(weakref.ref(modality.latent) for modality in inputs)
        raise type(error)(*error.args)

    monkeypatch.setattr(pipeline.diffusion.transformer, "forward", fail)
    gc.disable()  # A reference cycle would keep device memory until the collector runs.
    try:
        report, payload = actor.run(stage, item, conditions, *([first] if stage == "stage2" else []))
        alive = [ref for ref in tensors if ref() is not None]
    finally:
        gc.enable()
    assert (report.error.type, payload) == (type(error).__name__, None)
    assert report.error.kind == error_kind(error)
    assert len(tensors) == 2 and not alive


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tp", "peers"), [(3, 1), (1, 2), (2, 2)])
def test_ranks_that_disagree_lose_their_gang(tp, peers, dtype):
    """One changed bit, or two values that have changed places, on any one rank is noticed by all."""
    torch.manual_seed(0)
    video, audio = torch.randn(1, 4, 2, 3, 3, dtype=dtype), torch.randn(1, 2, 5, 2, dtype=dtype)
    video[0, 0, 0, 0, 0] = torch.nan

    def drifted(how: str) -> AV[torch.Tensor]:
        x, y = video.clone(), audio.clone()
        if how == "a bit":
            x.view(torch.int16)[0, 1, 1, 1, 1] ^= 1
        elif how == "places":
            y[0, 0, 0, 0], y[0, 1, 4, 1] = audio[0, 1, 4, 1], audio[0, 0, 0, 0]
        return AV(x, y)

    def verdicts(stage: Stage, how: str, bad: int, divided: bool = True) -> list[str]:
        def run(mesh: Mesh) -> str:
            engine = object.__new__(DiffusionEngine)
            engine.mesh = dataclasses.replace(mesh, tokens=mesh.peers) if divided else mesh
            engine.spec = SimpleNamespace(layout=GangLayout(sequence_parallel=peers if divided else 1))
            rank = mesh.peers.rank * tp + mesh.tp.rank
            latents = StageLatents(drifted(how if rank == bad else ""), ledger)
            try:
                engine._check_ranks_agree(stage, latents)
            except ReplicaError as error:
                return str(error)
            return ""

        return run_ranks(tp, peers, run)

    ledger = NoiseLedger(0, "cpu", "cpu")
    for stage in DIFFUSION_STAGES:
        for how in ("a bit", "places"):
            for bad in range(tp * peers):
                found = verdicts(stage, how, bad)
                assert all(f"different latents in {stage}" in said for said in found), (how, bad, found)
        assert not any(verdicts(stage, "", 0))
        # Peers that do not divide a stage repeat it, and only the first of them counts.
        repeated = verdicts(stage, "a bit", 0, divided=False)
        assert [bool(said) for said in repeated] == [tp > 1] * tp + [False] * tp * (peers - 1)
