"""Conditioning images: decoding them, and the places from which they may be read."""

from __future__ import annotations

import dataclasses
import json
import os
import urllib.request
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from ltx_ray.dataset.existing import ExistingRows
from ltx_ray.engine.images import InvalidImage, cover, decode_rgb, image_pixels, through_h264
from ltx_ray.engine.text import read_planned_image
from ltx_ray.manifest.reader import RawRow
from ltx_ray.manifest.rules import RowRules, judge
from ltx_ray.planning.identity import item_id
from ltx_ray.planning.plan import ILLEGAL, TODO, UNREAD, Plan
from ltx_ray.records import Recipe, RowError, WorkItem
from ltx_ray.storage import images
from ltx_ray.storage.images import check_roots, image_digest, locate, read_image
from ltx_ray.storage.store import Store
from tests.support.checkpoint_files import RELEASED
from tests.support.pictures import encoded, gradient


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


def test_a_broken_colour_profile_is_ignored():
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
def test_data_that_is_not_a_picture_is_refused(data):
    with pytest.raises(InvalidImage, match=r"not a known image format|truncated"):
        image_pixels(data, 33, 64, 64)


def test_a_missing_image_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        read_image(str(tmp_path / "none.png"))
    with pytest.raises(ValueError, match="no such file, but a folder"):
        read_image(str(tmp_path))


class FakeBuilder:
    """Makes work items as ItemBuilder does, without a model."""

    recipe = Recipe("hq", "float32", "bf16", "cpu", "c", "g", "u", None, (0.0, 0.0))
    checkpoint = SimpleNamespace(transformer=RELEASED)

    def item(self, request, digest):
        digests = tuple(digest(image.path, image.crf) for image in request.images)
        name = item_id(request, self.recipe, digests)
        return WorkItem(name, dataclasses.replace(request, id=request.id or name[:16]), self.recipe, "r", digests)


def plan_of(folder, rows):
    plan = Plan(str(folder / "m.jsonl"), RowRules(), FakeBuilder(), ExistingRows())
    rows = [{"prompt": "x", "num_frames": 9, **row} for row in rows]
    return list(plan.rows(RawRow(str(folder / "m.jsonl"), n, row) for n, row in enumerate(rows, 1)))


def test_an_item_is_identified_by_its_images_bytes_not_by_their_paths(tmp_path):
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
    assert "m.jsonl:2:images: " in bad.messages()[0] and "no such file" in bad.messages()[0]


def test_the_resolved_row_names_the_file_and_the_crf(tmp_path):
    row = judge(RawRow(str(tmp_path / "m.jsonl"), 1, {"prompt": "x", "images": [{"path": "a.png"}]}), RowRules())
    assert row.request.images[0].path == str(tmp_path / "a.png") and row.request.images[0].crf == 33


def test_a_frame_beyond_the_clip_is_illegal(tmp_path):
    row = {"prompt": "x", "num_frames": 9, "images": [{"path": "a.png", "frame_idx": 9}]}
    judged = judge(RawRow(str(tmp_path / "m.jsonl"), 1, row), RowRules())
    assert "a frame_idx from 0 to 8" in judged.messages()[0]


# --- places of images --------------------------------------------------------------------------------


def put(s3, uri: str, data: bytes = b"x") -> None:
    with s3.open_output_stream(uri.removeprefix("s3://")) as file:
        file.write(data)


def deny(bucket: str, prefix: str) -> None:
    """Make the store refuse to read what is below `prefix`."""
    name = bucket.removeprefix("s3://")
    resource = f"arn:aws:s3:::{name}/{prefix}*"
    actions = ["s3:GetObject", "s3:HeadObject"]
    policy = {"Statement": [{"Effect": "Deny", "Principal": "*", "Action": actions, "Resource": resource}]}
    url = f"{os.environ['AWS_ENDPOINT_URL']}/{name}?policy"
    body, kind = json.dumps(policy).encode(), {"Content-Type": "application/json"}
    assert urllib.request.urlopen(urllib.request.Request(url, body, kind, method="PUT")).status < 300


