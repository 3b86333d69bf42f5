"""The context of a negative prompt may travel apart from the other conditions, and gives the same bits."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ltx_ray.engine.latents import latents_sha256, named_latents
from ltx_ray.pools.worker import _nbytes
from ltx_ray.records import Negative
from tests.support.pipeline import one_thread, toy_pipeline

ROW = {"prompt": "a red boat", "height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 2, "seed": 3}


@pytest.mark.parametrize("compiled", ["off", "fused"])
def test_a_context_that_travels_apart_gives_the_same_bits(compiled):
    pipeline = toy_pipeline(compiled=compiled)
    item = pipeline.item(ROW)
    text, diffusion = pipeline.text, pipeline.diffusion
    with one_thread():
        within = text.run("text", item)
        assert within.negative is not None and text.facts.negative is None
        separate = text.run("text", replace(item, negative=Negative.SEPARATE))
        packed = text.facts.negative
        left_out = text.run("text", replace(item, negative=Negative.LEFT_OUT))
        assert separate.negative is None and left_out.negative is None and text.facts.negative is None
        assert _nbytes(separate) * 2 == _nbytes(within) and len(packed) < 1.1 * _nbytes(separate) + 2048

        def clip(conditions, *negative: bytes) -> str:
            first = diffusion.run("stage1", item, conditions, *negative)
            return latents_sha256(named_latents(first, diffusion.run("stage2", item, conditions, first)))

        assert clip(within) == clip(separate, packed) == clip(left_out, packed)


def test_a_negative_prompt_that_was_cut_flags_the_row_wherever_its_context_is():
    pipeline = toy_pipeline()
    item = pipeline.item({**ROW, "negative_prompt": "blurry " * 3000})
    for negative in Negative:
        pipeline.text.run("text", replace(item, negative=negative))
        assert pipeline.text.facts.prompt_truncated
