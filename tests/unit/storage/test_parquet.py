"""Parquet is read without threads of Arrow's own.

Such a thread gives up the file a moment after the read has ended. When the file is a Python object and the process is
about to exit, the interpreter ends that thread, and the process aborts with exit code 134 after all its work.
"""

from __future__ import annotations

import io
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ltx_ray.storage.parquet import read_parquet

TABLE = pa.table({"id": ["a", "b"], "prompt": ["a cat", "a dog"], "seed": [1, 2]})


def _parquet(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def test_columns_are_chosen():
    assert read_parquet(_parquet(TABLE)).equals(TABLE)
    assert read_parquet(_parquet(TABLE), ["seed", "id"]).column_names == ["seed", "id"]
    assert read_parquet(_parquet(TABLE), []).num_columns == 0


def test_damage_and_missing_columns_are_errors():
    with pytest.raises(pa.ArrowInvalid, match="no column 'height'"):
        read_parquet(_parquet(TABLE), ["id", "height"])
    for data in (b"", b"PAR1", _parquet(TABLE)[:-1], b"x" * 1000):
        with pytest.raises(pa.ArrowException):
            read_parquet(data)


@pytest.mark.parametrize("compression", ["none", "zstd", "snappy"])
def test_a_flipped_bit_is_one_error_or_none(compression):
    """Arrow raises OSError for a damaged page, and UnicodeDecodeError for a damaged text."""
    buffer = io.BytesIO()
    pq.write_table(TABLE, buffer, compression=compression)
    data, found = buffer.getvalue(), 0
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= 0x80
        try:
            read_parquet(bytes(damaged)).to_pylist()
        except pa.ArrowException:
            found += 1
    assert found > len(data) // 4


def test_checksums_of_pages_are_checked():
    buffer = io.BytesIO()
    pq.write_table(TABLE, buffer, compression="none", write_page_checksum=True)
    data = buffer.getvalue()
    for found in (b"a cat", (2).to_bytes(8, "little")):
        with pytest.raises(pa.ArrowInvalid, match="CRC checksum"):
            read_parquet(data.replace(found, bytes([found[0] ^ 1]) + found[1:], 1))


_COUNT = """
import os, sys
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
{imports}

path = sys.argv[1]
# The allocator starts a thread with the first table, and the file system one that lists folders.
pa.table({{"a": list(range(100000))}})
pafs.LocalFileSystem().get_file_info(pafs.FileSelector(os.path.dirname(path)))
before = set(os.listdir("/proc/self/task"))
{reads}
print(len(set(os.listdir("/proc/self/task")) - before))
"""
_READS = {
    "part": ("from ltx_ray.storage.parquet import read_parquet", "read_parquet(open(path, 'rb').read())"),
    "rows of a part": (
        "from ltx_ray.dataset.report_data import _rows; from ltx_ray.storage.store import Store",
        "folder, _, name = path.rpartition('/')\n"
        "assert len(list(_rows(Store(os.path.dirname(folder)), os.path.basename(folder), ['id'], []))) == 20000",
    ),
    "manifest": (
        "from ltx_ray.manifest.reader import open_manifest",
        "assert len(list(open_manifest(path).rows())) == 20000",
    ),
    # The test can see a thread: this is how tables are read by default.
    "by default": ("", "pq.read_table(path)"),
}


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
@pytest.mark.parametrize("read", _READS)
def test_no_thread_is_started(tmp_path, read):
    imports, reads = _READS[read]
    folder = tmp_path / "out" / "index"
    folder.mkdir(parents=True)
    path = folder / "part-0000.parquet"
    rows = [f"row {n}" for n in range(20000)]
    pq.write_table(pa.table({"id": rows, "prompt": rows, "seed": list(range(20000))}), path, row_group_size=1000)
    command = [sys.executable, "-c", _COUNT.format(imports=imports, reads=reads), str(path)]
    said = subprocess.run(command, text=True, capture_output=True, check=True).stdout
    assert (int(said) > 0) == (read == "by default")
