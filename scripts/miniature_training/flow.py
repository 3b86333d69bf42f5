"""Flow matching of the miniature's DiT: its modules, their initial weights, and the loss of a batch.

The modules are those of the engine, and on a GPU they compute in bfloat16 as the engine does. The weights are float32.

The DiT neither reads nor writes the latent channels that the VAEs do not use. Its first layers have zeros there, and so
have its last, so that it predicts a velocity of 0. A sampler then leaves the noise of these channels as it is. They
cannot be predicted: their velocity is their noise, and a DiT narrower than the latents cannot carry that through. For
guidance this means that its rescaling, which compares standard deviations over all channels, changes less than with 128
used ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch.func import functional_call

from ltx_ray.checkpoints.transformer_keys import CROSS_ROWS, K_NORM, Q_NORM
from ltx_ray.engine.codec import ConnectorAttention
from ltx_ray.miniature import export
from ltx_ray.miniature.config import ACTIVE_AUDIO, ACTIVE_VIDEO, LATENT_CHANNELS
from ltx_ray.model.attention import Attention
from ltx_ray.model.block import STREAM_NAMES, AVBlock
from ltx_ray.model.rope import RopeTable, audio_positions, video_positions
from ltx_ray.model.transformer import Modality, Perturbation, Transformer
from ltx_ray.records import AV
from ltx_ray.shapes import ClipShape
from scripts.miniature_training.prompts import TEXT_TOKENS

ACTIVE = AV(ACTIVE_VIDEO, ACTIVE_AUDIO)
#: Initial gates of the residual branches, norm weights of queries and keys in attention to the text, and size of the
#: part of a query there that turns away from the registers.
_GATE, _TEXT_NORM, _AVERSION = 0.3, 1.4, 2.0
#: Weight of the first audio latent in the loss. It says little but that the sound begins here, and its numbers are ten
#: times as large as those of all others.
FIRST_SOUND_WEIGHT = 0.1

#: Rotary tables of both streams, as Transformer.ropes gives them.
Ropes = AV[tuple[RopeTable, RopeTable]]


@dataclass(frozen=True)
class NoisyBatch:
    """Clips at noise levels. B is a multiple of the number of prompts P; clips of one prompt follow each other.

    latents and noise: used channels (B, T, C) float32; prompt_sigma (P,): the noise level of all clips of a prompt;
    held (B,): the denoise mask of the tokens in the first latent frame, 1 where they are free, None when they are in
    all clips; hidden (P, TEXT_TOKENS, F) and mask (P, TEXT_TOKENS) of the prompts.
    """

    latents: AV[torch.Tensor]
    noise: AV[torch.Tensor]
    prompt_sigma: torch.Tensor
    hidden: torch.Tensor
    mask: torch.Tensor
    held: torch.Tensor | None = None

    @property
    def clips_per_prompt(self) -> int:
        return len(self.latents.video) // len(self.hidden)

    @property
    def sigma(self) -> torch.Tensor:
        """The noise levels (B,) of the clips."""
        return self.of_clips(self.prompt_sigma)

    def of_clips(self, of_prompts: torch.Tensor) -> torch.Tensor:
        """(P, ...) -> (B, ...)."""
        return of_prompts[:, None].expand(-1, self.clips_per_prompt, *of_prompts.shape[1:]).flatten(0, 1)


class TextAndDit(torch.nn.Module):
    """Text projections, connectors and transformer."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.transformer: Transformer
        self.connectors: Any = export.new_connectors(dtype)
        for connector in (self.connectors.video_connector, self.connectors.audio_connector):
            connector.rope = _SharedRope(connector.rope)
            for block in connector.transformer_blocks:
                block.attn1.set_processor(_MasklessAttention())
        self.transformer = Transformer(export.transformer_config())
        self._shared_text = _SharedText()
        for block in self.transformer.blocks:
            for names in STREAM_NAMES:
                self._shared_text.hook(block.get_submodule(names.text_attention))
        initialise(self.connectors, self.transformer)
        self.requires_grad_(True)

    def contexts(self, hidden: torch.Tensor, mask: torch.Tensor) -> AV[torch.Tensor]:
        """Contexts (P, TEXT_TOKENS, D) of prompts' hidden states (P, TEXT_TOKENS, F) and mask (P, TEXT_TOKENS)."""
        video, audio, _ = self._rounded(self.connectors)(hidden.to(self.dtype), mask)
        return AV(video, audio)

    def velocities(
        self, inputs: AV[Modality], perturbation: Perturbation, clips_per_prompt: int = 1
    ) -> AV[torch.Tensor]:
        """Velocities (B, T, C) of the used channels, in the modules' dtype.

        `clips_per_prompt` clips that follow each other have the same context and noise level, and only the context of
        the first one is read.
        """
        with self._shared_text.between(clips_per_prompt):
            found = self._rounded(self.transformer)(inputs, perturbation)
        return found.map(lambda x, active: x[..., :active], ACTIVE)

    def _rounded(self, module: Any) -> Any:
        """`module` with its weights rounded to the modules' dtype."""
        if self.dtype == torch.float32:
            return module
        weights = {name: weight.to(self.dtype) for name, weight in module.named_parameters()}
        return lambda *arguments: functional_call(module, weights, arguments)

    @torch.no_grad()
    def prepare(self, hidden: torch.Tensor, mask: torch.Tensor) -> None:
        """Turn the queries for the text away from the registers, which outnumber the words of a prompt by far.

        Otherwise the words would hardly change what a query gets, nor would their gradients.
        """
        contexts = self.contexts(hidden, mask).map(lambda x: x[:, -TEXT_TOKENS // 2 :].float().mean((0, 1)))
        for block in self.transformer.blocks:
            for names, register in zip(STREAM_NAMES, contexts, strict=True):
                attention = cast(Attention, block.get_submodule(names.text_attention))
                key = attention.to_k(register)
                attention.to_q.bias.copy_(-_AVERSION * F.normalize(key, dim=0) * math.sqrt(len(key)))


class _SharedRope(torch.nn.Module):
    """The rotary tables of a connector (1, heads, S, d / 2), which are the same for all prompts of a batch."""

    def __init__(self, rope: torch.nn.Module) -> None:
        super().__init__()
        self.rope = rope
        self._tables: dict[tuple[int, torch.device], tuple[torch.Tensor, torch.Tensor]] = {}

    def forward(self, batch: int, size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        key = size, torch.device(device)
        if key not in self._tables:
            self._tables[key] = self.rope(1, size, device=device)
        return self._tables[key]


class _MasklessAttention(ConnectorAttention):
    """Attention of a connector without its mask, which is 0 everywhere and keeps PyTorch from its fastest kernels."""

    def __call__(
        self,
        attn: Any,
        x: torch.Tensor,
        context: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        query_rotary_emb: Any = None,
        key_rotary_emb: Any = None,
    ) -> torch.Tensor:
        return super().__call__(attn, x, context, None, query_rotary_emb, key_rotary_emb)


class _SharedText:
    """Computes keys and values of the text once for several clips, which attend to them as one long sequence.

    The text's positions are several times as many as a small clip's tokens, and take most of a step. The attention has
    no mask and no rotary embedding, so the queries of all clips of a prompt can be one sequence. The context is
    modulated by the noise level, which therefore has to be the same for them.
    """

    def __init__(self) -> None:
        self._clips = 1

    @contextmanager
    def between(self, clips: int) -> Iterator[None]:
        """Share the text between `clips` clips that follow each other."""
        self._clips = clips
        try:
            yield
        finally:
            self._clips = 1

    def hook(self, attention: torch.nn.Module) -> None:
        """Make `attention` share the text."""
        attention.register_forward_pre_hook(self._join)
        attention.register_forward_hook(self._split)

    def _join(
        self, attention: torch.nn.Module, arguments: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x (P * n, T, D) -> (P, n * T, D) and context (P * n, S, D) -> (P, S, D) for n clips of a prompt."""
        x, context = arguments
        return x.unflatten(0, (-1, self._clips)).flatten(1, 2), context[:: self._clips]

    def _split(self, attention: torch.nn.Module, arguments: object, attended: torch.Tensor) -> torch.Tensor:
        """(P, n * T, D) -> (P * n, T, D)."""
        return attended.unflatten(1, (self._clips, -1)).flatten(0, 1)


# --- initial weights ---------------------------------------------------------------------------------------------


@torch.no_grad()
def initialise(connectors: Any, transformer: Transformer) -> None:
    """Random weights from torch's global generator.

    Linear layers keep the variance of their inputs. All clips are first modulated alike, and velocities are 0.
    """
    for module in (connectors, transformer):
        for name, weight in module.named_parameters():
            if weight.dim() < 2:
                is_norm = name.removesuffix(".weight").endswith((Q_NORM, K_NORM, "norm_q", "norm_k"))
                weight.fill_(1.0 if is_norm else 0.0)
            elif (
                name.endswith("to_gate_logits.weight") or "table" in name or name.endswith("adaln_single.linear.weight")
            ):
                weight.zero_()
            elif "registers" in name:
                weight.copy_(torch.randn(weight.shape[1]) + 0.2 * torch.randn(weight.shape))
            else:
                weight.normal_(0, 1 / math.sqrt(weight.shape[1]))
    for connector in (connectors.video_connector, connectors.audio_connector):
        for block in connector.transformer_blocks:
            # Queries and keys with a common part attend to near tokens, since rotary embedding turns far ones away.
            bias = torch.randn(block.attn1.to_q.bias.shape)
            block.attn1.to_q.bias.copy_(bias)
            block.attn1.to_k.bias.copy_(bias)
    for names, active in zip(STREAM_NAMES, ACTIVE, strict=True):
        transformer.get_submodule(names.patchify).get_parameter("weight")[:, active:] = 0
        transformer.get_submodule(names.patchify).get_parameter("weight").mul_(math.sqrt(LATENT_CHANNELS / active))
        transformer.get_submodule(names.proj_out).get_parameter("weight").zero_()
    for block in transformer.blocks:
        _initialise_block(block)


def _initialise_block(block: AVBlock) -> None:
    for names in STREAM_NAMES:
        block.get_parameter(names.table)[2::3] = _GATE
        block.get_parameter(names.cross_table)[CROSS_ROWS:] = _GATE
        for norm in (Q_NORM, K_NORM):
            block.get_submodule(f"{names.text_attention}.{norm}").get_parameter("weight").fill_(_TEXT_NORM)


def takes_muon(name: str) -> bool:
    """Whether Muon trains the weight matrix `name` of a TextAndDit: those of attention and feed-forward in blocks.

    Tables and registers are no matrices. The modulations and gates begin at 0, and the first and the last layer have
    unused channels, so steps that ignore the gradients' size would change them too fast.
    """
    matrix = ("to_q", "to_k", "to_v", "to_out.0", "proj", "net.2")
    return "transformer_blocks." in name and name.removesuffix(".weight").endswith(matrix)


# --- loss --------------------------------------------------------------------------------------------------------


def ropes_of(transformer: Transformer, shape: ClipShape, dtype: torch.dtype, device: str) -> Ropes:
    """Rotary tables of a stage of `shape`."""
    positions = AV(video_positions(shape, device), audio_positions(shape.audio_latents, device))
    return transformer.ropes(positions, dtype)


def denoise_mask(held: torch.Tensor, tokens: int, frame_tokens: int) -> torch.Tensor:
    """The denoise mask (B, tokens) of the video: `held` (B,) for the first latent frame's tokens, 1 for the others."""
    first = torch.arange(tokens, device=held.device) < frame_tokens
    return torch.where(first, held[:, None], 1.0)


def noisy_inputs(
    batch: NoisyBatch, contexts: AV[torch.Tensor], ropes: Ropes, frame_tokens: int, dtype: torch.dtype
) -> tuple[AV[Modality], AV[torch.Tensor]]:
    """What the transformer gets of a batch, and the noise level (B, 1) or (B, T) of its tokens.

    `frame_tokens` are the video tokens of a latent frame.
    """
    sigma = batch.sigma
    levels = AV(sigma[:, None], sigma[:, None])
    if batch.held is not None:
        mask = denoise_mask(batch.held, batch.latents.video.shape[1], frame_tokens)
        levels = AV(sigma[:, None] * mask, levels.audio)

    def modality(
        x0: torch.Tensor, noise: torch.Tensor, level: torch.Tensor, context: torch.Tensor, rope: Any
    ) -> Modality:
        x = torch.lerp(x0, noise, level[..., None])
        x = F.pad(x, (0, LATENT_CHANNELS - x.shape[-1])).to(dtype)
        return Modality(x, sigma, level, context, *rope)

    return batch.latents.map(modality, batch.noise, levels, contexts.map(batch.of_clips), ropes), levels


def flow_losses(
    model: TextAndDit, batch: NoisyBatch, ropes: Ropes, frame_tokens: int, perturbation: Perturbation
) -> dict[str, torch.Tensor]:
    """Mean squared errors of the velocity noise - x0 in the used channels, of both streams, and their sum "loss".

    Tokens that are held entirely count for nothing. "high" and "low" are the video's above 0.9 and below 0.5.
    """
    inputs, levels = noisy_inputs(batch, model.contexts(batch.hidden, batch.mask), ropes, frame_tokens, model.dtype)
    found = model.velocities(inputs, perturbation, batch.clips_per_prompt)
    weights = AV((levels.video > 0).float(), torch.ones_like(batch.latents.audio[:1, :, 0]))
    weights.audio[:, 0] = FIRST_SOUND_WEIGHT

    def errors(v: torch.Tensor, x0: torch.Tensor, noise: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        squares = (v.float() - (noise - x0)).square().mean(-1)
        return (squares * weight).mean(1)

    video, audio = found.map(errors, batch.latents, batch.noise, weights)

    def among(errors: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        return (errors * chosen).sum() / chosen.sum().clamp(min=1)

    high, low = batch.sigma > 0.9, batch.sigma < 0.5
    return {
        "loss": video.mean() + audio.mean(),
        "video": video.mean(),
        "audio": audio.mean(),
        "video high": among(video, high),
        "video low": among(video, low),
        "audio high": among(audio, high),
        "audio low": among(audio, low),
    }
