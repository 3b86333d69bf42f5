"""The miniature's text encoder: a Gemma 3 directory with a tokenizer for the words of its world, and random weights.

The weights are never trained. The hidden states are random features of a prompt's words and of those before them, from
which the text projections and connectors learn. A word of the world is one token wherever it stands and whether or not
it is capitalised, and all of its tokens have the same vector.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import torch

from ltx_ray.miniature import world
from ltx_ray.miniature.config import GEMMA_HIDDEN, GEMMA_LAYERS
from ltx_ray.presets import DEFAULT_NEGATIVE_PROMPT
from ltx_ray.toy import gemma_format
from ltx_ray.toy.gemma_format import VOCABULARY, GemmaSizes
from ltx_ray.toy.weights import Draw

SIZES = GemmaSizes(GEMMA_HIDDEN, GEMMA_LAYERS, heads=2, kv_heads=2)
#: How much more often a word of the world counts than one of the negative prompt. Merges of the world thus come first.
_WORLD_COUNT = 1000


def _merges() -> list[tuple[str, str]]:
    """Merges that make each word of the world one token, and words of the negative prompt as far as there is room."""
    counts: dict[str, int] = {}
    for word in world.words():
        for form in (word, word.capitalize()):
            counts |= {form: _WORLD_COUNT, "▁" + form: _WORLD_COUNT}
    for word in re.findall(r"\w+", DEFAULT_NEGATIVE_PROMPT):
        counts["▁" + word] = counts.get("▁" + word, 0) + 1
    return gemma_format.byte_pair_merges(counts, VOCABULARY)


def _meaning(piece: str) -> str:
    """What the vector of a token depends on: its letters without the space before them, in lower case."""
    return piece.removeprefix("▁").lower() or piece


def _embeddings(draw: Draw, pieces: list[str]) -> torch.Tensor:
    """A vector (VOCABULARY, GEMMA_HIDDEN) for each token, of mean square 1 after Gemma has multiplied it."""
    vectors = draw.uniform((VOCABULARY, GEMMA_HIDDEN), 1.0)
    vectors = vectors / vectors.norm(dim=1, keepdim=True)
    first: dict[str, int] = {}
    of_meaning = [first.setdefault(_meaning(piece), number) for number, piece in enumerate(pieces)]
    return vectors[of_meaning]


def write_gemma(folder: str | os.PathLike, seed: int = 0) -> None:
    """Write the directory into `folder`, which is made if it does not exist. The bytes depend on `seed` alone."""
    from ltx_ray.toy import save_tensors

    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    merges = _merges()
    pieces, _ = gemma_format.vocabulary(merges)
    assert len(pieces) == VOCABULARY, len(pieces)
    draw = Draw(torch.Generator().manual_seed(seed))
    draw.put("language_model.model.embed_tokens.weight", _embeddings(draw, pieces))
    gemma_format.draw_layers(draw, SIZES)
    gemma_format.draw_vision(draw, SIZES)
    save_tensors(out / "model.safetensors", draw.tensors, {"format": "pt"})
    for name, content in gemma_format.files(SIZES, merges).items():
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (out / name).write_text(text, encoding="utf-8")
