"""Results of items: a rendered one and two failures."""

from __future__ import annotations

from ltx_ray.dataset.writer import Failure, Rendered
from ltx_ray.records import Clip, PictureMeasures, SoundMeasures

ITEM, OTHER = "a" * 32, "b" * 32
RENDERED = Rendered(
    clip=Clip(
        f"clips/aa/{ITEM}.mp4",
        "c" * 64,
        "d" * 64,
        ("silent",),
        "stage_1",
        PictureMeasures(94.5, 0.0, 0.25, 0.125, 310.5, 1),
        SoundMeasures(-69.5, 0, 0.02),
    ),
    attempts=2,
    recipe="{}",
    recipe_digest="e" * 16,
    numerics="{}",
    noise_ledger="{}",
    versions="{}",
    device="cpu",
    seconds={"text_seconds": 1, "stage1_seconds": 2.5, "gpu_seconds": 0},
    stage1_replica="stage1-0",
    switches=1,
    extra_flags=("prompt_truncated",),
)
CRASH = Failure("stage2", 3, "infrastructure", "the gang died", "Traceback ...")
NAN = Failure("stage1", 1, "row", "latents are not finite")
