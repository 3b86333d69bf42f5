"""Rotary tables."""

from __future__ import annotations

import pytest
import torch

from ltx_ray.model.rope import rope_table, video_positions
from ltx_ray.shapes import ClipShape


@pytest.mark.parametrize("max_pos", [(20,), (20, 2048), (20, 2048, 2048, 1)])
def test_every_axis_has_a_limit(max_pos):
    """With fewer, tokens would not know where they are on the others."""
    positions = video_positions(ClipShape(9, 64, 64, 24.0))
    with pytest.raises(ValueError, match="argument"):
        rope_table(positions, dim=48, heads=2, max_pos=max_pos, theta=10000.0, float64=True, dtype=torch.float32)
