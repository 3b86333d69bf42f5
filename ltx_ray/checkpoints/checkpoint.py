"""Model files checked by their headers, before any actor starts. No torch.

A wrong generation, a missing part or a truncated download is a ValueError here.
"""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from ltx_ray.checkpoints import diffusers_layout
from ltx_ray.checkpoints.model_paths import is_file, is_folder, names, open_binary, size
from ltx_ray.checkpoints.safetensors import SafetensorsHeader, TensorInfo, listed, read_header
from ltx_ray.checkpoints.transformer_config import TransformerConfig
from ltx_ray.checkpoints.transformer_keys import (
    AUDIO_CONNECTOR_PREFIX,
    BLOCKS,
    CONNECTOR_PREFIXES,
    TRANSFORMER_PREFIX,
    VIDEO_CONNECTOR_PREFIX,
    transformer_shapes,
)
from ltx_ray.storage.file_kinds import HEAD_BYTES, named_kind
from ltx_ray.storage.locations import join

SUPPORTED_GENERATION = (2, 3)
_LEGAL_GENERATION = "legal: 2.3.x (LTX-2.0 and LTX-2.5 are other architectures)"
#: Dtypes of a transformer's tensors.
_PLAIN_DTYPES = ("BF16", "F16", "F32", "F64")
#: Dtypes of prequantized tensors: the values are to be multiplied by the tensor `<name>_scale`, if there is one.
_QUANTIZED_DTYPES = ("F8_E4M3", "F8_E5M2")
_INPUT_SCALE = ".input_scale"
_SCALES = (".weight_scale", ".bias_scale", _INPUT_SCALE)
#: Files of which each tells transformers which tokens begin and pad a text. The last is that of Gemma's weights.
_SPECIAL_TOKENS = ("tokenizer_config.json", "special_tokens_map.json", "config.json")
#: Parts that a single file must hold, by the prefix of their keys.
PIECES = {
    f"{TRANSFORMER_PREFIX}{BLOCKS}.": "transformer",
    VIDEO_CONNECTOR_PREFIX: "video text connector",
    AUDIO_CONNECTOR_PREFIX: "audio text connector",
    "text_embedding_projection.": "text projection",
    "vae.decoder.": "video decoder",
    "vae.encoder.": "video encoder",
    "vae.per_channel_statistics.": "statistics of the video latents",
    "audio_vae.decoder.": "audio decoder",
    "vocoder.vocoder.": "vocoder",
    "vocoder.bwe_generator.": "bandwidth extension of the vocoder",
}


@dataclass(frozen=True)
class Checkpoint:
    """A model, as its files' headers describe it.

    `tensors` are the transformer's without the connectors, by official name without `TRANSFORMER_PREFIX`. They may be
    in several files. `size` is in bytes.
    """

    path: str
    model_version: str
    transformer: TransformerConfig
    tensors: Mapping[str, TensorInfo]
    size: int

    @cached_property
    def linear_layers(self) -> dict[str, tuple[int, int]]:
        """(out features, in features) of the transformer's linear layers, by module name."""
        return {
            name[: -len(".weight")]: (info.shape[0], info.shape[1])
            for name, info in self.tensors.items()
            if name.endswith(".weight") and len(info.shape) == 2
        }


def parse_generation(model_version: str) -> tuple[int, ...]:
    """The leading numbers of a `model_version` such as "2.3.1" or "2.3-rc1"; empty when there are none."""
    match = re.match(r"\d+(?:\.\d+)*", model_version.strip())
    return tuple(int(part) for part in match.group().split(".")) if match else ()


def open_checkpoint(path: str) -> Checkpoint:
    """Open an official single file, or a directory in diffusers' layout.

    Raises ValueError when it is of another generation or architecture, incomplete, or quantized but not in fp8.
    """
    checkpoint = _open_directory(path) if is_folder(path) else _open_file(path)
    legal = (*_PLAIN_DTYPES, *_QUANTIZED_DTYPES)
    quantized = [info for info in checkpoint.tensors.values() if info.dtype not in legal]
    if quantized:
        raise ValueError(
            f"{path}: {len(quantized)} of the transformer's tensors are quantized, such as {quantized[0].key} "
            f"({quantized[0].dtype}); legal: {', '.join(legal)}"
        )
    return checkpoint


