"""item_id and the recipe's digest: what they depend on, and that no version changes them."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ltx_ray.planning.identity import item_id, recipe_digest
from ltx_ray.presets import PIPELINES
from ltx_ray.records import (
    AV,
    Guidance,
    ImageCondition,
    LoraUse,
    NoiseLedger,
    Recipe,
    RenderRequest,
    canonical_json,
    plain,
)
from tests.support.samples import recipe, request

#: For each field of a request that enters the item_id, a value other than the default.
OTHER_VALUES = {
    "prompt": "a dog",
    "negative_prompt": "",
    "seed": 11,
    "height": 64,
    "width": 64,
    "num_frames": 9,
    "frame_rate": 25.0,
    "num_inference_steps": 16,
    **{f"{m}_{scale}_scale": 1.5 for m in ("video", "audio") for scale in ("cfg", "stg", "rescale", "modality")},
    "video_stg_blocks": (28,),
    "audio_stg_blocks": (28,),
    "video_skip_step": 1,
    "audio_skip_step": 1,
    "distilled_lora_strength_stage_1": 0.3,
    "distilled_lora_strength_stage_2": 0.6,
    "images": (ImageCondition("a.png", 0, 1.0, None),),
    "pipeline": "base",
}
#: For each field of a recipe, a value other than that of `recipe()`.
OTHER_RECIPES = {
    "pipeline": "base",
    "dtype": "float32",
    "precision": "fp8",
    "noise_device": "cpu",
    "checkpoint": "0" * 32,
    "gemma": "0" * 32,
    "upsampler": "0" * 32,
    "distilled_lora": None,
    "distilled_lora_strengths": (0.25, 0.75),
    "loras": (("a" * 32, 0.5),),
    "scheme": 2,
}


def digests(r: RenderRequest) -> tuple[str, ...]:
    return tuple("9" * 32 for _ in r.images)


def identity(r: RenderRequest, by: Recipe | None = None) -> str:
    return item_id(r, by or recipe(), digests(r))


def test_the_identity_of_this_request_never_changes():
    """Changing one of these digests makes every existing dataset render again, so it needs a reason."""
    assert identity(request(seed=7, id="x")) == "b54d392e76654cb12d2e6303f19734d5"
    assert recipe_digest(recipe()) == "14b6459ad9721514"


def test_identity_has_32_hex_digits():
    assert len(identity(request())) == 32
    assert int(identity(request()), 16) >= 0
    assert len(recipe_digest(recipe())) == 16


def test_id_and_extra_do_not_count():
    bare = request()
    assert identity(request(id="a")) == identity(request(id="b")) == identity(bare)
    assert identity(request(note="x")) == identity(bare)


def test_loras_count_by_their_bytes_and_strengths_never_by_name():
    one, other = (dataclasses.replace(request(), loras=(LoraUse(name, 0.5),)) for name in ("style", "renamed"))
    assert one.loras != other.loras
    assert identity(one) == identity(other)
    changed = dataclasses.replace(recipe(), loras=(("a" * 32, 0.5),))
    assert identity(one, changed) != identity(one)


def test_every_field_is_covered():
    fields = {f.name for f in dataclasses.fields(RenderRequest)}
    assert fields == set(OTHER_VALUES) | {"id", "extra", "loras"}
    assert {f.name for f in dataclasses.fields(Recipe)} == set(OTHER_RECIPES)


@pytest.mark.parametrize("name", OTHER_VALUES)
def test_every_other_field_of_the_request_counts(name):
    one = request()
    other = dataclasses.replace(one, **{name: OTHER_VALUES[name]})
    assert getattr(one, name) != OTHER_VALUES[name]
    assert identity(one) != identity(other)


@pytest.mark.parametrize("name", OTHER_RECIPES)
def test_every_field_of_the_recipe_counts(name):
    other = dataclasses.replace(recipe(), **{name: OTHER_RECIPES[name]})
    assert identity(request()) != identity(request(), other)
    assert recipe_digest(recipe()) != recipe_digest(other)


def test_images_count_by_their_bytes_and_their_settings_but_not_by_their_path():
    def with_image(path: str, digest: str, **changes) -> str:
        image = dataclasses.replace(ImageCondition(path, 0, 1.0, None), **changes)
        return item_id(dataclasses.replace(request(), images=(image,)), recipe(), (digest,))

    here = with_image("/a/x.png", "1" * 32)
    assert with_image("/b/y.png", "1" * 32) == here
    assert with_image("/a/x.png", "2" * 32) != here
    for name, value in {"frame_idx": 8, "strength": 0.5, "crf": 0}.items():
        assert with_image("/a/x.png", "1" * 32, **{name: value}) != here


def test_equal_numbers_are_equal_however_they_are_written():
    as_written = [json.loads(text) for text in ("24", "24.0", "2.4e1")]
    assert len({identity(request(frame_rate=v)) for v in as_written}) == 1
    assert identity(request(seed=7)) == identity(request(seed=7.0))
    assert identity(request(video_stg_scale=0)) == identity(request(video_stg_scale=-0.0))


def test_a_default_equals_the_same_value_given():
    given_values = {k: plain(v) for k, v in PIPELINES["hq"].defaults.items()}
    assert identity(request(**given_values)) == identity(request())
    assert identity(request(pipeline="hq")) == identity(request())


def test_rows_whose_prompts_differ_in_blanks_are_different_items():
    assert identity(request(prompt="a cat")) != identity(request(prompt="a  cat"))
    assert identity(request(prompt="é")) != identity(request(prompt="e\u0301"))


@given(st.dictionaries(st.text(), st.floats(allow_nan=False, allow_infinity=False) | st.integers() | st.text()))
def test_canonical_json_ignores_the_order_of_keys(values):
    text = canonical_json(values)
    assert canonical_json(dict(reversed(values.items()))) == text
    assert json.loads(text) == values


def test_canonical_json_refuses_values_that_json_lacks():
    with pytest.raises(ValueError):
        canonical_json({"x": float("nan")})


def test_guidance_of_both_streams():
    r = request(video_cfg_scale=2, audio_cfg_scale=5, video_stg_blocks=[1], audio_skip_step=3)
    assert r.guidance == AV(Guidance(2.0, 0.0, 0.45, 3.0, (1,), 0), Guidance(5.0, 0.0, 1.0, 3.0, (), 3))


def test_av_maps_video_first():
    seen = []
    added = AV(1, 2).map(lambda a, b: seen.append(a) or a + b, AV(10, 20))
    assert added == AV(11, 22)
    assert seen == [1, 2]
    assert list(AV("v", "a")) == ["v", "a"]


def test_extending_a_ledger_appends_draws_and_leaves_the_original_unchanged():
    ledger = NoiseLedger(7, "cpu", "x")
    longer = ledger.extended("stage_1.video", (1, 2, 128), "bfloat16")
    longer = longer.extended("stage_1.audio", (1, 3, 128), "bfloat16")
    assert ledger.draws == ()
    assert [d[0] for d in longer.draws] == ["stage_1.video", "stage_1.audio"]
    assert longer.seed == 7