def test_an_image_in_an_object_store_is_read_by_its_literal_key(s3, bucket):
    for key in ("img/a b+%20é.png", "img/#1.png"):
        put(s3, f"{bucket}/{key}", key.encode())
        path = locate(key.removeprefix("img/"), f"{bucket}/img", [f"{bucket}/img"])
        assert path == locate(f"{bucket}/{key}", "/elsewhere", [f"{bucket}/img/"]) == f"{bucket}/{key}"
        assert read_image(path) == key.encode() and image_digest(path) == image_digest(f"{bucket}/{key}")


def test_an_unreadable_image_in_an_object_store_makes_its_row_illegal(s3, bucket, monkeypatch):
    put(s3, f"{bucket}/m/secret/a.png")
    deny(bucket, "m/secret/")
    put(s3, f"{bucket}/m/large.png", b"12")
    monkeypatch.setattr(images, "MAX_BYTES", 1)
    paths = ["none.png", "secret/a.png", "large.png", f"{bucket}none/a.png", "secret"]
    plan = Plan("", RowRules(image_roots=(bucket, f"{bucket}none")), FakeBuilder(), ExistingRows())
    rows = [{"prompt": "x", "images": [{"path": path}]} for path in paths]
    planned = list(plan.rows(RawRow(f"{bucket}/m/m.jsonl", n, row) for n, row in enumerate(rows, 1)))
    assert [p.status for p in planned] == [ILLEGAL] * 5
    why = ["no such file", "ACCESS_DENIED", "over the limit", "no such file", "no such file"]
    for number, (row, path, reason) in enumerate(zip(planned, paths, why), 1):
        full = path if "://" in path else f"{bucket}/m/{path}"
        start = f"{bucket}/m/m.jsonl:{number}:images: '{full}', legal: an image that can be read ("
        assert row.messages()[0].startswith(start) and reason in row.messages()[0]


def test_a_bad_image_is_the_rows_fault_and_a_bad_store_is_not(s3, bucket, monkeypatch):
    """A missing or changed image is the row's fault. A store or node that refuses the read is not."""
    put(s3, f"{bucket}/a.png", b"one")
    digest = image_digest(f"{bucket}/a.png")
    assert read_planned_image(f"{bucket}/a.png", digest) == b"one"
    with pytest.raises(RowError, match=f"{bucket}/b.png cannot be read .no such file"):
        read_planned_image(f"{bucket}/b.png", digest)
    put(s3, f"{bucket}/a.png", b"two")
    with pytest.raises(RowError, match=f"{bucket}/a.png has changed since the run was planned"):
        read_planned_image(f"{bucket}/a.png", digest)
    deny(bucket, "a")
    with pytest.raises(OSError, match=f"{bucket}/a.png cannot be read here .*ACCESS_DENIED"):
        read_planned_image(f"{bucket}/a.png", digest)


@pytest.mark.parametrize(
    "path",
    ["../a.png", "sub/../../a.png", "s3://b/img/../a.png", "s3://b/img-other/a.png", "s3://b/imga.png", "s3://b/img",
     "s3://other/img/a.png", "gs://b/img/a.png", "S3://b/img/a.png", "/etc/passwd", "file:///etc/passwd",
     "a.png?endpoint_override=elsewhere", "s3://b/img/a.png?scheme=http&endpoint_override=elsewhere",
     "s3://key:secret@b/img/a.png", "s3://b/img/./a.png", "https://b/img/a.png"],
)  # fmt: skip
def test_paths_outside_a_root_in_an_object_store_are_refused(path):
    for root in ("s3://b/img", "s3://b/img/", "s3://b/img?region=us-east-1"):
        assert locate(path, "s3://b/img", [root]) is None


