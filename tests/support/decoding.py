"""Small clips to decode, and a record of the tiles that are decoded."""

from __future__ import annotations

import torch

from ltx_ray.engine import codec
from ltx_ray.engine.initial_state import stage1_draws
from ltx_ray.engine.patchify import latent_sizes
from ltx_ray.records import NoiseLedger, StageLatents, WorkItem
from tests.support.samples import recipe, request


def work(number: int = 0, **values) -> WorkItem:
    """A small clip with little sound. The first three rungs cut its 89 frames along time in three ways."""
    row = {"height": 64, "width": 64, "num_frames": 89, "frame_rate": 250.0, "seed": number, **values}
    return WorkItem(f"{number:032x}", request(**row), recipe(dtype="float32"), "r" * 16)


def stages(item: WorkItem) -> list[StageLatents]:
    """Random latents of both stages of `item`, with their ledgers."""
    generator = torch.Generator().manual_seed(item.request.seed)
    first = NoiseLedger(item.request.seed, "cpu", "cpu", stage1_draws(item.request, "float32"))
    later = first.extended("stage_2.video", (1, 1, 128), "float32").extended("stage_2.audio", (1, 1, 128), "float32")
    shapes = item.request.shape.half(), item.request.shape
    return [
        StageLatents(latent_sizes(shape).map(lambda size: torch.randn(size, generator=generator)), ledger)
        for shape, ledger in zip(shapes, (first, later))
    ]


class Tiles:
    """Replaces the decoding of tiles: records their sizes, and raises the errors in `failing` by number of the tile."""

    def __init__(self, monkeypatch):
        self.seen: list[tuple[int, ...]] = []
        self.failing: dict[int, BaseException] = {}
        self.decode = codec.decode_video_tile
        monkeypatch.setattr("ltx_ray.engine.codec.decode_video_tile", self)

    def __call__(self, vae, tile):
        self.seen.append(tuple(tile.shape[2:]))
        if error := self.failing.get(len(self.seen) - 1):
            raise error
        return self.decode(vae, tile)

    def frames(self) -> list[int]:
        """Latent frames of the tiles since the last call."""
        seen, self.seen = [size[0] for size in self.seen], []
        return seen
