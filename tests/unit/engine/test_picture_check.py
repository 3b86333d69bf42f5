"""What is measured of frames, and the flags `black` and `frozen`, on clips that look like something."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ltx_ray.engine.frames import PictureCheck, to_yuv420
from ltx_ray.records import PictureMeasures
from tests.support.moving_pictures import FRAMES, HEIGHT, WIDTH, i420, scene, with_square

STILL = scene()
NIGHT = 16 + (STILL - STILL.min()) / (STILL.max() - STILL.min()) * 20


def measured(frames: torch.Tensor, *chunks: int) -> PictureCheck:
    check = PictureCheck()
    for chunk in frames.split(list(chunks) or len(frames)):
        check.update(chunk)
    return check


def noise(amplitude: int, seed: int) -> torch.Tensor:
    """Whole codes from -amplitude to amplitude."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-amplitude, amplitude + 1, STILL.shape, generator=generator)


def grain(deviation: float, seed: int) -> torch.Tensor:
    return deviation * torch.randn(STILL.shape, generator=torch.Generator().manual_seed(seed))


def dithered(n: int, share: float) -> torch.Tensor:
    chosen = torch.rand(STILL.shape, generator=torch.Generator().manual_seed(n)) < share
    return STILL.floor() + chosen


def stepped(rows: slice, columns: slice, since: int) -> list[torch.Tensor]:
    """The scene, with one code more in a region from frame `since` on."""
    after = STILL.clone()
    after[rows, columns] += 1
    return [STILL] * since + [after] * (FRAMES - since)


def pan(pixels: float) -> list[torch.Tensor]:
    """The scene moved by `pixels` a frame, with interpolation."""
    columns = torch.arange(WIDTH)
    shifts = [(columns + n * pixels) % WIDTH for n in range(FRAMES)]
    return [torch.lerp(STILL[:, s.long()], STILL[:, (s.long() + 1) % WIDTH], (s - s.floor()).float()) for s in shifts]


