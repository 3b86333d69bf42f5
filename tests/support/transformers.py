"""Our transformer and diffusers' on the same file, and inputs for both."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from safetensors.torch import load_file

from ltx_ray.checkpoints.checkpoint import open_checkpoint
from ltx_ray.checkpoints.diffusers_names import to_diffusers
from ltx_ray.checkpoints.transformer_keys import CONNECTOR_PREFIXES, TRANSFORMER_PREFIX
from ltx_ray.model.rope import audio_positions, video_positions
from ltx_ray.model.transformer import Modality, Transformer
from ltx_ray.parallel.collectives import SINGLE_RANK, RankGroup
from ltx_ray.parallel.loading import load_shard
from ltx_ray.records import AV
from ltx_ray.shapes import ClipShape

SHAPE = ClipShape(num_frames=17, height=128, width=192, frame_rate=24.0)
TEXT = 32


def load_ours(path: str, dtype: torch.dtype = torch.float32, tp: RankGroup = SINGLE_RANK) -> Transformer:
    checkpoint = open_checkpoint(path)
    with torch.device("meta"):
        model = Transformer(checkpoint.transformer, tp)
    load_shard(model, checkpoint.tensors, tp, dtype=dtype, device=torch.device("cpu"))
    return model


def load_diffusers(path: str):
    from diffusers import LTX2VideoTransformer3DModel

    config = open_checkpoint(path).transformer
    video, audio = config.video, config.audio
    with torch.device("meta"):
        model = LTX2VideoTransformer3DModel(
            in_channels=video.in_channels, out_channels=video.out_channels,
            num_attention_heads=video.heads, attention_head_dim=video.head_dim,
            cross_attention_dim=video.context_dim, gated_attn=True, cross_attn_mod=True,
            audio_in_channels=audio.in_channels, audio_out_channels=audio.out_channels,
            audio_num_attention_heads=audio.heads, audio_attention_head_dim=audio.head_dim,
            audio_cross_attention_dim=audio.context_dim, audio_gated_attn=True, audio_cross_attn_mod=True,
            num_layers=config.num_layers, rope_double_precision=True, rope_type="split",
            timestep_scale_multiplier=1000, cross_attn_timestep_scale_multiplier=1000,
            use_prompt_embeddings=False, perturbed_attn=True,
        )  # fmt: skip
    state = {
        to_diffusers(name[len(TRANSFORMER_PREFIX) :]): tensor.float()
        for name, tensor in load_file(path).items()
        if name.startswith(TRANSFORMER_PREFIX) and not name.startswith(CONNECTOR_PREFIXES)
    }
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


@dataclass(frozen=True)
class Inputs:
    """Inputs of a pass: latents (1, T, C), contexts (1, S, D), sigmas, and a denoise mask (1, T) of the video."""

    latents: AV[torch.Tensor]
    contexts: AV[torch.Tensor]
    sigma: AV[float]
    video_mask: torch.Tensor | None = None

    @classmethod
    def random(cls, model: Transformer, seed: int, sigma: float = 0.7) -> Inputs:
        rng = torch.Generator().manual_seed(seed)
        video, audio = model.config.video, model.config.audio

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(size, generator=rng)

        return cls(
            AV(normal(1, SHAPE.video_tokens, video.in_channels), normal(1, SHAPE.audio_latents, audio.in_channels)),
            AV(normal(1, TEXT, video.context_dim), normal(1, TEXT, audio.context_dim)),
            AV(sigma, sigma),
        )

    def with_mask(self, seed: int) -> Inputs:
        """The same with a noise level for every video token."""
        rng = torch.Generator().manual_seed(seed)
        return replace(self, video_mask=torch.rand((1, SHAPE.video_tokens), generator=rng))

    def ours(self, model: Transformer, perturbation) -> AV[torch.Tensor]:
        ropes = model.ropes(AV(video_positions(SHAPE), audio_positions(SHAPE.audio_latents)), torch.float32)
        levels = self.sigma.map(lambda s: torch.tensor([s]))
        timesteps = levels.map(lambda s: s.reshape(1, 1))
        if self.video_mask is not None:
            timesteps = AV(self.video_mask * self.sigma.video, timesteps.audio)
        parts = zip(self.latents, levels, timesteps, self.contexts, ropes, strict=True)
        with torch.inference_mode():
            return model(AV(*(Modality(x, s, t, c, *r) for x, s, t, c, r in parts)), perturbation)

    def theirs(self, model, **options) -> AV[torch.Tensor]:
        sigma = self.sigma.map(lambda s: torch.tensor([s * 1000.0]))
        video = self.video_mask * self.sigma.video * 1000.0 if self.video_mask is not None else sigma.video
        with torch.inference_mode():
            out = model(
                hidden_states=self.latents.video, audio_hidden_states=self.latents.audio,
                encoder_hidden_states=self.contexts.video, audio_encoder_hidden_states=self.contexts.audio,
                timestep=video, audio_timestep=sigma.audio, sigma=sigma.video, audio_sigma=sigma.audio,
                num_frames=SHAPE.latent_frames, height=SHAPE.latent_height, width=SHAPE.latent_width,
                fps=SHAPE.frame_rate, audio_num_frames=SHAPE.audio_latents, return_dict=False, **options,
            )  # fmt: skip
        return AV(*out)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()
