"""The transformers of ltx_core and diffusers with the weights and inputs of ours, for comparison."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ltx_ray.checkpoints.diffusers_names import to_official
from ltx_ray.checkpoints.transformer_config import TransformerConfig
from ltx_ray.model.rope import audio_positions, video_positions
from ltx_ray.parallel.fp8 import FP8_MAX
from ltx_ray.records import AV
from ltx_ray.shapes import ClipShape
from scripts.bench import random_transformer

SIGMA = 0.7
#: The packages that each peer needs.
NEEDS = {"ltx-core": ("ltx_core", "einops"), "diffusers": ("diffusers",)}


@dataclass(frozen=True)
class Case:
    """A pass: the model (its checkpoint's `config`), the clip's shape, and the inputs. `sigma` is (1,) float32."""

    metadata: Mapping[str, Any]
    shape: ClipShape
    device: torch.device
    dtype: torch.dtype
    latents: AV[torch.Tensor]
    contexts: AV[torch.Tensor]
    sigma: torch.Tensor

    @classmethod
    def random(
        cls, metadata: Mapping[str, Any], shape: ClipShape, text: int, device: torch.device, dtype: torch.dtype
    ) -> Case:
        rng = torch.Generator(device).manual_seed(1)
        config = TransformerConfig.from_metadata(metadata["transformer"])

        def normal(tokens: int, width: int) -> torch.Tensor:
            return torch.randn((1, tokens, width), generator=rng, device=device, dtype=torch.bfloat16).to(dtype)

        streams, tokens = AV(config.video, config.audio), AV(shape.video_tokens, shape.audio_latents)
        return cls(
            metadata, shape, device, dtype,
            latents=streams.map(lambda s, n: normal(n, s.in_channels), tokens),
            contexts=streams.map(lambda s: normal(text, s.context_dim)),
            sigma=torch.tensor([SIGMA], device=device),
        )  # fmt: skip

    @property
    def config(self) -> TransformerConfig:
        return TransformerConfig.from_metadata(self.metadata["transformer"])

    @property
    def positions(self) -> AV[torch.Tensor]:
        return AV(video_positions(self.shape, self.device), audio_positions(self.shape.audio_latents, self.device))


@dataclass(frozen=True)
class Peer:
    """A peer's model. `call(isolated)` returns the velocities of video and audio.

    `exact` holds these velocities in bfloat16, by `isolated`, when `call` computes in fp8.
    """

    side: str
    note: str
    model: nn.Module
    call: Callable[[bool], tuple[torch.Tensor, torch.Tensor]]
    exact: Mapping[bool, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)


def ltx_core(case: Case, fp8: frozenset[str], compiled: bool, levels: str) -> Peer:
    """The reference's LTXModel, with the layers named in `fp8` as its FP8Linear and the others in `case.dtype`."""
    model = ltx_core_model(case)
    from ltx_core.model.transformer.attention import attention_label

    label = attention_label(model.transformer_blocks[0].attn1.attention_function)
    call = ltx_core_call(model, case, levels)
    exact: dict[bool, tuple[torch.Tensor, torch.Tensor]] = {}
    largest: dict[str, torch.Tensor] = {}
    if fp8:
        with _record_largest_inputs(_peer_layers(model, fp8)) as largest:
            for isolated in (False, True):
                video, audio = call(isolated)
                exact[isolated] = video.cpu(), audio.cpu()
        _to_fp8(model, largest)
    if compiled:
        ltx_core_compiled(model)
    kind = f"{f'{len(largest)} layers FP8Linear' if fp8 else case.dtype}, {'compiled blocks' if compiled else 'eager'}"
    side = "ltx-core" + (" fp8" if fp8 else "") + (" compiled" if compiled else "")
    return Peer(side, f"{kind}, attention {label}, timesteps by {levels}", model, call, exact)


def ltx_core_model(case: Case) -> Any:
    """The reference's transformer with the case's weights, eager."""
    if case.device.type == "cuda":
        _name_fa3()
    from ltx_core.model.transformer import LTXModelConfigurator

    with torch.device("meta"):
        model = LTXModelConfigurator.from_metadata({"config": dict(case.metadata)}).eval()
    random_transformer.fill(model, case.device, case.dtype)
    return model


def ltx_core_compiled(model: nn.Module) -> None:
    """Compile the blocks as the reference's pipelines do."""
    from ltx_core.model.transformer.compiling import CompilationConfig, compile_transformer

    compile_transformer(model, CompilationConfig())


def ltx_core_call(model: Any, case: Case, levels: str) -> Callable[[bool], tuple[torch.Tensor, torch.Tensor]]:
    """isolated -> velocities. `levels`: a timestep for every "token", or "one" for all."""
    from ltx_core.guidance import perturbations as p
    from ltx_core.model.transformer import Modality

    shapes = {"token": case.latents.map(lambda x: (1, x.shape[1], 1)), "one": AV((1, 1, 1), (1, 1, 1))}[levels]

    def modality(latent: torch.Tensor, context: torch.Tensor, positions: torch.Tensor, shape: tuple) -> Any:
        timesteps = torch.ones(shape, device=case.device) * case.sigma
        return Modality(latent=latent, sigma=case.sigma, timesteps=timesteps, positions=positions, context=context)

    streams = case.latents.map(modality, case.contexts, case.positions, shapes)
    between_streams = (p.PerturbationType.SKIP_A2V_CROSS_ATTN, p.PerturbationType.SKIP_V2A_CROSS_ATTN)
    configs = {
        isolated: p.BatchedPerturbationConfig(
            [p.PerturbationConfig([p.Perturbation(kind, None) for kind in between_streams] if isolated else [])],
            model.num_blocks, case.device, case.dtype,
        )
        for isolated in (False, True)
    }  # fmt: skip

    def call(isolated: bool) -> tuple[torch.Tensor, torch.Tensor]:
        return model(streams.video, streams.audio, configs[isolated])

    return call


def _peer_layers(model: nn.Module, fp8: frozenset[str]) -> dict[str, nn.Linear]:
    """The layers that the peer stores in fp8: as ours but for the gates, whose input it would cast once more."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if name in fp8 and not name.endswith("to_gate_logits") and isinstance(layer, nn.Linear)
    }


@contextmanager
def _record_largest_inputs(layers: Mapping[str, nn.Linear]) -> Iterator[dict[str, torch.Tensor]]:
    """Layer name -> the largest magnitude of its inputs, recorded while the context is open."""
    found: dict[str, torch.Tensor] = {}

    def hook_of(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            largest = inputs[0].abs().amax()
            found[name] = torch.maximum(found.get(name, largest), largest)

        return hook

    hooks = [layer.register_forward_pre_hook(hook_of(name)) for name, layer in layers.items()]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _to_fp8(model: nn.Module, largest: Mapping[str, torch.Tensor]) -> None:
    """Replace these layers with the reference's FP8Linear, scaled for the largest inputs seen."""
    from ltx_core.quantization.fp8_scaled_mm import _linear_to_fp8linear, quantize_weight_to_fp8_per_tensor

    for name, largest_input in largest.items():
        parent, _, attribute = name.rpartition(".")
        layer = model.get_submodule(name)
        quantized = _linear_to_fp8linear(layer)
        weight, scale = quantize_weight_to_fp8_per_tensor(layer.weight.data)
        values = {
            "weight": weight,
            "weight_scale": scale,
            "input_scale": largest_input.float() / FP8_MAX,
            "bias": layer.bias,
        }
        for key, value in values.items():
            setattr(quantized, key, nn.Parameter(value.data, requires_grad=False))
        setattr(model.get_submodule(parent), attribute, quantized)


def diffusers(case: Case, fp8: frozenset[str], compiled: bool, levels: str) -> Peer:
    """diffusers' LTX2VideoTransformer3DModel, always in `case.dtype` and with one timestep for all tokens."""
    from diffusers import LTX2VideoTransformer3DModel as Model

    c = case.metadata["transformer"]
    same = (
        "in_channels", "out_channels", "num_attention_heads", "attention_head_dim", "cross_attention_dim",
        "audio_in_channels", "audio_out_channels", "audio_num_attention_heads", "audio_attention_head_dim",
        "audio_cross_attention_dim", "num_layers",
    )  # fmt: skip
    with torch.device("meta"):
        model: Any = Model(
            **{name: c[name] for name in same},
            gated_attn=True, cross_attn_mod=True, audio_gated_attn=True, audio_cross_attn_mod=True,
            rope_double_precision=True, rope_type="split", timestep_scale_multiplier=1000,
            cross_attn_timestep_scale_multiplier=1000, use_prompt_embeddings=False, perturbed_attn=True,
        )  # fmt: skip
    model.eval()
    random_transformer.fill(model, case.device, case.dtype, official=to_official)
    attention = _diffusers_attention(model) if case.device.type == "cuda" else "native"
    if compiled:
        model.compile_repeated_blocks()
    sigma, shape = case.sigma * 1000.0, case.shape

    def call(isolated: bool) -> tuple[torch.Tensor, torch.Tensor]:
        return model(
            hidden_states=case.latents.video, audio_hidden_states=case.latents.audio,
            encoder_hidden_states=case.contexts.video, audio_encoder_hidden_states=case.contexts.audio,
            timestep=sigma, audio_timestep=sigma, sigma=sigma, audio_sigma=sigma, use_cross_timestep=True,
            num_frames=shape.latent_frames, height=shape.latent_height, width=shape.latent_width,
            fps=shape.frame_rate, audio_num_frames=shape.audio_latents, isolate_modalities=isolated,
            return_dict=False,
        )  # fmt: skip

    kind = f"{case.dtype}, {'compiled blocks' if compiled else 'eager'}"
    return Peer("diffusers" + (" compiled" if compiled else ""), f"{kind}, attention {attention}", model, call)


def _diffusers_attention(model: Any) -> str:
    """Select FlashAttention-3 where it is installed, else cuDNN's attention."""
    _name_fa3()
    from diffusers.models import attention_dispatch

    if "flash_attn_interface" in sys.modules:
        # diffusers looks for the package flash_attn_3. PyPI's fa3-fwd has the one function that diffusers calls.
        attention_dispatch._CAN_USE_FLASH_ATTN_3 = True
        attention_dispatch.flash_attn_3_func = sys.modules["flash_attn_interface"].flash_attn_func
        name = "_flash_3"
    else:
        name = "_native_cudnn"
    model.set_attention_backend(name)
    return name


def _name_fa3() -> None:
    """Make PyPI's fa3-fwd importable under the name of a FlashAttention-3 that was built from source."""
    for name in _fa3_names():
        if importlib.util.find_spec(name):
            sys.modules["flash_attn_interface"] = importlib.import_module(name)
            return


def _fa3_names() -> Iterator[str]:
    # Its kernels need a Hopper GPU.
    if torch.cuda.get_device_capability()[0] == 9:
        yield from ("flash_attn_interface", "fa3_fwd_interface")


BUILDERS: Mapping[str, Callable[..., Peer]] = {"ltx-core": ltx_core, "diffusers": diffusers}
