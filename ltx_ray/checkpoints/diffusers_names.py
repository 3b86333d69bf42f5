"""How diffusers names what an official LTX-2.3 file holds. No torch.

Source of the facts: diffusers 0.42.1, `scripts/convert_ltx2_to_diffusers.py`.
"""

from __future__ import annotations

#: Parts of the transformer by the first word of their name, official -> diffusers.
_TOP = {
    "patchify_proj": "proj_in",
    "audio_patchify_proj": "audio_proj_in",
    "adaln_single": "time_embed",
    "audio_adaln_single": "audio_time_embed",
    "prompt_adaln_single": "prompt_adaln",
    "audio_prompt_adaln_single": "audio_prompt_adaln",
    "av_ca_video_scale_shift_adaln_single": "av_cross_attn_video_scale_shift",
    "av_ca_audio_scale_shift_adaln_single": "av_cross_attn_audio_scale_shift",
    "av_ca_a2v_gate_adaln_single": "av_cross_attn_video_a2v_gate",
    "av_ca_v2a_gate_adaln_single": "av_cross_attn_audio_v2a_gate",
}
#: Words further inside.
_INNER = {
    "q_norm": "norm_q",
    "k_norm": "norm_k",
    "scale_shift_table_a2v_ca_video": "video_a2v_cross_attn_scale_shift_table",
    "scale_shift_table_a2v_ca_audio": "audio_a2v_cross_attn_scale_shift_table",
}
_TOP_BACK = {theirs: ours for ours, theirs in _TOP.items()}
_INNER_BACK = {theirs: ours for ours, theirs in _INNER.items()}


def to_diffusers(name: str) -> str:
    """diffusers' name of the transformer's tensor or module `name` (official, without prefix)."""
    return _renamed(name, _TOP, _INNER)


def to_official(name: str) -> str:
    """The official name of diffusers' transformer tensor or module `name`. An official name stays as it is."""
    return _renamed(name, _TOP_BACK, _INNER_BACK)


def _renamed(name: str, top: dict[str, str], inner: dict[str, str]) -> str:
    first, *rest = name.split(".")
    return ".".join([top.get(first, first), *(inner.get(word, word) for word in rest)])
