"""Running the parts around the transformer that components.py loads: contexts, latents, pixels and sound.

They compute as v1.2.0 of the reference does, down to the order in which it rounds (docs/ltx-2.3.md#text,
#upsampling-and-decoding, #sound).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

#: A module of diffusers, whose attributes have no types.
DiffusersModule = Any


class RoundedRope(torch.nn.Module):
    """The RoPE tables of a connector, rounded to the run's dtype as in the reference; diffusers keeps float32."""

    def __init__(self, rope: torch.nn.Module, dtype: torch.dtype):
        super().__init__()
        self.rope = rope
        self.dtype = dtype

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = self.rope(*args, **kwargs)
        return cos.to(self.dtype), sin.to(self.dtype)


class ConnectorAttention:
    """An attention processor with gates and split RoPE that rotates in the run's dtype, as the reference does.

    The processor of diffusers rotates in float32, which in a bfloat16 run changes the contexts by about 1 %.
    """

    def __call__(
        self,
        attn: DiffusersModule,
        x: torch.Tensor,
        context: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        query_rotary_emb: Any = None,
        key_rotary_emb: Any = None,
    ) -> torch.Tensor:
        """Self-attention of x (B, S, D)."""
        assert context is None and key_rotary_emb is None

        def by_head(t: torch.Tensor) -> torch.Tensor:
            """(B, S, H * d) -> (B, H, S, d)."""
            return t.unflatten(2, (attn.heads, -1)).transpose(1, 2)

        q = self._rotate(by_head(attn.norm_q(attn.to_q(x))), *query_rotary_emb)
        k = self._rotate(by_head(attn.norm_k(attn.to_k(x))), *query_rotary_emb)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, by_head(attn.to_v(x)), attn_mask=attention_mask)
        out = out.transpose(1, 2)
        if attn.to_gate_logits is not None:
            out = out * (2.0 * torch.sigmoid(attn.to_gate_logits(x))).unsqueeze(-1)
        return attn.to_out[0](out.flatten(2))

    @staticmethod
    def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.cat([(first * cos).addcmul_(-sin, second), (second * cos).addcmul_(sin, first)], dim=-1)


class GroupNorm(torch.nn.GroupNorm):
    """torch.nn.GroupNorm that also takes a single value for each group, which it norms to 0.

    A clip of 64x64 and one frame has one token in stage 1. An upsampler with as many channels as groups then norms
    single values, which PyTorch refuses with the advice not to train so.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return torch.group_norm(input, self.num_groups, self.weight, self.bias, self.eps, torch.backends.cudnn.enabled)


class ReflectingConv3d(torch.nn.Conv3d):
    """torch.nn.Conv3d with reflected sides, which repeats a side of a single value, where PyTorch raises an error.

    Stage 1 of a clip with a side of 64 pixels is one latent high or wide, and its previews and images have to be made.
    """

    def _conv_forward(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if 1 not in input.shape[-2:]:
            return super()._conv_forward(input, weight, bias)
        _, height, width = (int(side) for side in self.padding)
        for padding, side in (((width, width, 0, 0, 0, 0), -1), ((0, 0, height, height, 0, 0), -2)):
            input = F.pad(input, padding, mode="replicate" if input.shape[side] == 1 else "reflect")
        return F.conv3d(input, weight, bias, self.stride, 0, self.dilation, self.groups)


def _per_channel(vector: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(C,) -> (1, C, 1, 1, 1) in the dtype and on the device of `like`."""
    return vector.to(like).view(1, -1, 1, 1, 1)


@torch.inference_mode()
def encode_connectors(
    connectors: DiffusersModule, hidden_states: tuple[torch.Tensor, ...], attention_mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(video context, audio context) of Gemma's hidden states.

    hidden_states: layers + 1 of (B, S, D); attention_mask: (B, S) of 0 and 1, with padding on either side; S is a
    multiple of the number of registers. Returns (B, S, video dim) and (B, S, audio dim), valid tokens first and then
    registers, so that no mask is needed with them.
    """
    dtype = connectors.video_text_proj_in.weight.dtype
    stacked = torch.stack([h.to(dtype) for h in hidden_states], dim=-1)
    video, audio, _ = connectors(stacked, attention_mask)
    return video, audio


@torch.inference_mode()
def encode_video(vae: DiffusersModule, pixels: torch.Tensor) -> torch.Tensor:
    """Normalised latents (B, 128, F', H/32, W/32) of pixels (B, 3, F, H, W) in [-1, 1], where F = 8 (F' - 1) + 1.

    They are the means of the posterior; nothing is sampled.
    """
    moments = vae.encoder(pixels.to(vae.latents_mean.dtype))
    means = moments[:, : moments.shape[1] // 2]
    return (means - _per_channel(vae.latents_mean, means)) / _per_channel(vae.latents_std, means)


@torch.inference_mode()
def decode_video_tile(vae: DiffusersModule, latents: torch.Tensor) -> torch.Tensor:
    """Pixels (B, 3, 8 (F' - 1) + 1, 32 H', 32 W') of normalised latents (B, 128, F', H', W').

    Nominally in [-1, 1] but not clamped. Computed in the VAE's dtype, returned in that of the latents.
    """
    x = latents.to(vae.latents_mean.dtype)
    x = x * _per_channel(vae.latents_std, x) + _per_channel(vae.latents_mean, x)
    return vae.decoder(x).to(latents.dtype)


@torch.inference_mode()
def upsample_latents(
    upsampler: DiffusersModule, mean: torch.Tensor, std: torch.Tensor, latent: torch.Tensor
) -> torch.Tensor:
    """Normalised latents (B, 128, F', H', W') at twice their height and width. `mean` and `std` are of latent_stats."""
    x = latent * _per_channel(std, latent) + _per_channel(mean, latent)
    x = upsampler(x)
    return (x - _per_channel(mean, x)) / _per_channel(std, x)


@torch.inference_mode()
def decode_mel(audio_vae: DiffusersModule, latents: torch.Tensor) -> torch.Tensor:
    """Log-mel spectrogram (B, 2, 4 T - 3, 64), in the VAE's dtype, of normalised latents (B, 8, T, 16)."""
    batch, channels, frames, bins = latents.shape
    x = latents.to(audio_vae.latents_mean.dtype)
    packed = x.permute(0, 2, 1, 3).reshape(batch, frames, channels * bins)
    packed = packed * audio_vae.latents_std + audio_vae.latents_mean
    return audio_vae.decoder(packed.reshape(batch, frames, channels, bins).permute(0, 2, 1, 3))


@torch.inference_mode()
def decode_audio(
    audio_vae: DiffusersModule, vocoder: DiffusersModule, latents: torch.Tensor
) -> tuple[torch.Tensor, int]:
    """(waveform float32 (2, N) in [-1, 1], samples per second) of the normalised latents (1, 8, T, 16) of one clip.

    The vocoder computes in float32. As in v1.2.0, the waveform then passes through the spectrogram's dtype: in a
    bfloat16 run its values are bfloat16 numbers.
    """
    assert latents.shape[0] == 1, latents.shape
    mel = decode_mel(audio_vae, latents)
    with torch.autocast(device_type=mel.device.type, enabled=False):
        waveform = vocoder(mel.float())
    return waveform.to(mel.dtype).squeeze(0).float(), vocoder.config.output_sampling_rate
