"""diffusers' names of the transformer's modules and tensors. No torch.

Source: diffusers 0.42.1, `scripts/convert_ltx2_to_diffusers.py`.
"""

from __future__ import annotations

from ltx_ray.checkpoints.transformer_keys import AUDIO, K_NORM, Q_NORM, VIDEO

#: Modules of the transformer by the first part of their name, official -> diffusers.
_TOP = {
    VIDEO.patchify: "proj_in",
    AUDIO.patchify: "audio_proj_in",
    VIDEO.adaln: "time_embed",
    AUDIO.adaln: "audio_time_embed",
    VIDEO.prompt_adaln: "prompt_adaln",
    AUDIO.prompt_adaln: "audio_prompt_adaln",
    VIDEO.cross_adaln: "av_cross_attn_video_scale_shift",
    AUDIO.cross_adaln: "av_cross_attn_audio_scale_shift",
    VIDEO.cross_gate_adaln: "av_cross_attn_video_a2v_gate",
    AUDIO.cross_gate_adaln: "av_cross_attn_audio_v2a_gate",
}
#: Later parts of a name.
_INNER = {
    Q_NORM: "norm_q",
    K_NORM: "norm_k",
    VIDEO.cross_table: "video_a2v_cross_attn_scale_shift_table",
    AUDIO.cross_table: "audio_a2v_cross_attn_scale_shift_table",
}
_TOP_BACK = {diffusers: official for official, diffusers in _TOP.items()}
_INNER_BACK = {diffusers: official for official, diffusers in _INNER.items()}


def to_diffusers(name: str) -> str:
    """diffusers' name of the transformer's tensor or module `name` (official, without prefix)."""
    return _rename(name, _TOP, _INNER)


def to_official(name: str) -> str:
    """The official name of diffusers' transformer tensor or module `name`. An official name stays as it is."""
    return _rename(name, _TOP_BACK, _INNER_BACK)


def _rename(name: str, top: dict[str, str], inner: dict[str, str]) -> str:
    first, *rest = name.split(".")
    return ".".join([top.get(first, first), *(inner.get(part, part) for part in rest)])
