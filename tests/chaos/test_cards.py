"""Logical GPUs: cards on which nothing loads, those that are lost, and decoders that take two clips at once."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from itertools import pairwise

import pytest

from ltx_ray.placement.sizing import ParallelConfig
from tests.support.local_cluster import FAKE, Job, LocalCluster, rows, undisturbed

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[LocalCluster]:
    """Two nodes with two GPUs each."""
    cluster = LocalCluster(workers=2, slots=8, gpus=2)
    yield cluster
    cluster.close()


@pytest.fixture
def cluster(two_nodes) -> LocalCluster:
    """With both its nodes, whatever the previous test has done to it."""
    two_nodes.heal()
    return two_nodes


def test_a_bad_card_is_named_and_left_alone_and_its_neighbours_go_on(job):
    engines = {**FAKE, "diffusion": "tests.support.engines:BadCard"}
    manifest = rows(*["[[stage1:gate]]"] * 12)
    driver = job.start(manifest, parallel=ParallelConfig(), engines=engines, preflight=True)
    job.until(lambda: job.out.events("card_parked"), "bad card")
    job.open_gate()
    log = driver.ends(0)
    assert len(job.out.index()) == 12 and job.out.failed() == {}
    parked = job.out.events("card_parked")
    assert {event["where"].rpartition(", ")[2] for event in parked} == {"GPU 1"}
    assert f"{parked[0]['where']}: left alone for 30 s" in log and "Traceback" not in log
    for where in {event["where"] for event in parked}:
        times = [event["t"] for event in parked if event["where"] == where]
        assert all(after - before >= 30 for before, after in pairwise(times)), "it is not tried again before its time"
    diffusion = [event for event in job.out.events("gang_started") if event["role"] in ("stage1", "stage2")]
    assert diffusion and {rank["gpus"] for event in diffusion for rank in event["ranks"]} == {"0"}
    assert job.check([f"r{n}" for n in range(12)], undisturbed(job.out.index(), job.folder / "alone")) == []


def test_a_decoder_takes_two_clips_at_once(job):
    driver = job.start(rows(*["[[decode:gate]]"] * 6), parallel=ParallelConfig(decode=1))
    job.until(
        lambda: job.at_gate("decode") == 2 and sum(e["stage"] == "stage2" for e in job.out.events("call")) == 6,
        "two clips in the decoder and four that wait",
    )
    opened = time.time()
    job.open_gate()
    driver.ends(0)
    calls = [event for event in job.out.events("call") if event["stage"] == "decode"]
    assert len(calls) == 6 and {event["replica"] for event in calls} == {"decode-0"}
    spans = sorted((event["start"], event["start"] + event["seconds"]) for event in calls)
    assert [begin < opened for begin, _ in spans] == [True] * 2 + [False] * 4
    # Two cards or more, from the first replica to the last clip.
    assert json.loads((job.out.folder / "state/gpu_time.json").read_text())["gpu_seconds"] > spans[-1][1] - spans[0][0]
    assert job.check([f"r{n}" for n in range(6)], undisturbed(job.out.index(), job.folder / "alone")) == []


def test_a_run_takes_a_node_that_joins_up_to_its_number_of_gpus(tmp_path):
    cluster = LocalCluster(workers=1, slots=8, gpus=2)
    job = Job(cluster, tmp_path)
    try:
        driver = job.start(rows(*["[[stage1:gate]]"] * 8), parallel=ParallelConfig(max_gpus=3))
        job.until(lambda: job.out.gangs("diffusion") or job.out.gangs("stage1"), "stage 1")
        added = cluster.add_node()
        grown = job.until(lambda: job.out.events("pool_grown"), "growth")
        assert len(grown) == 1
        job.until(
            lambda: any(rank["node"] == added for gang in job.out.events("gang_started") for rank in gang["ranks"]),
            "gang on the new node",
        )
        job.open_gate()
        assert "grows to 2 replicas, because nodes have joined the cluster" in driver.ends(0)
        on_cards = [gang for gang in job.out.events("gang_started") if gang["role"] not in ("text", "decode")]
        assert len(on_cards) == 2, "with the card of text and decode these are three"
        assert job.check([f"r{n}" for n in range(8)], undisturbed(job.out.index(), tmp_path / "alone")) == []
    finally:
        job.close()
        cluster.close()


def test_text_and_decode_get_a_card_of_the_dit_when_theirs_is_lost(job):
    """Three cards have a replica of the DiT, and one has text and decode, until its node is lost for good."""
    driver = job.start(rows(*["[[stage1:gate]]"] * 8), parallel=ParallelConfig())
    dit = job.until(
        lambda: len(found := [*job.out.gangs("stage1"), *job.out.gangs("stage2")]) == 3 and found, "the DiT"
    )
    (text,) = job.until(lambda: job.out.gangs("decode") and job.out.gangs("text"), "text and decode")
    (decode,) = job.out.gangs("decode")
    assert [(rank["node"], rank["gpus"]) for rank in text["ranks"]] == [
        (rank["node"], rank["gpus"]) for rank in decode["ranks"]
    ], "they share a card"
    lost = text["ranks"][0]["node"]
    staying = {gang["replica"] for gang in dit if gang["ranks"][0]["node"] != lost}
    assert len(staying) == 2
    job.cluster.remove_node(lost)
    job.until(lambda: job.out.events("gang_leaving"), "a replica that makes room")
    job.open_gate()
    log = driver.ends(0)
    assert len(job.out.index()) == 8 and job.out.failed() == {}
    (left,) = job.out.events("gang_leaving")
    assert left["replica"] in staying and left["reason"] in ("text has no place", "decode has no place")
    assert "Traceback" not in log
    assert job.check([f"r{n}" for n in range(8)], undisturbed(job.out.index(), job.folder / "alone")) == []
