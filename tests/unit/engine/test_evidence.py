"""What a rank shows of what it computes with before its replica joins a run."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from ltx_ray.config import EngineSpec, GangLayout, ModelFiles, Numerics, RecipeNumerics
from ltx_ray.engine import diffusion
from ltx_ray.engine.base import Rank
from ltx_ray.engine.decode import DecodeEngine
from ltx_ray.engine.diffusion import DiffusionEngine
from ltx_ray.engine.latents import latents_sha256, named_latents
from ltx_ray.engine.text import TextEngine
from ltx_ray.planning.plan import ItemBuilder
from ltx_ray.pools.worker import RankActor
from ltx_ray.records import AV, Clip, NotFinite, PromptContext, ReplicaError, UnfitNode, WorkItem
from ltx_ray.stages import DIFFUSION_STAGES, Stage
from tests.support.pipeline import one_thread, toy_pipeline
from tests.support.samples import recipe, request

MODEL = ModelFiles("", "", "", provider="ltx_ray.toy:ensure_toy_model")
ROW = {"prompt": "a red boat", "height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 2, "seed": 3}


def spec(engine: str = "ltx_ray.engine.diffusion:DiffusionEngine", compile: str = "off") -> EngineSpec:
    numerics = Numerics(dtype="float32", compile=compile)
    return EngineSpec(engine, MODEL, numerics, "out", layout=GangLayout(DIFFUSION_STAGES))


@pytest.fixture(scope="module")
def engine() -> DiffusionEngine:
    engine = DiffusionEngine(spec(), Rank())
    engine.load()
    return engine


def test_files_have_the_digests_of_the_rows_recipes(engine):
    digests = ItemBuilder(MODEL, RecipeNumerics(dtype="float32")).digests
    text = TextEngine(spec(), Rank())
    text.load()
    for shown in (engine.evidence().files, text.evidence().files):
        assert shown and shown.items() <= digests.items()
    assert engine.evidence().files.keys() == {"checkpoint_path", "spatial_upsampler_path", "distilled_lora"}


@pytest.mark.parametrize("bad", ["a cat", "blurry"])
def test_a_context_that_is_not_finite_is_reported_and_goes_nowhere(bad, monkeypatch):
    text = TextEngine(spec(), Rank())

    def encode(prompt: str) -> PromptContext:
        return PromptContext(AV(*[torch.full((1, 4, 8), math.nan if prompt == bad else 1.0)] * 2), 4, truncated=False)

    monkeypatch.setattr(text, "encode", encode)
    item = WorkItem("0" * 32, request(prompt="a cat", negative_prompt="blurry"), recipe(), "r")
    with pytest.raises(NotFinite, match=f"64 numbers of the context of '{bad}' are not finite"):
        text.run(Stage.TEXT, item)


@pytest.mark.parametrize("compile", ["off", "fused"])
def test_the_answer_is_that_of_every_rank_with_these_weights_and_of_no_others(compile):
    def answers() -> dict[str, str]:
        other = DiffusionEngine(spec(compile=compile), Rank())
        other.load()
        before = other.evidence()
        assert other.evidence() == before
        weight = other.transformer.get_parameter("proj_out.weight")
        with torch.no_grad():
            weight[0, 0] += 0.25
        changed = other.evidence().answers
        assert changed["transformer"] != before.answers["transformer"]
        assert changed["upsampler"] == before.answers["upsampler"]
        return dict(before.answers)

    with one_thread():
        assert answers() == answers()


def decoder(output: str, dtype: str = "float32") -> DecodeEngine:
    numerics = Numerics(dtype=dtype)
    engine = DecodeEngine(EngineSpec("ltx_ray.engine.decode:DecodeEngine", MODEL, numerics, output), Rank())
    engine.load()
    return engine


@pytest.mark.parametrize("part", ["video_vae", "audio_vae", "vocoder"])
def test_decoders_have_one_answer_too_and_another_with_any_other_weight(part, tmp_path):
    with one_thread():
        changed, other = decoder(str(tmp_path)), decoder(str(tmp_path))
        before = changed.evidence()
        assert other.evidence() == before and before.answers.keys() == {"decoder"}
        assert other.evidence() == before and before.files.keys() == {"checkpoint_path"}
        weight = next(iter(getattr(changed, part).parameters()))
        with torch.no_grad():
            weight.view(-1)[0] += 0.25
        assert changed.evidence().answers != before.answers


def test_a_decoder_that_makes_nan_is_found_before_it_joins(tmp_path):
    broken = decoder(str(tmp_path))
    with torch.no_grad():
        next(iter(broken.vocoder.parameters())).view(-1)[0] = torch.nan
    with pytest.raises(ReplicaError, match="the decoder of the known-answer clip is not finite, so this device"):
        broken.evidence()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_decoder_makes_the_same_clip_after_it_has_answered(dtype, tmp_path):
    pipeline = toy_pipeline(dtype=dtype)
    item = pipeline.item(ROW)
    with one_thread():
        conditions = pipeline.text.run("text", item)
        first = pipeline.diffusion.run("stage1", item, conditions)
        second = pipeline.diffusion.run("stage2", item, conditions, first)

        def clip(name: str, answers: bool) -> Clip:
            engine = decoder(str(tmp_path / name), dtype)
            if answers:
                engine.evidence()
            return engine.run("decode", item, first, second)

        assert clip("asked", answers=True) == clip("not asked", answers=False)


def test_it_changes_no_bit_of_a_clip_and_draws_no_global_random_number():
    pipeline = toy_pipeline()
    item = pipeline.item(ROW)
    with one_thread():
        conditions = pipeline.text.run("text", item)

        def clip() -> str:
            first = pipeline.diffusion.run("stage1", item, conditions)
            return latents_sha256(named_latents(first, pipeline.diffusion.run("stage2", item, conditions, first)))

        before, state = clip(), torch.get_rng_state()
        pipeline.text.evidence()
        pipeline.diffusion.evidence()
        assert clip() == before and torch.equal(torch.get_rng_state(), state)


def test_a_device_that_makes_nan_is_found_before_it_joins():
    broken = DiffusionEngine(spec(), Rank())
    broken.load()
    with torch.no_grad():
        broken.transformer.get_parameter("proj_out.weight")[0, 0] = torch.nan
    with pytest.raises(ReplicaError, match="the transformer of the known-answer clip is not finite, so this device"):
        broken.evidence()


def test_a_node_that_lacks_what_the_attention_needs_reads_no_further(monkeypatch):
    def endless(*args: object, proceed: Callable[[], None], **kwargs: object) -> None:
        until = time.monotonic() + 60
        while time.monotonic() < until:
            proceed()
        pytest.fail("the weights are read to the end")

    monkeypatch.setattr(diffusion, "load_shard", endless)
    asked = spec(compile="fused")
    unfit = DiffusionEngine(replace(asked, numerics=replace(asked.numerics, attention="fa3")), Rank())
    with pytest.raises(UnfitNode, match="attention 'fa3' needs CUDA, and this replica runs on cpu"):
        unfit.load()


@pytest.mark.parametrize("fails", ["load_shard", "load_upsampler"])
def test_an_unfit_node_is_named_whatever_else_fails_there_first(monkeypatch, fails):
    failed = threading.Event()

    def breaks(*_: object, **__: object) -> None:
        failed.set()
        raise RuntimeError("no kernel image is available for execution on the device")

    def finds_it_later(*_: object) -> None:
        assert failed.wait(60)
        raise UnfitNode("the fused path needs Triton")

    monkeypatch.setattr(diffusion, "load_shard", breaks)
    if fails == "load_upsampler":
        monkeypatch.setattr(diffusion, "load_shard", lambda *_, **__: None)
        monkeypatch.setattr(diffusion.components, "load_upsampler", breaks)
    monkeypatch.setattr(diffusion, "check_node", finds_it_later)
    with pytest.raises(UnfitNode, match="needs Triton"):
        DiffusionEngine(spec(compile="fused"), Rank()).load()


def test_a_rank_reports_it_when_it_has_started_and_not_with_calls():
    actor = RankActor()
    report = actor.start(spec(), 0, 1, None, 10.0)
    shown = report.facts.evidence
    assert report.ok and shown is not None and shown.device.startswith("cpu") and shown.answers and shown.versions
    assert shown.driver == ""
    pipeline = toy_pipeline()
    item = pipeline.item(ROW)
    with one_thread():
        call, _ = actor.run("stage1", item, pipeline.text.run("text", item))
    assert call.ok and call.facts.evidence is None
