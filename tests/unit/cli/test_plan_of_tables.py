"""`ltx-ray plan` of a dataset's failed/: its rows' images are where their manifest was, as for `retry`."""

from dataclasses import replace

import pytest
from click.testing import CliRunner
from PIL import Image

from ltx_ray.cli.app import app
from ltx_ray.dataset.output import is_own_table
from ltx_ray.manifest.reader import RawRow
from ltx_ray.records import ImageCondition
from ltx_ray.storage.store import Store
from tests.support.datasets import dataset_writer, finish
from tests.support.results import CRASH, ITEM
from tests.support.samples import request


@pytest.fixture
def out(tmp_path) -> str:
    """A dataset with a failed row of another folder's manifest, which has an image."""
    (tmp_path / "rows").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "rows/a.png")
    out = Store(str(tmp_path / "out"))
    writer = dataset_writer(out)
    image = ImageCondition(str(tmp_path / "rows/a.png"), 0, 1.0, 0)
    row = replace(request(id="r", height=64, width=64, num_frames=9), images=(image,))
    writer.write_failed(ITEM, row, RawRow(str(tmp_path / "rows/m.jsonl"), 1, {}), CRASH)
    finish(writer)
    out.write_bytes("run.json", b"{}")
    return out.uri


def plan(*words: str) -> tuple[int, str]:
    found = CliRunner().invoke(app, ["plan", *words, "--model", "toy"])
    return found.exit_code, found.output


def test_failed_is_planned_without_the_roots_of_its_images(out):
    (part,) = Store(out).list_names("failed")
    for manifest in ("failed", "failed/", f"failed/{part}"):
        for output in ([], ["--output", out]):
            code, text = plan(f"{out}/{manifest}", *output)
            assert code == 0 and "1 rows: 1 to render\n" in text, text


def test_the_failed_rows_of_another_output_name_no_place_for_images(out, tmp_path):
    """It may come from somebody who is not trusted, and its images would be rendered into the other output."""
    code, text = plan(f"{out}/failed", "--output", str(tmp_path / "elsewhere"))
    assert code == 3 and f"legal: a path inside an --image-root ({out}/failed)" in text


def test_a_folder_that_is_called_failed_is_not_a_table(out, tmp_path):
    (tmp_path / "mine/failed").mkdir(parents=True)
    assert not is_own_table(str(tmp_path / "mine/failed"), None)
    assert not is_own_table(f"{out}/rows.jsonl", out) and not is_own_table(f"{out}/state/manifests/m.jsonl", out)
    assert is_own_table(f"{out}/previews", f"{out}/") and is_own_table("s3://b/out/failed?region=x", "s3://b/out")
