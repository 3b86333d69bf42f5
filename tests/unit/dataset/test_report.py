"""The report page: self-contained, complete, bounded in size, and safe against hostile text and damaged files."""

import base64
import hashlib
import io
import json
import random
import re
import subprocess
import sys
import tracemalloc
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from ltx_ray.dataset import report_data
from ltx_ray.dataset.report import write_report
from ltx_ray.dataset.report_failures import EXAMPLES, retry_command
from ltx_ray.dataset.report_list import Smallest
from ltx_ray.dataset.report_text import esc, human
from ltx_ray.dataset.thumbnails import make_strip
from ltx_ray.dataset.timeline import build_timeline
from ltx_ray.dataset.timeline_chart import draw_timeline
from ltx_ray.storage.store import Store
from tests.support import report_data as data


class Page(HTMLParser):
    """A report as parsed: its tags with their attributes in order, and its text outside style and script."""

    def __init__(self, out, **options):
        super().__init__()
        self.tags, self.text, self._stack = [], "", []
        self.source = Path(write_report(str(out), **options)).read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._stack.append(tag)

    def handle_endtag(self, tag):
        while self._stack and self._stack.pop() != tag:
            pass

    def handle_data(self, text):
        if not {"style", "script"} & set(self._stack[-1:]):
            self.text += text

    def all(self, tag, kind=None):
        return [a for t, a in self.tags if t == tag and (kind is None or kind in (a.get("class") or "").split())]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """Six rows (one clip damaged, one missing, one never made), three failures, events."""
    root = tmp_path_factory.mktemp("out")
    rows = [data.index_row(i) for i in range(6)]
    rows[1]["prompt"] = rows[2]["prompt"] = data.HOSTILE
    rows[2]["flags"] = ["silent", data.HOSTILE]
    rows[4]["clip"] = None
    for i, row in enumerate(rows[:4]):
        data.write_mp4(root / row["clip"], 64, 64, 9, seed=i)
    (root / rows[0]["clip"]).write_bytes(b"not an mp4")
    (root / rows[3]["clip"]).unlink()
    data.write_mp4(root / rows[5]["clip"], 96, 64, 57, 29.97)
    rows[5].update(width=96, num_frames=57, frame_rate=29.97)
    data.write_parts(root, "index", rows, size=4)
    failures = [data.failed_row(i) for i in range(1, 3)]
    failures.append(data.failed_row(3, id=data.HOSTILE, message=data.HOSTILE, traceback=data.HOSTILE, item_id=None))
    data.write_parts(root, "failed", failures)
    data.write_events(root, data.run_events())
    data.write_run(root, rows=9, rendered=6, failed=3)
    return root


@pytest.fixture(scope="module")
def page(out):
    return Page(out)


def test_the_page_loads_nothing_from_outside(page):
    assert "http://" not in page.source and "https://" not in page.source
    for tag, attrs in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form")
        if "src" in attrs:
            assert attrs["src"].startswith("data:image/webp;base64,")
        if "href" in attrs:
            assert re.fullmatch(r"#\w+|clips/\w\w/\w+\.mp4", attrs["href"])
    assert "url(" not in page.source and "@import" not in page.source


def test_hostile_text_stays_text(page):
    assert len(page.all("script")) == 1
    assert not [a for _, a in page.tags if any(name.startswith("on") for name in a)]
    assert all((a.get("src") or "").startswith("data:") for a in page.all("img"))
    shown = data.HOSTILE.replace("\x00", "\ufffd")
    # The text is in three prompts, in a flag (summary, badge and option), and in a failed row's id and message, twice
    # each, and traceback. Its "{{title}}" is not taken for a placeholder.
    assert page.text.count(shown) == 11
    assert "\x00" not in page.source
    flags = [json.loads(a["data-flags"]) for a in page.all("article") if a.get("data-flags")]
    assert flags == [["silent", data.HOSTILE]]


def test_the_policy_allows_the_one_script_and_nothing_else(page):
    script = re.search(r"<script>(.*?)</script>", page.source, re.S)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy


