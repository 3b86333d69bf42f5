"""A dataset made by the version before the refactoring: looked at, checked, continued, retried and promoted now.

tests/data/version_before/make.py says what is in it. Its rows are rows of the manifest whose item_ids and latents are
kept beside it, so that what is made now can be compared with what would have been made then.
"""

from __future__ import annotations

import hashlib
import json
import tarfile

import pytest

from tests.support import version_before
from tests.support.version_before import DATA, ROOT, Version, kept

FINISHED = {"negative-none", "image-first", "base-stg", "extra", "again"}


class Dataset(Version):
    """A copy of the dataset of the version before, and the commands of the present one."""

    def __init__(self, folder):
        super().__init__(ROOT, folder)
        version_before.check_toy(self)
        with tarfile.open(DATA / "dataset.tar.xz") as archive:
            # Python has the filter from 3.11.4 on.
            archive.extractall(self.folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
        self.out = self.folder / "out"

    def rows(self, table: str = "index") -> dict[str, dict]:
        found = version_before.rows_of(self.out, table)
        assert len({row["id"] for row in found}) == len(found), "a row appears twice"
        return {row["id"]: row for row in found}

    def clips(self) -> dict[str, str]:
        """sha256 of the clip of every finished row, each as long as its row says that it is."""
        clips = {row_id: (self.out / row["clip"]).read_bytes() for row_id, row in self.rows().items()}
        return {row_id: hashlib.sha256(clip).hexdigest() for row_id, clip in clips.items()}

    def calls(self) -> dict[str, set[str]]:
        """The stages that the newest run called, by the id of the row."""
        events = [json.loads(line) for line in (self.out / "events.jsonl").read_text().splitlines()]
        called: dict[str, set[str]] = {}
        for event in events:
            if event["event"] == "call":
                called.setdefault(event["id"], set()).add(event["stage"])
        return called

    def counts(self) -> dict[str, int]:
        return json.loads((self.out / "run.json").read_text())["counts"]

    def check_rendered(self, row_id: str) -> None:
        """The row is in the index as the item of before, with the clip that it names and the latents of before."""
        row = self.rows()[row_id]
        assert row["item_id"] == kept("ids.json")["float32"][row_id]["item_id"]
        assert self.clips()[row_id] == row["clip_sha256"]
        distances = version_before.distances(self.out, row["item_id"])
        assert max(distances.values()) <= version_before.tolerance(), distances


@pytest.fixture
def dataset(tmp_path) -> Dataset:
    return Dataset(tmp_path / "moved")


def test_it_is_told_and_checked(dataset):
    said = dataset.run("status", "out")
    assert ": finished\n" in said
    kinds = "1 illegal, 1 of their own fault, 2 of infrastructure's"
    assert f"5 rows in the index, 4 in failed/ ({kinds}), 2 previews" in said
    assert "stage1-0: last finished stage1 of guidance-1" in said
    said = dataset.run("verify", "out")
    assert said == "5 rows and 5 clips checked, 4 rows in failed/: all well\n"
    assert dataset.run("report", "out").strip().endswith("report.html")
    page = (dataset.out / "report.html").read_text()
    assert all(row_id in page for row_id in (*FINISHED, "seed-0", "faulty"))

    clip = dataset.out / dataset.rows()["extra"]["clip"]
    clip.write_bytes(clip.read_bytes()[:-1])
    said = dataset.run("verify", "out", codes=(3,))
    assert "(extra): its clip" in said and "1 problems" in said


def test_it_is_continued(dataset, cluster):
    """The same command: what is done stays, what is missing or lost is made, what infrastructure broke is retried."""
    before, rows = dataset.clips(), dataset.rows()
    assert set(rows) == FINISHED and set(dataset.rows("failed")) == {"seed-0", "seed-largest", "faulty", "illegal"}
    (dataset.out / rows["extra"]["clip"]).unlink()
    options = (*dataset.of_dataset(), "--save-latents", "--ray-address", cluster)
    said = dataset.run("verify", "out", "--repair", codes=(3,))
    assert f"index/part-{rows['extra']['item_id']}" in said and "is missing; set aside in state/aside/index/" in said
    said = dataset.run("render", "first.jsonl", "--output", "out", *options, codes=(3,))
    assert "first.jsonl:8:width (illegal): 300, legal: " in said

    # seed-0 resumes from the latents that the version before kept, and faulty is left to `retry`
    calls = dataset.calls()
    assert set(calls) == {"seed-0", "unicode", "extra"}
    assert "stage1" in calls["unicode"] and "stage1" in calls["extra"] and "stage1" not in calls["seed-0"]
    assert dataset.counts() == {"rows": 9, "rendered": 3, "already_done": 4, "failed": 1, "illegal": 1}
    for row_id in ("seed-0", "unicode", "extra"):
        dataset.check_rendered(row_id)
    now = dataset.rows()
    assert set(now) == FINISHED | {"seed-0", "unicode"}
    for row_id in FINISHED - {"extra"}:
        assert now[row_id] == rows[row_id] and dataset.clips()[row_id] == before[row_id]
    assert {row_id for row_id, row in now.items() if row.get("mean_luma") is not None} == {"seed-0", "unicode", "extra"}
    # the row of the other manifest is not this one's
    assert set(dataset.rows("failed")) == {"seed-largest", "faulty", "illegal"}
    assert dataset.run("verify", "out").endswith("7 rows and 7 clips checked, 3 rows in failed/: all well\n")


def test_its_failed_rows_are_retried(dataset, cluster):
    """Those of every manifest. A row at fault is tried again, too, and fails again in the same way."""
    before = dataset.rows("failed")
    options = (*dataset.of_dataset(), "--save-latents", "--ray-address", cluster)
    dataset.run("retry", "out", *options, codes=(3,))
    calls = dataset.calls()
    assert set(calls) == {"seed-0", "seed-largest", "faulty"}
    assert "stage1" not in calls["seed-0"] | calls["seed-largest"]
    for row_id in ("seed-0", "seed-largest"):
        assert before[row_id]["error_class"] == "infrastructure" and before[row_id]["stage"] == "decode"
        dataset.check_rendered(row_id)
    assert set(dataset.rows()) == FINISHED | {"seed-0", "seed-largest"}
    now = dataset.rows("failed")
    assert set(now) == {"faulty", "illegal"}
    same = ("item_id", "source", "stage", "attempts", "error_class", "message", "manifest_row", "prompt")
    for name in same:
        assert now["faulty"][name] == before["faulty"][name], name
    assert now["illegal"]["message"].split(", legal:")[0] == before["illegal"]["message"].split(", legal:")[0]


def test_a_preview_of_it_is_promoted(dataset, cluster):
    """The clip of the whole line, from the latents that the version before stored."""
    assert set(dataset.rows("previews")) == {"loras-none", "guidance-1"}
    options = (*dataset.of_dataset(), "--save-latents", "--ray-address", cluster)
    # its previews have no measures
    said = dataset.run("promote", "out", "--where", "motion >= 0", *options)
    assert "no preview in " in said
    where = ("--where", "id = guidance-1", "--where", "seed < 100", "--where", "motion != 1")
    dataset.run("promote", "out", *where, *options)
    calls = dataset.calls()
    assert set(calls) == {"guidance-1"} and "stage1" not in calls["guidance-1"]
    assert set(dataset.rows()) == FINISHED | {"guidance-1"}
    dataset.check_rendered("guidance-1")
    assert dataset.rows()["guidance-1"]["latents_sha256"] != dataset.rows("previews")["guidance-1"]["latents_sha256"]
