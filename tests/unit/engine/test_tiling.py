"""Tiles of the video decoder, which cover everything and blend to the untiled picture; and colours."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ltx_ray.engine.frames import decode_tiled, to_yuv420
from ltx_ray.engine.tiling import LADDER, Tiling, distinct_rungs, side_intervals, split, sums_to_one, time_intervals
from ltx_ray.shapes import SPACE_FACTOR, TIME_FACTOR

RUNGS = pytest.mark.parametrize("rung", range(len(LADDER)))

# --- tiles ---------------------------------------------------------------------------------------


@given(st.integers(1, 300), st.integers(3, 40), st.integers(1, 20))
def test_spans_cover_the_length_and_overlap(length, size, overlap):
    overlap = min(overlap, size - 1)
    spans = split(length, size, overlap)
    assert spans[0].start == 0 and spans[-1].end == length
    assert spans[0].left == 0 and spans[-1].right == 0
    for span in spans:
        assert 0 < span.end - span.start <= size
    for before, after in itertools.pairwise(spans):
        assert before.start < after.start
        assert before.end - after.start == overlap == before.right == after.left


def covered(intervals, length: int) -> torch.Tensor:
    total = torch.zeros(length)
    for i in intervals:
        assert len(i.weights) == i.pixel.stop - i.pixel.start
        assert i.weights.min() >= 0 and i.weights.max() <= 1
        total[i.pixel] += i.weights
    return total


@RUNGS
@settings(max_examples=60)
@given(latent_frames=st.integers(1, 120))
def test_tiles_in_time_cover_every_frame_and_sum_to_one(rung, latent_frames):
    intervals = time_intervals(latent_frames, LADDER[rung])
    length = (latent_frames - 1) * TIME_FACTOR + 1
    total = covered(intervals, length)
    assert torch.allclose(total, torch.ones(length), atol=1e-5)
    assert sums_to_one(intervals, length)
    for i in intervals:
        assert i.pixel.stop - i.pixel.start == (i.latent.stop - i.latent.start - 1) * TIME_FACTOR + 1
        assert i.latent.stop - i.latent.start <= LADDER[rung].frames // TIME_FACTOR + 1


@RUNGS
@settings(max_examples=60)
@given(side=st.integers(2, 130), other=st.integers(2, 130))
def test_tiles_of_a_side_cover_every_pixel(rung, side, other):
    intervals = side_intervals(side, max(side, other), LADDER[rung])
    total = covered(intervals, side * SPACE_FACTOR)
    assert total.min() > 0
    assert sums_to_one(intervals, side * SPACE_FACTOR) == bool((total - 1).abs().max() <= 1e-5)
    for i in intervals:
        assert (i.pixel.start, i.pixel.stop) == (i.latent.start * SPACE_FACTOR, i.latent.stop * SPACE_FACTOR)
        assert i.latent.stop - i.latent.start <= LADDER[rung].long_side // SPACE_FACTOR


def ranges(intervals) -> list[tuple[int, int]]:
    return [(i.latent.start, i.latent.stop) for i in intervals]


def test_the_layout_of_an_hq_clip():
    """34 x 60 latents in tiles of 768 x 448 pixels that overlap by 64, and of 80 frames that overlap by 24."""
    assert ranges(side_intervals(60, 60, LADDER[0])) == [(0, 24), (22, 46), (44, 60)]
    assert ranges(side_intervals(34, 60, LADDER[0])) == [(0, 14), (12, 26), (24, 34)]
    assert ranges(time_intervals(16, LADDER[0])) == [(0, 10), (6, 16)]


def largest_tile(latent_size, tiling: Tiling) -> int:
    frames, height, width = latent_size
    cuts = (
        time_intervals(frames, tiling),
        *(side_intervals(side, max(height, width), tiling) for side in (height, width)),
    )
    return math.prod(max(i.latent.stop - i.latent.start for i in intervals) for intervals in cuts)


def test_every_rung_of_an_hq_clip_needs_at_most_two_thirds_of_the_one_before():
    sizes = [largest_tile((16, 34, 60), tiling) for tiling in LADDER]
    assert sizes == [10 * 14 * 24, 6 * 14 * 24, 4 * 14 * 24, 4 * 9 * 16, 4 * 7 * 12]
    assert all(after <= before * 2 / 3 for before, after in itertools.pairwise(sizes))


@given(st.tuples(st.integers(1, 40), st.integers(2, 70), st.integers(2, 70)))
def test_rungs_that_cut_in_the_same_way_are_left_out(latent_size):
    rungs = distinct_rungs(latent_size)
    assert rungs[0] == 0 and rungs == sorted(rungs)
    for rung, tiling in enumerate(LADDER):
        same = max(r for r in rungs if r <= rung)
        assert largest_tile(latent_size, tiling) == largest_tile(latent_size, LADDER[same])


def test_rungs_of_some_clips():
    assert distinct_rungs((16, 34, 60)) == [0, 1, 2, 3, 4]
    assert distinct_rungs((3, 4, 6)) == [0], "one small tile cannot be cut"
    assert distinct_rungs((8, 4, 6)) == [0, 1, 2]
    assert distinct_rungs((3, 4, 20)) == [0, 3, 4]


# --- decoding ------------------------------------------------------------------------------------


def linear_decoder(latent: torch.Tensor) -> torch.Tensor:
    """A "decoder" by nearest neighbours, with one frame of the first latent and eight of each later one."""
    rgb = latent[:, :3]
    frames = torch.cat((rgb[:, :, :1], rgb[:, :, 1:].repeat_interleave(TIME_FACTOR, dim=2)), dim=2)
    return frames.repeat_interleave(SPACE_FACTOR, dim=3).repeat_interleave(SPACE_FACTOR, dim=4)


@RUNGS
@pytest.mark.parametrize(
    "frames, height, width",
    [
        (1, 2, 2),  # One tile.
        (3, 2, 40),  # Tiles along the width.
        (3, 30, 4),  # Along the height.
        (2, 5, 35),  # A very wide clip, whose weights do not add up to 1.
        (25, 2, 3),  # Along time.
        (12, 2, 26),  # Along time and width.
    ],
)
def test_tiled_is_untiled(frames, height, width, rung):
    latent = torch.randn(1, 4, frames, height, width, generator=torch.Generator().manual_seed(0))
    tiles = 0

    def decode(tile: torch.Tensor) -> torch.Tensor:
        nonlocal tiles
        tiles += 1
        return linear_decoder(tile)

    chunks = [c.clone() for c in decode_tiled(decode, latent, LADDER[rung])]
    assert all(chunk.shape[2] for chunk in chunks), "nothing can be encoded from an empty chunk"
    got = torch.cat(chunks, dim=2)
    assert got.shape == (1, 3, (frames - 1) * TIME_FACTOR + 1, height * SPACE_FACTOR, width * SPACE_FACTOR)
    assert (got - linear_decoder(latent)).abs().max() < 1e-5
    size = LADDER[rung].frames // TIME_FACTOR, LADDER[rung].long_side // SPACE_FACTOR
    assert (tiles == 1) == (frames <= size[0] and max(height, width) <= size[1])


def test_the_weights_of_a_very_wide_clip_do_not_sum_to_one():
    assert not sums_to_one(side_intervals(5, 35, LADDER[0]), 5 * SPACE_FACTOR)


def test_chunks_come_one_interval_of_time_at_a_time():
    seen = []

    def decode(tile: torch.Tensor) -> torch.Tensor:
        seen.append(tile.shape[2])
        return linear_decoder(tile)

    stream = decode_tiled(decode, torch.zeros(1, 3, 40, 2, 2), LADDER[0])
    next(stream)
    assert len(seen) == 2, "the first chunk waits only for the tile that overlaps it"
    assert max(seen) <= 11
    list(stream)
    assert len(seen) == len(time_intervals(40, LADDER[0]))


def test_the_result_keeps_the_latents_dtype():
    [chunk] = decode_tiled(linear_decoder, torch.zeros(1, 3, 1, 2, 2, dtype=torch.bfloat16), LADDER[0])
    assert chunk.dtype == torch.bfloat16


# --- colours -------------------------------------------------------------------------------------

#: BT.709, limited range: R, G, B in [-1, 1] and the exact Y, Cb, Cr.
COLOURS = {
    "black": ((-1, -1, -1), (16, 128, 128)),
    "white": ((1, 1, 1), (235, 128, 128)),
    "grey": ((0, 0, 0), (125.5, 128, 128)),
    "red": ((1, -1, -1), (62.6, 102.3, 240)),
    "green": ((-1, 1, -1), (172.6, 41.7, 26.3)),
    "blue": ((-1, -1, 1), (31.8, 240, 117.7)),
}


@pytest.mark.parametrize("name", COLOURS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1), (torch.bfloat16, 2)])
def test_pure_colours(name, dtype, tolerance):
    rgb, expected = COLOURS[name]
    chunk = torch.tensor(rgb, dtype=dtype).view(1, 3, 1, 1, 1).expand(1, 3, 2, 4, 8)
    packed = to_yuv420(chunk)
    assert packed.shape == (2, 6, 8) and packed.dtype == torch.uint8
    for plane, value in zip((packed[:, :4], packed[:, 4:5], packed[:, 5:]), expected):
        assert plane.unique().numel() == 1
        assert abs(plane[0, 0, 0].item() - value) <= tolerance


def test_values_out_of_range_are_clipped():
    assert torch.equal(to_yuv420(torch.full((1, 3, 1, 2, 2), 9.0)), to_yuv420(torch.full((1, 3, 1, 2, 2), 1.0)))
    assert torch.equal(to_yuv420(torch.full((1, 3, 1, 2, 2), -9.0)), to_yuv420(torch.full((1, 3, 1, 2, 2), -1.0)))


def test_planes_are_laid_out_as_i420():
    """Red on the left, blue on the right: luma at full size, then Cb and Cr at half size."""
    chunk = torch.full((1, 3, 1, 8, 8), -1.0)
    chunk[:, 0, :, :, :4] = 1.0
    chunk[:, 2, :, :, 4:] = 1.0
    packed = to_yuv420(chunk)[0]
    assert (packed[:8, :4] == 62).all() and (packed[:8, 4:] == 31).all()
    cb, cr = packed[8:].reshape(2, 4, 4)
    assert (cb[:, :2] == 102).all() and (cb[:, 2:] >= 239).all()
    assert (cr[:, :2] >= 239).all() and (cr[:, 2:] == 117).all()
