"""What scripts/quality.py renders: how many clips, of which size, through which pipeline, with which options."""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ltx_ray.miniature import world

#: Option of `ltx-ray render` that leaves out stage 2.
STOP_AFTER = "--stop-after"


@dataclass(frozen=True)
class Settings:
    """`options` go to `ltx-ray render` as they are. With `images`, the first frame of each clip is given as a picture.

    `weights` is the folder of the miniature's parts; None for those of the package.
    """

    clips: int
    pipeline: str
    seed: int
    height: int = 256
    width: int = 384
    num_frames: int = 33
    frame_rate: float = 24.0
    images: bool = False
    weights: Path | None = None
    options: tuple[str, ...] = ()

    @property
    def stage1_alone(self) -> bool:
        """Whether the options leave out stage 2."""
        return any(option.split("=")[0] == STOP_AFTER for option in self.options)

    def scenes(self) -> list[world.Clip]:
        """The held-out clips that are asked for. They follow from the seed, the number of clips and the aspect."""
        return list(itertools.islice(world.clips(self.seed, "held_out", self.width / self.height), self.clips))

    def ids(self) -> list[str]:
        """The ids of the clips' rows."""
        return [f"s{self.seed}-{number:04d}" for number in range(self.clips)]

    def shown(self) -> dict[str, Any]:
        """The settings as JSON has them, but for those that it has under names of their own."""
        values = {**asdict(self), "weights": self.weights and str(self.weights), "options": list(self.options)}
        return {name: value for name, value in values.items() if name not in ("clips", "pipeline", "seed")}
