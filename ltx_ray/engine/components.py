"""The parts around the transformer, loaded into diffusers' modules (docs/ltx-2.3.md#diffusers).

Every loader builds its module on the meta device and takes exactly the tensors of the module, cast to the run's dtype.
Official files (checkpoints/single_file.py) and directories in diffusers' layout (checkpoints/diffusers_layout.py) give
the same modules. A file that does not fit raises a ValueError that names it. codec.py runs the modules.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch

from ltx_ray.checkpoints.diffusers_layout import Component, refuse_unknown
from ltx_ray.checkpoints.parts import (
    AUDIO_SIZES,
    UPSAMPLER_SIZES,
    VIDEO_SIZES,
    VOCODER_SIZES,
    check_sizes,
    layout_of,
)
from ltx_ray.checkpoints.safetensors import TensorInfo
from ltx_ray.engine.codec import ConnectorAttention, DiffusersModule, GroupNorm, ReflectingConv3d, RoundedRope
from ltx_ray.engine.fused_decoder import fuse_decoder
from ltx_ray.records import UnfitNode

Path = str | os.PathLike[str]
Device = str | torch.device

#: The two halves of a VAE.
_HALVES = ("encoder", "decoder")


def load_connectors(path: Path, dtype: torch.dtype, device: Device) -> DiffusersModule:
    """Text projections and connectors as diffusers' LTX2TextConnectors, run by codec.encode_connectors."""
    from diffusers.pipelines.ltx2 import LTX2TextConnectors

    part = layout_of(path).connectors(str(path))
    return _materialized(rounding_connectors(_load(LTX2TextConnectors, part, "text connectors", dtype, device), dtype))


def rounding_connectors(module: DiffusersModule, dtype: torch.dtype) -> DiffusersModule:
    """The `module`, an LTX2TextConnectors, made to rotate in `dtype` as the reference does."""
    for connector in (module.video_connector, module.audio_connector):
        connector.rope = RoundedRope(connector.rope, dtype)
        for block in connector.transformer_blocks:
            block.attn1.set_processor(ConnectorAttention())
    return module


def load_video_vae(
    path: Path, dtype: torch.dtype, device: Device, part: str = "decoder", fused: bool = False
) -> DiffusersModule:
    """The video VAE as diffusers' AutoencoderKLLTX2Video; `part` is "decoder", "encoder" or "both".

    A half that `part` leaves out is not read, and is None in the module. Both parts have latents_mean and latents_std.
    `fused`: the decoder computes as in fused_decoder.py. Raises UnfitNode where that is impossible.
    """
    from diffusers import AutoencoderKLLTX2Video

    if part not in (*_HALVES, "both"):
        raise ValueError(f"part is {part!r}; legal is 'decoder', 'encoder' or 'both'")
    without = [half for half in _HALVES if part not in (half, "both")]
    component = layout_of(path).video_vae(str(path))
    what = f"video VAE ({part})"
    vae = _materialized(_load(AutoencoderKLLTX2Video, component, what, dtype, device, without, VIDEO_SIZES))
    for name, conv in list(vae.named_modules()):
        if type(conv) is torch.nn.Conv3d and conv.padding_mode == "reflect":
            _replace(vae, name, conv, _reflecting(conv))
    if fused and vae.decoder is not None:
        try:
            fuse_decoder(vae.decoder)
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except Exception as error:
            raise UnfitNode(
                f"decoding in fused steps needs Triton and a C compiler on every GPU node "
                f"({type(error).__name__}: {error}); legal: --compile off"
            ) from error
    return vae


def latent_stats(path: Path, which: str = "video") -> tuple[torch.Tensor, torch.Tensor]:
    """(mean, std) of the VAE's latents, each (128,), in the file's dtype on the CPU.

    `which` is "video" (by channel) or "audio" (by packed index, channel * 16 + bin).
    """
    if which not in ("video", "audio"):
        raise ValueError(f"which is {which!r}; legal is 'video' or 'audio'")
    layout = layout_of(path)
    part = layout.video_vae(str(path)) if which == "video" else layout.audio_vae(str(path))
    names = ("latents_mean", "latents_std")
    _refuse(part.path, f"{which} statistics", "missing keys", set(names) - part.tensors.keys())
    state = _read_tensors({name: part.tensors[name] for name in names}, None, "cpu")
    return state["latents_mean"], state["latents_std"]


def load_audio_decoder(path: Path, dtype: torch.dtype, device: Device) -> DiffusersModule:
    """The decoder of the audio VAE as diffusers' AutoencoderKLLTX2Audio, whose encoder is None."""
    from diffusers import AutoencoderKLLTX2Audio

    part = layout_of(path).audio_vae(str(path))
    what = "audio VAE (decoder)"
    return _materialized(_load(AutoencoderKLLTX2Audio, part, what, dtype, device, ["encoder"], AUDIO_SIZES))


