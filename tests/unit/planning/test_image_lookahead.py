"""Images are read before the rows that need them are taken, by several threads, and rows stay in their order."""

from __future__ import annotations

import threading
import time
from collections import Counter

import pytest

from ltx_ray.config import Selection
from ltx_ray.manifest.rules import IllegalRow, RowRules
from ltx_ray.planning.image_lookahead import ImageLookAhead
from ltx_ray.planning.plan import Plan
from tests.support.pictures import encoded, gradient
from tests.support.samples import SMALL, write_jsonl

SECONDS = 120


class Images:
    """Reads images while `go` is set, and counts how often each is read."""

    def __init__(self):
        self.read, self.go = Counter(), threading.Event()

    def digest(self, path: str, crf: int) -> str:
        self.read[path] += 1
        assert self.go.wait(SECONDS)
        if path == "bad":
            raise ValueError("bad")
        return f"digest of {path} at {crf}"


def uses(row: str) -> tuple[tuple[str, int], ...]:
    return tuple((path, 3) for path in row.split())


def until(condition) -> bool:
    end = time.monotonic() + SECONDS
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return condition()


def test_the_images_of_the_next_rows_are_read_at_once():
    images = Images()
    reader = ImageLookAhead(images.digest, depth=4)
    rows = reader.over([f"image{n}" for n in range(20)], uses)
    assert next(rows) == "image0"
    assert until(lambda: len(images.read) == 5), "one more than are ahead"
    assert not reader.ready
    images.go.set()
    assert until(lambda: reader.ready)
    assert reader.digest("image0", 3) == "digest of image0 at 3" and images.read["image0"] == 1
    assert list(rows) == [f"image{n}" for n in range(1, 20)], "in their order"
    assert reader.ready and set(images.read.values()) == {1}


def test_an_image_that_several_rows_need_is_read_once():
    images = Images()
    images.go.set()
    reader = ImageLookAhead(images.digest, depth=4)
    for row in reader.over(["a b", "a", "a", "b"], uses):
        assert [reader.digest(*use) for use in uses(row)] == [f"digest of {path} at 3" for path in row.split()]
    assert images.read == {"a": 1, "b": 1} and not reader._reading, "none is kept when no row needs it"


def test_what_is_wrong_with_an_image_is_raised_where_it_is_needed():
    images = Images()
    images.go.set()
    reader = ImageLookAhead(images.digest)
    outcomes = []
    for row in reader.over(["good", "bad", "fine"], uses):
        try:
            outcomes.append(reader.digest(row, 3))
        except ValueError as error:
            outcomes.append(str(error))
    assert outcomes == ["digest of good at 3", "bad", "digest of fine at 3"] and images.read["bad"] == 1


def test_rows_without_images_start_no_thread_and_are_not_held():
    taken = []
    reader = ImageLookAhead(Images().digest)
    rows = reader.over((taken.append(n) or str(n) for n in range(9)), lambda row: ())
    assert next(rows) == "0" and taken == [0]
    assert list(rows) == [str(n) for n in range(1, 9)] and reader._pool is None


def test_rows_that_nobody_takes_are_not_read():
    images = Images()
    reader = ImageLookAhead(images.digest, depth=60)
    rows = reader.over([f"image{n}" for n in range(100)], uses)
    next(rows)
    begun = 16  # threads
    assert until(lambda: len(images.read) == begun)
    rows.close()
    images.go.set()
    assert reader.ready and reader._pool is not None
    reader._pool.shutdown(wait=True)
    assert len(images.read) == begun


@pytest.fixture
def plan(tmp_path, builder):
    """A plan of 30 rows, of which every third has an image, one has none that can be read, and one is illegal."""
    rows = [{"prompt": f"clip {n}", "id": f"r{n}", **SMALL} for n in range(30)]
    for n in range(0, 30, 3):
        (tmp_path / f"{n}.png").write_bytes(encoded(gradient(40 + n)))
        rows[n]["images"] = [{"path": f"{n}.png"}]
    (tmp_path / "9.png").unlink()
    rows[10]["height"] = 65
    manifest = write_jsonl(tmp_path / "m.jsonl", rows)

    def make(depth: int) -> Plan:
        made = Plan(manifest, RowRules(image_roots=(str(tmp_path),)), builder, selection=Selection(), samples=2)
        made._images._depth = depth
        return made

    return make


def test_a_plan_is_the_same_however_far_ahead_images_are_read(plan):
    def planned(depth: int) -> list:
        a_plan = plan(depth)
        rows = [r.messages() if isinstance(r, IllegalRow) else (r.id, r.item_id, r.status) for r in a_plan.open()]
        return [*rows, dict(a_plan.counts)]

    at_once, one, many = (planned(depth) for depth in (0, 1, 64))
    assert at_once == one == many
    assert at_once[-1]["illegal"] == 2 and at_once[-1]["todo"] == 56
