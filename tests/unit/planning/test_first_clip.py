"""The size of the first clip to render."""

from __future__ import annotations

from types import SimpleNamespace

from ltx_ray.planning import first_clip
from ltx_ray.planning.first_clip import FirstClip
from ltx_ray.shapes import ClipShape


class Row(SimpleNamespace):
    pass


def test_rows_pass_and_the_first_one_to_render_tells_its_size(monkeypatch):
    monkeypatch.setattr(first_clip, "PlannedRow", Row)
    monkeypatch.setattr(first_clip, "item_to_render", lambda row: row.item)
    sizes = [ClipShape(9, 64, 64 * n, 24.0) for n in range(4)]
    rows = [
        "illegal", Row(item=None, request=SimpleNamespace(shape=sizes[0])),
        *(Row(item=str(n), request=SimpleNamespace(shape=sizes[n])) for n in (1, 2, 3)),
    ]  # fmt: skip
    first = FirstClip()
    watched = first.watch(iter(rows))
    assert [next(watched), next(watched)] == rows[:2] and first.shape is None
    # Whoever has the row knows its size already.
    assert next(watched) is rows[2] and first.shape == sizes[1]
    assert list(watched) == rows[3:] and first.shape == sizes[1]


def test_nothing_to_render():
    first = FirstClip()
    assert list(first.watch(iter(()))) == [] and first.shape is None
