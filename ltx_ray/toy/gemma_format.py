"""A small Gemma 3 directory in the released format: tokenizer, configurations, and weights at any scale.

The toy and the miniature both have one. They differ in their words and in the scale of their random weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ltx_ray.toy.weights import Draw

_SPECIALS = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>",
             "<end_of_image>", "<image_soft_token>")  # fmt: skip
#: Tokens of the vocabulary.
VOCABULARY = 1024
_VISION = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1}


@dataclass(frozen=True)
class GemmaSizes:
    """Width, depth and attention heads of the text model. Heads together are as wide as the model."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


# --- tokenizer ---------------------------------------------------------------------------------------------------


def byte_pair_merges(words: Mapping[str, int], size: int) -> list[tuple[str, str]]:
    """Up to `size` merges of byte-pair encoding over words with counts: the most frequent pair first, ties
    alphabetically."""
    counts = {tuple(word): n for word, n in words.items()}
    merges: list[tuple[str, str]] = []
    while len(merges) < size:
        pairs: dict[tuple[str, str], int] = {}
        for pieces, n in counts.items():
            for pair in pairwise(pieces):
                pairs[pair] = pairs.get(pair, 0) + n
        if not pairs:
            break
        best = min(pairs, key=lambda p: (-pairs[p], p))
        merges.append(best)
        merged: dict[tuple[str, ...], int] = {}
        for pieces, n in counts.items():
            out: list[str] = []
            for piece in pieces:
                if out and (out[-1], piece) == best:
                    out[-1] += piece
                else:
                    out.append(piece)
            merged[tuple(out)] = merged.get(tuple(out), 0) + n
        counts = merged
    return merges


def vocabulary(merges: Sequence[tuple[str, str]]) -> tuple[list[str], list[list[str]]]:
    """The pieces of the vocabulary in the order of their ids, and those of the `merges` for which it has room."""
    pieces = [*_SPECIALS, *(f"<0x{b:02X}>" for b in range(256)), "▁", "\n", *(chr(c) for c in range(33, 127))]
    known = set(pieces)
    kept = []
    for pair in merges:
        joined = "".join(pair)
        if len(pieces) + (joined not in known) > VOCABULARY:
            break
        kept.append(list(pair))
        if joined not in known:
            known.add(joined)
            pieces.append(joined)
    return pieces, kept


