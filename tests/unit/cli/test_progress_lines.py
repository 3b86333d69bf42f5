"""Whoever waits for a long command is told how far it is."""

from __future__ import annotations

import pytest

from ltx_ray.cli.app import main
from ltx_ray.dataset.writer import DatasetWriter
from ltx_ray.driver import progress
from ltx_ray.storage.store import Store
from tests.support.damaged_dataset import ITEMS, as_one_row_parts, boxes, build, clip_of
from tests.support.datasets import row_log
from tests.support.results import RENDERED
from tests.support.samples import request


@pytest.fixture
def cmd(capfd, monkeypatch):
    monkeypatch.setattr(progress, "_LOG_PERIOD", 0.0)

    def call(*arguments: str) -> str:
        with pytest.raises(SystemExit) as caught:
            main(list(arguments))
        assert caught.value.code == 0
        return capfd.readouterr().err

    return call


@pytest.fixture
def out(tmp_path) -> Store:
    return build(Store(str(tmp_path / "out")))


def test_fold(cmd, tmp_path):
    store = Store(str(tmp_path / "out"))
    writer = DatasetWriter(row_log(store))
    for n, item_id in enumerate(ITEMS):
        store.write_bytes(clip_of(n), boxes(item_id))
        writer.write_index(item_id, request(id=str(n)), RENDERED)
    store.write_bytes(RENDERED.clip.path, boxes("a" * 32))
    writer.log.commit()
    assert "3 of 3 rows folded" in cmd("fold", store.uri)


def test_migrate(cmd, out):
    as_one_row_parts(out)
    assert "4 of 4 rows moved" in cmd("fold", out.uri, "--migrate")


@pytest.mark.parametrize("to", ["webdataset", "hf"])
def test_export(cmd, out, tmp_path, to):
    assert "4 of 4 rows exported" in cmd("export", out.uri, str(tmp_path / "export"), "--to", to)


def test_remove(cmd, out, tmp_path):
    (tmp_path / "ids").write_text("a\n")
    assert "1 of 1 parts read" in cmd("remove", out.uri, "--ids", str(tmp_path / "ids"))


def test_verify(cmd, out):
    assert "4 of 4 rows checked" in cmd("verify", out.uri)