def load_vocoder(path: Path, dtype: torch.dtype, device: Device) -> DiffusersModule:
    """The vocoder with bandwidth extension as diffusers' LTX2VocoderWithBWE.

    Its weights are rounded to `dtype` and held in float32, because v1.2.0 stores them in the run's dtype and computes
    in float32 (its comment: bfloat16 degrades the spectrum by 40-90 %).
    """
    from diffusers.pipelines.ltx2 import LTX2VocoderWithBWE
    from diffusers.pipelines.ltx2.vocoder import UpSample1d

    part = layout_of(path).vocoder(str(path))
    module = _load(LTX2VocoderWithBWE, part, "vocoder", dtype, device, sizes=VOCODER_SIZES).float()
    # The resampler's filter is computed and not stored, so the one built on the meta device has no values.
    ratio = module.config.output_sampling_rate // module.config.input_sampling_rate
    resampler = UpSample1d(ratio=ratio, window_type="hann", persistent=False)
    resampler.filter = resampler.filter.to(device=device, dtype=torch.float32)
    module.resampler = resampler
    return _materialized(module)


def load_upsampler(path: Path, dtype: torch.dtype, device: Device) -> DiffusersModule:
    """The latent upsampler as diffusers' LTX2LatentUpsamplerModel."""
    from diffusers.pipelines.ltx2 import LTX2LatentUpsamplerModel

    part = layout_of(path).upsampler(str(path))
    module = _load(LTX2LatentUpsamplerModel, part, "latent upsampler", dtype, device, sizes=UPSAMPLER_SIZES)
    for name, norm in list(module.named_modules()):
        if type(norm) is torch.nn.GroupNorm:
            _replace(module, name, norm, GroupNorm(norm.num_groups, norm.num_channels, norm.eps, device="meta"))
    return _materialized(module)


# --- filling a module --------------------------------------------------------------------------------------------


def _load(
    cls: Any,
    part: Component,
    what: str,
    dtype: torch.dtype,
    device: Device,
    without: Iterable[str] = (),
    sizes: Mapping[str, int] = MappingProxyType({}),
) -> Any:
    """A `cls` filled with the part's tensors, ready for inference. Its parts `without` are None and not read.

    `sizes` are the values of its settings with which clips are as long and as large as planned.
    """
    arguments = inspect.signature(cls).parameters
    refuse_unknown(part, set(arguments))
    with torch.device("meta"):
        module = cls(**{field: value for field, value in part.config.items() if field in arguments})
    # A VAE computes its factors where its config does not state them.
    check_sizes(part.path, what, sizes, lambda name: vars(module).get(name, module.config.get(name)))
    for name in without:
        setattr(module, name, None)
    found = {name: info for name, info in part.tensors.items() if name.split(".")[0] not in without}
    expected = module.state_dict()
    _refuse(part.path, what, "missing keys", expected.keys() - found.keys())
    _refuse(part.path, what, "unexpected keys", found.keys() - expected.keys())
    _refuse(
        part.path,
        what,
        "keys of another shape than the config says",
        (
            f"{name} {info.shape} instead of {tuple(expected[name].shape)}"
            for name, info in found.items()
            if info.shape != expected[name].shape
        ),
    )
    module.load_state_dict(_read_tensors(found, dtype, device), strict=True, assign=True)
    return module.requires_grad_(False).eval()


def _replace(module: DiffusersModule, name: str, old: torch.nn.Module, new: torch.nn.Module) -> None:
    """Put `new` in the place of `old`, which `module` has under `name`, with its tensors."""
    new.load_state_dict(old.state_dict(), assign=True)
    module.set_submodule(name, new.requires_grad_(False).eval())


def _reflecting(conv: DiffusersModule) -> ReflectingConv3d:
    return ReflectingConv3d(
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups,
        conv.bias is not None, conv.padding_mode, "meta",
    )  # fmt: skip


def _materialized(module: DiffusersModule) -> DiffusersModule:
    """The module, after a check that nothing was left on the meta device, such as a buffer that no file holds."""
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        assert not tensor.is_meta, name
    return module


def _refuse(path: str, what: str, problem: str, keys: Iterable[str]) -> None:
    """Raise ValueError naming the first ten `keys`, when there are any."""
    keys = sorted(keys)
    if keys:
        shown = ", ".join(keys[:10]) + (", …" if len(keys) > 10 else "")
        raise ValueError(f"{path}: {what}: {len(keys)} {problem}: {shown}")


def _open(path: str) -> Any:
    from safetensors import safe_open

    return safe_open(path, framework="pt", device="cpu")


def _read_tensors(
    tensors: Mapping[str, TensorInfo], dtype: torch.dtype | None, device: Device
) -> dict[str, torch.Tensor]:
    """The tensors from their files, as `dtype` (None: that of the file) on `device`."""
    state = {}
    for path in {info.path for info in tensors.values()}:
        with _open(path) as file:
            for name, info in tensors.items():
                if info.path == path:
                    state[name] = file.get_tensor(info.key).to(device=device, dtype=dtype)
    return state