def test_a_percent_escape_in_an_object_key_is_literal(s3, bucket):
    """If the key were decoded anywhere on the way, it would lead out of the root."""
    put(s3, f"{bucket}/secret.png")
    path = locate("%2e%2e/secret.png", f"{bucket}/img", [f"{bucket}/img"])
    assert path == f"{bucket}/img/%2e%2e/secret.png"
    with pytest.raises(ValueError, match="no such file"):
        read_image(path)
    put(s3, path, b"mine")
    assert read_image(path) == b"mine"


def test_the_operators_options_of_a_root_reach_the_workers():
    assert locate("a.png", "s3://b/m?region=x", ["s3://b/m?region=x"]) == "s3://b/m/a.png?region=x"
    assert locate("s3://b/i/a.png", "/m", ["s3://c", "s3://b/i?region=y"]) == "s3://b/i/a.png?region=y"


def test_a_file_uri_is_a_local_path_with_links_resolved(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "secret.png").write_bytes(b"")
    (tmp_path / "in" / "link.png").symlink_to(tmp_path / "secret.png")
    folder = f"file://{tmp_path}/in"
    for root in (folder, str(tmp_path / "in")):
        for form in ("a.png", f"{folder}/a.png", f"FILE://{tmp_path}/in/a.png", f"file:{tmp_path}/in/a.png"):
            assert locate(form, folder, [root]) == locate(f"{folder}/a.png", "/m", [root]) == f"{tmp_path}/in/a.png"
        assert locate("link.png", folder, [root]) is None
        assert locate(f"{folder}/link.png", "/m", [root]) is None
        assert locate("../secret.png", folder, [root]) is None


def test_illegal_roots_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    check_roots([str(tmp_path), f"file://{tmp_path}"])
    for root in (f"{tmp_path}/none", f"{tmp_path}/file", "s3://", "s3:///a", "web://bucket/a"):
        with pytest.raises(ValueError, match=f"--image-root: {root}, legal: a folder, or a place such as s3://"):
            check_roots([root])


def test_a_root_that_may_not_be_looked_up_is_legal(s3, bucket):
    put(s3, f"{bucket}/kept/a.png")
    deny(bucket, "kept")
    check_roots([bucket, f"{bucket}/kept", f"{bucket}/none?region=us-east-1"])


@pytest.fixture
def nobody_answers(monkeypatch):
    """Stores are tried once, and nobody listens at the port of their endpoint."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(images, "Store", lambda uri, seconds=0.0: Store(uri, retry_seconds=0.0))
    return "s3://bucket/a"


def test_a_root_whose_store_does_not_answer_is_no_fault_of_the_root(nobody_answers):
    for root in (nobody_answers, f"{nobody_answers}?region=us-east-1"):
        with pytest.raises(ConnectionError, match=r"--image-root: s3://bucket/a.*, cannot be reached: s3://bucket/a: "):
            check_roots([root])


def test_a_row_is_not_blamed_for_a_store_that_does_not_answer(nobody_answers, tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(gradient()))
    rows = [{"images": [{"path": path}]} for path in (f"{nobody_answers}/b.png", f"{tmp_path}/a.png")]
    plan = Plan("", RowRules(image_roots=(nobody_answers, str(tmp_path))), FakeBuilder(), ExistingRows())
    unread, good = plan.rows(
        RawRow("m.jsonl", n, {"prompt": "x", "num_frames": 9, **row}) for n, row in enumerate(rows)
    )
    assert (unread.status, good.status) == (UNREAD, TODO) and plan.counts["clips"] == 1
    assert unread.message.startswith(f"m.jsonl:0:images: {nobody_answers}/b.png cannot be read now ({nobody_answers}/b")
    assert unread.raw.values["height"] == 1088, "a retry without the run's defaults asks for the same clip"


def test_the_digest_is_that_of_the_bytes(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"123")
    assert image_digest(str(path)) == "a665a45920422f9d417e4867efdc4fb8"
