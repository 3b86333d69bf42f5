"""The toy's text encoder: a Gemma 3 directory with a tokenizer for any language, configurations and weights."""

from __future__ import annotations

import math
from itertools import pairwise

from ltx_ray.toy.config import ToyShape
from ltx_ray.toy.weights import Draw

_SPECIALS = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>",
             "<end_of_image>", "<image_soft_token>")  # fmt: skip
_VOCAB = 1024
_VISION = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1}
_CORPUS = """a woman walks slowly through the old market while the camera follows her from behind in soft morning
light the camera pans across a wide mountain valley with clouds moving over the snow a man in a red coat is speaking
to the crowd and the sound of rain is heard in the background close up of hands playing a piano in a dark room with
warm light two children are running along the beach at sunset with waves and seagulls a small dog is sleeping on the
wooden floor near the window a city street at night with neon signs and cars passing quickly an aerial view of the
river and the forest in autumn with birds singing a cook is cutting vegetables in a bright kitchen and talking the
train is leaving the station as people are waving blurry out of focus low quality distorted motion static noise music
voice whisper laughing singing dancing falling flying water fire smoke wind sky ground blue green yellow white black"""


def _train_bpe(words: list[str], size: int) -> list[tuple[str, str]]:
    """Up to `size` merges of byte-pair encoding over words: the most frequent pair first, ties alphabetically."""
    counts: dict[tuple[str, ...], int] = {}
    for word in words:
        key = tuple("▁" + word)
        counts[key] = counts.get(key, 0) + 1
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


def _tokenizer_json() -> dict:
    """A tokenizer.json like Gemma's: spaces become U+2581, and characters without a token become their bytes."""
    pieces = [*_SPECIALS, *(f"<0x{b:02X}>" for b in range(256)), "▁", "\n", *(chr(c) for c in range(33, 127))]
    known = set(pieces)
    merges = []
    for pair in _train_bpe(_CORPUS.split(), _VOCAB):
        joined = "".join(pair)
        if len(pieces) + (joined not in known) > _VOCAB:
            break
        merges.append(list(pair))
        if joined not in known:
            known.add(joined)
            pieces.append(joined)
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
            "merges": merges,
        },
    }  # fmt: skip


def files(s: ToyShape) -> dict[str, dict]:
    """The JSON files of the Gemma directory by name."""
    text = {
        "model_type": "gemma3_text",
        "hidden_size": s.gemma_hidden,
        "head_dim": s.gemma_hidden // s.gemma_heads,
        "intermediate_size": 2 * s.gemma_hidden,
        "num_attention_heads": s.gemma_heads,
        "num_key_value_heads": s.gemma_kv_heads,
        "num_hidden_layers": s.gemma_layers,
        "query_pre_attn_scalar": s.gemma_hidden // s.gemma_heads,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 64,  # Shorter than long prompts, so that it has an effect.
        "layer_types": ["full_attention" if (i + 1) % 3 == 0 else "sliding_attention" for i in range(s.gemma_layers)],
        "vocab_size": _VOCAB,
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
        "tokenizer.json": _tokenizer_json(),
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


def draw_weights(draw: Draw, s: ToyShape) -> None:
    """Draw the text model, and a vision tower just large enough for the class to load."""
    dim, head_dim, hidden = s.gemma_hidden, s.gemma_hidden // s.gemma_heads, 2 * s.gemma_hidden

    def matrix(key: str, n_out: int, n_in: int, gain: float = 1.0) -> None:
        draw.vector(f"{key}.weight", (n_out, n_in), gain / math.sqrt(n_in))

    # Gemma multiplies embeddings by sqrt(dim) and stores norm weights as their difference from 1.
    matrix("language_model.model.embed_tokens", _VOCAB, dim)
    for layer in range(s.gemma_layers):
        block = f"language_model.model.layers.{layer}."
        for name in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            draw.vector(f"{block}{name}_layernorm.weight", (dim,), 0.2)
        for name, heads in (("q", s.gemma_heads), ("k", s.gemma_kv_heads), ("v", s.gemma_kv_heads)):
            matrix(f"{block}self_attn.{name}_proj", heads * head_dim, dim)
        matrix(f"{block}self_attn.o_proj", dim, s.gemma_heads * head_dim)
        for name in ("q", "k"):
            draw.vector(f"{block}self_attn.{name}_norm.weight", (head_dim,), 0.2)
        matrix(f"{block}mlp.gate_proj", hidden, dim)
        matrix(f"{block}mlp.up_proj", hidden, dim)
        matrix(f"{block}mlp.down_proj", dim, hidden)
    draw.vector("language_model.model.norm.weight", (dim,), 0.2)

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
    draw.vector("multi_modal_projector.mm_input_projection_weight", (eye, dim), 1 / math.sqrt(eye))
    draw.vector("multi_modal_projector.mm_soft_emb_norm.weight", (eye,), 0.2)
