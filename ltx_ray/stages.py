"""The stages of a clip: one type, and one table of what each takes, costs and leaves behind.

`stage1` is the spelling in code, events, logs and the index's own columns (`stage1_seconds`, `stage1_replica`). Four
stored names have the reference's spelling `stage_1`: latents (`stage_1.video`), draws of noise, values of the column
`audio_stage`, and `distilled_lora_strength_stage_1`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from types import MappingProxyType


class Stage(StrEnum):
    """A step that one call of a replica takes for one item, upstream first."""

    TEXT = "text"
    STAGE1 = "stage1"
    #: Reads the stored latents of stage 1 instead of rendering them.
    LOAD_LATENTS = "load_latents"
    STAGE2 = "stage2"
    DECODE = "decode"
    #: Saves the latents of an item that does not go on.
    SAVE_LATENTS = "save_latents"


@dataclass(frozen=True)
class StageTraits:
    """What holds for every call of a stage.

    `seconds` and `result_bytes` are guesses that serve until calls have been measured: whole calls on one H100, an HQ
    clip of 121 frames at 1088x1920 (docs/benchmarks.md#parts-of-a-clip). Only their ratios matter. A call of decode is
    mostly x264 and the upload; it takes the GPU for 1.75 s.
    """

    #: Results that a call takes, in the order of its arguments, as far as the item has them. A result is dropped as
    #: soon as no later stage on the item's path takes it.
    inputs: tuple[Stage, ...]
    #: Whose result a call makes.
    result: Stage
    #: Whether a replica merges LoRAs at this stage's strengths, so that a switch to the stage takes time.
    merges_weights: bool
    #: Whether it goes on while a run drains.
    runs_while_draining: bool
    seconds: float
    result_bytes: float


def _traits(
    result: Stage,
    seconds: float,
    inputs: tuple[Stage, ...] = (),
    result_bytes: float = 0.0,
    merges_weights: bool = False,
    runs_while_draining: bool = False,
) -> StageTraits:
    return StageTraits(inputs, result, merges_weights, runs_while_draining, seconds, result_bytes)


_LATENTS = (Stage.STAGE1, Stage.STAGE2)

TRAITS: Mapping[Stage, StageTraits] = MappingProxyType(
    {
        Stage.TEXT: _traits(Stage.TEXT, 0.1, result_bytes=25e6),
        Stage.STAGE1: _traits(Stage.STAGE1, 46.0, (Stage.TEXT,), 2e6, merges_weights=True),
        Stage.LOAD_LATENTS: _traits(Stage.STAGE1, 0.1, result_bytes=2e6),
        Stage.STAGE2: _traits(Stage.STAGE2, 17.0, (Stage.TEXT, Stage.STAGE1), 8e6, merges_weights=True),
        Stage.DECODE: _traits(Stage.DECODE, 5.0, _LATENTS, runs_while_draining=True),
        Stage.SAVE_LATENTS: _traits(Stage.SAVE_LATENTS, 0.1, _LATENTS, runs_while_draining=True),
    }
)

#: The stages of a replica of the DiT.
DIFFUSION_STAGES = tuple(stage for stage, traits in TRAITS.items() if traits.merges_weights)
#: The paths of items: from prompt to clip, from prompt to preview, and from stored stage-1 latents to clip.
FULL_PATH = (Stage.TEXT, Stage.STAGE1, Stage.STAGE2, Stage.DECODE)
PREVIEW_PATH = (Stage.TEXT, Stage.STAGE1, Stage.DECODE)
PATH_FROM_STORED = (Stage.TEXT, Stage.LOAD_LATENTS, Stage.STAGE2, Stage.DECODE)
#: The stages of a decode replica: all that read or write the output.
OUTPUT_STAGES = (Stage.DECODE, Stage.SAVE_LATENTS, Stage.LOAD_LATENTS)


@cache
def needed_results(path: tuple[Stage, ...]) -> frozenset[Stage]:
    """The stages whose results the stages on `path` take."""
    return frozenset(stage for following in path for stage in TRAITS[following].inputs)
