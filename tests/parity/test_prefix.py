"""The perturbed pass takes over the first blocks of the conditional one: the same bits where both run alone.

Where the conditional pass is one of a batch of two, its products have twice as many rows, and some CPUs round them
differently.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from ltx_ray.engine.base import Rank
from ltx_ray.engine.diffusion import DiffusionEngine
from ltx_ray.engine.stage_model import StageModel
from ltx_ray.model.transformer import Prefix
from tests.support.pipeline import one_thread, toy_pipeline
from tests.support.transformers import relative

ROW = {
    "num_frames": 9, "num_inference_steps": 2, "height": 64, "width": 128, "prompt": "a lighthouse", "pipeline": "base",
    "video_stg_scale": 1.0, "video_stg_blocks": [1], "audio_stg_scale": 0.5, "audio_stg_blocks": [2],
    "images": [{"path": "a.png", "frame_idx": 8}],
}  # fmt: skip
CASES = {
    "both streams": {},
    "from the first block on": {"video_stg_blocks": [0]},
    "the last block": {"video_stg_blocks": [3], "audio_stg_scale": 0.0},
    "one stream": {"video_stg_scale": 0.0},
    "a stream that skips calls": {"video_skip_step": 1},
    "the other stream skips calls": {"audio_skip_step": 1, "video_stg_blocks": [2], "audio_stg_blocks": [1]},
    "other guidance": {"video_cfg_guidance_scale": 1.0, "audio_cfg_guidance_scale": 1.0},
}


@pytest.fixture
def count_prefixes(monkeypatch):
    """The prefixes that passes took over, in order."""
    taken: list[int] = []
    whole = StageModel._prefix_of

    def prefix_of(self, name, latents, sigma, enabled) -> Prefix | None:
        found = whole(self, name, latents, sigma, enabled)
        if found is not None and found.streams is not None:
            taken.append(found.length)
        return found

    monkeypatch.setattr(StageModel, "_prefix_of", prefix_of)
    return taken


@pytest.fixture(scope="module", params=["off", "fused", "fused, in pairs"])
def engine(request):
    """The diffusion engine of a path, and by how much sharing may change its latents, relative to them."""
    path, _, pairs = request.param.partition(", ")
    spec = toy_pipeline(compiled=path).diffusion.spec
    numerics = replace(spec.numerics, guidance_batching=2 if pairs else 1)
    engine = DiffusionEngine(replace(spec, numerics=numerics), Rank())
    engine.load()
    return engine, 1e-5 if pairs else 0.0


@pytest.mark.parametrize("case", CASES)
def test_sharing_changes_nothing(monkeypatch, count_prefixes, case, engine):
    diffusion, most = engine
    pipeline = toy_pipeline()
    item = pipeline.item({**ROW, **CASES[case]})
    with one_thread():
        conditions = pipeline.text.run("text", item)
        shared = diffusion.run("stage1", item, conditions)
        taken = list(count_prefixes)
        monkeypatch.setattr(StageModel, "_prefix_of", lambda *call: None)
        alone = diffusion.run("stage1", item, conditions)
    for found, expected in zip(shared.latents, alone.latents, strict=True):
        assert relative(found, expected) <= most
    assert bool(taken) == (case != "from the first block on"), taken
