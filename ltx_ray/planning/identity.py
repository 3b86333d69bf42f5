"""What names a clip: `item_id` hashes the resolved request and the recipe, never paths, pool sizes or versions."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable
from json.encoder import encode_basestring

from ltx_ray.records import Recipe, RenderRequest, canonical_json, plain
from ltx_ray.stages import Stage


def recipe_digest(recipe: Recipe) -> str:
    """First 16 hex of sha256 over the recipe."""
    return hashlib.sha256(canonical_json(recipe).encode()).hexdigest()[:16]


class ItemHasher:
    """The identity of requests that differ in prompt and seed only.

    What is hashed is canonical JSON of {"recipe", "request"}; all of it before the prompt is hashed here, once.
    """

    def __init__(self, request: RenderRequest, recipe: Recipe, image_digests: tuple[str, ...] = ()):
        assert len(image_digests) == len(request.images)
        row = plain(request)
        for name in ("id", "extra", "loras", "prompt", "seed"):
            row.pop(name)
        row["images"] = [{**image, "path": digest} for image, digest in zip(row["images"], image_digests, strict=True)]
        # keys are sorted, and "seed" is the one after "prompt"
        before = canonical_json({name: value for name, value in row.items() if name < "prompt"})[1:-1]
        after = canonical_json({name: value for name, value in row.items() if name > "seed"})[1:-1]
        assert not any("prompt" < name < "seed" for name in row)
        self._start = hashlib.sha256(f'{{"recipe":{canonical_json(recipe)},"request":{{{before},"prompt":'.encode())
        self._end = f",{after}}}}}"

    def of(self, prompt: str, seed: int) -> bytes:
        """The 16 bytes of the item_id. Raises UnicodeEncodeError for half characters."""
        hashed = self._start.copy()
        hashed.update(f'{encode_basestring(prompt)},"seed":{seed}{self._end}'.encode())
        return hashed.digest()[:16]


def item_id(request: RenderRequest, recipe: Recipe, image_digests: tuple[str, ...] = ()) -> str:
    """The 32 hex digits that name a clip.

    Images count by the digest of their bytes (`image_digests`, in row order), never by path, and LoRAs by
    theirs, which the recipe holds with their strengths.
    """
    return ItemHasher(request, recipe, image_digests).of(request.prompt, request.seed).hex()


def merged_weights(request: RenderRequest) -> dict[Stage, Hashable]:
    """By stage, what a replica must have merged; between rows that agree it need not switch."""
    loras = tuple((use.name, use.strength) for use in request.loras)
    return {
        Stage.STAGE1: (loras, request.distilled_lora_strength_stage_1),
        Stage.STAGE2: (loras, request.distilled_lora_strength_stage_2),
    }
