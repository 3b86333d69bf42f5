"""The example of docs/dataset.md that reads a dataset with Ray Data."""

from __future__ import annotations

import pytest

from tests.support.damaged_dataset import ITEMS, boxes
from tests.support.doc_examples import make_dataset, run_example


def test_ray_data_reads_the_index_with_its_clips(cluster, tmp_path, monkeypatch):
    pytest.importorskip("pandas", reason="Ray Data needs it")
    monkeypatch.chdir(tmp_path)
    make_dataset(tmp_path)
    rows = run_example("ray.data")["clips"].take_all()
    assert sorted(row["mp4"] for row in rows) == sorted(map(boxes, (ITEMS[0], *ITEMS)))
