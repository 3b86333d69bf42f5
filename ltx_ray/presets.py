"""The pipelines and their defaults: sampler, schedules, guidance, sizes, the default negative prompt.

Source: `ltx_pipelines/utils/constants.py` of the reference v1.2.0 (docs/ltx-2.3.md#schedules).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

DEFAULT_NEGATIVE_PROMPT = (
    "has_subtitles, has_blurbox, transition from black, transition to black, speech_ending_short, "
    "blurry, out of focus, overexposed, underexposed, low contrast, washed out colors, excessive noise, "
    "grainy texture, poor lighting, flickering, motion blur, distorted proportions, unnatural skin tones, "
    "deformed facial features, asymmetrical face, missing facial features, extra limbs, disfigured hands, "
    "wrong hand count, artifacts around text, inconsistent perspective, camera shake, incorrect depth of "
    "field, background too sharp, background clutter, distracting reflections, harsh shadows, inconsistent "
    "lighting direction, color banding, cartoonish rendering, 3D CGI look, unrealistic materials, uncanny "
    "valley effect, incorrect ethnicity, wrong gender, exaggerated expressions, wrong gaze direction, "
    "mismatched lip sync, silent or muted audio, distorted voice, robotic voice, echo, background noise, "
    "off-sync audio, incorrect dialogue, added dialogue, repetitive speech, jittery movement, awkward "
    "pauses, incorrect timing, unnatural transitions, inconsistent framing, tilted camera, flat lighting, "
    "inconsistent tone, cinematic oversaturation, stylized filters, or AI artifacts."
)

#: The schedule of stage 2 in every pipeline.
STAGE2_SIGMAS = (0.909375, 0.725, 0.421875, 0.0)
#: H.264 quality (CRF) of the conditioning images that LTX-2.3 was trained with.
DEFAULT_IMAGE_CRF = 33
DISTILLED_SIGMAS = (1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875, 0.0)

_COMMON: dict[str, Any] = {
    "negative_prompt": DEFAULT_NEGATIVE_PROMPT,
    "seed": 10,
    "num_frames": 121,
    "frame_rate": 24.0,
    "loras": (),
    "images": (),
    "video_skip_step": 0,
    "audio_skip_step": 0,
    "video_modality_scale": 3.0,
    "audio_modality_scale": 3.0,
    "video_cfg_scale": 3.0,
    "audio_cfg_scale": 7.0,
}


@dataclass(frozen=True)
class SamplerTraits:
    """What the planner has to know of a sampler. sampling/samplers.py has the samplers themselves."""

    calls_per_step: int
    extra_calls: int
    #: Bytes that it keeps for each latent channel of a token while the model runs.
    state_bytes: int

    def model_calls(self, steps: int) -> int:
        """Evaluations of the model for `steps` steps, each of which may take several passes."""
        return self.calls_per_step * steps + self.extra_calls


SAMPLER_TRAITS: Mapping[str, SamplerTraits] = MappingProxyType(
    {"res_2s": SamplerTraits(2, 1, state_bytes=6 * 8), "euler": SamplerTraits(1, 0, state_bytes=3 * 4)}
)


@dataclass(frozen=True)
class Pipeline:
    """A named pipeline: its sampler, its stage-1 schedule, the stage whose audio it keeps, and its row defaults."""

    name: str
    sampler: str
    #: Noise levels of stage 1; None computes them from the number of steps.
    sigmas: tuple[float, ...] | None
    #: Number of tokens by which a computed schedule is shifted; None takes the clip's stage-1 video tokens.
    schedule_tokens: int | None
    audio_stage: str
    #: Whether it runs on the distilled checkpoint, which has no distilled LoRA and no guidance.
    distilled: bool
    defaults: Mapping[str, Any] = field(default_factory=dict)


def _defaults(**changes: Any) -> Mapping[str, Any]:
    return MappingProxyType({**_COMMON, **changes})


_NO_GUIDANCE = {
    f"{stream}_{name}": value
    for stream in ("video", "audio")
    for name, value in {
        "cfg_scale": 1.0, "stg_scale": 0.0, "modality_scale": 1.0, "rescale_scale": 0.0, "stg_blocks": (),
    }.items()
}  # fmt: skip

PIPELINES: Mapping[str, Pipeline] = MappingProxyType(
    {
        "hq": Pipeline(
            name="hq",
            sampler="res_2s",
            sigmas=None,
            schedule_tokens=None,
            audio_stage="stage_1",
            distilled=False,
            defaults=_defaults(
                height=1088,
                width=1920,
                num_inference_steps=15,
                video_stg_scale=0.0,
                audio_stg_scale=0.0,
                video_rescale_scale=0.45,
                audio_rescale_scale=1.0,
                video_stg_blocks=(),
                audio_stg_blocks=(),
                distilled_lora_strength_stage_1=0.25,
                distilled_lora_strength_stage_2=0.5,
            ),
        ),
        "base": Pipeline(
            name="base",
            sampler="euler",
            sigmas=None,
            schedule_tokens=4096,
            audio_stage="stage_1",
            distilled=False,
            defaults=_defaults(
                height=1024,
                width=1536,
                num_inference_steps=30,
                video_stg_scale=1.0,
                audio_stg_scale=1.0,
                video_rescale_scale=0.7,
                audio_rescale_scale=0.7,
                video_stg_blocks=(28,),
                audio_stg_blocks=(28,),
                distilled_lora_strength_stage_1=0.0,
                distilled_lora_strength_stage_2=1.0,
            ),
        ),
        "distilled": Pipeline(
            name="distilled",
            sampler="euler",
            sigmas=DISTILLED_SIGMAS,
            schedule_tokens=None,
            audio_stage="stage_2",
            distilled=True,
            defaults=_defaults(
                height=1024,
                width=1536,
                num_inference_steps=len(DISTILLED_SIGMAS) - 1,
                **_NO_GUIDANCE,
                negative_prompt="",
                distilled_lora_strength_stage_1=0.0,
                distilled_lora_strength_stage_2=0.0,
            ),
        ),
    }
)


def served_pipelines(distilled: bool) -> tuple[str, ...]:
    """Names of the pipelines that a checkpoint serves; the first is the default of its rows."""
    return tuple(name for name, pipeline in PIPELINES.items() if pipeline.distilled == distilled)
