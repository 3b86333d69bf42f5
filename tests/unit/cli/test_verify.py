"""What verify finds in a damaged dataset and repairs, and what it makes of a sample that is rendered again."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from ltx_ray.cli import verify as verify_module
from ltx_ray.cli.app import app
from ltx_ray.cli.verify import verify
from ltx_ray.config import ModelFiles, RequestedNumerics
from ltx_ray.dataset.layout import ADDED_COLUMNS, INDEX_SCHEMA, one_row_part, row_key
from ltx_ray.dataset.parts import encode_part, encode_segment
from ltx_ray.dataset.writer import Failure
from ltx_ray.manifest.reader import RawRow, read_manifest
from ltx_ray.manifest.rules import LegalRow, RowRules, judge
from ltx_ray.placement.sizing import ParallelConfig
from ltx_ray.run import ExitCode, Options
from ltx_ray.storage.lease import holder
from ltx_ray.storage.store import Store
from tests.support.damaged_dataset import ITEMS, ROWS, as_one_row_parts, build, clip_of, one_row, part_of, rows_of
from tests.support.datasets import dataset_writer, finish
from tests.support.samples import request


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.slow)])
def store(request, tmp_path) -> Store:
    """A dataset of parts of one row, as earlier versions wrote them."""
    place = str(tmp_path / "out") if request.param == "local" else request.getfixturevalue("bucket")
    return as_one_row_parts(build(Store(place)))


#: For what is made of rows once they have been read, whatever they were read from.
on_a_disk = pytest.mark.parametrize("store", ["local"], indirect=True)


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.slow)])
def folded(request, tmp_path) -> Store:
    """The same rows in numbered parts: three in the first, one in the second."""
    store = Store(str(tmp_path / "out") if request.param == "local" else request.getfixturevalue("bucket"))
    return build(build(store, ROWS[:3]), ROWS[3:])


def check(store: Store, **options) -> tuple[int, list[str]]:
    said: list[str] = []
    return verify(store.uri, said.append, **options), said


def change(store: Store, part: str, **values) -> None:
    row = pq.read_table(io.BytesIO(store.read_bytes(part))).to_pylist()[0]
    store.write_bytes(part, one_row({**row, **values}, INDEX_SCHEMA))


def test_it_says_how_far_it_is(store, folded):
    for dataset in (store, folded):
        seen: list[tuple[int, int]] = []
        check(dataset, on_rows=lambda done, total, seen=seen: seen.append((done, total)))
        assert seen[-1] == (4, 4) and {total for _, total in seen} == {4}
        assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_a_whole_dataset(store):
    before = store.list_names("", recursive=True)
    assert check(store) == (0, ["4 rows and 4 clips checked, 0 rows in failed/: all well"])
    assert check(store, repair=True)[0] == 0
    assert [name for name in store.list_names("", recursive=True) if name != "lease.json"] == before
    assert holder(store) is None


def test_no_dataset(tmp_path):
    with pytest.raises(ValueError, match="no dataset; legal: the --output of a run"):
        verify(str(tmp_path), pytest.fail)


@pytest.mark.parametrize("lacking", [ADDED_COLUMNS, {"cuts"}], ids=["all", "one"])
def test_a_part_of_an_earlier_version_is_well(store, lacking):
    without_columns(store, lacking)
    assert check(store) == (0, ["4 rows and 4 clips checked, 0 rows in failed/: all well"])
    assert check(store, repair=True)[0] == 0


def flip(store: Store, name: str) -> None:
    data = bytearray(store.read_bytes(name))
    data[-1] ^= 1
    store.write_bytes(name, bytes(data))


def truncate(store: Store, name: str) -> None:
    store.write_bytes(name, store.read_bytes(name)[:-9])


def flip_page(store: Store) -> None:
    """A bit in the header of the first page, for which Arrow raises an OSError."""
    data = bytearray(store.read_bytes(part_of(1, "c")))
    data[4] ^= 0x80
    store.write_bytes(part_of(1, "c"), bytes(data))


def not_utf8(store: Store) -> None:
    table = pq.read_table(io.BytesIO(store.read_bytes(part_of(1, "c"))))
    text = pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff"))
    buffer = io.BytesIO()
    pq.write_table(table.set_column(table.column_names.index("prompt"), "prompt", text), buffer)
    store.write_bytes(part_of(1, "c"), buffer.getvalue())


def without_columns(store: Store, names: Iterable[str]) -> None:
    table = pq.read_table(io.BytesIO(store.read_bytes(part_of(1, "c")))).drop_columns(list(names))
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    store.write_bytes(part_of(1, "c"), buffer.getvalue())


def two_rows(store: Store) -> None:
    table = pq.read_table(io.BytesIO(store.read_bytes(part_of(1, "c"))))
    buffer = io.BytesIO()
    pq.write_table(pa.concat_tables([table, table]), buffer)
    store.write_bytes(part_of(1, "c"), buffer.getvalue())


def other_clip(store: Store) -> None:
    """The bytes of another item's clip, of which the index says that they are right."""
    store.write_bytes(clip_of(1), store.read_bytes(clip_of(2)))
    sha256 = pq.read_table(io.BytesIO(store.read_bytes(part_of(2, "d"))))["clip_sha256"][0].as_py()
    change(store, part_of(1, "c"), clip_sha256=sha256)


