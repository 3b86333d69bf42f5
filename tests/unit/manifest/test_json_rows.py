"""JSON manifests as people's programs write them: arrays, encodings, line endings, and what is wrong in one row."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import os
import tracemalloc
from pathlib import Path

import pytest

from ltx_ray.manifest.raw import RawRow
from ltx_ray.manifest.reader import read_manifest
from ltx_ray.manifest.rules import IllegalRow, RowRules, extra_json, judge

ROWS = [{"id": f"r{n}", "prompt": f"a fox {n}, café", "seed": n} for n in range(5)]
LINES = [json.dumps(row, ensure_ascii=False) for row in ROWS]


def rows_of(path: Path, data: bytes | str) -> list[RawRow]:
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return list(read_manifest(str(path)))


def reasons(path: Path, data: bytes | str) -> list[str | None]:
    """Why rows are illegal, in order; None for legal ones."""
    rows = [judge(raw, RowRules()) for raw in rows_of(path, data)]
    return [row.messages()[0] if isinstance(row, IllegalRow) else None for row in rows]


FORMS = {
    "lines": "\n".join(LINES),
    "CRLF": "\r\n".join(LINES) + "\r\n",
    "CR": "\r".join(LINES),
    "blank lines": "\n\n \n" + "\n\t\n".join(LINES) + "\n\n",
    "byte order mark": "\ufeff" + "\n".join(LINES),
    "joined files with marks": "\ufeff" + "\n".join(LINES[:2]) + "\n\ufeff" + "\n".join(LINES[2:]),
    "end of file of DOS": "\r\n".join(LINES) + "\r\n\x1a",
    "end of file of DOS, last line open": "\n".join(LINES) + "\x1a",
    "UTF-16": "\r\n".join(LINES).encode("utf-16"),
    "UTF-16, big end first": b"\xfe\xff" + "\n".join(LINES).encode("utf-16-be"),
    "UTF-16 without mark": "\n".join(LINES).encode("utf-16-le"),
    "UTF-32": "\n".join(LINES).encode("utf-32"),
    "array, an object a line": "[\n" + ",\n".join(LINES) + "\n]\n",
    "array in one line": json.dumps(ROWS),
    "array in one line with its end": json.dumps(ROWS) + "\r\n",
    "pretty array": json.dumps(ROWS, indent=2),
    "pretty array in UTF-16": json.dumps(ROWS, indent=2).encode("utf-16"),
    "array with a comma too many": "[\n" + ",\n".join(LINES) + ",\n]",
    "pretty objects": "\n".join(json.dumps(row, indent=2) for row in ROWS),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_forms_of_json(tmp_path, form, ending):
    assert [raw.values for raw in rows_of(tmp_path / f"m.{ending}", FORMS[form])] == ROWS


@pytest.mark.parametrize("name", ["m.jsonl.gz", "m.json.gz", "M.JSONL.GZ", "m.ndjson.bz2", "m.jsonl.zst"])
def test_compressed_files(tmp_path, name):
    import pyarrow as pa

    codecs = {"gz": gzip.compress, "bz2": bz2.compress, "zst": lambda data: pa.compress(data, "zstd", asbytes=True)}
    data = "\n".join(LINES).encode()
    if name.endswith("zst"):
        with pa.CompressedOutputStream(str(tmp_path / name), "zstd") as file:
            file.write(data)
        packed = (tmp_path / name).read_bytes()
    else:
        packed = codecs[name.lower().rpartition(".")[2]](data)
    assert [raw.values for raw in rows_of(tmp_path / name, packed)] == ROWS


def test_rows_of_an_array_are_counted_and_those_of_lines_are_lines(tmp_path):
    numbers = [raw.number for raw in rows_of(tmp_path / "m.json", json.dumps(ROWS, indent=2))]
    assert numbers == [1, 2, 3, 4, 5]
    assert [raw.number for raw in rows_of(tmp_path / "m.json", "\n".join(["", *LINES]))] == [2, 3, 4, 5, 6]


def test_a_long_array_is_streamed(tmp_path):
    path = tmp_path / "m.json"
    with open(path, "w") as file:
        file.write("[" + ",".join(json.dumps({"prompt": f"p{n}", "x": "y" * 1000}) for n in range(40_000)) + "]")
    tracemalloc.start()
    count = sum(1 for _ in read_manifest(str(path)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 40_000 and peak < 8 * 2**20, peak


def test_rows_of_an_array_that_reach_over_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("ltx_ray.manifest.json_rows._PIECE", 7)
    for form in ("pretty array", "array in one line", "pretty objects"):
        assert [raw.values for raw in rows_of(tmp_path / "m.json", FORMS[form])] == ROWS


BROKEN_ARRAYS = {
    "cut": ("[\n" + ",\n".join(LINES)[:-10], 4, "the rest of the file is not read"),
    "no end": ("[\n" + ",\n".join(LINES), 5, "the array has no end"),
    "broken": ("[\n" + ",\n".join(LINES[:2]) + ",\n{bad},\n" + LINES[3] + "]", 2, "the rest of the file is not read"),
    "more": ("[\n" + ",\n".join(LINES) + "\n]\n" + LINES[0], 5, "more text after the end of the array"),
    "other values": ("[\n" + ",\n".join(LINES) + ", 5]", 5, "a JSON number, not an object"),
}


@pytest.mark.parametrize("name", BROKEN_ARRAYS)
def test_a_broken_array_gives_the_rows_before(tmp_path, name):
    data, legal, reason = BROKEN_ARRAYS[name]
    found = reasons(tmp_path / "m.json", data)
    assert found[:legal] == [None] * legal and len(found) == legal + 1 and reason in found[-1]


def test_an_array_among_lines_is_one_illegal_row(tmp_path):
    found = reasons(tmp_path / "m.jsonl", "[1, 2]\n" + "\n".join(LINES))
    assert found[1:] == [None] * 5 and "a JSON array, not an object" in found[0]


def test_a_broken_first_line_does_not_hide_the_others(tmp_path):
    for line in (LINES[0] + " garbage", LINES[0][:-5], "{", "garbage", LINES[0] + LINES[1]):
        found = reasons(tmp_path / "m.jsonl", "\n".join([line, *LINES[1:]]))
        assert found[1:] == [None] * 4 and "not JSON" in found[0]


# --- one row -----------------------------------------------------------------------------------------------------


def test_bytes_that_are_not_utf8_concern_their_row(tmp_path):
    data = b'{"prompt": "caf\xe9"}\n{"prompt": "ok", "note": "caf\xe9"}\n{"prompt": "last"}'
    first, second, third = reasons(tmp_path / "m.jsonl", data)
    assert "m.jsonl:1:prompt" in first and first.endswith("legal: text that is not blank, in UTF-8 without NUL")
    assert second is None and third is None


def test_utf16_with_half_a_character(tmp_path):
    found = reasons(tmp_path / "m.jsonl", "\n".join(LINES).encode("utf-16") + "\n".encode("utf-16-le") + b"{")
    assert found[:5] == [None] * 5 and "the rest of the file cannot be read" in found[5]
    lone = '{"prompt": "a \ud800"}\n{"prompt": "b"}'.encode("utf-16", "surrogatepass")
    first, second = reasons(tmp_path / "m.jsonl", lone)
    assert "prompt" in first and second is None


def test_nul_bytes_concern_their_row(tmp_path):
    data = "\n".join([LINES[0], "\0\0\0", '{"prompt": "a\0b"}', '{"prompt": "a\\u0000b"}', LINES[1]]) + "\n\0\0"
    found = reasons(tmp_path / "m.jsonl", data)
    assert [reason is None for reason in found] == [True, False, False, False, True, False]
    assert found[3].endswith("in UTF-8 without NUL")


def test_nan_is_a_gap_and_infinity_is_a_number(tmp_path):
    data = (
        '{"prompt": "a", "seed": NaN, "x": NaN}\n{"prompt": "b", "frame_rate": Infinity}\n{"prompt": "c", "x": 1e999}'
    )
    rows = [judge(raw, RowRules()) for raw in rows_of(tmp_path / "m.jsonl", data)]
    assert (rows[0].request.seed, rows[0].request.extra) == (10, '{"x": null}')
    assert "frame_rate: inf" in rows[1].messages()[0]
    assert rows[2].request.extra == '{"x": null}'


def test_numbers_longer_than_python_reads(tmp_path):
    digits = "9" * 5000
    data = f'{{"prompt": "a", "x": {digits}}}\n{{"prompt": "b", "seed": {digits}}}\n{{"prompt": "c", "seed": 5}}'
    first, second, third = (judge(raw, RowRules()) for raw in rows_of(tmp_path / "m.jsonl", data))
    assert json.loads(first.request.extra) == {"x": digits}
    assert "m.jsonl:2:seed" in second.messages()[0]
    assert third.request.seed == 5


def test_a_column_that_is_given_twice_makes_its_row_illegal(tmp_path):
    lines = [
        '{"prompt": "a", "prompt": "b"}', '{"prompt" : "a", "seed" : 1, "seed" : 1}', '{"prompt": "c", "x": 1, "x": 2}',
        r'{"prompt": "a \": b", "x": {"prompt": 1, "seed": 2}}', '{"prompt": "a", "seed": 1, "seed" : 2}',
        '{"prompt": "a", "seed": 1, "x": {"y": 1}, "seed" \t: 2}', '{"prompt": "a : b", "x": {"seed" : 1}, "seed" : 2}',
    ]  # fmt: skip
    found = reasons(tmp_path / "m.jsonl", "\n".join(lines))
    assert "'prompt' is given twice" in found[0].replace("\\", "")
    assert all("'seed' is given twice" in found[n] for n in (1, 4, 5))
    assert [found[n] for n in (2, 3, 6)] == [None, None, None]


@pytest.mark.parametrize("depth", [100, 900, 100_000])
def test_deep_objects_concern_their_row(tmp_path, depth):
    deep = '{"prompt": "a", "seed": 5, "x": ' + '{"x": ' * depth + "1" + "}" * depth + "}"
    first, second = reasons(tmp_path / "m.jsonl", "\n".join([LINES[0], deep]))
    assert first is None and (second is None) == (depth == 100)


@pytest.mark.parametrize("column", ["x", "seed", "loras"])
@pytest.mark.parametrize("leaf", ["1", "Infinity", r'"\ud800"'])
def test_a_row_that_can_be_read_can_be_written_on_any_stack(tmp_path, column, leaf):
    """Python 3.11 reads and writes JSON as deep as its stack has room, of which a run takes more than its reader."""

    def below(frames: int, rows: list[RawRow]) -> list[str | None]:
        return below(frames - 1, rows) if frames else [extra_json(row) or str(judge(row, RowRules())) for row in rows]

    lines = [f'{{"prompt": "a", "{column}": {"[" * n}{leaf}{"]" * n}}}' for n in (1, 150, 199, 200, 480, 700, 930)]
    first = '{"prompt": "a", "seed": 1, "loras": []}'
    *shallow, deep, deeper, deepest = rows_of(tmp_path / "m.jsonl", "\n".join([first, *lines]))
    assert all(below(200, shallow))
    assert [row.unreadable is None for row in shallow] == [True] * 4 + [False]
    assert "more than 200 deep" in deep.unreadable and deeper.unreadable and deepest.unreadable


def test_a_line_without_end_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr("ltx_ray.manifest.json_rows._LONGEST_ROW", 1000)
    long = json.dumps({"prompt": "long", "x": "y" * 5000})
    found = reasons(tmp_path / "m.jsonl", "\n".join([LINES[0], long, LINES[1], long]))
    assert [reason is None for reason in found] == [True, False, True, False]
    assert "m.jsonl:2:row: 'a line of more than 1000 characters'" in found[1]


def test_long_values_of_unknown_columns_become_their_size_and_digest(tmp_path):
    text = "é" * 100_000
    row = {"prompt": "a", "negative_prompt": text, "x": text, "deep": {"y": text}, "short": "s"}
    [raw] = rows_of(tmp_path / "m.jsonl", json.dumps(row))
    request = judge(raw, RowRules()).request
    assert request.negative_prompt == text
    extra = json.loads(request.extra)
    assert extra["x"] == {"bytes": 200_000, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    assert set(extra["deep"]) == {"bytes", "sha256"} and extra["short"] == "s"
    assert raw.values["x"] == extra["x"], "the text stays in memory"


# --- files -------------------------------------------------------------------------------------------------------

MANY = "".join(json.dumps({"prompt": f"p{n}", "x": os.urandom(20).hex()}) + "\n" for n in range(20_000)).encode()


@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_damage_late_in_a_compressed_file_is_an_illegal_row(tmp_path, damage):
    packed = bytearray(gzip.compress(MANY))
    middle = len(packed) // 2
    if damage == "cut":
        del packed[middle:]
    else:
        packed[middle : middle + 20] = b"\xff" * 20
    *found, last = reasons(tmp_path / "m.jsonl.gz", bytes(packed))
    assert len(found) > 1000 and found[:1000] == [None] * 1000
    assert "the rest of the file cannot be read" in last and last.endswith("legal: an undamaged file")


@pytest.mark.parametrize(
    "data",
    [
        "hello",
        "5\n6\n",
        "[1, 2]",
        "// comment\n" + json.dumps(ROWS, indent=1),
        "\0" * 100,
        "[",
        "{",
        b"\xff\xfe{\0",
        b"\x1f\x8b\0\0",
    ],
)
def test_what_is_no_json_is_refused_in_one_sentence(tmp_path, data):
    with pytest.raises(ValueError, match=r"m\.json: cannot be read as JSON lines or as a JSON array") as caught:
        rows_of(tmp_path / "m.json", data)
    assert "\n" not in str(caught.value)


def test_an_object_that_holds_the_rows_has_no_prompt(tmp_path):
    with pytest.raises(ValueError, match=r"has no column 'prompt' \(it has rows\)"):
        rows_of(tmp_path / "m.json", json.dumps({"rows": ROWS}, indent=2))


@pytest.mark.parametrize("data", ["", "[]", "[ ]\n", "\n", "\ufeff"])
def test_an_empty_file_has_no_rows(tmp_path, data):
    assert rows_of(tmp_path / "m.json", data) == []