def _tokenizer_json(merges: Sequence[tuple[str, str]]) -> dict:
    """A tokenizer.json like Gemma's: spaces become U+2581, and characters without a token become their bytes."""
    pieces, kept = vocabulary(merges)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    start = [{"SpecialToken": {"id": "<bos>", "type_id": 0}}]
    text = {"single": [{"Sequence": {"id": "A", "type_id": 0}}], "pair": [{"Sequence": {"id": "B", "type_id": 1}}]}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": token, **flags} for i, token in enumerate(_SPECIALS)],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": {
            "type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": start + text["single"],
            "pair": start + text["single"] + [{"SpecialToken": {"id": "<bos>", "type_id": 1}}] + text["pair"],
            "special_tokens": {"<bos>": {"id": "<bos>", "ids": [2], "tokens": ["<bos>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "merges": kept,
        },
    }  # fmt: skip


# --- files -------------------------------------------------------------------------------------------------------


def files(sizes: GemmaSizes, merges: Sequence[tuple[str, str]]) -> dict[str, dict]:
    """The JSON files of the directory by name. `merges` are those of its tokenizer."""
    text = {
        "model_type": "gemma3_text",
        "hidden_size": sizes.hidden,
        "head_dim": sizes.head_dim,
        "intermediate_size": 2 * sizes.hidden,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "num_hidden_layers": sizes.layers,
        "query_pre_attn_scalar": sizes.head_dim,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 64,  # Shorter than long prompts, so that it has an effect.
        "layer_types": ["full_attention" if (i + 1) % 3 == 0 else "sliding_attention" for i in range(sizes.layers)],
        "vocab_size": VOCABULARY,
    }
    config = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "boi_token_index": 7,
        "eoi_token_index": 8,
        "image_token_index": 9,
        "eos_token_id": [1, 6],
        "initializer_range": 0.02,
        "mm_tokens_per_image": 4,
        "torch_dtype": "bfloat16",
        "text_config": text,
        "vision_config": {
            **_VISION, "image_size": 28, "patch_size": 14, "model_type": "siglip_vision_model",
            "vision_use_head": False,
        },
    }  # fmt: skip
    named = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    images = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    return {
        "config.json": config,
        "generation_config.json": {"bos_token_id": 2, "eos_token_id": [1, 6], "pad_token_id": 0, "do_sample": True,
                                   "top_k": 64, "top_p": 0.95, "cache_implementation": "hybrid"},
        "tokenizer.json": _tokenizer_json(merges),
        "tokenizer_config.json": {
            "add_bos_token": True, "add_eos_token": False, **named, **images, "clean_up_tokenization_spaces": False,
            "model_max_length": 131072, "padding_side": "left", "processor_class": "Gemma3Processor",
            "tokenizer_class": "GemmaTokenizer", "spaces_between_special_tokens": False,
        },
        "special_tokens_map.json": {**named, **images},
        "processor_config.json": {"image_seq_length": 4, "processor_class": "Gemma3Processor"},
        "preprocessor_config.json": {
            "do_convert_rgb": None, "do_normalize": True, "do_pan_and_scan": None, "do_rescale": True,
            "do_resize": True, "image_mean": [0.5] * 3, "image_processor_type": "Gemma3ImageProcessor",
            "image_seq_length": 4, "image_std": [0.5] * 3, "processor_class": "Gemma3Processor", "resample": 2,
            "rescale_factor": 1 / 255, "size": {"height": 28, "width": 28},
        },
    }  # fmt: skip


# --- weights -----------------------------------------------------------------------------------------------------


def _draw_matrix(draw: Draw, key: str, n_out: int, n_in: int) -> None:
    draw.vector(f"{key}.weight", (n_out, n_in), 1 / math.sqrt(n_in))


def draw_embeddings(draw: Draw, sizes: GemmaSizes) -> None:
    """Draw a vector for each token. Gemma multiplies them by sqrt(hidden)."""
    _draw_matrix(draw, "language_model.model.embed_tokens", VOCABULARY, sizes.hidden)


def draw_layers(draw: Draw, sizes: GemmaSizes) -> None:
    """Draw the layers of the text model. Gemma stores norm weights as their difference from 1."""
    dim, hidden = sizes.hidden, 2 * sizes.hidden
    for layer in range(sizes.layers):
        block = f"language_model.model.layers.{layer}."
        for name in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            draw.vector(f"{block}{name}_layernorm.weight", (dim,), 0.2)
        for name, heads in (("q", sizes.heads), ("k", sizes.kv_heads), ("v", sizes.kv_heads)):
            _draw_matrix(draw, f"{block}self_attn.{name}_proj", heads * sizes.head_dim, dim)
        _draw_matrix(draw, f"{block}self_attn.o_proj", dim, sizes.heads * sizes.head_dim)
        for name in ("q", "k"):
            draw.vector(f"{block}self_attn.{name}_norm.weight", (sizes.head_dim,), 0.2)
        _draw_matrix(draw, f"{block}mlp.gate_proj", hidden, dim)
        _draw_matrix(draw, f"{block}mlp.up_proj", hidden, dim)
        _draw_matrix(draw, f"{block}mlp.down_proj", dim, hidden)
    draw.vector("language_model.model.norm.weight", (dim,), 0.2)


def draw_vision(draw: Draw, sizes: GemmaSizes) -> None:
    """Draw a vision tower just large enough for the class to load. Nothing uses it."""
    eye, top = _VISION["hidden_size"], "vision_tower.vision_model."
    draw.conv(f"{top}embeddings.patch_embedding", eye, 3, (14, 14))
    draw.vector(f"{top}embeddings.position_embedding.weight", (4, eye), 0.5)
    for layer in range(_VISION["num_hidden_layers"]):
        block = f"{top}encoder.layers.{layer}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            draw.linear(f"{block}self_attn.{name}", eye, eye)
        draw.linear(f"{block}mlp.fc1", _VISION["intermediate_size"], eye)
        draw.linear(f"{block}mlp.fc2", eye, _VISION["intermediate_size"])
        for name in ("layer_norm1", "layer_norm2"):
            draw.vector(f"{block}{name}.weight", (eye,), 0.1, 1.0)
            draw.vector(f"{block}{name}.bias", (eye,), 0.1)
    draw.vector(f"{top}post_layernorm.weight", (eye,), 0.1, 1.0)
    draw.vector(f"{top}post_layernorm.bias", (eye,), 0.1)
    draw.vector("multi_modal_projector.mm_input_projection_weight", (eye, sizes.hidden), 1 / math.sqrt(eye))
    draw.vector("multi_modal_projector.mm_soft_emb_norm.weight", (eye,), 0.2)
