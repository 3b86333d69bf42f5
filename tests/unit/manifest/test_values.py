"""Arrow's values as Python's: no type of an unknown column stops a row, and none makes its `extra` large."""

from __future__ import annotations

import datetime
import decimal
import hashlib
import json
import sys
import uuid
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ltx_ray.manifest.reader import read_manifest
from ltx_ray.manifest.rules import IllegalRow, LegalRow, RowRules, judge


def judged(path: Path, **columns) -> list[LegalRow | IllegalRow]:
    count = len(next(iter(columns.values())))
    defaults = {"prompt": [f"p{n}" for n in range(count)]}
    pq.write_table(pa.table({**defaults, **columns}), path)
    return [judge(raw, RowRules()) for raw in read_manifest(str(path))]


def extras(path: Path, column: pa.Array) -> list:
    """The values of an unknown column as the index has them."""
    rows = judged(path, x=column)
    assert all(isinstance(row, LegalRow) for row in rows)
    return [json.loads(row.request.extra, parse_constant=pytest.fail)["x"] for row in rows]


def texts(values: list[bytes], type_: pa.DataType | None = None) -> pa.Array:
    """A column of texts with any bytes, as writers that check nothing make it."""
    type_ = type_ or pa.string()
    width = np.int64 if type_ == pa.large_string() else np.int32
    ends = np.cumsum([0, *map(len, values)]).astype(width)
    return pa.Array.from_buffers(
        type_, len(values), [None, pa.py_buffer(ends.tobytes()), pa.py_buffer(b"".join(values))]
    )


def digest(data: bytes) -> dict:
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


LATIN = [b"oak", b"ch\xeane", b"elm"]
NESTED = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
PICTURE = b"\x89PNG" + bytes(100_000)

TIMES = {
    "timestamp": (pa.array([1234567891, 1000, None], pa.timestamp("ns")),
                  ["1970-01-01 00:00:01.234567891", "1970-01-01 00:00:00.000001", None]),
    "before 1970": (pa.array([-1, -1000], pa.timestamp("ns")),
                    ["1969-12-31 23:59:59.999999999", "1969-12-31 23:59:59.999999"]),
    "zone": (pa.array([1234567891], pa.timestamp("ns", "Europe/Berlin")), ["1970-01-01 01:00:01.234567891+01:00"]),
    "unknown zone": (pa.array([1], pa.timestamp("s", "Mars/Olympus")), ["1970-01-01 00:00:01+00:00"]),
    "unknown zone, ns": (pa.array([1], pa.timestamp("ns", "Mars/Olympus")), ["1970-01-01 00:00:00.000000001+00:00"]),
    "time": (pa.array([1234567891, 10**9], pa.time64("ns")), ["00:00:01.234567891", "00:00:01"]),
    "duration": (pa.array([1234567891, 10**9 + 1, -1], pa.duration("ns")),
                 ["0:00:01.234567891", "0:00:01.000000001", "-1 day, 23:59:59.999999999"]),
    "long duration": (pa.array([2**62], pa.duration("s")), ["4611686018427387904"]),
    "far dates": (pa.array([2**31 - 1, -(10**7), 3], pa.int32()).cast(pa.date32()),
                  ["2147483647", "-25410-12-06", "1970-01-04"]),
    "far timestamps": (pa.array([10**15, -(10**15), 5], pa.timestamp("ms")),
                       ["1000000000000000", "-29719-04-05 22:13:20.000", "1970-01-01 00:00:00.005000"]),
    "nested": (pa.array([[("a", 1)]], pa.map_(pa.string(), pa.timestamp("ns"))),
               [[["a", "1970-01-01 00:00:00.000000001"]]]),
}  # fmt: skip