def test_failures_come_first_with_their_details(page):
    assert page.source.index('id="failures"') < page.source.index('id="timeline"') < page.source.index('id="clips"')
    assert len(page.all("details", "cause")) == len(page.all("ol", "failures")) == 2
    for text in (
        "bad-001",
        "3 attempts",
        "infrastructure",
        "illegal memory access",
        "RuntimeError",
        "prompts.parquet:1",
    ):
        assert text in page.text


def test_every_clip_has_a_card_with_a_strip_or_a_reason(page):
    assert len([card for card in page.all("article", "clip") if "hidden" not in card]) == 6
    strips = [a for t, a in page.tags if "strip" in (a.get("class") or "").split()]
    assert len(strips) == 6
    assert len([a for a in strips if "none" in a["class"].split()]) == 3
    assert "cannot be decoded" in page.text and "is missing" in page.text and "stopped after stage 1" in page.text
    images = page.all("img")
    assert len(images) == 3 * 6 and all(a["alt"] and a["loading"] == "lazy" for a in images)
    assert "2 clips of the index missing or damaged" in page.text
    for text in ("seed 15", "96 × 64", "57 frames", "29.97 fps", "1.90 s", "stage 1", "silent"):
        assert text in page.text


def test_pictures_that_workers_made_are_shown_and_no_clip_is_decoded(tmp_path, monkeypatch):
    rows = [data.index_row(i) for i in range(4)]
    pictures = {}
    for i, row in enumerate(rows):
        data.write_mp4(tmp_path / row["clip"], 64, 64, 9, seed=i)
        if i != 3:
            sheet = Image.new("RGB", (192, 128), (10 * i, 200, 0))
            buffer = io.BytesIO()
            sheet.save(buffer, "WEBP")
            pictures[i] = buffer.getvalue()
            path = tmp_path / "thumbs" / row["item_id"][:2] / f"{row['item_id']}.webp"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(pictures[i] if i != 2 else b"damaged")
    (tmp_path / rows[1]["clip"]).unlink()
    data.write_parts(tmp_path, "index", rows)
    decoded = []
    make = report_data.make_strip
    monkeypatch.setattr(report_data, "make_strip", lambda file, **o: (decoded.append(file), make(file, **o))[1])
    page = Page(tmp_path)
    assert len(decoded) == 2, "those without a picture, or with a damaged one"
    assert page.source.count(base64.b64encode(pictures[0]).decode()) == 1
    assert len(page.all("img")) == 1 + 2 * 6 and f"{rows[1]['clip']} is missing" in page.text


def test_an_item_id_that_is_a_path_is_not_followed(tmp_path):
    outside = tmp_path / "outside.webp"
    Image.new("RGB", (8, 8)).save(outside, "WEBP")
    row = data.index_row(1, item_id="../../outside")
    data.write_mp4(tmp_path / "out" / row["clip"], 64, 64, 9)
    data.write_parts(tmp_path / "out", "index", [row])
    assert len(Page(tmp_path / "out").all("img")) == 6


def test_summary(page):
    text = " ".join(page.text.split())
    for part in (
        "6 clips rendered, 3 failed",
        "r-20260512-210407",
        "of 9 rows",
        "5 min 0 s",
        "72 clips/h",
        "torch 2.11.0",
        "NVIDIA H100",
        "9f2c41d07be3a855",
        "1.50 GPU hours",
        "$3.75: $0.05 a clip, $40.00 an hour of video",
    ):
        assert part in text, part
    assert re.search(r"Measured ?motion 0\.\d+ ", text), "of the whole dataset"


