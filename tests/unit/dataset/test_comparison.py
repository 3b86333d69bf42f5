"""compare.html: which rows of two datasets belong together, what is counted of them, and what is shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from ltx_ray.dataset import comparison
from ltx_ray.dataset.comparison import compare, write_comparison
from ltx_ray.storage.store import Store
from tests.support import report_data as data


@pytest.fixture
def two(tmp_path):
    """Makes two datasets of these rows."""

    def make(first: list[dict], second: list[dict]) -> tuple[Store, Store]:
        stores = []
        for name, rows in (("a", first), ("b", second)):
            data.write_parts(tmp_path / name, "index", rows, size=3)
            data.write_run(tmp_path / name, rows=len(rows))
            stores.append(Store(str(tmp_path / name)))
        return stores[0], stores[1]

    return make


def row(i: int, **changes) -> dict:
    return data.index_row(i, motion=0.5, flags=changes.pop("flags", []), **changes)


def test_rows_belong_together_by_their_ids(two):
    first = [row(i) for i in range(6)]
    second = [
        row(5), row(4, latents_sha256="f" * 64), row(3, latents_sha256="f" * 64, flags=["silent"]),
        row(2, seed=99, latents_sha256="f" * 64), row(17),
    ]  # fmt: skip
    found = compare(*two(first, second))
    assert found.kinds == {"same": 1, "other": 2, "request": 1}
    assert found.only == (2, 1) and not found.is_sample
    order = [pair[0]["id"] for pair in found.pairs]
    assert order == ["clip-0003", "clip-0002", "clip-0004", "clip-0005"], "flags, then latents, then the same"
    assert found.flags[1] == {"silent": 1} and not found.flags[0]


def test_means_are_those_of_the_pairs(two):
    first = [row(i, gpu_seconds=10.0 * i) for i in range(4)]
    second = [row(i, gpu_seconds=1.0) for i in (1, 3)] + [row(9, gpu_seconds=1000.0)]
    found = compare(*two(first, second))
    assert found.sums["gpu_seconds"] == [40.0, 2.0] and found.measured["gpu_seconds"] == 2


def test_of_many_rows_the_same_are_taken_on_both_sides(two, monkeypatch):
    monkeypatch.setattr(comparison, "MAX_COMPARED", 40)
    monkeypatch.setattr(comparison, "MAX_PAIRS", 7)
    rows = [row(i) for i in range(100)]
    found = compare(*two(rows, rows[::-1]))
    assert found.is_sample and found.kinds == {"same": 40} and found.only == (0, 0)
    assert len(found.pairs) == 7


def test_the_page_shows_pairs_with_links_to_both(two, tmp_path):
    first, second = [row(i) for i in range(2)], [row(i, latents_sha256="f" * 64) for i in range(2)]
    first[0]["prompt"] = second[0]["prompt"] = data.HOSTILE
    stores = two(first, second)
    for side in "ab":
        data.write_mp4(tmp_path / side / first[0]["clip"], 64, 64, 9)
    path = write_comparison(stores[0].uri, stores[1].uri)
    assert path == str(tmp_path / "a" / "compare.html")
    page = Path(path).read_text()
    assert page.count('class="pair"') == 2 and page.count("other latents") >= 2
    assert f'href="{first[0]["clip"]}"' in page and f'href="../b/{first[0]["clip"]}"' in page
    assert "<script>alert(2)" not in page and 'onmouseover="alert' not in page
    assert page.count("<script>") == 1 and "default-src 'none'" in page
    assert f"{first[1]['clip']} is missing" in page


def test_datasets_without_a_row_in_common(two):
    path = write_comparison(*(store.uri for store in two([row(1)], [row(2)])))
    assert "No row has its id in both datasets" in Path(path).read_text()