@pytest.mark.parametrize("name", TIMES)
def test_times_that_python_has_no_type_for_travel_as_text(tmp_path, name, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    column, expected = TIMES[name]
    assert extras(tmp_path / "m.parquet", column) == expected


def test_times_that_python_has_are_written_as_before(tmp_path):
    day = datetime.datetime(2026, 1, 2, 3, 4, 5, 6)
    columns = (
        pa.array([day]), pa.array([day], pa.timestamp("ns")), pa.array([day], pa.timestamp("us", "UTC")),
        pa.array([day.date()]), pa.array([day.time()]), pa.array([datetime.timedelta(days=2)]),
    )  # fmt: skip
    assert [extras(tmp_path / "m.parquet", column) for column in columns] == [
        [str(day)], [str(day)], [f"{day}+00:00"], ["2026-01-02"], ["03:04:05.000006"], ["2 days, 0:00:00"],
    ]  # fmt: skip


def test_dates_in_sparks_old_format_may_be_far(tmp_path):
    days = [datetime.datetime(9999, 12, 31), datetime.datetime(1, 1, 1), datetime.datetime(2026, 1, 2, 3, 4, 5, 6)]
    table = pa.table({"prompt": ["a", "b", "c"], "x": pa.array(days)})
    pq.write_table(table, tmp_path / "m.parquet", use_deprecated_int96_timestamps=True)
    rows = [judge(raw, RowRules()) for raw in read_manifest(str(tmp_path / "m.parquet"))]
    assert [json.loads(row.request.extra)["x"] for row in rows] == [str(day) for day in days]


@pytest.mark.parametrize("type_", [pa.binary(), pa.large_binary(), pa.binary_view()])
def test_bytes_become_their_digits_or_their_size_and_digest(tmp_path, type_):
    found = extras(tmp_path / "m.parquet", pa.array([b"\xff\x00", PICTURE, None, b""], type_))
    assert found == ["ff00", digest(PICTURE), None, ""]


def test_pictures_in_any_nesting_become_their_size_and_digest(tmp_path):
    path, short = tmp_path / "m.parquet", digest(PICTURE)
    assert extras(path, pa.array([{"bytes": PICTURE, "path": "a.png"}, None], NESTED)) == [
        {"bytes": short, "path": "a.png"}, None
    ]  # fmt: skip
    assert extras(path, pa.array([[PICTURE], []], pa.list_(pa.binary()))) == [[short], []]
    assert extras(path, pa.array([{"a": [{"b": PICTURE}]}])) == [{"a": [{"b": short}]}]
    assert extras(path, pa.array([PICTURE, PICTURE]).dictionary_encode()) == [short, short]
    assert extras(path, pa.array([b"\x00" * 16], pa.binary(16))) == ["00" * 16]


class Unknown(pa.ExtensionType):
    """A type that no reader knows."""

    def __init__(self):
        super().__init__(pa.struct([("a", pa.binary()), ("t", pa.timestamp("ns"))]), "test.unknown")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage, serialized):
        return cls()


def test_extension_types(tmp_path):
    path, name = tmp_path / "m.parquet", uuid.UUID(int=5)
    tensor = pa.fixed_shape_tensor(pa.int32(), (2, 2))
    four = pa.array([[1, 2, 3, 4]], pa.list_(pa.int32(), 4))
    opaque = pa.opaque(pa.binary(), "kind", "vendor")
    own = pa.array([{"a": PICTURE, "t": 1}], Unknown().storage_type)
    assert extras(path, pa.array([name.bytes], pa.uuid())) == [str(name)]
    assert extras(path, pa.array(['{"a": 1}'], pa.json_())) == ['{"a": 1}']
    assert extras(path, pa.ExtensionArray.from_storage(pa.bool8(), pa.array([1, None], pa.int8()))) == [True, None]
    assert extras(path, pa.ExtensionArray.from_storage(tensor, four)) == [[1, 2, 3, 4]]
    assert extras(path, pa.ExtensionArray.from_storage(opaque, pa.array([b"x"]))) == ["78"]
    assert extras(path, pa.ExtensionArray.from_storage(Unknown(), own)) == [
        {"a": digest(PICTURE), "t": "1970-01-01 00:00:00.000000001"}
    ]


def test_numbers_and_containers_of_any_kind(tmp_path):
    path, two = tmp_path / "m.parquet", [pa.array([1]), pa.array([2])]
    assert extras(path, pa.array([decimal.Decimal("1.50"), None])) == ["1.50", None]
    assert extras(path, pa.array([1.5, float("nan"), None], pa.float16())) == [1.5, None, None]
    assert extras(path, pa.array([[1.0, float("inf")]])) == [[1.0, None]]
    assert extras(path, pa.array([[1], None], pa.list_view(pa.int32()))) == [[1], None]
    assert extras(path, pa.StructArray.from_arrays(two, names=["a", "a"])) == [{"a": 2}]
    assert extras(path, pa.array(["a", None], pa.string_view())) == ["a", None]


