"""A row that was taken down is not rendered again by a real run, and dataset.json says what the dataset holds."""

from __future__ import annotations

import json

from ltx_ray.cli.remove import remove
from ltx_ray.storage.store import Store

SMALL = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 2}
ROWS = [{"id": name, "prompt": f"a {name}", **SMALL} for name in ("boat", "bird", "tree")]


def test_a_run_passes_over_what_was_removed(runner, capfd):
    def described() -> dict:
        return json.loads((runner.output / "dataset.json").read_text())

    assert runner.render(ROWS) == 0
    index = runner.index()
    assert described()["rows"] == {"index": 3, "previews": 0, "failed": 0}
    assert described()["recipe_digests"] == sorted({row["recipe_digest"] for row in index.values()})
    remove(Store(str(runner.output)), frozenset({"bird"}), lambda message: None, lambda done, total: None)
    assert (
        runner.render([*ROWS, {"id": "other", "prompt": "a bird", **SMALL}, {"id": "cat", "prompt": "a cat", **SMALL}])
        == 0
    )
    assert set(runner.index()) == {"boat", "tree", "cat"}
    assert not (runner.output / index["bird"]["clip"]).exists()
    assert described()["rows"]["index"] == 3
    started = [event["id"] for event in runner.events() if event["event"] == "item_finished"]
    assert started == ["cat"]
    assert "2 taken down before" in capfd.readouterr().err