def test_many_clips_are_a_list_whose_data_is_in_the_page(out):
    page = Page(out, cards=5, max_listed=2)
    assert not page.all("article") and len(page.all("div", "list")) == 1
    (element,) = [a for a in page.all("script") if a.get("type") == "application/json"]
    text = re.search(rf'<script type="application/json" id="{element["id"]}">(.*?)</script>', page.source, re.S)[1]
    found = json.loads(text)
    ids = ["clip-0002", "clip-0000", "bad-001", "bad-002"]
    assert found["id"] == ids, "flagged ones first, then in the order of finishing, and failed rows at the end"
    assert (found["rendered"], found["status"], found["statuses"][0]) == (2, [0, 0], "stage 2: infrastructure")
    assert all("illegal memory access" in why for why in found["why"])
    assert found["prompt"][0] == data.HOSTILE and "<" not in text
    assert [found["names"][n] for n in found["flags"][0]] == ["silent", data.HOSTILE] and found["flags"][1] == []
    assert found["clip"][:2] == ["", ""] and found["item"][1] == data.index_row(0)["item_id"]
    assert "4 more rows not shown here" in page.text and "1 more failed row not listed here" in page.text
    assert "pictures are in thumbs/" in page.text
    assert found["measures"] == [
        {"column": "motion", "title": "motion", "digits": 3, "unit": "", "values": [0.2, 0.1]}
    ]  # fmt: skip
    assert re.findall(r'<option value="([+-][a-z]\w+)">(.*?)</option>', page.source) == [
        ("+motion", "motion, least first"), ("-motion", "motion, most first"),
    ]  # fmt: skip


def test_a_list_of_clips_of_which_nothing_was_measured(tmp_path):
    """Datasets of earlier versions have no such columns."""
    rows = [{name: value for name, value in data.index_row(n).items() if name != "motion"} for n in range(3)]
    data.write_parts(tmp_path, "index", rows)
    page = Page(tmp_path, cards=2)
    assert '"measures":[]' in page.source and "<optgroup" not in page.source


def test_failed_rows_are_there_for_the_filter_by_status(page):
    options = re.search(r'<select name="status".*?</select>', page.source, re.S)[0]
    assert re.findall(r'<option value="(.*?)">(.*?)</option>', options) == [
        ("+", "Finished (6)"), ("-", "Failed (3)"), ("-0", "Failed in stage 2: infrastructure (3)"),
        ("", "All rows (9)"),
    ]  # fmt: skip
    cards = page.all("article", "failed")
    assert [card["data-status"] for card in cards] == ["-0"] * 3 and all("hidden" in card for card in cards)


def test_rows_that_share_a_clip_are_counted_as_rows(tmp_path):
    rows = [data.index_row(n, id=f"row-{n}-{k}") for n in range(3) for k in range(1 + n)]
    data.write_parts(tmp_path, "index", rows)
    data.write_run(tmp_path, rows=6, rendered=6)
    text = " ".join(Page(tmp_path).text.split())
    assert "6 rows of 3 clips rendered, none failed" in text and "rows of 3 clips · of 6 rows in the manifest" in text
    assert "Clips6 rows of 3 clips" in text


def test_the_policy_of_a_list_allows_its_two_scripts_and_pictures_beside_it(out):
    page = Page(out, cards=5)
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    scripts = re.findall(r"<script>(.*?)</script>", page.source, re.S)
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    assert len(scripts) == 2 and all(f"'sha256-{digest}'" in policy for digest in digests)
    assert "img-src 'self' file: data:;" in policy and "default-src 'none'" in policy
    assert not [a for _, a in page.tags if any(name.startswith("on") for name in a)]


def test_a_list_makes_the_pictures_that_are_missing(tmp_path):
    rows = [data.index_row(i) for i in range(4)]
    for i, row in enumerate(rows[:3]):
        data.write_mp4(tmp_path / row["clip"], 64, 64, 9, seed=i)
    (tmp_path / rows[1]["clip"]).write_bytes(b"not an mp4")
    there = tmp_path / "thumbs" / rows[2]["item_id"][:2] / f"{rows[2]['item_id']}.webp"
    there.parent.mkdir(parents=True)
    there.write_bytes(b"of a worker")
    data.write_parts(tmp_path, "index", rows)
    Page(tmp_path, cards=3)
    made = sorted(path.stem for path in (tmp_path / "thumbs").rglob("*.webp"))
    assert made == sorted([rows[0]["item_id"], rows[2]["item_id"]]) and there.read_bytes() == b"of a worker"
    with Image.open(tmp_path / "thumbs" / rows[0]["item_id"][:2] / f"{rows[0]['item_id']}.webp") as picture:
        assert picture.size == (3 * 64, 2 * 64)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows_that_are_not_shown(tmp_path, monkeypatch):
    """20,000 rows in the index and as many in failed/, of which few are shown."""
    monkeypatch.setattr(report_data, "MAX_DECODED", 10)
    for k in range(1, 5):
        numbers = range(5000 * k, 5000 * (k + 1))
        data.write_parts(tmp_path, "index", [data.index_row(n, item_id=f"a{n:031x}") for n in numbers], size=5000)
        data.write_parts(tmp_path, "failed", [data.failed_row(n, message="x" * 4000) for n in numbers], size=5000)
        for folder in ("index", "failed"):
            (tmp_path / folder / "part-00000000.parquet").rename(tmp_path / folder / f"part-{k:08d}.parquet")
    tracemalloc.start()
    try:
        found = report_data.read_report_data(Store(str(tmp_path)), 10)
        assert tracemalloc.get_traced_memory()[1] < 30_000_000
    finally:
        tracemalloc.stop()
    assert found.rendered == found.failures.total == 20_000
    assert len(found.clips) == len(found.listed) == 10