def _open_file(path: str) -> Checkpoint:
    header = read_header(path)
    _refuse_lora(header, "an LTX checkpoint")
    version = header.metadata.get("model_version", "")
    generation = parse_generation(version)
    if not version and "transformer" not in header.config:
        raise ValueError(
            f"{path}: not an LTX checkpoint (its metadata has neither model_version nor config.transformer); "
            f"legal: an official LTX-2.3 single file such as ltx-2.3-22b-dev.safetensors"
        )
    if generation[:2] != SUPPORTED_GENERATION:
        raise ValueError(f"{path}: model_version is {version or 'not given'!r}; {_LEGAL_GENERATION}")
    for prefix, piece in PIECES.items():
        if not any(name.startswith(prefix) for name in header.tensors):
            raise ValueError(f"{path}: has no {piece} (no keys under {prefix}); legal: a whole single file")
    config = TransformerConfig.from_metadata(header.config.get("transformer", {}), path)
    return Checkpoint(path, version, config, _transformer_tensors(header), header.size)


def _refuse_lora(header: SafetensorsHeader, wanted: str) -> None:
    """Raise ValueError when the file, which should be `wanted`, is a LoRA."""
    if any(part in name for name in header.tensors for part in (".lora_A.", ".lora_down.", ".lora.down.")):
        raise ValueError(f"{header.path}: not {wanted} but a LoRA; legal: --lora or --distilled-lora for this file")


def _open_directory(path: str) -> Checkpoint:
    transformer = join(path, "transformer")
    if not is_file(join(transformer, "config.json")):
        files = [name for name in names(path) if name.endswith(".safetensors")]
        instead = f"name one of its files ({', '.join(files[:10])}), or " if files else ""
        raise ValueError(
            f"{path}: is a directory without transformer/config.json; legal: {instead}an LTX-2.3 directory as "
            f"diffusers writes it"
        )
    config = diffusers_layout.read_config(transformer)
    diffusers_layout.check_class(transformer, config, diffusers_layout.COMPONENTS["transformer"])
    version, why = diffusers_layout.generation(config)
    if parse_generation(version) != SUPPORTED_GENERATION:
        raise ValueError(f"{path}: model_version is {version!r} (transformer/config.json: {why}); {_LEGAL_GENERATION}")
    parts = diffusers_layout.read_model(path)
    official = diffusers_layout.official_config(parts["transformer"], parts["connectors"])
    return Checkpoint(
        path,
        version,
        TransformerConfig.from_metadata(official, path),
        diffusers_layout.official_tensors(parts["transformer"]),
        sum(info.nbytes for part in parts.values() for info in part.tensors.values()),
    )


def _transformer_tensors(header: SafetensorsHeader) -> dict[str, TensorInfo]:
    tensors = {
        name[len(TRANSFORMER_PREFIX) :]: info
        for name, info in header.tensors.items()
        if name.startswith(TRANSFORMER_PREFIX) and not name.startswith(CONNECTOR_PREFIXES)
    }
    scales = {name for name in tensors if name.endswith(_SCALES)}
    for name in scales:
        scale = tensors.pop(name)
        if name.endswith(_INPUT_SCALE):
            continue  # a static scale of the layer's inputs, which are measured row by row here
        quantized = name[: -len("_scale")]
        if quantized not in tensors or math.prod(scale.shape) != 1:
            raise ValueError(
                f"{header.path}: {scale.key} has shape {scale.shape} and belongs to {quantized}; legal: one number, "
                f"for a tensor in the file"
            )
        tensors[quantized] = replace(tensors[quantized], scale=scale)
    return tensors


def check_upsampler(path: str) -> None:
    """Raise ValueError unless `path` is a spatial x2 latent upsampler, as a file or in diffusers' layout."""
    if is_folder(path):
        part = diffusers_layout.read_upsampler(path)
        config, tensors, scale = part.config, part.tensors, part.config.get("rational_spatial_scale", 2.0)
    else:
        header = read_header(path)
        _refuse_lora(header, "a spatial upsampler x2")
        config, tensors, scale = header.config, header.tensors, header.config.get("spatial_scale", 2.0)
    doubles = config.get("spatial_upsample", True) and not config.get("temporal_upsample", False)
    if "initial_conv.weight" not in tensors or not doubles or scale != 2.0:
        example = "ltx-2.3-spatial-upscaler-x2-1.1.safetensors"
        raise ValueError(f"{path}: not a spatial upsampler x2; legal: such as {example}")


def gemma_folders(root: str) -> tuple[str, str]:
    """Folders of Gemma's weights and its tokenizer in `root`, a Gemma directory or one in diffusers' layout."""
    inside = join(root, diffusers_layout.TEXT_ENCODER)
    if is_folder(inside) and not is_file(join(root, "config.json")):
        return inside, join(root, diffusers_layout.TOKENIZER)
    return root, root