def test_long_texts_become_their_size_and_digest(tmp_path):
    path, long = tmp_path / "m.parquet", "é" * 70_000
    short = digest(long.encode())
    for type_ in (pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())):
        assert extras(path, pa.array(["a", long, None], type_)) == ["a", short, None]
    assert extras(path, pa.array([{"caption": "é" * 65_000}])) == [{"caption": "é" * 65_000}]
    [embedded] = extras(path, pa.array([list(range(50_000))]))
    assert embedded["bytes"] > 200_000 and set(embedded) == {"bytes", "sha256"}


# --- text that is not UTF-8 --------------------------------------------------------------------------------------


@pytest.mark.parametrize("type_", [pa.string(), pa.large_string()])
def test_an_unknown_column_may_hold_text_that_is_not_utf8(tmp_path, type_):
    assert extras(tmp_path / "m.parquet", texts(LATIN, type_)) == ["oak", "ch\udceane", "elm"]


@pytest.mark.parametrize("index", [pa.int8(), pa.int32(), pa.int64()])
def test_also_in_dictionaries_and_containers(tmp_path, index):
    path = tmp_path / "m.parquet"
    encoded = pa.DictionaryArray.from_arrays(pa.array([0, 1, None], index), texts(LATIN))
    listed = pa.ListArray.from_arrays(pa.array([0, 1, 2, 3], pa.int32()), texts(LATIN))
    assert extras(path, encoded) == ["oak", "ch\udceane", None]
    assert extras(path, listed) == [["oak"], ["ch\udceane"], ["elm"]]
    assert extras(path, pa.StructArray.from_arrays([texts(LATIN)], names=["s"]))[1] == {"s": "ch\udceane"}


ONE_BAD = {
    "prompt": texts(LATIN),
    "negative_prompt": texts(LATIN),
    "id": texts(LATIN),
    "pipeline": texts([b"hq", b"h\xeaq", b"base"]),
    "images": pa.ListArray.from_arrays(
        pa.array([0, 0, 1, 1], pa.int32()), pa.StructArray.from_arrays([texts([b"\xea.png"])], names=["path"])
    ),
}


@pytest.mark.parametrize("column", ONE_BAD)
def test_in_a_column_that_a_request_has_it_makes_its_row_illegal(tmp_path, column):
    first, bad, last = judged(tmp_path / "m.parquet", **{column: ONE_BAD[column]})
    assert isinstance(first, LegalRow) and isinstance(last, LegalRow)
    [message] = bad.messages()
    assert message.startswith(f"{tmp_path}/m.parquet:2:{column}") and "\\udcea" in message
    if column.endswith("prompt"):
        assert message.endswith(", in UTF-8 without NUL")
    message.encode()


@pytest.mark.parametrize("index", [pa.int8(), pa.int32()])
def test_prompts_in_a_dictionary_that_is_not_utf8(tmp_path, index):
    prompts = pa.DictionaryArray.from_arrays(pa.array([0, 1, 0, 1], index), texts(LATIN))
    assert [isinstance(row, LegalRow) for row in judged(tmp_path / "m.parquet", prompt=prompts)] == [True, False] * 2


def test_late_in_a_long_file(tmp_path):
    prompts = [f"p{n}".encode() for n in range(6000)]
    prompts[5000] = b"caf\xe9"
    rows = judged(tmp_path / "m.parquet", prompt=texts(prompts))
    assert [n for n, row in enumerate(rows) if isinstance(row, IllegalRow)] == [5000]


def test_numbers_of_any_width_fit_their_columns(tmp_path):
    rows = judged(
        tmp_path / "m.parquet",
        seed=pa.array([1, 2, None], pa.float16()),
        num_frames=pa.array([9, 17, 9]).dictionary_encode(),
        video_stg_blocks=pa.array([[1], [2], None], pa.list_view(pa.int32())),
        negative_prompt=pa.array(["a", "b", None], pa.string_view()),
    )
    requests = [row.request for row in rows]
    assert [r.seed for r in requests] == [1, 2, 10] and [r.num_frames for r in requests] == [9, 17, 9]
    assert [r.video_stg_blocks for r in requests] == [(1,), (2,), ()]


def test_a_field_that_images_have_twice_is_refused(tmp_path):
    twice = pa.StructArray.from_arrays([pa.array(["a"])] * 2, names=["path", "path"])
    table = pa.table({"prompt": ["a"], "images": pa.ListArray.from_arrays(pa.array([0, 1], pa.int32()), twice)})
    pq.write_table(table, tmp_path / "m.parquet")
    with pytest.raises(ValueError, match="column 'images' has type"):
        read_manifest(str(tmp_path / "m.parquet"))