@pytest.mark.parametrize("most", [1, 3, 50, 1000])
def test_the_smallest_are_kept_whatever_their_order(most):
    numbers = list(range(300))
    random.Random(most).shuffle(numbers)
    smallest, taken = Smallest(most), 0
    for number in numbers:
        if smallest.takes(number):
            taken += 1
            smallest.add(number, str(number))
        assert len(smallest._kept) <= 2 * most
    assert smallest.values() == [str(number) for number in range(min(most, 300))]
    assert most > 50 or taken < 300, "what cannot be one of them is not taken"


def test_empty_dataset(tmp_path):
    page = Page(tmp_path)
    assert "Nothing rendered" in page.text and "No clips yet" in page.text
    assert not page.all("article") and 'id="failures"' not in page.source and 'id="timeline"' not in page.source
    with pytest.raises(FileNotFoundError, match="no dataset"):
        write_report(str(tmp_path / "typo"))


def test_failures_only_and_many_of_them(tmp_path):
    data.write_parts(tmp_path, "failed", [data.failed_row(i) for i in range(340)], size=100)
    page = Page(tmp_path)
    assert "0 clips rendered, 340 failed" in page.text and f"{340 - EXAMPLES} more like these" in page.text
    assert len(page.all("details", "cause")) == 1 and "bad-000" in page.text
    assert len(page.source) < 200_000


def test_failures_of_one_cause_are_together_with_their_command(tmp_path):
    lost = [data.failed_row(i, message=f"replica stage2-{i} died: exit code {i}") for i in range(20)]
    illegal = [
        data.failed_row(100 + i, error_class="row", item_id=None, stage="plan",
                        message=f"m.jsonl:{i}:height (bad-{100 + i}): {i}, legal: a multiple of 64")
        for i in range(5)
    ]  # fmt: skip
    bad = [data.failed_row(200, error_class="row", stage="stage1", message="latents are not finite")]
    data.write_parts(tmp_path, "failed", [*bad, *illegal, *lost], size=100)
    data.write_run(tmp_path, rows=26)
    groups = report_data.read_report_data(Store(str(tmp_path)), 10).failures.groups()
    assert [(g.kind, g.stage, g.count) for g in groups] == [
        ("infrastructure", "stage2", 20), ("illegal", "plan", 5), ("row", "stage1", 1),
    ]  # fmt: skip
    page = Page(tmp_path)
    assert page.text.count("ltx-ray render prompts.parquet --output OUT") >= 2
    assert f"ltx-ray retry {tmp_path}" in page.text and "Correct the manifest" in page.text


@pytest.mark.parametrize(
    "command, retry",
    [
        (["/bin/ltx-ray", "render", "m.jsonl", "--output", "out", "--model", "toy"], "ltx-ray retry out --model toy"),
        (["ltx-ray", "render", "--model", "toy", "/data/m.jsonl", "--output=out", "--limit", "3"],
         "ltx-ray retry out --model toy"),
        (["jobs/render.py", "m.jsonl", "--output", "out", "--tp", "2", "--lora", "a b.safetensors", "0.5"],
         "ltx-ray retry out --tp 2 --lora 'a b.safetensors' 0.5"),
        (["ltx-ray", "retry", "out", "--model", "toy"], "ltx-ray retry out --model toy"),
        ([], "ltx-ray retry out"),
        ("damaged", "ltx-ray retry out"),
    ],
)  # fmt: skip
def test_the_command_of_a_retry_has_the_options_of_the_run(command, retry):
    assert retry_command({"command": command, "manifest": "/data/m.jsonl"}, "out") == retry