N = range(FRAMES)
#: Clips by name: their pictures, and whether they are frozen.
CLIPS = {
    "a still picture": (lambda: [STILL] * FRAMES, True),
    "dither on 3 % of the pixels": (lambda: [dithered(n, 0.03) for n in N], True),
    "dither on half of the pixels": (lambda: [dithered(n, 0.5) for n in N], True),
    "noise of one code either way": (lambda: [STILL + noise(1, n) for n in N], True),
    "the whole picture one code up and down": (lambda: [STILL + n % 2 for n in N], True),
    "fine film grain": (lambda: [STILL + grain(3, n) for n in N], True),
    "coarse noise": (lambda: [scene(n) * 0.1 + STILL * 0.9 for n in N], False),
    "a step of one code at a seam between chunks": (lambda: [STILL + (n >= 25) for n in N], True),
    "steps of one code at two seams between chunks": (lambda: [STILL + (n >= 16) + (n >= 32) for n in N], True),
    "a step of one code in one tile": (lambda: stepped(slice(0, 200), slice(0, 320), 25), True),
    "a step of one code at one seam between tiles": (lambda: stepped(slice(0, HEIGHT), slice(320, 321), 25), True),
    "a small object that moves": (lambda: [with_square(STILL, 100, 40 + 2 * n) for n in N], False),
    "a small object that moves slowly": (lambda: [with_square(STILL, 100, 40 + n // 3) for n in N], False),
    "a smaller object of little contrast": (
        lambda: [with_square(STILL, 101, 41 + 2 * n, 4, float(STILL[101, 41]) - 40) for n in N], False,
    ),
    "a blinking lamp": (lambda: [with_square(STILL, 100, 40, luma=220 if n // 6 % 2 else 60) for n in N], False),
    "a lamp that blinks every 24 frames": (
        lambda: [with_square(STILL, 100, 40, luma=220 if n % 24 < 2 else 60) for n in N], False,
    ),
    "a fade from black": (lambda: [16 + (STILL - 16) * n / (FRAMES - 1) for n in N], False),
    "a slow fade, half a code a frame": (lambda: [STILL - n / 2 for n in N], False),
    "a pan": (lambda: pan(2.0), False),
    "a slow pan": (lambda: pan(0.1), False),
    "frozen for its longest part": (lambda: [scene(n) for n in range(20)] + [STILL] * (FRAMES - 20), True),
    "frozen for less than half": (lambda: [scene(n) for n in range(30)] + [STILL] * (FRAMES - 30), False),
    "two still pictures of the same length": (lambda: [STILL] * 24 + [scene(1)] * 24, False),
    "a drawing on threes": (lambda: [scene(n // 3) for n in N], False),
    "noise": (lambda: [110 + noise(90, n) for n in N], False),
    "a night that stands still": (lambda: [NIGHT] * FRAMES, True),
}  # fmt: skip


@pytest.mark.parametrize("name", CLIPS)
def test_frozen(name):
    make, frozen = CLIPS[name]
    check = measured(i420(make()))
    assert check.flags() == (("frozen",) if frozen else ()), check.measures()
    if frozen:
        assert check.measures().motion < 1e-3 or "part" in name


@pytest.mark.parametrize("frames, flags", [(1, ()), (2, ("frozen",)), (9, ("frozen",))])
def test_one_frame_is_not_frozen(frames, flags):
    check = measured(i420([STILL] * frames))
    assert check.flags() == flags
    found = check.measures()
    assert (found.motion, found.still_share) == ((None, None) if frames == 1 else (0.0, 1.0))
    assert found.cuts == 0


def test_a_small_object_at_full_size_is_not_frozen():
    """10 x 10 pixels, which are a 20,000th of the picture."""
    ground = scene(3, 1088, 1920)
    moving = [with_square(ground, 500, 301 + 2 * n, luma=float(ground[500, 301]) + 40) for n in range(17)]
    assert measured(i420(moving)).flags() == ()
    assert 0 < measured(i420(moving)).measures().motion < 1e-3
    assert measured(i420(moving[:1] * 17)).flags() == ("frozen",)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_roundings_of_the_conversion_are_not_motion(dtype):
    """A still picture plus what a decoder adds to it: less than a code before it is rounded."""
    rgb = (STILL - 16) / 219 * 2 - 1
    generator = torch.Generator().manual_seed(0)
    frames = rgb + 0.002 * torch.randn(1, 3, 17, *STILL.shape, generator=generator)
    check = measured(to_yuv420(frames.to(dtype)))
    assert check.flags() == ("frozen",) and check.measures().motion == 0


def test_how_long_it_is_still_is_measured():
    pictures = [scene(n) for n in range(1, 11)] + [STILL] * 30 + [scene(n) for n in range(1, 10)]
    assert measured(i420(pictures)).measures().still_share == 30 / 49


def test_motion_is_the_share_that_moves():
    """A band of a quarter of the picture moves; a flash and a cut change nothing."""
    other = scene(1)
    bands = [torch.cat((torch.roll(STILL[:88], 4 * n, 1), (STILL if n < 30 else other)[88:])) for n in N]
    bands[10] = torch.full_like(STILL, 235)
    assert 0.2 < measured(i420(bands)).measures().motion <= 0.25


# --- black ---------------------------------------------------------------------------------------

BLACK = torch.full_like(STILL, 16)


def logo(pixels: int) -> torch.Tensor:
    picture = BLACK.clone()
    picture[20:40, 20 : 20 + pixels // 20] = 235
    return picture


BLACKS = {
    "black": (lambda: [BLACK] * 9, True),
    "black with noise": (lambda: [BLACK + noise(2, n).abs() for n in range(9)], True),
    "black with a small logo": (lambda: [logo(2000)] * 9, True),
    "black with a large logo": (lambda: [logo(3000)] * 9, False),
    "a night": (lambda: [torch.roll(NIGHT, 5 * n, 1) for n in range(9)], False),
    "a night with little in it": (lambda: [16 + (NIGHT - 16) / 2 + grain(1, n) for n in range(9)], False),
    "grey, one code above": (lambda: [BLACK + 5] * 9, False),
    "black first": (lambda: [BLACK] * 3 + [scene(n) for n in range(6)], False),
    "black but for its last frame": (lambda: [BLACK] * 8 + [STILL], False),
    "black but for a flash": (lambda: [BLACK] * 4 + [STILL] + [BLACK] * 4, False),
}


@pytest.mark.parametrize("name", BLACKS)
def test_black(name):
    make, black = BLACKS[name]
    assert ("black" in measured(i420(make())).flags()) == black


def test_dark_blue_is_not_black():
    """Its luma is that of black with noise."""
    rgb = torch.tensor((-1.0, -1.0, -0.5)).view(1, 3, 1, 1, 1).expand(1, 3, 9, 64, 64)
    frames = to_yuv420(rgb)
    assert frames[:, :64].max() <= 20
    assert measured(frames).flags() == ("frozen",)


def test_one_frame_may_be_black():
    assert measured(i420([BLACK])).flags() == ("black",)


def test_the_share_of_black_frames_is_measured():
    assert measured(i420([BLACK] * 3 + [STILL] * 6)).measures().black_share == 3 / 9


# --- brightness, sharpness, cuts -----------------------------------------------------------------


def test_mean_luma():
    found = measured(i420([torch.full((16, 32), 50.0), torch.full((16, 32), 61.0)])).measures()
    assert found.mean_luma == 55.5


def test_sharpness_is_the_variance_of_the_laplacian():
    pictures = [scene(n, 96, 64) for n in range(3)]
    variances = []
    for picture in pictures:
        p = picture.to(torch.uint8).double().numpy()
        laplacian = p[:-2, 1:-1] + p[2:, 1:-1] + p[1:-1, :-2] + p[1:-1, 2:] - 4 * p[1:-1, 1:-1]
        variances.append(laplacian.var())
    assert math.isclose(measured(i420(pictures)).measures().sharpness, np.median(variances), rel_tol=1e-12)


def test_a_blurred_picture_is_less_sharp():
    def sharpness(picture: torch.Tensor) -> float:
        return measured(i420([picture] * 2)).measures().sharpness

    blurred = torch.nn.functional.avg_pool2d(STILL[None, None], 5, 1)[0, 0]
    assert sharpness(torch.full((64, 64), 90.0)) == 0
    assert sharpness(blurred) < 0.8 * sharpness(STILL)


def shot(seed: int, frames: int) -> list[torch.Tensor]:
    """A pan over a scene."""
    picture = scene(seed)
    return [torch.roll(picture, 2 * n, 1) for n in range(frames)]


FLASH = torch.full_like(STILL, 235)
CUTS = {
    "one shot": (lambda: shot(0, 40), 0),
    "a cut": (lambda: shot(0, 20) + shot(1, 20), 1),
    "two cuts": (lambda: shot(0, 15) + shot(1, 15) + shot(2, 15), 2),
    "back to the first shot": (lambda: shot(0, 12) + shot(1, 12) + shot(0, 12), 2),
    "a cut between still pictures": (lambda: [STILL] * 10 + [scene(1)] * 10, 1),
    "a cut from black": (lambda: [BLACK] * 10 + shot(0, 20), 1),
    "a cut to the last frame": (lambda: shot(0, 20) + [scene(1)], 1),
    "a flash": (lambda: [FLASH if n == 20 else p for n, p in enumerate(shot(0, 40))], 0),
    "a flash of three frames": (lambda: [FLASH if 20 <= n < 23 else p for n, p in enumerate(shot(0, 40))], 0),
    "a flash that dies away": (
        lambda: [torch.lerp(p, FLASH, {20: 1.0, 21: 0.6, 22: 0.3}.get(n, 0.0)) for n, p in enumerate(shot(0, 40))], 0,
    ),
    "a flash, then a cut": (lambda: shot(0, 15) + [FLASH] + shot(0, 16)[1:] + shot(1, 15), 1),
    "a strobe": (lambda: [FLASH if n % 2 else p for n, p in enumerate(shot(0, 40))], 0),
    "a fade to black": (lambda: [torch.lerp(p, BLACK, n / 20) for n, p in enumerate(shot(0, 21))], 0),
    "a dissolve": (
        lambda: [torch.lerp(a, b, min(max((n - 10) / 15, 0), 1))
                 for n, (a, b) in enumerate(zip(shot(0, 35), shot(1, 35)))], 0,
    ),
    "a fast pan": (lambda: [torch.roll(STILL, 40 * n, 1) for n in range(16)], 0),
    "a small object that jumps": (lambda: [with_square(STILL, 50 + 99 * (n // 10), 50, 60) for n in range(30)], 0),
    "one frame": (lambda: [STILL], 0),
}  # fmt: skip


@pytest.mark.parametrize("name", CUTS)
def test_cuts(name):
    make, cuts = CUTS[name]
    assert measured(i420(make())).measures().cuts == cuts


# --- how frames arrive ---------------------------------------------------------------------------


def test_chunks_are_seen_as_one_clip():
    frames = i420(shot(0, 15) + [STILL] * 8 + shot(1, 17))
    whole = measured(frames).measures()
    assert measured(frames, 1, 14, 20, 5).measures() == measured(frames, *[1] * 40).measures() == whole


def test_any_size_is_measured():
    for height, width in ((2, 2), (4, 36), (12, 20), (352, 642)):
        found = measured(i420([torch.full((height, width), 90.0)] * 3))
        assert found.flags() == ("frozen",)
        assert found.measures().mean_luma == 90


def test_without_frames_nothing_is_known():
    assert PictureCheck().measures() == PictureMeasures() and PictureCheck().flags() == ()
