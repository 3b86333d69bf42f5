"""Conditioning images: from bytes to pixels, and where they may come from."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pytest
import torch
from PIL import Image

from ltx_ray.dataset.writer import Done
from ltx_ray.engine.images import cover, decode_rgb, image_pixels, through_h264
from ltx_ray.imagefiles import image_digest, read_image
from ltx_ray.manifest import RawRow, RowRules, judge
from ltx_ray.plan import ILLEGAL, TODO, Plan
from ltx_ray.recipe import item_id
from ltx_ray.records import Recipe, RowError, WorkItem


def encoded(array: np.ndarray, format_: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format_, **options)
    return buffer.getvalue()


def gradient(height: int = 40, width: int = 60) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    return np.stack((x * 255 // width, y * 255 // height, (x + y) % 256), axis=-1).astype(np.uint8)


def test_alpha_is_dropped_not_blended():
    picture = gradient()
    with_alpha = np.dstack((picture, np.full(picture.shape[:2], 10, np.uint8)))
    assert (decode_rgb(encoded(with_alpha)) == picture).all()


def test_grey_becomes_three_channels():
    grey = gradient()[..., 0]
    assert (decode_rgb(encoded(grey)) == grey[..., None]).all()


@pytest.mark.parametrize("orientation, turns", [(1, 0), (3, 2), (6, 3), (8, 1), (2, 0)])
def test_orientation(orientation, turns):
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert (decode_rgb(encoded(gradient(), exif=exif)) == np.rot90(gradient(), turns)).all()


def test_a_broken_colour_profile_costs_nothing():
    assert (decode_rgb(encoded(gradient(), icc_profile=b"no profile")) == gradient()).all()


def test_h264_changes_pixels_more_at_a_higher_crf_and_cuts_odd_edges():
    picture = gradient(41, 61)
    near, far = (np.abs(through_h264(picture, crf).astype(int) - picture[:40, :60]).mean() for crf in (10, 45))
    assert 0 < near < far


def test_cover_scales_and_cuts_the_centre():
    picture = torch.arange(40 * 80, dtype=torch.float32).view(40, 80, 1).expand(-1, -1, 3)
    assert torch.equal(cover(picture, 40, 40)[0, :, 0].permute(1, 2, 0), picture[:, 20:60])
    assert cover(picture, 64, 64).shape == (1, 3, 1, 64, 64)
    assert cover(torch.zeros(7, 13, 3), 192, 64).shape == (1, 3, 1, 192, 64)


def test_pixels_are_between_minus_one_and_one():
    pixels = image_pixels(encoded(gradient()), 0, 64, 64)
    assert pixels.shape == (1, 3, 1, 64, 64) and -1 <= pixels.min() < -0.9 and 0.9 < pixels.max() <= 1


@pytest.mark.parametrize("data", [b"", b"not an image", encoded(gradient())[:60]])
def test_what_is_no_image_fails_the_row(data):
    with pytest.raises(RowError, match="cannot be decoded"):
        image_pixels(data, 33, 64, 64)


def test_reading_says_why_not(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        read_image(str(tmp_path / "none.png"))
    with pytest.raises(ValueError, match="no such file"):
        read_image(str(tmp_path))


class _Book:
    """Identity without a model."""

    recipe = Recipe("hq", "float32", "bf16", "cpu", "c", "g", "u", None, (0.0, 0.0))
    checkpoint = type("C", (), {"transformer": {}})

    def item(self, request):
        from ltx_ray.plan import _digest

        digests = tuple(_digest(image.path) for image in request.images)
        name = item_id(request, self.recipe, digests)
        return WorkItem(name, dataclasses.replace(request, id=request.id or name[:16]), self.recipe, "r", digests)


def plan_of(folder, rows):
    plan = Plan(str(folder / "m.jsonl"), RowRules(), _Book(), Done())
    rows = [{"prompt": "x", "num_frames": 9, **row} for row in rows]
    return list(plan._rows(RawRow(str(folder / "m.jsonl"), n, row) for n, row in enumerate(rows, 1)))


def test_an_item_is_known_by_its_images_bytes_not_their_path(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(gradient()))
    (tmp_path / "b.png").write_bytes(encoded(gradient()))
    (tmp_path / "c.png").write_bytes(encoded(gradient() // 2))
    rows = [{"images": [{"path": f"{name}.png"}]} for name in "abc"] + [{"images": [{"path": "a.png", "crf": 33}]}]
    a, b, c, explicit = (p.item.item_id for p in plan_of(tmp_path, rows))
    assert a == b == explicit != c


def test_an_unreadable_image_makes_its_row_illegal(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(gradient()))
    good, bad = plan_of(tmp_path, [{"images": [{"path": "a.png"}]}, {"images": [{"path": "none.png"}]}])
    assert (good.status, bad.status) == (TODO, ILLEGAL)
    assert "m.jsonl:2:images: " in bad.messages[0] and "no such file" in bad.messages[0]


def test_the_resolved_row_names_the_file_and_the_crf(tmp_path):
    row = judge(RawRow(str(tmp_path / "m.jsonl"), 1, {"prompt": "x", "images": [{"path": "a.png"}]}), RowRules())
    assert row.request.images[0].path == str(tmp_path / "a.png") and row.request.images[0].crf == 33


def test_a_frame_beyond_the_clip_is_illegal(tmp_path):
    row = {"prompt": "x", "num_frames": 9, "images": [{"path": "a.png", "frame_idx": 9}]}
    judged = judge(RawRow(str(tmp_path / "m.jsonl"), 1, row), RowRules())
    assert "a frame_idx from 0 to 8" in judged.messages()[0]


def test_digests_are_of_the_bytes(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"123")
    assert image_digest(str(path)) == "a665a45920422f9d417e4867efdc4fb8"
