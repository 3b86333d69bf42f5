"""The real driver keeps the cards of a simulated fleet busy, whatever its nodes do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ltx_ray.placement.sizing import ParallelConfig
from scripts.bench.fleet_run import Workload, run_fleet
from scripts.bench.simulated_fleet import Fleet

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("decode_seconds", [1.75, 6.3])
def test_decode_keeps_up_with_the_dit_whatever_its_calls_take(tmp_path, decode_seconds):
    figures = run_fleet(Fleet(16), Workload(800, decode_seconds=decode_seconds), 0, str(tmp_path))
    assert (figures.exit_code, figures.rows_lost, figures.rows_twice) == (0, 0, 0)
    assert figures.ratio > 0.95


def test_a_pool_of_decode_that_is_too_small_is_named(tmp_path):
    workload = Workload(600, decode_seconds=12.0, parallel=ParallelConfig(decode=1))
    figures = run_fleet(Fleet(16), workload, 0, str(tmp_path))
    assert figures.ratio < 0.75
    assert any(line.startswith("stage2 waits for decode") for line in figures.waits)


def test_a_bad_card_costs_its_own_clips_alone(tmp_path):
    figures = run_fleet(Fleet(16, bad_cards=2), Workload(700), 0, str(tmp_path))
    assert (figures.exit_code, figures.rows_lost, figures.rows_twice) == (0, 0, 0)
    assert figures.ratio > 0.93
    assert any("left alone for 30 s" in line for line in figures.said)


def test_a_fleet_of_bad_cards_ends_the_run(tmp_path):
    figures = run_fleet(Fleet(32, bad_cards=31), Workload(40), 0, str(tmp_path))
    assert figures.exit_code == 1 and "gangs failed to start" in figures.said[-1]


def test_lost_nodes_lose_no_rows(tmp_path):
    figures = run_fleet(Fleet(16, node_losses_per_hour=20), Workload(600), 1, str(tmp_path))
    assert (figures.exit_code, figures.rows_lost, figures.rows_twice) == (0, 0, 0)
    assert any("its node was lost" in line for line in figures.said)


def test_x264_without_cpus_takes_its_time(tmp_path):
    """The nodes, and not the driver, are what is tested here."""
    workload = Workload(60, parallel=ParallelConfig(decode=1))
    fast, slow = (run_fleet(Fleet(2, 2, cpus_per_gpu=cpus), workload, 0, str(tmp_path)) for cpus in (8.0, 2.0))
    assert slow.clips_per_hour < fast.clips_per_hour


def test_the_figures_are_written_as_json(tmp_path):
    found = subprocess.run(
        [sys.executable, "scripts/bench_fleet.py", "--gpus", "2", "--clips", "8", "--json", str(tmp_path / "figures")],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    figures = json.loads((tmp_path / "figures").read_text())
    assert {"clips_per_hour", "bound_clips_per_hour", "ratio", "rows_lost", "rows_twice", "exit_code"} <= set(figures)
    assert "ratio" in found.stdout
