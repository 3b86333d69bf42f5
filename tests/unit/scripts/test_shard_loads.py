"""The arithmetic of loads of a whole gang at once."""

from __future__ import annotations

import pytest

from scripts.bench.shard_loads import GangLoad, Load
from scripts.bench_load import gang_figures


def load(begin, end, disk=0):
    return Load(begin, end, shard=600, host=0, device=0, disk=disk)


def test_a_gang_waits_from_the_first_begin_to_the_last_end():
    gang = GangLoad([load(10.0, 12.0), load(10.5, 14.0)])
    assert gang.seconds == 4.0 and gang.shards == 1200


def test_bytes_from_the_disk_are_those_of_all_ranks():
    assert GangLoad([load(0, 1, 300), load(0, 1, 700)]).disk == 1000
    assert GangLoad([load(0, 1, 300), load(0, 1, None)]).disk is None


def test_figures_are_medians_over_the_repetitions():
    loads = [GangLoad([load(0, seconds, disk), load(0, 1, disk)]) for seconds, disk in ((2, 500), (9, 800), (4, 600))]
    figures = gang_figures(loads, plain=8.0, size=1000)
    assert figures["seconds"] == 4 and figures["plain_over_gang"] == 2.0
    assert figures["shards_over_file"] == pytest.approx(1.2)
    assert figures["disk_over_file"] == pytest.approx(1.2)


def test_bytes_that_are_not_counted_have_no_figure():
    assert gang_figures([GangLoad([load(0, 1, None)])], plain=1.0, size=1000)["disk_over_file"] is None
