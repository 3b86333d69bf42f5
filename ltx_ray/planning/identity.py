"""The item_id, which names a clip: a hash of the resolved request and the recipe.

It has what decides the clip and is known while rows are planned. Not in it are paths and ids; the model of the GPU that
draws the noise, which `dataset.json` has and a run checks; and what changes bits within rounding: attention, kernels,
layouts, GPUs and versions, which each row of the index records (docs/dataset.md#schemes).
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable
from functools import lru_cache
from json.encoder import encode_basestring

from ltx_ray.records import Recipe, RenderRequest, canonical_json, plain
from ltx_ray.stages import Stage


@lru_cache(maxsize=256)
def recipe_json(recipe: Recipe) -> str:
    """The recipe as canonical JSON. That of scheme 1 has no field for its scheme."""
    values = plain(recipe)
    if recipe.scheme == 1:
        del values["scheme"]
    return canonical_json(values)


def recipe_digest(recipe: Recipe) -> str:
    """The first 16 hex digits of sha256 over the recipe."""
    return hashlib.sha256(recipe_json(recipe).encode()).hexdigest()[:16]


class ItemHasher:
    """item_ids of requests that differ in prompt and seed only.

    The hash is over canonical JSON of {"recipe", "request"}. What comes before the prompt is hashed once, here.
    """

    def __init__(self, request: RenderRequest, recipe: Recipe, image_digests: tuple[str, ...] = ()):
        assert len(image_digests) == len(request.images)
        row = plain(request)
        for name in ("id", "extra", "loras", "prompt", "seed"):
            row.pop(name)
        row["images"] = [{**image, "path": digest} for image, digest in zip(row["images"], image_digests, strict=True)]
        # canonical JSON sorts its keys, and no key is between "prompt" and "seed"
        before = canonical_json({name: value for name, value in row.items() if name < "prompt"})[1:-1]
        after = canonical_json({name: value for name, value in row.items() if name > "seed"})[1:-1]
        assert not any("prompt" < name < "seed" for name in row)
        self._start = hashlib.sha256(f'{{"recipe":{recipe_json(recipe)},"request":{{{before},"prompt":'.encode())
        self._end = f",{after}}}}}"

    def item_id_bytes(self, prompt: str, seed: int) -> bytes:
        """The item_id as its 16 bytes. Raises UnicodeEncodeError for lone surrogates."""
        hashed = self._start.copy()
        hashed.update(f'{encode_basestring(prompt)},"seed":{seed}{self._end}'.encode())
        return hashed.digest()[:16]


def item_id(request: RenderRequest, recipe: Recipe, image_digests: tuple[str, ...] = ()) -> str:
    """The 32 hex digits that name a clip.

    Images enter it by the digests of their bytes (`image_digests`, in the row's order), never by path. LoRAs enter it
    by their digests and strengths in the recipe.
    """
    return ItemHasher(request, recipe, image_digests).item_id_bytes(request.prompt, request.seed).hex()


def merged_weights(request: RenderRequest) -> dict[Stage, Hashable]:
    """What a replica must have merged for each stage. Rows for which it is equal need no switch between them."""
    loras = tuple((use.name, use.strength) for use in request.loras)
    return {
        Stage.STAGE1: (loras, request.distilled_lora_strength_stage_1),
        Stage.STAGE2: (loras, request.distilled_lora_strength_stage_2),
    }