DAMAGE = {
    "altered clip": (lambda s: flip(s, clip_of(1)), "(c): its clip clips/0a/", "has sha256"),
    "missing clip": (lambda s: s.delete(clip_of(1)), "(c): its clip clips/0a/", "is missing"),
    "clip of another item": (other_clip, "(c): its clip clips/0a/", "is of another item"),
    "clip elsewhere": (lambda s: change(s, part_of(1, "c"), clip="clips/x.mp4"), "(c): its clip is 'clips/x.mp4'", ""),
    "truncated part": (lambda s: truncate(s, part_of(1, "c")), "cannot be read as Parquet", ""),
    "flipped bit in a page": (flip_page, "cannot be read as Parquet", ""),
    "text that is not UTF-8": (not_utf8, "cannot be read as Parquet", ""),
    "empty part": (lambda s: s.write_bytes(part_of(1, "c"), b""), "cannot be read as Parquet", ""),
    "missing column": (lambda s: without_columns(s, ["flags"]), "does not have the columns of an index (flags)", ""),
    "two rows": (two_rows, "holds 2 rows, legal: 1", ""),
    "no id": (lambda s: change(s, part_of(1, "c"), id=None), "its row has no id or no item_id", ""),
    "row of another name": (lambda s: change(s, part_of(1, "c"), id="z"), "is not named after its row", ""),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_and_repaired(store, kind):
    damage, what, more = DAMAGE[kind]
    damage(store)
    count, (line, *_, summary) = check(store)
    assert count == 1 and line.startswith(f"{part_of(1, 'c')}") and what in line and more in line
    assert "run ltx-ray verify --repair" in line
    assert summary.endswith("1 problems")
    assert check(store)[0] == 1, "nothing was changed"

    _, said = check(store, repair=True)
    assert any("set aside" in line and "state/aside/" in line for line in said)
    assert check(store)[0] == 0
    kept = {"two rows": [(ITEMS[1], "c")], "row of another name": [(ITEMS[1], "z")]}.get(kind, [])
    assert sorted(rows_of(store)) == sorted([(ITEMS[0], "a"), (ITEMS[0], "b"), (ITEMS[2], "d"), *kept])
    assert holder(store) is None


def test_every_row_of_an_altered_clip_is_a_problem(store):
    flip(store, clip_of(0))
    count, said = check(store)
    assert count == 2 and "(a)" in said[0] + said[1] and "(b)" in said[0] + said[1]


def test_an_oddly_named_copy_is_a_problem(store):
    store.write_bytes("index/part-copy.parquet", store.read_bytes(part_of(1, "c")))
    count, said = check(store)
    assert count == 1 and said[0].startswith("index/part-copy.parquet: is no part that a run has written (a copy")
    count, said = check(store, repair=True)
    assert count == 1 and "set aside as state/aside/index/part-copy.parquet; 0 of its rows stay" in said[0]
    assert check(store)[0] == 0 and len(rows_of(store)) == 4


def test_clips_without_a_row_and_shared_ids_are_notes(store):
    store.write_bytes("clips/77/" + "7" * 32 + ".mp4", b"x")
    store.write_bytes("clips/0a/" + "0a" * 16 + ".mp4", b"x")
    build(store, rows=((2, "a"),))
    count, said = check(store)
    assert count == 0
    assert said[0].startswith("note: 2 clips have no row in the index")
    assert said[1].startswith("note: 1 rows have the id of another row with other content")


def test_failed_rows_that_cannot_be_read(store):
    failure = Failure("stage1", 1, "row", "why")
    writer = dataset_writer(store)
    writer.write_failed(ITEMS[1], request(id="x"), RawRow("m.jsonl", 1, {}), failure)
    finish(writer)
    assert check(store) == (0, ["4 rows and 4 clips checked, 1 rows in failed/: all well"])
    store.write_bytes("failed/part-row-x.parquet", b"x")
    store.write_bytes("failed/part-row-y.parquet", store.read_bytes(part_of(1, "c")))
    count, said = check(store)
    assert count == 2 and said[0].startswith("failed/part-row-x.parquet: cannot be read as a table of failed rows")


# --- numbered parts ------------------------------------------------------------------------------

ALL = {(ITEMS[n], row_id) for n, row_id in ROWS}


def part_number(store: Store, number: int) -> str:
    return f"index/{store.list_names('index')[number]}"


def rewrite(store: Store, number: int, **values: list) -> None:
    """Change columns of a numbered part."""
    path = part_number(store, number)
    table = pq.read_table(io.BytesIO(store.read_bytes(path)))
    for name, column in values.items():
        table = table.set_column(
            table.schema.get_field_index(name), name, pa.array(column, table.schema.field(name).type)
        )
    store.write_bytes(path, encode_part(table, "index"))


def test_a_whole_dataset_of_numbered_parts(folded):
    assert check(folded) == (0, ["4 rows and 4 clips checked, 0 rows in failed/: all well"])
    before = {name: folded.read_bytes(f"index/{name}") for name in folded.list_names("index")}
    assert check(folded, repair=True)[0] == 0
    assert {name: folded.read_bytes(f"index/{name}") for name in folded.list_names("index")} == before


@pytest.mark.parametrize(
    "damage, gone",
    [
        (lambda s: flip(s, clip_of(0)), "ab"),
        (lambda s: s.delete(clip_of(1)), "c"),
        (lambda s: s.write_bytes(clip_of(2), b""), "d"),
        (lambda s: rewrite(s, 1, item_id=[None]), "d"),
    ],
    ids=["altered clip of two rows", "missing clip", "empty clip, all rows of a part", "no item_id"],
)
def test_bad_rows_are_taken_out_of_their_part(folded, damage, gone):
    names = folded.list_names("index")
    damage(folded)
    assert check(folded)[0] == len(gone)
    count, said = check(folded, repair=True)
    assert count == len(gone) and all("set aside in state/aside/index/part-" in line for line in said[:count])
    assert {row_id for _, row_id in rows_of(folded)} == {row_id for _, row_id in ALL} - set(gone)
    assert set(folded.list_names("index")) <= set(names) and check(folded)[0] == 0


def test_a_clip_that_is_not_its_rows_goes_with_them_so_that_it_is_rendered_anew(folded):
    flip(folded, clip_of(0))
    altered = folded.read_bytes(clip_of(0))
    check(folded, repair=True)
    assert not folded.exists(clip_of(0)) and folded.read_bytes(f"state/aside/{clip_of(0)}") == altered
    moved_to = [name for name in folded.names("state/aside") if name.endswith(".parquet")]
    [table] = [pq.read_table(io.BytesIO(folded.read_bytes(f"state/aside/{name}"))) for name in moved_to]
    assert sorted(table["id"].to_pylist()) == ["a", "b"]


def test_a_damaged_part_is_set_aside_as_a_whole(folded):
    path = part_number(folded, 0)
    truncate(folded, path)
    count, said = check(folded)
    assert count == 1 and said[0].startswith(f"{path}: cannot be read as Parquet")
    check(folded, repair=True)
    assert set(rows_of(folded)) == {(ITEMS[2], "d")} and folded.exists(f"state/aside/{path}")


def test_rows_of_a_renamed_part_stay(folded):
    old = part_number(folded, 0)
    folded.move(old, "index/part-renamed.parquet")
    folded.write_bytes("index/again.parquet", folded.read_bytes("index/part-renamed.parquet"))
    assert check(folded)[0] == 2
    count, said = check(folded, repair=True)
    assert count == 2 and "0 of its rows stay" in said[0] and "3 of its rows stay" in said[1]
    assert sorted(rows_of(folded)) == sorted(ALL) and check(folded)[0] == 0
    assert all(name.startswith("part-") and len(name) == 30 for name in folded.list_names("index"))


def test_a_row_that_is_in_two_parts_stays_in_the_first(folded):
    first, second = part_number(folded, 0), part_number(folded, 1)
    tables = [pq.read_table(io.BytesIO(folded.read_bytes(path))) for path in (first, second)]
    folded.write_bytes(second, encode_part(pa.concat_tables([tables[1], tables[0].slice(0, 1)]), "index"))
    count, said = check(folded)
    assert count == 1 and said[0].startswith(second) and "the row is in another part too" in said[0]
    check(folded, repair=True)
    assert sorted(rows_of(folded)) == sorted(ALL) and folded.exists(clip_of(0))
    assert check(folded)[0] == 0


def test_a_clip_that_another_row_has_rightly_stays(folded):
    table = pq.read_table(io.BytesIO(folded.read_bytes(part_number(folded, 1))))
    other = table.set_column(table.schema.get_field_index("id"), "id", pa.array(["x"]))
    wrong = other.set_column(table.schema.get_field_index("clip_sha256"), "clip_sha256", pa.array(["0" * 64]))
    folded.write_bytes(part_number(folded, 1), encode_part(pa.concat_tables([table, wrong]), "index"))
    count, said = check(folded, repair=True)
    assert count == 1 and "(x): its clip" in said[0] and sorted(rows_of(folded)) == sorted(ALL)
    assert folded.exists(clip_of(2)) and check(folded)[0] == 0


def test_finished_rows_that_are_not_folded_are_a_note_and_a_repair_folds_them(folded):
    table = pq.read_table(io.BytesIO(folded.read_bytes(part_number(folded, 1))))
    folded.delete(part_number(folded, 1))
    folded.write_bytes("state/wal/killed/00000000-index.rows", encode_segment(table, "index"))
    count, said = check(folded)
    assert count == 0 and said[0].startswith("note: 1 rows are finished and not yet folded")
    check(folded, repair=True)
    assert set(rows_of(folded)) == ALL


def test_a_damaged_segment_and_a_damaged_part_of_previews(folded):
    folded.write_bytes("state/wal/killed/00000000-index.rows", b"x")
    folded.write_bytes("previews/part-0badcafe-00000000.parquet", b"x")
    count, said = check(folded)
    assert count == 2 and said[0].startswith("previews/part-") and said[1].startswith("state/wal/killed/")
    assert check(folded, repair=True)[0] == 2 and check(folded)[0] == 0


# --- a sample ------------------------------------------------------------------------------------


def renders(monkeypatch, answer) -> list[Options]:
    """In place of render: `answer(manifest row)` gives the index row's changes, None: the row fails."""
    asked = []

    def render(options: Options) -> int:
        asked.append(options)
        out = Store(options.output)
        for raw in read_manifest(options.manifest):
            row = judge(raw, RowRules(image_roots=options.image_roots))
            assert isinstance(row, LegalRow), row.messages()
            changes = answer(row.request)
            if changes is None:
                writer, failure = dataset_writer(out), Failure("stage1", 1, "row", "latents are not finite")
                writer.write_failed(row.request.id, row.request, raw, failure)
                finish(writer)
                continue
            values = {**row.request.row(), "item_id": row.request.id, "latents_sha256": "d" * 64, "device": "cpu",
                      "numerics": "{}", "recipe_digest": "e" * 16, **changes}  # fmt: skip
            part = one_row_part(values["item_id"], row_key(row.request.id))
            out.write_bytes(f"index/{part}", one_row(values, INDEX_SCHEMA))
        return 0

    monkeypatch.setattr(verify_module, "render", render)
    return asked


def options(manifest: str, output: str) -> Options:
    numerics = RequestedNumerics(dtype="float32", noise_device="cpu")
    return Options(manifest, output, ModelFiles("", "", ""), numerics, save_latents=True)


def test_a_sample_is_the_same_each_time_and_one_row_an_item(store, monkeypatch):
    asked = renders(monkeypatch, lambda request: {})
    for sample, items in ((2, 2), (3, 3), (99, 3)):
        count, said = check(store, sample=sample, options=options)
        assert count == 0 and sum("rendered again, the same latents" in line for line in said) == items
    assert check(store, sample=2, options=options)[1] == check(store, sample=2, options=options)[1]
    assert {(o.numerics.dtype, o.numerics.noise_device, o.save_latents) for o in asked} == {
        ("bfloat16", "model", False)
    }, "the recipe's"


@on_a_disk
def test_rows_are_rendered_as_they_were_resolved(store, monkeypatch):
    seen = {}
    renders(monkeypatch, lambda request: seen.update({request.id: request}) or {})
    made = request(id="full", seed=77, video_stg_blocks=[3], negative_prompt="", num_frames=9, pipeline="base")
    change(store, part_of(1, "c"), **{k: v for k, v in made.row().items() if k not in ("id", "extra")})
    assert check(store, sample=9, options=options)[0] == 0
    again = seen[ITEMS[1]]
    assert {**again.row(), "id": "full"} == made.row()


@on_a_disk
@pytest.mark.parametrize(
    "changes, said, problems",
    [
        ({"latents_sha256": "0" * 64}, f"renders to latents {'0' * 64}, the index has {'d' * 64}", 1),
        ({"latents_sha256": "0" * 64, "device": "H200"}, "was rendered on cpu, and now on H200, where bits", 0),
        ({"latents_sha256": "0" * 64, "numerics": '{"tp":2}'}, 'was rendered on {}, and now on {"tp":2}, where', 0),
        ({"item_id": "9" * 32, "recipe_digest": "f" * 16}, "was rendered with other weights or LoRAs than", 0),
        ({"item_id": "9" * 32}, "was rendered with other images than", 0),
        (None, "could not be rendered again (latents are not finite)", 1),
    ],
)  # fmt: skip
def test_what_a_sample_may_show(store, monkeypatch, changes, said, problems):
    renders(monkeypatch, lambda request: changes)
    count, lines = check(store, sample=1, options=options)
    assert count == problems and said in lines[0] and lines[0].startswith("index/part-")
    assert ("not comparable" in lines[0]) == (changes is not None and not problems)
    assert lines[-1].endswith(f"{problems} problems" if problems else "all well")


@on_a_disk
def test_a_row_is_rendered_again_as_it_was_computed(store, monkeypatch):
    asked = renders(monkeypatch, lambda request: {})
    numerics = {"attention": "cudnn", "compile": "off", "tp": 4, "stage2_tp": 2, "text_batch": 1}
    change(store, part_of(1, "c"), numerics=json.dumps(numerics))
    check(store, sample=9, options=options)
    own, plain = sorted(asked, key=lambda one: one.numerics.attention != "cudnn")
    assert (own.numerics.attention, own.numerics.compile) == ("cudnn", "off")
    assert (own.parallel.tp, own.parallel.stage2_tp) == (4, 2)
    assert (plain.numerics.attention, plain.parallel) == ("auto", ParallelConfig())


@on_a_disk
def test_what_an_option_says_goes_before_what_a_row_had(store, monkeypatch):
    asked = renders(monkeypatch, lambda request: {})
    change(store, part_of(1, "c"), numerics='{"attention": "cudnn", "tp": 4}')

    def asking(manifest: str, output: str) -> Options:
        one = options(manifest, output)
        numerics = dataclasses.replace(one.numerics, attention="sdpa")
        return dataclasses.replace(one, numerics=numerics, parallel=ParallelConfig(tp=2))

    check(store, sample=9, options=asking)
    assert {(one.numerics.attention, one.parallel.tp) for one in asked} == {("sdpa", 2)}


@on_a_disk
def test_where_that_cannot_be_done_it_is_rendered_as_it_can_be(store, monkeypatch):
    asked = renders(monkeypatch, lambda request: {})
    render = verify_module.render

    def refusing(given: Options) -> int:
        if given.numerics.attention == "fa3":
            raise ValueError("--attention: 'fa3' without a GPU, legal: auto or sdpa")
        return render(given)

    monkeypatch.setattr(verify_module, "render", refusing)
    change(store, part_of(1, "c"), numerics='{"attention": "fa3"}')
    count, said = check(store, sample=9, options=options)
    assert count == 0 and len(asked) == 2
    assert sum("the same latents" in line for line in said) == 3


@on_a_disk
def test_a_row_of_a_lora_that_is_not_given_is_not_comparable(store, monkeypatch):
    seen = {}
    renders(monkeypatch, lambda request: seen.update({request.id: request.loras}) or {})
    change(store, part_of(1, "c"), loras=[{"name": "style", "strength": 0.5}])
    count, said = check(store, sample=9, options=options)
    assert count == 0 and ITEMS[1] not in seen
    assert any("not comparable: it was rendered with LoRAs that are not given (style)" in line for line in said)


@on_a_disk
def test_images_whose_folder_is_gone_concern_their_row(store, monkeypatch, tmp_path):
    """A folder that there is not is no --image-root."""
    asked = []
    monkeypatch.setattr(verify_module, "render", lambda given: asked.append(given) or ExitCode.FAILED_ROWS)
    (tmp_path / "here").mkdir()
    for number, row_id, folder in ((1, "c", "here"), (2, "d", "gone")):
        image = {"path": f"{tmp_path}/{folder}/a.png", "frame_idx": 0, "strength": 1.0, "crf": 33}
        change(store, part_of(number, row_id), images=[image])
    check(store, sample=9, options=options)
    assert [one.image_roots for one in asked] == [(f"{tmp_path}/here",)]


@on_a_disk
def test_a_row_of_a_pipeline_that_is_not_served_is_not_comparable(store, monkeypatch):
    """One output may have rows of both checkpoints."""
    seen = []
    renders(monkeypatch, lambda request: seen.append(request.id) or {})
    change(store, part_of(1, "c"), pipeline="distilled")
    count, said = check(store, sample=9, options=options)
    assert count == 0 and seen and ITEMS[1] not in seen
    assert any("not comparable: it was rendered by the pipeline distilled, which" in line for line in said)


@on_a_disk
@pytest.mark.parametrize(
    "damage",
    [{"recipe": None}, {"recipe": "{}"}, {"recipe": "[1]"}, {"numerics": "{"}, {"numerics": "5"},
     {"device": "cuda:0", "noise_ledger": '{"device": "cuda"}'}],
)  # fmt: skip
def test_a_row_with_damaged_records_is_not_comparable(store, monkeypatch, damage):
    renders(monkeypatch, lambda request: {})
    change(store, part_of(1, "c"), **damage)
    count, said = check(store, sample=9, options=options)
    assert count == 0 and sum("the same latents" in line for line in said) == 2
    assert any("(c): not comparable: its recipe, numerics or noise_ledger is damaged" in line for line in said)


@on_a_disk
def test_replicas_of_the_rows_layout_that_do_not_start_are_no_problem_of_the_dataset(store, monkeypatch):
    asked = renders(monkeypatch, lambda request: {})
    render = verify_module.render
    monkeypatch.setattr(
        verify_module, "render", lambda given: ExitCode.ERROR if given.parallel.tp == 4 else render(given)
    )
    change(store, part_of(1, "c"), numerics='{"tp": 4}')
    count, said = check(store, sample=9, options=options)
    assert count == 0 and len(asked) == 2
    assert sum("the same latents" in line for line in said) == 3


@on_a_disk
def test_a_row_without_loras_is_rendered_without_those_that_are_given(store, monkeypatch):
    manifests = []
    monkeypatch.setattr(verify_module, "render", lambda given: manifests.append(Path(given.manifest).read_text()) or 0)
    check(store, sample=9, options=options)
    assert manifests and all(json.loads(line)["loras"] == [] for text in manifests for line in text.splitlines())


LEDGER = '{"seed":1,"device":"cuda","device_model":"NVIDIA H100","draws":[]}'


@on_a_disk
@pytest.mark.parametrize(
    "ledger, now, words",
    [
        (LEDGER, "NVIDIA A100", "was rendered on NVIDIA H100, and now on NVIDIA A100, where bits"),
        (LEDGER, "NVIDIA H100", None),
        ("{}", "NVIDIA H100", "was rendered on a GPU whose model is not known, and now on NVIDIA H100"),
    ],
)
def test_rows_of_the_first_version_name_the_gpu_in_their_ledger(store, monkeypatch, ledger, now, words):
    renders(monkeypatch, lambda request: {"latents_sha256": "0" * 64, "device": now})
    for number, row_id in ROWS:
        change(store, part_of(number, row_id), device="cuda:0", noise_ledger=ledger)
    lines = check(store, sample=1, options=options)[1]
    assert words in lines[0] if words else "renders to latents" in lines[0]


def test_rows_whose_clips_are_damaged_are_not_in_the_sample(store, monkeypatch):
    seen = []
    renders(monkeypatch, lambda request: seen.append(request.id) or {})
    flip(store, clip_of(1))
    check(store, sample=9, options=options)
    assert sorted(seen) == [ITEMS[0], ITEMS[2]]


# --- the command ---------------------------------------------------------------------------------


def test_exit_codes(tmp_path):
    store = build(Store(str(tmp_path / "out")))

    def run(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["verify", *arguments])
        return result.exit_code, result.output

    assert run(store.uri) == (0, "4 rows and 4 clips checked, 0 rows in failed/: all well\n")
    store.delete(clip_of(2))
    code, output = run(store.uri)
    assert code == 3 and "is missing" in output
    code, output = run(store.uri, "--repair")
    assert code == 3 and "set aside in state/aside/index/part-" in output
    assert run(store.uri)[0] == 0, "its row is to be rendered again; nothing else is wrong"
    assert run(store.uri)[0] == 0
    assert run(str(tmp_path / "none"))[0] == 2
    code, output = run(store.uri, "--sample", "1")
    assert code == 2 and "no model: give --checkpoint-path" in output
    assert run(store.uri, "--sample", "-1")[0] == 2


def test_the_sample_s_options_are_the_command_line_s(tmp_path, monkeypatch):
    store = build(Store(str(tmp_path / "out")))
    asked = renders(monkeypatch, lambda request: {})
    result = CliRunner().invoke(app, ["verify", store.uri, "--sample", "1", "--model", "toy", "--tp", "2"])
    assert result.exit_code == 0, result.output
    [given] = asked
    assert given.parallel.tp == 2 and given.model.provider == "ltx_ray.toy:ensure_toy_model"
    assert not given.output.startswith(store.uri) and not given.image_roots