def test_memory_does_not_grow_with_failures_or_their_causes(tmp_path):
    rows = [data.failed_row(i, traceback=f"{i} " * 5000) for i in range(900)]
    rows += [data.failed_row(i, message="word" * i) for i in range(1, 200)]
    data.write_parts(tmp_path, "failed", rows, size=30)
    del rows
    tracemalloc.start()
    try:
        found = report_data.read_report_data(Store(str(tmp_path)), 10)
        assert tracemalloc.get_traced_memory()[1] < 6_000_000
    finally:
        tracemalloc.stop()
    assert found.failures.total == 1099
    assert max(len(group.rows) for group in found.failures.groups()) == EXAMPLES


def test_a_failure_that_was_rendered_since_is_not_listed(tmp_path):
    row = data.index_row(1, clip=None)
    data.write_parts(tmp_path, "index", [row])
    data.write_parts(tmp_path, "failed", [data.failed_row(1, item_id=row["item_id"]), data.failed_row(2)])
    page = Page(tmp_path)
    assert "1 failed" in page.text and "bad-001" not in page.text and "1 earlier failure rendered since" in page.text


def test_damaged_records_are_reported_and_not_fatal(tmp_path):
    data.write_parts(
        tmp_path,
        "index",
        [data.index_row(1, clip="../../etc/passwd"), data.index_row(2, clip="javascript:x")],
    )
    (tmp_path / "index" / "part-zzz.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "index" / "_tmp.parquet").write_bytes(b"someone is writing this")
    (tmp_path / "run.json").write_text(
        '{"run_id": "\\ud800", "started_at": 1e300, "counts": [], "pools": 3, "state": 7}'
    )
    lines = [
        '{"t": 1, "event": "call"}',
        '{"t": 1, "event": "call", "role": [], "replica": 0, "start": "x"}',
        "[]",
        "{",
        "",
    ]
    lines += [
        '{"t": NaN, "event": "call"}',
        '{"t": 2, "event": "switch", "role": "a", "replica": {}, "seconds": -1}',
    ]
    lines += ['{"t": 3, "event": "call", "role": "x", "replica": 1, "stage": ["y"], "start": 1, "seconds": 1}']
    (tmp_path / "events.jsonl").write_text("\n".join(lines))
    page = Page(tmp_path)
    assert "part-zzz.parquet cannot be read" in page.text and "3 malformed lines skipped" in page.text
    assert "not a path inside the dataset" in page.text and "_tmp" not in page.text
    assert {a.get("href") for a in page.all("a")} == {"#clips", "javascript%3Ax"}


def test_only_the_newest_run_is_on_the_timeline(tmp_path):
    data.write_events(
        tmp_path,
        [
            {"t": 5, "event": "gang_starting", "role": "old", "replica": "old-0"},
            *data.run_events(),
        ],
    )
    page = Page(tmp_path)
    assert "old-0" not in page.text and "stage1-2" in page.text


def test_timeline_shows_loading_switches_losses_and_failures():
    events = data.run_events(shared=True)
    chart = draw_timeline(build_timeline(events))
    for text in (
        "loading: ",
        "on node-0 cuda:0",
        "switch to stage2: 3.0 s",
        "replica lost: rank 0 died",
        "stage 1 + 2",
    ):
        assert text in chart
    assert chart.count('<rect class="k-') == sum(e["event"] in ("call", "switch", "gang_started") for e in events)
    assert build_timeline([]) is build_timeline([{"t": 1.0, "event": "run_started"}]) is None
    assert draw_timeline(None) == ""


def test_timeline_lanes_are_in_order_of_stage_and_number():
    events = data.run_events(400, replicas=(1, 11, 2, 1))
    lanes = re.findall(r'<div title="([^"]+)">', draw_timeline(build_timeline(events)))
    assert lanes == ["text-0", *(f"stage1-{k}" for k in range(11)), "stage2-0", "stage2-1", "decode-0"]


@pytest.mark.slow
def test_ten_thousand_events_and_many_replicas_stay_small(tmp_path):
    events = data.run_events(40_000, replicas=(2, 60, 50, 12))
    assert len(events) > 10_000
    data.write_events(tmp_path, events)
    page = Page(tmp_path)
    assert len(page.source) < 700_000
    assert "more replicas are not drawn" in page.text
    assert len(draw_timeline(build_timeline(data.run_events(10_000, replicas=(1, 4, 3, 2))))) < 200_000


def test_busy_bins_add_up():
    """A replica that is busy half of the time fills half of its lane."""
    events = [{"t": 0.0, "event": "run_started"}]
    for i in range(1000):
        call = {
            "role": "text",
            "replica": "a",
            "stage": "text",
            "id": str(i),
            "start": 10.0 * i,
            "seconds": 5.0,
            "ok": True,
        }
        events.append({"t": 10.0 * i + 10, "event": "call", **call})
    chart = draw_timeline(build_timeline(events))
    heights = [int(h) for h in re.findall(r"v-(\d+)h-1z", chart)]
    assert sum(heights) / 100 / 240 == pytest.approx(0.5, abs=0.01)
    assert ">50%</div>" in chart


def test_strips_fit_their_budget_and_show_every_frame_that_decodes(tmp_path):
    path = tmp_path / "a.mp4"
    data.write_mp4(path, 320, 192, 57)
    with path.open("rb") as file:
        full = make_strip(file, seconds=57 / 24, budget=72_000)
    with path.open("rb") as file:
        small = make_strip(file, seconds=57 / 24, budget=4_000)
    assert full.size == (320, 192) and full.problem is None and len(full.frames) == len(small.frames) == 6
    assert sum(len(picture) for _, picture in small.frames) <= 4_000 < sum(len(picture) for _, picture in full.frames)
    times = [time for time, _ in full.frames]
    assert times == sorted(times) and times == pytest.approx([57 / 24 * (i + 0.5) / 6 for i in range(6)], abs=0.15)
    with path.open("rb") as file:
        short = make_strip(file, seconds=20.0)
    assert short.frames and "breaks off" in short.problem


def test_a_clip_of_one_frame(tmp_path):
    data.write_mp4(tmp_path / "a.mp4", 64, 64, 1)
    with (tmp_path / "a.mp4").open("rb") as file:
        strip = make_strip(file, seconds=1 / 24)
    assert len(strip.frames) == 1 and strip.problem is None and "--cols:1" in strip.html("a", "a.mp4")


def test_durations_for_people():
    expected = {
        None: "–",
        0: "0 s",
        0.123: "0.12 s",
        59.96: "1 min 0 s",
        3599.6: "1 h 00 min",
        7500: "2 h 05 min",
        2e5: "2 d 7 h",
    }
    assert {seconds: human(seconds) for seconds in expected} == expected
    assert [human(t, 30) for t in (0, 30, 60, 90, 3600)] == ["0", "30 s", "1 min", "1 min 30 s", "1 h"]
    assert esc('<a b="\'">\x07') == "&lt;a b=&quot;&#x27;&quot;&gt;\ufffd"


def test_needs_neither_torch_nor_ray():
    code = "import sys, ltx_ray.dataset.report; assert not {'torch', 'ray'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_replica_that_was_given_back_was_idle_no_longer():
    """It was busy for all of its life, which is half of the run."""
    of_replica = {"role": "text", "replica": "text-0"}
    events = [
        {"t": 0.0, "event": "gang_started", "seconds": 0, **of_replica},
        {
            "t": 50.0,
            "event": "call",
            "start": 0.0,
            "seconds": 50.0,
            "stage": "text",
            "id": "a",
            "ok": True,
            **of_replica,
        },
        {"t": 50.0, "event": "gang_given_back", "reason": "no row needs it", **of_replica},
        {"t": 100.0, "event": "run_finished"},
    ]
    chart = draw_timeline(build_timeline(events))
    assert "busy 100% of the time" in chart and "replica lost" not in chart