def check_gemma(root: str) -> None:
    """Raise ValueError unless `root` holds a Gemma 3 model and its tokenizer, complete as far as headers tell."""
    legal = "legal: a Gemma 3 model directory (gemma3), or a diffusers directory with text_encoder/ and tokenizer/"
    model, tokenizer = gemma_folders(root)
    if not is_file(join(model, "config.json")):
        raise ValueError(f"--gemma-root: {model}, has no config.json; {legal}")
    whole, pieces = (join(tokenizer, name) for name in ("tokenizer.json", "tokenizer.model"))
    # Of the second alone, transformers makes the first with a package that ltx-ray does not install.
    makes_it = is_file(pieces) and importlib.util.find_spec("sentencepiece") is not None
    if not is_file(whole) and not makes_it:
        raise ValueError(f"--gemma-root: {tokenizer}, has no tokenizer.json; {legal}")
    special = [path for name in _SPECIAL_TOKENS if is_file(path := join(tokenizer, name))]
    if not special:
        raise ValueError(f"--gemma-root: {tokenizer}, has no tokenizer_config.json; {legal}")
    for path in special:
        diffusers_layout.read_json(path)
    for path in filter(is_file, (whole, pieces)):
        with open_binary(path) as file:
            if kind := named_kind(file.read(HEAD_BYTES)):
                raise ValueError(f"{path}: not a tokenizer but {kind}")
    if is_file(whole) and not _ends_like_json(whole):
        raise ValueError(f"{whole}: is not JSON (its end is missing); fetch it again")
    config = diffusers_layout.read_config(model)
    kind = str(config.get("model_type"))
    if kind != "gemma3":  # gemma3_text (without the vision tower) and gemma3n have other classes
        raise ValueError(f"--gemma-root: {model}, is a {kind} (LTX-2.5 takes Gemma 4); {legal}")
    diffusers_layout.check_plain(model, config)
    single = join(model, "model.safetensors")
    if is_file(single):  # transformers prefers it to an index, whereas diffusers prefers the index
        read_header(single)
    else:
        diffusers_layout.read_weights(model, "model.safetensors")


def _ends_like_json(path: str) -> bool:
    """Whether a file of 30 MB, which is not read for this, ends as a JSON object does."""
    with open_binary(path) as file:
        file.seek(max(0, size(path) - HEAD_BYTES))
        return file.read().rstrip().endswith(b"}")


def held_by(checkpoint_path: str) -> dict[str, str]:
    """Default paths, by option name, of the other models that a checkpoint in diffusers' layout contains."""
    held: dict[str, str] = {}
    if not is_folder(checkpoint_path):
        return held
    if is_folder(join(checkpoint_path, diffusers_layout.TEXT_ENCODER)):
        held["gemma_root"] = checkpoint_path
    if is_folder(upsampler := join(checkpoint_path, diffusers_layout.UPSAMPLER)):
        held["spatial_upsampler_path"] = upsampler
    return held


def check_transformer(checkpoint: Checkpoint) -> None:
    """Raise ValueError unless the transformer's tensors are those of its config, listing ten of each kind, and the text
    is as wide as each stream: so wide do the connectors make it, and rotary tables rely on it."""
    config = checkpoint.transformer
    for field, stream in (("cross_attention_dim", config.video), ("audio_cross_attention_dim", config.audio)):
        if stream.context_dim != stream.dim:
            raise ValueError(
                f"{checkpoint.path}: config.transformer.{field} is {stream.context_dim}; legal: {stream.dim}, "
                f"the heads times the width of one"
            )
    expected, found = transformer_shapes(checkpoint.transformer), checkpoint.tensors
    other = [name for name in expected.keys() & found.keys() if found[name].shape != expected[name]]
    problems = (
        listed("missing", expected.keys() - found.keys())
        + listed("unexpected", found.keys() - expected.keys())
        + listed("of another shape", [f"{n} {found[n].shape} instead of {expected[n]}" for n in other])
    )
    if problems:
        raise ValueError(f"{checkpoint.path}: the transformer's keys do not fit its config: {'; '.join(problems)}")


def check_parallel(
    checkpoint: Checkpoint,
    tp: int,
    stage2_tp: int | None = None,
    sequence_parallel: int = 1,
    stage1_sequence_parallel: int = 1,
) -> None:
    """Raise ValueError unless the attention heads divide evenly over the ranks of both stages."""
    heads = checkpoint.transformer.video.heads
    second = tp if stage2_tp is None else stage2_tp
    for flag, value, over, ranks in (
        ("--tp", tp, "", 1),
        ("--stage2-tp", second, "", 1),
        ("--sequence-parallel", sequence_parallel, "--stage2-tp", second),
        ("--stage1-sequence-parallel", stage1_sequence_parallel, "--tp", tp),
    ):
        if value < 1 or heads % (value * ranks):
            left = heads // ranks
            legal = [n for n in range(1, left + 1) if left % n == 0]
            of = f" over {over} {ranks}" if left != heads else ""
            raise ValueError(
                f"{flag}: {value}, legal: a divisor of the {heads} attention heads of {checkpoint.path}{of}: {legal}"
            )
