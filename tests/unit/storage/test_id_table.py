"""IdTable: every record is found again, however the sorted runs were merged."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ltx_ray.storage.id_table import IdTable


def digest(n: int) -> bytes:
    return hashlib.sha256(str(n).encode()).digest()


@given(
    st.lists(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 3)), max_size=8), max_size=12),
    st.sampled_from([None, 4, 16]),
    st.sampled_from([4, 8]),
)
def test_a_table_is_a_multimap(batches, cap, width):
    """There are few heads, so that records share them, and small caps, so that only some runs are merged."""
    table, expected = IdTable(width + 1, head=width, cap=cap), {}
    for batch in batches:
        for head, rest in batch:
            table.put(digest(head)[:width], bytes([rest]))
            expected.setdefault(digest(head)[:width], []).append(bytes([rest]))
        table.settle(5)
    assert len(table) == sum(map(len, expected.values()))
    heads = [digest(n)[:width] for n in range(13)]
    settled = table.settled(heads)
    for head in heads:
        assert sorted(table.rests(head)) == sorted(expected.get(head, []))
        assert (head in settled) or list(table.rests(head, settled=False)) == list(table.rests(head))
        assert table.recent(head) or (head in settled) == (head in expected)
        for rest in range(4):
            assert table.has(head, bytes([rest])) == (bytes([rest]) in expected.get(head, []))


@pytest.mark.parametrize("head", [b"\0" * 8, b"\xff" * 8, b"\x80" + b"\0" * 7, b"\0" * 7 + b"\1"])
def test_the_smallest_and_largest_heads_are_found(head):
    table = IdTable(8)
    for n in range(100):
        table.put(digest(n)[:8])
    table.settle(1)
    assert not table.has(head) and not table.settled([head])
    table.put(head)
    table.settle(1)
    assert table.has(head) and table.settled([head, digest(1)[:8], digest(200)[:8]]) == {head, digest(1)[:8]}


def test_runs_are_few_and_none_is_merged_beyond_the_cap():
    table = IdTable(16, cap=4000)
    for n in range(50_000):
        table.put(digest(n)[:8], digest(n)[8:16])
        table.settle(500)
    sizes = [len(run["head"]) for run in table._runs]
    assert sum(sizes) == 50_000 and max(sizes) <= 4000
    assert len(sizes) <= 50_000 / 4000 + 4
    assert sum(words.nbytes for run in table._runs for words in run.values()) == 16 * 50_000
    table.load(b"".join(digest(n)[:16] for n in range(at, at + 1000)) for at in (50_000, 51_000))
    table.load([])
    assert [len(run["head"]) for run in table._runs] == [52_000]
    assert all(table.has(digest(n)[:8], digest(n)[8:16]) for n in range(50_000, 52_000, 99))
    assert all(table.has(digest(n)[:8], digest(n)[8:16]) for n in range(0, 50_000, 99))
    one = IdTable(16, cap=None)
    one.extend(b"".join(digest(n)[:16] for n in range(1000)))
    one.extend(b"".join(digest(n)[:16] for n in range(1000, 2000)))
    assert [len(run["head"]) for run in one._runs] == [2000]
    assert one.has(digest(1500)[:8], digest(1500)[8:16])


def test_an_empty_table_has_nothing():
    table = IdTable(12)
    table.settle(0)
    assert len(table) == 0 and table.version == 0
    assert not table.settled([digest(1)[:8]]) and not table.settled([]) and not table.has(digest(1)[:8], b"abcd")
